# ruff: noqa: E501 - one mistake per line reads as the table it is
"""Every mistake in an embodiment YAML is one line that names the file, the right line, the key and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from qwen_vla_core.embodiment import EmbodimentError, diagnose, load_embodiment, parse_embodiment
from qwen_vla_core.resources import resource_dir

ROBOT = """\
name: testbot
prompt:
  robot_tag: TestBot
  arms: single arm
  mobile_base: true
control:
  frequency_hz: 10
  horizon: 8
  controller_rate_hz: 50
  convention: absolute_joint
cameras:
  - view: ego
    topic: /ego/image
    reference: true
  - view: wrist
    topic: /wrist/image
state:
  - name: arm
    kind: joint_position
    unit: rad
    topic: /joint_states
    fields: [j1, j2]
    channels: [a1, a2]
  - name: hand
    kind: gripper
    unit: fraction
    topic: /joint_states
    fields: [finger]
    channels: [grip]
    map: {from: [0, 1], to: [0.0, 0.08]}
actions:
  - name: arm
    kind: joint_position
    unit: rad
    channels: [a1, a2]
    start: [0.0, 0.5]
    limits:
      lower: [-3.0, -1.0]
      upper: [3.0, 1.0]
      velocity: [1.0, 1.0]
      acceleration: [5.0, 5.0]
    command:
      kind: joint_trajectory
      topic: /arm/command
    on_timeout: hold_measured
  - name: hand
    kind: gripper
    unit: fraction
    channels: [grip]
    limits: {lower: [0], upper: [1], velocity: [2.0], acceleration: [9.0]}
    command:
      kind: forward_command
      topic: /hand/command
    on_timeout: hold_measured
  - name: base
    kind: base_twist
    unit: m/s,rad/s
    channels: [forward, turn]
    limits: {lower: [-1, -2], upper: [1, 2], velocity: [1, 2], acceleration: [2, 4]}
    command:
      kind: twist
      topic: cmd_vel
      fields: [vx, wz]
    on_timeout: zero
safety:
  watchdog_ms: 300
simulation:
  world: testbot
"""


BOX = "{group: arm, lower: [0, 0, 0], upper: [1, 1, 1], kinematics: {model: r.urdf, tip: t}}"


class Mistake(NamedTuple):
    """Replace the ``nth`` occurrence of ``old`` by ``new``; the error must name ``line``, ``key`` and ``fix``."""

    label: str
    old: str
    new: str
    line: int
    key: str
    fix: str
    nth: int = 0


MISTAKES = [
    # the text itself
    Mistake("tab", "  robot_tag", "\trobot_tag", 3, "", "indent with spaces"),
    Mistake("unclosed bracket", "fields: [j1, j2]", "fields: [j1, j2", 23, "", "brackets"),
    Mistake("bad indentation", "  horizon: 8", "    horizon: 8", 8, "", "indentation"),
    Mistake("second document", "safety:", "---\nsafety:", 65, "", "remove '---'"),
    Mistake("undefined alias", "start: [0.0, 0.5]", "start: *home", 36, "", "&name"),
    Mistake("control character", "TestBot", "Test\x07Bot", 3, "", "delete it"),
    Mistake("duplicate key", "  horizon: 8", "  horizon: 8\n  horizon: 9", 9, "control.horizon", "delete one"),
    Mistake("number as key", "  horizon: 8", "  horizon: 8\n  7: 9", 9, "control", "plain words"),
    Mistake("python tag", "TestBot", "!!python/name:os.system x", 3, "prompt.robot_tag", "without a '!' tag"),
    Mistake("wrong tag", "horizon: 8", "horizon: !!int eight", 8, "control.horizon", "without a '!' tag"),
    Mistake("bad merge", "  horizon: 8", "  horizon: 8\n  <<: 5", 9, "control", "<<: *name"),
    # keys and types
    Mistake("unknown key", "  horizon: 8", "  horizont: 8", 8, "control.horizont", "did you mean 'horizon'?"),
    Mistake("unknown key afar", "safety:", "zzz:", 65, "zzz", "use one of: name"),
    Mistake("missing key", "  horizon: 8\n", "", 6, "control.horizon", "add 'horizon'"),
    Mistake("missing section", "name: testbot\n", "", 1, "name", "add 'name'"),
    Mistake("text for number", "horizon: 8", "horizon: eight", 8, "control.horizon", "H: actions"),
    Mistake("quoted number", "frequency_hz: 10", "frequency_hz: '10'", 7, "control.frequency_hz", "frequency"),
    Mistake("float for integer", "horizon: 8", "horizon: 8.5", 8, "control.horizon", "H: actions"),
    Mistake("flag for number", "horizon: 8", "horizon: true", 8, "control.horizon", "H: actions"),
    Mistake("yes for flag", "mobile_base: true", "mobile_base: yes", 5, "prompt.mobile_base", "mobile base"),
    Mistake("nothing", "horizon: 8", "horizon:", 8, "control.horizon", "H: actions"),
    Mistake("choice", "single arm", "one arm", 4, "prompt.arms", "did you mean 'no arm'?"),
    Mistake("choice misspelt", "joint_trajectory", "joint_trajectry", 43, "actions[0].command.kind", "joint_trajectory"),
    Mistake("list for mapping", "simulation:\n  world: testbot", "simulation: [1]", 67, "simulation", "give it the keys world"),
    Mistake("mapping for list", "fields: [j1, j2]", "fields: {a: 1}", 22, "state[0].fields", "[ … ]"),
    Mistake("scalar for list", "start: [0.0, 0.5]", "start: 0.5", 36, "actions[0].start", "[ … ]"),
    Mistake("list for text", "world: testbot", "world: [testbot]", 68, "simulation.world", "World name"),
    Mistake("size of one", "topic: /ego/image", "topic: /ego/image\n    size: [640]", 14, "cameras[0].size", "width"),
    Mistake("size of zero", "topic: /ego/image", "topic: /ego/image\n    size: [640, 0]", 14, "cameras[0].size", "width"),
    Mistake("nan", "lower: [-3.0", "lower: [.nan", 38, "actions[0].limits.lower[0]", "limit per channel"),
    Mistake("infinity", "velocity: [1.0, 1.0]", "velocity: [1.0, .inf]", 40, "actions[0].limits.velocity[1]", "change"),
    Mistake("huge integer", "horizon: 8", f"horizon: {10**400}", 8, "control.horizon", "H: actions"),
    Mistake("endless integer", "horizon: 8", "horizon: " + "9" * 5000, 8, "control.horizon", "plain value"),
    Mistake("zero frequency", "frequency_hz: 10", "frequency_hz: 0", 7, "control.frequency_hz", "greater than 0"),
    Mistake(
        "more than a chunk", "  horizon: 8", "  horizon: 8\n  execute_steps: 9", 9, "control.execute_steps", "at most 8"
    ),
    Mistake("zero horizon", "horizon: 8", "horizon: 0", 8, "control.horizon", "at least 1"),
    Mistake("negative age", "/wrist/image", "/wrist/image\n    max_age_ms: -1", 17, "cameras[1].max_age_ms", "greater than 0"),
    # names
    Mistake("robot name", "name: testbot", "name: test bot", 1, "name", "underscores"),
    Mistake("group name", "- name: hand", "- name: the-hand", 24, "state[1].name", "underscores"),
    Mistake("same group name", "- name: hand", "- name: arm", 46, "actions[1].name", "name of its own", 1),
    Mistake("same channel", "channels: [grip]", "channels: [a1]", 29, "state[1].channels[0]", "name of its own"),
    Mistake("channel with space", "[a1, a2]", "['a 1', a2]", 23, "state[0].channels[0]", "no spaces"),
    Mistake("same view", "view: wrist", "view: ego", 15, "cameras[1].view", "name of its own"),
    Mistake("view no token", "view: wrist", "view: Wrist-Cam", 15, "cameras[1].view", "lower-case"),
    Mistake("empty tag", "robot_tag: TestBot", "robot_tag: ' '", 3, "prompt.robot_tag", "as the model reads it"),
    # cameras
    Mistake("no reference", "    reference: true\n", "", 11, "cameras", "reference: true"),
    Mistake("two references", "/wrist/image", "/wrist/image\n    reference: true", 17, "cameras[1].reference", "exactly one"),
    # lengths and limits
    Mistake("short fields", "fields: [j1, j2]", "fields: [j1]", 22, "state[0].fields", "one message field per channel"),
    Mistake("short limits", "lower: [-3.0, -1.0]", "lower: [-3.0]", 38, "actions[0].limits.lower", "one per channel"),
    Mistake("short start", "start: [0.0, 0.5]", "start: [0.0]", 36, "actions[0].start", "one per channel"),
    Mistake("no channels", "channels: [grip]", "channels: []", 49, "actions[1].channels", "at least one", 1),
    Mistake("crossed limits", "lower: [-3.0, -1.0]", "lower: [-3.0, 2.0]", 38, "actions[0].limits.lower[1]", "swap"),
    Mistake("zero velocity", "velocity: [1.0, 1.0]", "velocity: [1.0, 0]", 40, "actions[0].limits.velocity[1]", "largest rate"),
    Mistake("negative acceleration", "[5.0, 5.0]", "[5.0, -5.0]", 41, "actions[0].limits.acceleration[1]", "largest rate"),
    Mistake("start outside", "start: [0.0, 0.5]", "start: [0.0, 1.5]", 36, "actions[0].start[1]", "start pose or the limits"),
    Mistake("degrees", "upper: [3.0, 1.0]", "upper: [180, 1.0]", 39, "actions[0].limits.upper[0]", "radians: 3.1416"),
    Mistake("fraction of 100", "upper: [1], vel", "upper: [100], vel", 50, "actions[1].limits.upper[0]", "0 (closed)"),
    Mistake("base cannot stop", "lower: [-1, -2]", "lower: [0.1, -2]", 59, "actions[2].limits.lower[0]", "include 0"),
    # units and maps
    Mistake("unknown unit", "unit: rad", "unit: deg", 20, "state[0].unit", "use rad or m"),
    Mistake("unit of another kind", "unit: fraction", "unit: m/s", 48, "actions[1].unit", "fraction", 1),
    Mistake("scale zero", "{from: [0, 1], to: [0.0, 0.08]}", "{scale: 0}", 30, "state[1].map.scale", "factor"),
    Mistake("flat range", "from: [0, 1]", "from: [1, 1]", 30, "state[1].map.from", "two values"),
    Mistake("flat target", "to: [0.0, 0.08]", "to: [2, 2]", 30, "state[1].map.to", "two values"),
    Mistake("half a range", "{from: [0, 1], to: [0.0, 0.08]}", "{from: [0, 1]}", 30, "state[1].map.to", "add 'to"),
    Mistake("mixed map", "{from: [0, 1],", "{from: [0, 1], scale: 2,", 30, "state[1].map.scale", "{scale, offset}"),
    # commands and time-outs
    Mistake("zero on an arm", "hold_measured", "zero", 45, "actions[0].on_timeout", "use hold_measured"),
    Mistake("hold on a base", "on_timeout: zero", "on_timeout: hold_measured", 64, "actions[2].on_timeout", "use zero"),
    Mistake("nothing measured", "channels: [grip]", "channels: [g]", 49, "actions[1].channels[0]", "add a state channel named 'grip'"),
    Mistake("other unit measured", "unit: fraction", "unit: rad", 49, "actions[1].channels[0]", "one unit"),
    Mistake("command of another kind", "kind: forward_command", "kind: twist", 52, "actions[1].command.kind", "use joint_t"),
    Mistake("interbotix without name", "forward_command", "interbotix_single", 51, "actions[1].command.group_name", "group_name"),
    Mistake("single for two", "joint_trajectory", "interbotix_single\n      group_name: x", 43, "actions[0].command.kind", "interbotix_group"),
    Mistake("stamped without frame", "kind: twist\n", "kind: twist_stamped\n", 60, "actions[2].command.frame_id", "frame_id"),
    Mistake("twist without fields", "      fields: [vx, wz]\n", "", 60, "actions[2].command.fields", "[vx, wz]"),
    Mistake("twist field", "[vx, wz]", "[vx, wy2]", 63, "actions[2].command.fields[1]", "did you mean 'wy'?"),
    Mistake("short command fields", "[vx, wz]", "[vx]", 63, "actions[2].command.fields", "one per channel"),
    Mistake("pose field", "/joint_states\n    fields: [finger]", "/ee_pose\n    source: pose\n    fields: [qxx]", 29, "state[1].fields[0]", "'qx'"),
    Mistake("odometry field", "/joint_states\n    fields: [finger]", "/odom\n    source: odometry\n    fields: [yaww]", 29, "state[1].fields[0]", "'yaw'"),
    # topics
    Mistake("topic with space", "/ego/image", "/ego image", 13, "cameras[0].topic", "joined by '/'"),
    Mistake("topic ends in slash", "/ego/image", "/ego/image/", 13, "cameras[0].topic", "joined by '/'"),
    Mistake("private topic", "topic: cmd_vel", "topic: ~/cmd_vel", 62, "actions[2].command.topic", "joined by '/'"),
    Mistake("two cameras, one topic", "/wrist/image", "/ego/image", 16, "cameras[1].topic", "another topic"),
    Mistake("camera and state", "topic: /joint_states", "topic: /ego/image", 21, "state[0].topic", "another topic"),
    Mistake("two commands, one topic", "/hand/command", "/arm/command", 53, "actions[1].command.topic", "topic of its own"),
    Mistake("command into state", "/hand/command", "/joint_states", 53, "actions[1].command.topic", "use another"),
    Mistake("same joint twice", "fields: [finger]", "fields: [j1]", 28, "state[1].fields[0]", "another field"),
    # rates and the prompt
    Mistake("slow controller", "controller_rate_hz: 50", "controller_rate_hz: 5", 9, "control.controller_rate_hz", "at least 10"),
    Mistake("nervous watchdog", "watchdog_ms: 300", "watchdog_ms: 50", 66, "safety.watchdog_ms", "at least 100"),
    Mistake("base unmentioned", "  mobile_base: true\n", "", 2, "prompt.mobile_base", "mobile_base: true"),
    Mistake("arm denied", "single arm", "no arm", 4, "prompt.arms", "single arm or dual arms"),
    Mistake("wrong convention", "absolute_joint", "delta_eef", 10, "control.convention", "absolute_joint, base_velocity"),
    Mistake("contradicted convention", "absolute_joint", "base_velocity", 10, "control.convention", "one convention"),
    # safety: jerk, watchdogs, grippers, boxes
    Mistake("short jerk", "acceleration: [5.0, 5.0]", "acceleration: [5.0, 5.0]\n      jerk: [100]", 42, "actions[0].limits.jerk", "one per channel"),
    Mistake("zero jerk", "acceleration: [5.0, 5.0]", "acceleration: [5.0, 5.0]\n      jerk: [100, 0]", 42, "actions[0].limits.jerk[1]", "largest rate"),
    Mistake("nervous group", "on_timeout: zero", "on_timeout: zero\n    watchdog_ms: 20", 65, "actions[2].watchdog_ms", "at least 100"),
    Mistake("dead group", "on_timeout: zero", "on_timeout: zero\n    watchdog_ms: 0", 65, "actions[2].watchdog_ms", "greater than 0"),
    Mistake("young observation", "watchdog_ms: 300", "max_observation_age_ms: 40", 66, "safety.max_observation_age_ms", "at least 100"),
    Mistake("grip of an arm", "start: [0.0, 0.5]", "grip: {max_lead: 0.3}", 36, "actions[0].grip", "delete it"),
    Mistake("grip of two", "limits: {lower: [0],", "grip: {max_lead: 2}\n    limits: {lower: [0],", 50, "actions[1].grip.max_lead", "at most 1"),
    Mistake("closed where", "limits: {lower: [0],", "grip: {closed: down}\n    limits: {lower: [0],", 50, "actions[1].grip.closed", "lower, upper"),
    Mistake("one box", "  watchdog_ms: 300", "  workspace: {lower: [0, 0, 1], upper: [1, 1, 1]}", 66, "safety.workspace", "write [ … ]"),
    Mistake("crossed workspace", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('1, 1, 1', '1, 1, -1')}]", 66, "safety.workspace[0].lower[2]", "swap"),
    Mistake("flat workspace", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('1, 1, 1', '1, 1')}]", 66, "safety.workspace[0].upper", "maximum"),
    Mistake("box of nothing", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('arm', 'armm')}]", 66, "safety.workspace[0].group", "did you mean 'arm'?"),
    Mistake("box of a base", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('arm', 'base')}]", 66, "safety.workspace[0].group", "kind eef_pose"),
    Mistake("box without kinematics", "  watchdog_ms: 300", f"  workspace: [{BOX.replace(', kinematics: {model: r.urdf, tip: t}', '')}]", 66, "safety.workspace[0].kinematics", "add kinematics"),
    Mistake("box with position", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('group', 'position: [a1, a1, a1], group')}]", 66, "safety.workspace[0].position", "delete it"),
    Mistake("model of what", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('r.urdf', 'r.step')}]", 66, "safety.workspace[0].kinematics.model", ".urdf"),
    Mistake("model without tip", "  watchdog_ms: 300", f"  workspace: [{BOX.replace(', tip: t', '')}]", 66, "safety.workspace[0].kinematics.tip", "add 'tip'"),
    Mistake("chain of a gripper", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('tip: t', 'tip: t, channels: [a1, grip]')}]", 66, "safety.workspace[0].kinematics.channels[1]", "use one of: a1, a2"),
    Mistake("short joints", "  watchdog_ms: 300", f"  workspace: [{BOX.replace('tip: t', 'tip: t, joints: [j1]')}]", 66, "safety.workspace[0].kinematics.joints", "one per channel"),
]  # fmt: skip


def broken(mistake: Mistake) -> str:
    """The good robot with one mistake in it."""
    parts = ROBOT.split(mistake.old)
    assert len(parts) > mistake.nth + 1, f"{mistake.old!r} is not in the robot often enough"
    head, tail = mistake.old.join(parts[: mistake.nth + 1]), mistake.old.join(parts[mistake.nth + 1 :])
    return head + mistake.new + tail


def test_the_robot_without_mistakes_loads() -> None:
    _, problems = diagnose(ROBOT)
    assert problems == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.label for mistake in MISTAKES])
def test_mistake_is_one_line_with_line_number_key_and_fix(mistake: Mistake) -> None:
    with pytest.raises(EmbodimentError) as caught:
        parse_embodiment(broken(mistake), source="robot.yaml")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert message.startswith(f"robot.yaml:{mistake.line}: " + (f"{mistake.key}: " if mistake.key else "")), message
    assert mistake.fix in message.split("; fix: ")[1], message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "got a list of 2"),
        ("just words\n", "got the text 'just words'"),
        ("a: &a [*a]\n", "unknown key"),
        ("name: &n\n  <<: *n\n", "expected text"),
        ("control: &c\n  <<: *c\nname: x\nprompt: {robot_tag: X, arms: no arm}\n", "cannot merge"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
    ids=["empty", "comment", "list", "scalar", "recursive alias", "recursive value", "recursive merge", "deep nesting"],
)
def test_a_file_that_is_no_embodiment_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(EmbodimentError) as caught:
        parse_embodiment(text, source="robot.yaml")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["cameras", "actions"])
def test_an_empty_section_is_refused(section: str) -> None:
    following = {"cameras": "state:", "actions": "safety:"}[section]
    head, rest = ROBOT.split(f"{section}:\n")
    text = f"{head}{section}: []\n{following}{rest.split(following, 1)[1]}"
    line = head.count("\n") + 1
    with pytest.raises(EmbodimentError, match=rf"^robot.yaml:{line}: {section}: no .*; fix: add at least one"):
        parse_embodiment(text, source="robot.yaml")


def test_a_box_on_displacements_needs_three_measured_metres() -> None:
    text = (resource_dir("embodiments") / "widowx.yaml").read_text()
    for old, new, key, fix in (
        ("position: [hand_x, hand_y, hand_z]", "position: [hand_x, hand_y]", "position", "three state channels"),
        ("position: [hand_x, hand_y, hand_z]", "position: [hand_x, hand_y, hand_zz]", "position[2]", "'hand_z'"),
        ("position: [hand_x, hand_y, hand_z]", "position: [hand_x, hand_y, waist]", "position[2]", "point's position"),
        ("      position: [hand_x, hand_y, hand_z]\n", "", "position", "add position"),
    ):
        assert old in text
        with pytest.raises(EmbodimentError) as caught:
            parse_embodiment(text.replace(old, new), source="robot.yaml")
        assert f": safety.workspace[0].{key}: " in str(caught.value) and fix in str(caught.value)


def test_too_many_channels_are_refused() -> None:
    names = [f"c{i}" for i in range(70)]
    base = ROBOT[: ROBOT.index("  - name: base")].replace("mobile_base: true", "mobile_base: false")
    lists = {"[a1, a2]": names, "[j1, j2]": names, "[0.0, 0.5]": [0] * 70, "[-3.0, -1.0]": [-1] * 70}
    lists |= {"[3.0, 1.0]": [1] * 70, "[1.0, 1.0]": [1] * 70, "[5.0, 5.0]": [1] * 70}
    for old, new in lists.items():
        base = base.replace(old, f"[{', '.join(map(str, new))}]")
    with pytest.raises(EmbodimentError, match="71 channels do not fit the tensor's K=64"):
        parse_embodiment(base)


def test_all_broken_rules_are_reported_together_in_line_order() -> None:
    text = ROBOT.replace("watchdog_ms: 300", "watchdog_ms: 5").replace(
        "controller_rate_hz: 50", "controller_rate_hz: 5"
    )
    _, problems = diagnose(text)
    assert [(problem.line, problem.key) for problem in problems] == [
        (9, "control.controller_rate_hz"),
        (66, "safety.watchdog_ms"),
    ]


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: x\ndescription: caf\xe9\n")
    with pytest.raises(EmbodimentError, match=r"latin\.yaml:2: byte 0xe9 is not UTF-8; fix: save the file as UTF-8"):
        load_embodiment(path)


@pytest.mark.parametrize("name", ["alloha", "nowhere/robot.yaml", "."])
def test_a_missing_file_lists_the_shipped_names(name: str) -> None:
    with pytest.raises(EmbodimentError) as caught:
        load_embodiment(name)
    for shipped in resource_dir("embodiments").glob("*.yaml"):
        assert shipped.stem in str(caught.value)


def test_an_unreadable_or_huge_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    path.write_text("#" * 1_000_001)
    with pytest.raises(EmbodimentError, match="is larger than"):
        load_embodiment(path)
