"""From a URDF and, where one runs, a ROS graph to a commented embodiment YAML that a person completes.

What neither of them tells is written as ``TODO``, which no check lets pass; what is a convention or a guess that works
is written out and marked CHECK. A draft without a TODO loads as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_vla_core.embodiment.spec import COMMAND_MESSAGES, IMAGE_MESSAGES, STATE_MESSAGES
from qwen_vla_core.embodiment.urdf import Urdf, UrdfJoint
from qwen_vla_core.errors import UserError

GRIPPER_WORDS = re.compile(r"gripper|finger|jaw|knuckle|claw", re.IGNORECASE)
GRIPPER_TOPIC = re.compile(r"gripper|finger|jaw|hand", re.IGNORECASE)
NO_PICTURE = re.compile(r"depth|disparity|mask|infra|/ir/|theora|heatmap|debug", re.IGNORECASE)
SIDES = ("left", "right")
COMMAND_KINDS = ("joint_trajectory", "forward_command")  # what ros2_control's controllers listen to
RAMP_S = 0.2  # the drafted acceleration reaches the largest velocity in this time; a URDF has none [O]
TURN = 2 * math.pi


@dataclass(frozen=True)
class GraphTopic:
    """One topic of a running graph.

    Attributes:
        types: message types on it, e.g. sensor_msgs/msg/JointState.
        published, subscribed: whether anyone does.
        joints: for joint states the names in a message, for commands the joints of the controller that listens.
        size: (width, height) of a picture; None where none arrived.
    """

    name: str
    types: tuple[str, ...]
    published: bool = False
    subscribed: bool = False
    joints: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Draft:
    """The YAML's text, what is still to do (line, what), and what was left out and why."""

    text: str
    todos: tuple[tuple[int, str], ...]
    left_out: tuple[str, ...]


@dataclass
class _Group:
    name: str
    joints: list[UrdfJoint] = field(default_factory=list)
    gripper: bool = False


def draft_embodiment(urdf: Urdf, graph: Sequence[GraphTopic] | None = None) -> Draft:
    """Drafts a robot that is commanded in joint positions, with grippers as opening fractions.

    Args:
        urdf: its description.
        graph: topics of the running graph; None: there is none, so that topics come from conventions.

    Raises:
        UserError: no joint of the URDF takes position commands.
    """
    commanded, left_out = _commanded(urdf)
    if not commanded:
        raise UserError(
            f"no joint of '{urdf.name}' takes position commands ({'; '.join(left_out)}); a base is written by hand: "
            "begin with embodiments/mobile_base.yaml"
        )
    groups = _groups(commanded)
    topics = tuple(topic for topic in graph or () if "/qwen_vla/" not in topic.name)
    states = {group.name: _state_topic(group, topics, graph is not None) for group in groups}
    commands = {group.name: _command(group, groups, topics) for group in groups}
    lines = [
        f"# Draft from the URDF of '{urdf.name}'{' and the running graph' if graph is not None else ''}.",
        "# TODO: must be filled in, nothing loads before. CHECK: a convention or a guess; compare it with your robot.",
        f"name: {_identifier(urdf.name)}",
        f"description: {_identifier(urdf.name)}, absolute joint positions; grippers as opening fraction.",
        "",
        "prompt:                       # what the model is told; shown by `qwen-vla embodiment show`",
        f"  robot_tag: {_tag(urdf.name)}",
        f"  arms: {'dual arms' if _sides(groups) > 1 else 'single arm'}            # CHECK",
        "",
        "control:",
        "  frequency_hz: 10            # CHECK: actions per second of the policy, as in your training data",
        "  horizon: 16                 # CHECK: actions per chunk",
        "  execute_steps: 5            # of them executed before the policy looks again; fewer follow what moves",
        "  controller_rate_hz: 50      # CHECK: how often commands are sent; the controller interpolates",
        "  convention: absolute_joint",
        "",
        "cameras:                      # in the order the model sees them; exactly one is the reference",
        *_camera_lines(topics, graph is not None, urdf),
        "",
        "state:",
    ]
    for group in groups:
        lines += _state_lines(group, *states[group.name])
    lines += ["", "actions:"]
    for group in groups:
        lines += _action_lines(group, commands[group.name])
    lines += [
        "",
        "safety:                       # all of it is on; see docs/safety.md",
        "  watchdog_ms: 500            # without a fresh chunk for this long everything holds where it is",
        "  max_jump: 0.5               # CHECK: largest |command - measured| per channel (rad, m or fraction)",
        "  soft_start_s: 1.0",
        "  max_skew_ms: 150",
    ]
    if left_out:
        lines += ["", "# Left out:", *(f"#   {text}" for text in left_out)]
    todos = tuple((i, line.strip()) for i, line in enumerate(lines, 1) if re.search(r":.*\bTODO\b|\[.*TODO", line))
    return Draft("\n".join(lines) + "\n", tuple(t for t in todos if not t[1].startswith("#")), tuple(left_out))


def _commanded(urdf: Urdf) -> tuple[list[UrdfJoint], list[str]]:
    kept, left_out = [], []
    for joint in urdf.joints:
        if joint.mimics:
            left_out.append(f"{joint.name}: follows {joint.mimics} (mimic)")
        elif joint.commands is not None and "position" not in joint.commands:
            given = ", ".join(joint.commands) or "no command interface"
            left_out.append(f"{joint.name}: takes no position commands ({given})")
        else:
            kept.append(joint)
    return kept, left_out


def _groups(joints: Sequence[UrdfJoint]) -> list[_Group]:
    """Arms (one per side where names have sides), each followed by its grippers: one group per gripper joint."""
    sides = {joint.name: _side(joint.name) for joint in joints}
    both = set(SIDES) <= {side for name, side in sides.items() if not GRIPPER_WORDS.search(name)}
    groups: dict[str, _Group] = {}
    for gripper in (False, True):
        for joint in joints:
            if bool(GRIPPER_WORDS.search(joint.name)) != gripper:
                continue
            side = f"{sides[joint.name]}_" if both and sides[joint.name] else ""
            unit = "_slider" if joint.kind == "prismatic" and not gripper else ""
            name = _identifier(joint.name) if gripper else f"{side}arm{unit}"
            groups.setdefault(name, _Group(name, gripper=gripper)).joints.append(joint)
    if sum(group.gripper for group in groups.values()) == 1:
        only = next(group for group in groups.values() if group.gripper)
        only.name = "gripper"
    order = {side: i for i, side in enumerate(SIDES)} if both else {}
    return sorted(groups.values(), key=lambda group: (order.get(_side(group.joints[0].name), -1), group.gripper))


def _side(name: str) -> str:
    words = re.split(r"[_\-/.]", name.lower())
    return next((side for side in SIDES if side in words or side[0] == words[0]), "")


def _sides(groups: Sequence[_Group]) -> int:
    return len({_side(group.joints[0].name) for group in groups if not group.gripper and "slider" not in group.name})


def _state_topic(group: _Group, topics: Sequence[GraphTopic], ran: bool) -> tuple[str, str]:
    """(topic, comment) of the joint states that name the group's joints."""
    names = {joint.name for joint in group.joints}
    seen = [t for t in topics if STATE_MESSAGES["joint_state"] in t.types and t.published]
    for topic in seen:
        if names <= set(topic.joints):
            return topic.name, f"seen: it names {'this joint' if len(names) == 1 else 'these joints'}"
    if ran:
        heard = ", ".join(topic.name for topic in seen) or "no joint states at all"
        return "TODO", f"TODO: no topic of the graph names {', '.join(sorted(names))}; seen: {heard}"
    return "/joint_states", "CHECK: where joint_state_broadcaster publishes; not seen running"


def _command(group: _Group, groups: Sequence[_Group], topics: Sequence[GraphTopic]) -> tuple[str, str, str]:
    """(kind, topic, comment): the controller that names the group's joints, or the only one that it can be."""
    names = [joint.name for joint in group.joints]
    kinds = {COMMAND_MESSAGES[kind]: kind for kind in COMMAND_KINDS}
    found = [(kinds[t.types[0]], t) for t in topics if t.subscribed and t.types and t.types[0] in kinds]
    for kind, topic in found:
        if set(topic.joints) == set(names):
            order = "" if list(topic.joints) == names else "; CHECK the order of its joints"
            return kind, topic.name, f"seen: its controller has these joints{order}"
    unnamed = [(kind, topic) for kind, topic in found if not topic.joints]
    alike = [(k, t) for k, t in unnamed if bool(GRIPPER_TOPIC.search(t.name)) == group.gripper]
    if len(alike) > 1 and _side(names[0]):
        alike = [(k, t) for k, t in alike if _side(names[0]) in t.name]
    rivals = [
        other for other in groups if other.gripper == group.gripper and _side(other.joints[0].name) == _side(names[0])
    ]
    if len(alike) == 1 and len(rivals) == 1:
        return alike[0][0], alike[0][1].name, "CHECK: seen, the only one that fits; its joints could not be asked for"
    seen = f"; seen: {', '.join(topic.name for _, topic in found)}" if found else ""
    return "joint_trajectory", "TODO", f"TODO: the controller's topic, e.g. /my_controller/joint_trajectory{seen}"


def _camera_lines(topics: Sequence[GraphTopic], ran: bool, urdf: Urdf) -> list[str]:
    by_type = {message: transport for transport, message in IMAGE_MESSAGES.items()}
    found = [
        (by_type[t.types[0]], t)
        for t in topics
        if t.published and t.types and t.types[0] in by_type and not NO_PICTURE.search(t.name)
    ]
    raw = {topic.name for transport, topic in found if transport == "raw"}
    found = [(transport, t) for transport, t in found if t.name.removesuffix("/compressed") not in raw or t.name in raw]
    if not found:
        links = [name for name in urdf.links if "camera" in name or name.startswith("cam_")]
        hint = f"; the URDF has the links {', '.join(links)}" if links else ""
        why = "no picture is published in the graph" if ran else "e.g. /camera/color/image_raw"
        return [
            f"  - {{view: ego, topic: TODO, size: [640, 480], max_age_ms: 300, reference: true}}  # TODO: {why}{hint}"
        ]
    lines, views = [], set[str]()
    for index, (transport, topic) in enumerate(sorted(found, key=lambda pair: pair[1].name)):
        view = "ego" if len(found) == 1 else _view(topic.name, views)
        views.add(view)
        size = f"[{topic.size[0]}, {topic.size[1]}]" if topic.size else "[640, 480]"
        parts = [f"view: {view}", f"topic: {topic.name}"]
        parts += ["transport: compressed"] if transport == "compressed" else []
        parts += [f"size: {size}", "max_age_ms: 300", *(["reference: true"] if index == 0 else [])]
        note = "seen" if topic.size else "CHECK: seen, but no picture arrived: size"
        lines.append(f"  - {{{', '.join(parts)}}}  # {note}")
    return lines


def _state_lines(group: _Group, topic: str, comment: str) -> list[str]:
    names = [joint.name for joint in group.joints]
    lines = [
        f"  - name: {group.name}",
        f"    kind: {'gripper' if group.gripper else 'joint_position'}",
        f"    unit: {_unit(group)}",
        f"    topic: {topic}  # {comment}",
        "    max_age_ms: 200",
        f"    fields: [{', '.join(names)}]",
        f"    channels: [{', '.join(names)}]",
    ]
    return [*lines, *_map_lines(group, "    ")]


def _action_lines(group: _Group, command: tuple[str, str, str]) -> list[str]:
    kind, topic, comment = command
    joints = group.joints
    names = ", ".join(joint.name for joint in joints)
    if group.gripper:
        (joint,) = joints
        span = joint.upper - joint.lower
        lower, upper, velocity = ["0"], ["1"], [_value(joint.velocity / span if joint.velocity > 0 else 0.0)]
    else:
        lower = [_bound(joint.lower, -TURN, joint) for joint in joints]
        upper = [_bound(joint.upper, TURN, joint) for joint in joints]
        velocity = [_value(joint.velocity) for joint in joints]
    acceleration = [v if v == "TODO" else _value(float(v) / RAMP_S) for v in velocity]
    missing = [joint.name for joint, v in zip(joints, velocity, strict=True) if v == "TODO"]
    endless = [joint.name for joint in joints if joint.kind == "continuous"]
    unbounded = [joint.name for joint, low in zip(joints, lower, strict=True) if low == "TODO"]
    notes = [f"      # TODO: the URDF has no velocity limit for {', '.join(missing)}"] if missing else []
    notes += [f"      # TODO: the URDF has no position limits for {', '.join(unbounded)}"] if unbounded else []
    notes += [f"      # CHECK: {', '.join(endless)} turns without end; one turn each way is allowed"] if endless else []
    return [
        f"  - name: {group.name}",
        f"    kind: {'gripper' if group.gripper else 'joint_position'}",
        f"    unit: {_unit(group)}",
        f"    channels: [{names}]",
        f"    limits:                   # {'as opening fraction' if group.gripper else 'of the URDF'}",
        *notes,
        f"      lower: [{', '.join(lower)}]",
        f"      upper: [{', '.join(upper)}]",
        f"      velocity: [{', '.join(velocity)}]  # CHECK: the URDF's largest; begin with less on a real robot",
        f"      acceleration: [{', '.join(acceleration)}]  # CHECK: a URDF has none; full speed in {RAMP_S:g} s",
        "    command:",
        f"      kind: {kind}",
        f"      topic: {topic}  # {comment}",
        f"      fields: [{names}]",
        *_map_lines(group, "      "),
        "    on_timeout: hold_measured",
    ]


def _map_lines(group: _Group, indent: str) -> list[str]:
    if not group.gripper:
        return []
    (joint,) = group.joints
    if not math.isfinite(joint.upper - joint.lower):
        return [f"{indent}map: {{from: [0, 1], to: [TODO, TODO]}}  # TODO: the joint closed and open, in its own unit"]
    ends = f"[{_plain(joint.lower)}, {_plain(joint.upper)}]"
    return [f"{indent}map: {{from: [0, 1], to: {ends}}}  # CHECK: 0 is closed, 1 is open; swap the two where not"]


def _unit(group: _Group) -> str:
    if group.gripper:
        return "fraction                  # 0 closed … 1 open"
    return "m" if group.joints[0].kind == "prismatic" else "rad"


def _bound(value: float, endless: float, joint: UrdfJoint) -> str:
    if math.isfinite(value):
        return _plain(value)
    return _plain(endless) if joint.kind == "continuous" else "TODO"


def _value(value: float) -> str:
    return _plain(value) if value > 0 and math.isfinite(value) else "TODO"


def _plain(value: float) -> str:
    return f"{value:.10g}"  # a limit must not be rounded to beyond what the driver allows


def _identifier(name: str) -> str:
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")
    return word if re.match(r"[A-Za-z]", word) else f"robot_{word}".rstrip("_")


def _tag(name: str) -> str:
    return " ".join(word.capitalize() for word in re.split(r"[_\-\s]+", _identifier(name)) if word)


def _view(topic: str, taken: set[str]) -> str:
    """A view's name from its topic: the first word that says where the camera is."""
    words = [re.sub(r"[^a-z0-9_]+", "_", word.lower()) for word in topic.strip("/").split("/")]
    telling = [w for w in words if w not in ("camera", "color", "rgb", "image", "image_raw", "compressed")] or words
    name, number = telling[0], 2
    while name in taken:
        name, number = f"{telling[0]}_{number}", number + 1
    return name
