"""``ik``, ``integrate``, ``frame`` and ``training_only``: a mistake is named by its key before anything moves."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import EmbodimentError, diagnose, load_embodiment, load_robot, parse_embodiment
from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.schema import embodiment_schema
from qwen_vla_core.errors import UserError
from qwen_vla_ros.bringup import build_graph

JOINTS = load_embodiment("widowx_joints").source_text
HANDS = load_embodiment("human_hands").source_text


def problems(text: str) -> dict[str, str]:
    """Key → problem."""
    return {problem.key: problem.problem for problem in diagnose(text)[1]}


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("        tip: ee_gripper_link\n", "", "actions[0].command.ik.tip", "missing"),
        ("model: wx250s.urdf", "model: wx250s.step", "actions[0].command.ik.model", "neither URDF nor MJCF"),
        ("[0, -0.4, 0.5, 0, 1.4, 0]", "[0, -0.4, 0.5]", "actions[0].command.ik.start[0]", "no start position"),
        ("lower: [-3.14158, -1.88496,", "lower: [-3.14158, 2.5,", "actions[0].command.ik.limits.lower[1]", "not below"),
        ("velocity: [3.0, 3.0,", "velocity: [3.0, -3.0,", "actions[0].command.ik.limits.velocity[1]", "not positive"),
        ("velocity: [3.0, 3.0,", "velocity: [3.0,", "actions[0].command.ik.limits.velocity", "5 values for 6"),
        ("on_timeout: hold_measured # the joints", "on_timeout: zero", "actions[0].on_timeout", "cannot be zeroed"),
        ("kind: interbotix_group", "kind: twist_stamped", "actions[0].command.ik", "means nothing"),
        ("unit: \"m,axis_angle\"", "unit: \"m,quaternion\"", "actions[0].channels", "6 channels, but a pose"),
        ("convention: delta_eef", "convention: absolute_joint", "control.convention", "needs a joint_position"),
        ("channels: [dx, dy", "frame: base\n    channels: [gripper, dy", "actions[1].channels[0]", "already used"),
    ],
)  # fmt: skip
def test_mistakes_in_an_ik_command(old: str, new: str, key: str, said: str) -> None:
    text = JOINTS.replace(old, new, 1)
    assert text != JOINTS
    try:
        found = problems(text)
    except EmbodimentError as error:
        found = {error.key: error.problem}
    assert said in found[key]


def test_joints_without_ik_unmeasured_joints_and_a_joint_commanded_twice_are_refused() -> None:
    head, tail = JOINTS.split("      ik:\n")
    without = head + tail[tail.index("    on_timeout: hold_measured # the joints") :]
    assert "commands joints and the policy says where the hand goes" in problems(without)["actions[0].command.ik"]
    renamed = JOINTS.replace("channels: [waist, shoulder", "channels: [hip, shoulder", 1)  # of the state
    assert "'waist' is no state channel" in problems(renamed)["actions[0].command.ik.channels[0]"]
    mixed = JOINTS.replace("        channels: [waist,", "        channels: [gripper,")
    assert "not the channels of one state group" in problems(mixed)["actions[0].command.ik.channels"]


def test_displacements_are_not_sent_as_positions() -> None:
    text = load_embodiment("aloha").source_text.replace("convention: absolute_joint", "convention: delta_joint")
    text = text.replace(
        "kind: joint_position\n    unit: rad\n    channels", "kind: joint_delta\n    unit: rad\n    channels"
    )
    text = text.replace("kind: interbotix_group", "kind: joint_trajectory")
    assert "the arm would go to zero" in problems(text)["actions[0].command.integrate"]
    euler = load_embodiment("widowx").source_text.replace("m,axis_angle", "m,euler_xyz")
    assert "cannot be scaled to an angular velocity" in problems(euler)["actions[0].command.kind"]
    framed = load_embodiment("aloha").source_text.replace(
        "    kind: gripper\n    unit: fraction\n    channels",
        "    kind: gripper\n    frame: tool\n    unit: fraction\n    channels",
    )
    assert "means nothing" in problems(framed)["actions[1].frame"]


def test_check_opens_the_model_of_an_ik_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(JOINTS.replace("tip: ee_gripper_link", "tip: nose"))
    assert main(["embodiment", "check", str(path)]) == 2
    assert "actions[0].command.ik.tip: the model has no link 'nose'" in capsys.readouterr().err


def test_the_commanded_robot_is_told_by_positions_and_keeps_its_boxes() -> None:
    robot = load_embodiment("widowx_joints")
    told = commanded_robot(robot)
    assert told.actions[0].kind == "joint_position" and told.actions[0].unit == "rad"
    assert told.actions[0].limits == robot.actions[0].command.ik.limits  # type: ignore[union-attr]
    assert told.actions[1] == robot.actions[1] and told.channels[-1] == "gripper"
    box = told.safety.workspace[0]
    assert box.kinematics is not None and box.kinematics.tip == "ee_gripper_link"
    assert commanded_robot(told) is told


def test_an_embodiment_for_training_only_shows_and_checks_and_runs_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embodiment", "show", "human_hands"]) == 0
    shown = capsys.readouterr().out
    assert "for training only" in shown and "16 control actions" in shown and "right_grasp_9" in shown
    assert main(["embodiment", "check", "human_hands"]) == 0
    with pytest.raises(
        EmbodimentError, match=r"human_hands.yaml:\d+: training_only: .*nothing can run it; fix: name a robot"
    ):
        load_robot("human_hands")
    for flags in ({"mock": True}, {}, {"sim": False}):
        with pytest.raises(UserError, match="for training only"):
            build_graph("human_hands", **flags)  # type: ignore[arg-type]
    assert main(["embodiment", "dry-run", "human_hands"]) == 2
    assert main(["up", "human_hands", "--mock"]) == 2
    assert "for training only" in capsys.readouterr().err


def test_what_belongs_to_a_robot_is_refused_in_one_for_training_only_and_missed_in_a_robot() -> None:
    with_topic = HANDS.replace("{view: ego, reference: true}", "{view: ego, reference: true, topic: /image}")
    assert "means nothing with training_only" in problems(with_topic)["cameras[0].topic"]
    with pytest.raises(EmbodimentError, match=r"control.controller_rate_hz: missing"):
        parse_embodiment(HANDS.replace("training_only: true\n", ""))
    with pytest.raises(EmbodimentError, match=r"training_only: expected true or false"):
        parse_embodiment(HANDS.replace("training_only: true\n", "training_only: maybe\n"))
    validator = jsonschema.Draft202012Validator(embodiment_schema())
    hands = yaml.safe_load(HANDS)
    assert validator.is_valid(hands)
    assert not validator.is_valid({**hands, "training_only": False})
