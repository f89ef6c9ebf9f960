"""``qwen-vla embodiment new``: what URDF and graph say is in the draft, and what they do not say stops the check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import EmbodimentError, parse_embodiment
from qwen_vla_core.embodiment.draft import GraphTopic, draft_embodiment
from qwen_vla_core.embodiment.urdf import parse_urdf, read_urdf
from qwen_vla_core.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "reach7.urdf"
ARM = ("shoulder_pan", "shoulder_lift", "upper_arm_roll", "elbow_flex", "lower_arm_roll", "wrist_flex", "wrist_roll")
STATES = GraphTopic("/joint_states", ("sensor_msgs/msg/JointState",), published=True, joints=("jaw", *ARM))
CAMERA = GraphTopic("/front/color/image_raw", ("sensor_msgs/msg/Image",), published=True, size=(1280, 720))
ARM_COMMAND = GraphTopic("/arm/joint_trajectory", ("trajectory_msgs/msg/JointTrajectory",), subscribed=True)
JAW_COMMAND = GraphTopic("/gripper/commands", ("std_msgs/msg/Float64MultiArray",), subscribed=True)
CHUNKS = GraphTopic("/qwen_vla/chunk", ("trajectory_msgs/msg/JointTrajectory",), True, True)
GRAPH = (STATES, CAMERA, ARM_COMMAND, JAW_COMMAND, CHUNKS)


def urdf(*joints: str) -> str:
    return f'<robot name="my-bot 2">{"".join(joints)}</robot>'


def joint(name: str, kind: str = "revolute", inner: str = '<limit lower="-1" upper="2" velocity="1.5"/>') -> str:
    return f'<joint name="{name}" type="{kind}">{inner}</joint>'


def test_a_urdf_gives_joints_limits_and_command_interfaces_and_leaves_mimics_out() -> None:
    draft = draft_embodiment(read_urdf(EXAMPLE))
    assert draft.left_out == ("jaw_mirror: follows jaw (mimic)",)
    assert [text.split("TODO")[0] for _, text in draft.todos] == ["- {view: ego, topic: ", "topic: ", "topic: "]
    with pytest.raises(EmbodimentError, match=r"cameras\[0\].topic: still says TODO \(and on lines ") as caught:
        parse_embodiment(draft.text)
    assert caught.value.line == draft.todos[0][0]
    assert all(str(line) in str(caught.value) for line, _ in draft.todos)
    filled = draft.text
    for topic in ("/cam/image_raw", "/arm/joint_trajectory", "/gripper/joint_trajectory"):
        filled = filled.replace("topic: TODO", f"topic: {topic}", 1)
    robot = parse_embodiment(filled)
    arm, gripper = robot.actions
    assert arm.channels == ARM and gripper.channels == ("jaw",) and gripper.kind == "gripper"
    assert arm.limits.lower[1] == -1.6  # the position interface allows less than the joint
    assert arm.limits.upper[3] == 0.1 and arm.limits.velocity[6] == 2.6
    assert gripper.command.map.to_message(1.0) == 0.04 and gripper.limits.velocity == (2.5,)
    assert robot.prompt.arms == "single arm" and robot.name == "reach7"


def test_a_graph_that_shows_everything_leaves_nothing_to_do() -> None:
    draft = draft_embodiment(read_urdf(EXAMPLE), GRAPH)
    assert draft.todos == ()
    robot = parse_embodiment(draft.text)
    assert [group.command.topic for group in robot.actions] == ["/arm/joint_trajectory", "/gripper/commands"]
    assert [group.command.kind for group in robot.actions] == ["joint_trajectory", "forward_command"]
    assert {group.topic for group in robot.state} == {"/joint_states"}
    (camera,) = robot.cameras
    assert (camera.topic, camera.size, camera.view) == ("/front/color/image_raw", (1280, 720), "ego")


def test_the_joints_of_a_controller_decide_which_group_it_moves() -> None:
    def topic(name: str, *joints: str) -> GraphTopic:
        return GraphTopic(name, ("trajectory_msgs/msg/JointTrajectory",), subscribed=True, joints=joints)

    others = (topic("/gripper_a", *reversed(ARM)), topic("/b", "jaw"), topic("/c", "shoulder_pan"))
    draft = draft_embodiment(read_urdf(EXAMPLE), (STATES, CAMERA, *others))
    assert [group.command.topic for group in parse_embodiment(draft.text).actions] == ["/gripper_a", "/b"]
    assert "CHECK the order" in draft.text


@pytest.mark.parametrize(
    ("graph", "todo"),
    [
        ((CAMERA, ARM_COMMAND, JAW_COMMAND), "no topic of the graph names"),
        ((STATES, ARM_COMMAND, JAW_COMMAND), "no picture is published"),
        ((STATES, CAMERA, JAW_COMMAND), "the controller's topic"),
        ((*GRAPH, GraphTopic("/arm2/joint_trajectory", ARM_COMMAND.types, subscribed=True)), "seen: /arm/"),
    ],
    ids=["joint states", "camera", "controller", "two controllers"],
)
def test_what_the_graph_does_not_show_or_shows_twice_is_to_do(graph: tuple[GraphTopic, ...], todo: str) -> None:
    draft = draft_embodiment(read_urdf(EXAMPLE), graph)
    assert draft.todos and any(todo in text for _, text in draft.todos)
    with pytest.raises(EmbodimentError, match="still says TODO"):
        parse_embodiment(draft.text)


def test_two_arms_sliders_endless_joints_and_missing_limits() -> None:
    text = urdf(
        joint("lift", "prismatic"),
        joint("left_elbow"),
        joint("right_elbow", "continuous", '<limit velocity="2"/>'),
        joint("left_finger", "prismatic", '<limit lower="0" upper="0.05" velocity="0"/>'),
        joint("right_finger", "revolute", ""),
    )
    robot = parse_urdf(text, "x")
    draft = draft_embodiment(robot, None)
    values = [text for _, text in draft.todos if "topic" not in text and "#" not in text[:1]]
    assert [value.split("#")[0].strip() for value in values] == [
        "map: {from: [0, 1], to: [TODO, TODO]}",  # of the state
        "velocity: [TODO]",
        "acceleration: [TODO]",
        "velocity: [TODO]",
        "acceleration: [TODO]",
        "map: {from: [0, 1], to: [TODO, TODO]}",
    ]
    filled = draft.text.replace("[TODO, TODO]", "[0, 1]").replace("[TODO]", "[1.0]")
    for number in range(filled.count("topic: TODO")):
        filled = filled.replace("topic: TODO", f"topic: /t{number}", 1)
    built = parse_embodiment(filled)
    assert [group.name for group in built.actions] == [
        "arm_slider", "left_arm", "left_finger", "right_arm", "right_finger",
    ]  # fmt: skip
    assert built.prompt.arms == "dual arms" and built.name == "my_bot_2"
    assert built.actions[3].limits.upper[0] == pytest.approx(6.28319) and built.actions[0].unit == "m"


def test_several_cameras_depth_and_copies() -> None:
    image, compressed = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
    cameras = [
        GraphTopic("/wrist/camera/color/image_raw", (image,), published=True, size=(640, 480)),
        GraphTopic("/wrist/camera/color/image_raw/compressed", (compressed,), published=True),
        GraphTopic("/wrist/camera/depth/image_raw", (image,), published=True),
        GraphTopic("/head/image/compressed", (compressed,), published=True),
    ]
    draft = draft_embodiment(read_urdf(EXAMPLE), (STATES, ARM_COMMAND, JAW_COMMAND, *cameras))
    robot = parse_embodiment(draft.text)
    assert [(c.view, c.transport) for c in robot.cameras] == [("head", "compressed"), ("wrist", "raw")]
    assert "CHECK: seen, but no picture arrived" in draft.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<robot", "no XML"),
        ("<sdf/>", "outermost tag is <sdf>"),
        (urdf(), "no movable joint"),
        (urdf(joint("a", "fixed")), "no movable joint"),
        (urdf(joint("${side}_a")), "is a xacro"),
        ('<!DOCTYPE r [<!ENTITY a "b">]><robot name="x"/>', "XML entities"),
        (urdf(joint("a", inner='<limit lower="x" upper="1" velocity="1"/>')), "joint 'a': 'x' is no number"),
    ],
)
def test_a_file_that_is_no_urdf_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match="--urdf x") as caught:
        parse_urdf(text, "x")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_robot_of_wheels_is_sent_to_the_base() -> None:
    wheel = joint("wheel", "continuous")
    control = '<ros2_control><joint name="wheel"><command_interface name="velocity"/></joint></ros2_control>'
    with pytest.raises(UserError, match=r"wheel: takes no position commands \(velocity\).*mobile_base.yaml"):
        draft_embodiment(parse_urdf(urdf(wheel, control), "x"))


def test_the_command_writes_never_overwrites_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reach7.yaml"
    command = ["embodiment", "new", "--urdf", str(EXAMPLE), "--output", str(out)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = out.read_text().splitlines()
    assert [lines[todo["line"] - 1].strip() for todo in report["todo"]] == [todo["text"] for todo in report["todo"]]
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0 and f"{out}:{report['todo'][0]['line']}: to do" in capsys.readouterr().err
    assert main(["embodiment", "check", str(out)]) == 2 and "still says TODO" in capsys.readouterr().err
    assert main(["embodiment", "new", "--urdf", str(tmp_path / "none.urdf")]) == 2
    assert main(["embodiment", "new", "--urdf", str(EXAMPLE)]) == 0 and "name: reach7" in capsys.readouterr().out
