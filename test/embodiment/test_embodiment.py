"""What a loaded embodiment promises: shipped files, prompt, hash, maps, layout, schema and documentation agree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import (
    ActionLayout,
    Embodiment,
    build_prompt,
    diagnose,
    load_embodiment,
    parse_embodiment,
    shipped_embodiments,
)
from qwen_vla_core.embodiment.prompt import view_tokens
from qwen_vla_core.embodiment.schema import embodiment_schema, keys_markdown, schema_text
from qwen_vla_core.embodiment.spec import (
    COMMAND_KINDS_BY_GROUP,
    COMMAND_MESSAGES,
    CONVENTION_KINDS,
    UNITS_BY_KIND,
    CommandKind,
    ControlSpec,
    GroupKind,
    LinearMap,
    PromptSpec,
)
from qwen_vla_core.resources import resource_dir

ROOT = Path(__file__).parents[2]
SHIPPED = shipped_embodiments()


def aloha_with(**changes: object) -> Embodiment:
    """The shipped ALOHA with some top-level fields replaced."""
    return dataclasses.replace(load_embodiment("aloha"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_embodiment_loads_by_name_and_by_path(name: str) -> None:
    path = resource_dir("embodiments") / f"{name}.yaml"
    robot = load_embodiment(name)
    assert robot == load_embodiment(path)
    assert name == robot.name or name.startswith(f"{robot.name}_")  # a robot may be commanded in several ways
    assert diagnose(path.read_text())[1] == []
    assert robot.reference_camera in robot.cameras


def test_aloha_has_the_canonical_channels_and_views() -> None:
    robot = load_embodiment("aloha")
    joints = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
    assert robot.channels == tuple(f"{side}_{joint}" for side in ("left", "right") for joint in joints)
    assert robot.state_channels == robot.channels
    assert robot.views == ("ego", "cam_left_wrist", "cam_right_wrist")
    assert robot.period_s == 0.1 and robot.control.horizon == 16


@pytest.mark.parametrize(
    ("arms", "waist", "base", "body"),
    [
        ("single arm", False, False, "single arm"),
        ("dual arms", False, False, "dual arms"),
        ("single arm", False, True, "single arm, and mobile base"),
        ("dual arms", True, False, "dual arms, waist"),
        ("dual arms", True, True, "dual arms, waist, and mobile base"),
    ],
)
def test_the_prompt_is_the_published_sentence(arms: str, waist: bool, base: bool, body: str) -> None:
    robot = aloha_with(
        prompt=PromptSpec(robot_tag="ALOHA", arms=arms, waist=waist, mobile_base=base),  # type: ignore[arg-type]
        control=ControlSpec(frequency_hz=30.0, horizon=16, controller_rate_hz=60.0, convention="absolute_joint"),
    )
    assert build_prompt(robot, "pick up the red cube") == (
        f"The robot is ALOHA with {body}. The control frequency is 30 Hz. "
        "Please predict the next 16 control actions to execute the following task: pick up the red cube."
    )


def test_a_robot_without_arms_states_its_waypoints() -> None:
    robot = aloha_with(
        prompt=PromptSpec(robot_tag="Rover", arms="no arm", mobile_base=True),
        control=ControlSpec(frequency_hz=2.0, horizon=8, controller_rate_hz=20.0, convention="waypoint"),
    )
    assert build_prompt(robot, "go to the door").startswith(
        "The robot is Rover with mobile base. The control frequency is 2 Hz. Please predict the next 8 waypoints ("
    )


def test_one_task_is_one_prompt_however_it_is_typed() -> None:
    robot = load_embodiment("aloha")
    assert build_prompt(robot, "  lift the\n cube. ") == build_prompt(robot, "lift the cube")
    with pytest.raises(ValueError, match="empty"):
        build_prompt(robot, " . ")


def test_view_tokens_are_the_published_ones() -> None:
    assert view_tokens("cam_left_wrist") == ("<|cam_left_wrist_start|>", "<|cam_left_wrist_end|>")


def test_the_hash_changes_with_the_content_and_only_then() -> None:
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    robot = parse_embodiment(text)
    assert robot.hash == parse_embodiment(text, source="elsewhere.yaml").hash
    changed = parse_embodiment(text.replace("max_jump: 1.0", "max_jump: 0.9"))
    assert changed.hash != robot.hash and changed.safety.max_jump == 0.9


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("watchdog_ms: 500", "watchdog_ms: 400", True),
        ("topic: /follower_left/joint_states", "topic: /left/joint_states", True),
        ("max_age_ms: 300, reference", "max_age_ms: 400, reference", True),
        ("velocity: [2.5, 2.5", "velocity: [2.0, 2.5", True),
        ("jerk: [1000, 1000", "jerk: [900, 1000", True),
        ("upper: [0.70,", "upper: [0.60,", True),
        ("on_timeout: hold_measured", "on_timeout: hold_measured\n    watchdog_ms: 400", True),
        ("    limits: &gripper_limits", "    grip: {max_lead: 0.2}\n    limits: &gripper_limits", True),
        ("soft_start_s: 1.0", "max_observation_age_ms: 900", True),
        ("to: [0.6197, 1.6214]", "to: [0.6, 1.7]", True),
        ("frequency_hz: 10 ", "frequency_hz: 10.0 ", True),
        ("controller_rate_hz: 50", "controller_rate_hz: 100", True),
        ("frequency_hz: 10 ", "frequency_hz: 20 ", False),
        ("horizon: 16", "horizon: 8", False),
        ("robot_tag: ALOHA", "robot_tag: Aloha", False),
        ("view: ego", "view: top", False),
        ("left_waist", "left_hip", False),
        ("[left_waist, left_shoulder", "[left_shoulder, left_waist", False),
    ],
)
def test_the_policy_hash_changes_with_what_a_policy_learns_and_only_then(old: str, new: str, same: bool) -> None:
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    assert old in text
    robot, changed = parse_embodiment(text), parse_embodiment(text.replace(old, new))
    assert changed.hash != robot.hash
    assert (changed.policy_hash == robot.policy_hash) is same
    assert (changed.policy_contract == robot.policy_contract) is same


finite = st.floats(-1e3, 1e3)


@settings(deadline=None)
@given(scale=finite.filter(lambda value: abs(value) > 1e-3), offset=finite, channel=finite)
def test_a_map_and_its_inverse_cancel(scale: float, offset: float, channel: float) -> None:
    linear = LinearMap(scale=scale, offset=offset)
    assert linear.to_channel(linear.to_message(channel)) == pytest.approx(channel, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(c0=finite, c1=finite, m0=finite, m1=finite)
def test_a_map_of_ranges_hits_both_ends(c0: float, c1: float, m0: float, m1: float) -> None:
    if abs(c0 - c1) < 1e-2 or abs(m0 - m1) < 1e-2:
        return
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    old = "map: {from: [0, 1], to: [0.0440, 0.0579]}"
    assert old in text
    robot = parse_embodiment(text.replace(old, f"map: {{from: [{c0!r}, {c1!r}], to: [{m0!r}, {m1!r}]}}"))
    linear = robot.state[1].map
    assert linear.to_message(np.array([c0, c1])) == pytest.approx([m0, m1], abs=1e-6, rel=1e-6)


def test_yaml_1_2_numbers_and_merges_are_understood() -> None:
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    merged = text.replace("limits: *gripper_limits", "limits: {<<: *gripper_limits, velocity: [1e-3]}")
    robot = parse_embodiment(merged)
    assert robot.actions[3].limits == dataclasses.replace(robot.actions[1].limits, velocity=(1e-3,))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHIPPED))
def test_padding_and_unpadding_lose_nothing_and_the_rest_is_zero(seed: int, name: str) -> None:
    layout = ActionLayout(load_embodiment(name))
    actions = np.random.default_rng(seed).normal(size=(2, layout.H, layout.c))
    padded = layout.pad(actions)
    assert padded.shape == (2, layout.H, 64)
    np.testing.assert_array_equal(layout.unpad(padded), actions)
    assert not padded[..., ~layout.channel_mask].any()


def test_the_mask_marks_real_steps_of_real_channels() -> None:
    layout = ActionLayout(load_embodiment("aloha"))
    mask = layout.mask(np.array([3, 16]))
    assert mask.shape == (2, 16, 64)
    assert mask[0].sum() == 3 * 14 and mask[1].sum() == 16 * 14
    assert mask[0, :3, :14].all()
    np.testing.assert_array_equal(layout.mask(), mask[1])
    with pytest.raises(ValueError, match="valid_steps"):
        layout.step_mask(17)


def test_a_layout_refuses_what_does_not_fit() -> None:
    robot = load_embodiment("aloha")
    with pytest.raises(ValueError, match="14 action channels"):
        ActionLayout(robot, K=13)
    with pytest.raises(ValueError, match="expected 14 channels"):
        ActionLayout(robot).pad(np.zeros((16, 13)))
    with pytest.raises(ValueError, match="expected 64 columns"):
        ActionLayout(robot).unpad(np.zeros((16, 14)))


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (resource_dir("embodiments") / "embodiment.schema.json").read_text()
    assert committed == schema_text(), "run: qwen-vla embodiment schema --output embodiments/embodiment.schema.json"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_accepts_shipped_files_and_refuses_mistakes(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(embodiment_schema())
    validator = jsonschema.Draft202012Validator(embodiment_schema())
    path = resource_dir("embodiments") / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=embodiment.schema.json\n")
    text = path.read_text()
    document = yaml.safe_load(text)
    validator.validate(document)
    for path_, value in ((("control", "horizon"), 0), (("prompt", "arms"), "two"), (("prompt", "colour"), "red")):
        document = yaml.safe_load(text)
        document[path_[0]][path_[1]] = value
        assert not validator.is_valid(document), path_


def test_the_key_tables_of_the_documentation_are_the_generated_ones() -> None:
    page = (ROOT / "docs" / "embodiment.md").read_text()
    begin, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    assert page[page.index(begin) + len(begin) : page.index(end)].strip() == keys_markdown().strip(), (
        "paste the output of: qwen-vla embodiment schema --markdown"
    )


def test_the_tables_of_kinds_cover_every_kind() -> None:
    groups, commands = set(GroupKind.__args__), set(CommandKind.__args__)  # type: ignore[attr-defined]
    assert set(UNITS_BY_KIND) == set(COMMAND_KINDS_BY_GROUP) == groups
    assert set(COMMAND_MESSAGES) == commands == {kind for kinds in COMMAND_KINDS_BY_GROUP.values() for kind in kinds}
    assert set(CONVENTION_KINDS) == set(
        json.loads(schema_text())["$defs"]["ControlSpec"]["properties"]["convention"]["enum"]
    )
