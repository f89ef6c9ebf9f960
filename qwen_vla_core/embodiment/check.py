"""Rules that need more than one key: each yields problems by key path; ``load.py`` adds file and line.

A rule exists because breaking it moves a robot wrongly or fails hours later with an error that does not name the YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from qwen_vla_core.actions.rotations import pose_size
from qwen_vla_core.embodiment.check_base import find_obstacle_problems, find_tracker_problems
from qwen_vla_core.embodiment.check_positions import (
    find_limit_problems,
    find_position_problems,
    find_training_problems,
)
from qwen_vla_core.embodiment.check_safety import find_safety_problems
from qwen_vla_core.embodiment.errors import Problem, did_you_mean
from qwen_vla_core.embodiment.spec import (
    ARM_KINDS,
    BASE_KINDS,
    COMMAND_KINDS_BY_GROUP,
    CONVENTION_KINDS,
    MAX_CHANNELS,
    STATE_FIELDS,
    TWIST_FIELDS,
    UNITS_BY_KIND,
    VELOCITY_KINDS,
    ActionGroup,
    Embodiment,
    StateGroup,
)

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_VIEW = re.compile(r"[a-z0-9_]+")
_NAME = re.compile(r"[^\s,\[\]{}]+")
_TOPIC = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(?:/[A-Za-z_][A-Za-z0-9_]*)*")
_MAX_TOPIC = 240  # DDS allows 255 characters, ROS prefixes some
_DEGREES_ABOVE = 4 * math.pi  # no revolute joint limit of a robot arm is beyond two turns


def find_problems(embodiment: Embodiment) -> Iterator[Problem]:
    """Every broken cross-field rule of a parsed embodiment."""
    yield from _names(embodiment)
    yield from _cameras(embodiment)
    if embodiment.training_only:
        yield from _prompt(embodiment)
        yield from find_training_problems(embodiment)
        return
    yield from _state(embodiment)
    for index, group in enumerate(embodiment.actions):
        yield from _action_group(group, f"actions[{index}]")
        yield from _timeout(embodiment, group, f"actions[{index}]")
    yield from find_position_problems(embodiment)
    yield from _topics(embodiment)
    yield from _rates(embodiment)
    yield from _prompt(embodiment)
    yield from find_safety_problems(embodiment)
    yield from find_obstacle_problems(embodiment)
    yield from _simulation(embodiment)


def _duplicates(pairs: Iterator[tuple[str, str]], what: str) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for key, value in pairs:
        if value in seen:
            yield Problem(key, f"{what} '{value}' is already used by {seen[value]}", "give it a name of its own")
        seen.setdefault(value, key)


def _names(e: Embodiment) -> Iterator[Problem]:
    if not _IDENTIFIER.fullmatch(e.name):
        yield Problem("name", f"'{e.name}' is not an identifier", "use letters, digits and underscores, e.g. my_robot")
    if not e.actions:
        yield Problem("actions", "no action groups", "add at least one group: without it nothing can move")
    yield from _group_names(e.state, "state")
    yield from _group_names(e.actions, "actions")
    maps = {f"state[{index}].map.scale": group.map for index, group in enumerate(e.state)}
    maps |= {f"actions[{index}].command.map.scale": group.command.map for index, group in enumerate(e.actions)}
    for key, linear in maps.items():
        if linear.scale == 0.0:
            yield Problem(key, "scale 0 cannot be inverted", "give the factor from channel to message units")
    if len(e.channels) > MAX_CHANNELS:
        yield Problem(
            "actions",
            f"{len(e.channels)} channels do not fit the tensor's K={MAX_CHANNELS} columns",
            f"name at most {MAX_CHANNELS} channels over all groups",
        )


def _group_names(groups: Sequence[StateGroup | ActionGroup], side: str) -> Iterator[Problem]:
    for index, group in enumerate(groups):
        key = f"{side}[{index}]"
        if not _IDENTIFIER.fullmatch(group.name):
            yield Problem(f"{key}.name", f"'{group.name}' is not an identifier", "use letters, digits, underscores")
        if not group.channels:
            yield Problem(f"{key}.channels", "no channels", "name at least one channel")
        for column, channel in enumerate(group.channels):
            if not _NAME.fullmatch(channel):
                yield Problem(f"{key}.channels[{column}]", f"'{channel}' is no channel name", "use a word, no spaces")
        units = UNITS_BY_KIND[group.kind]
        if group.unit not in units:
            problem = f"unit '{group.unit}' does not fit kind {group.kind}"
            yield Problem(f"{key}.unit", problem, f"use {' or '.join(units)}")
    yield from _duplicates(((f"{side}[{i}].name", group.name) for i, group in enumerate(groups)), "group name")
    yield from _duplicates(
        ((f"{side}[{i}].channels[{j}]", name) for i, g in enumerate(groups) for j, name in enumerate(g.channels)),
        "channel",
    )


def _cameras(e: Embodiment) -> Iterator[Problem]:
    if not e.cameras:
        yield Problem("cameras", "no cameras", "add at least one view, with reference: true")
        return
    references = [index for index, camera in enumerate(e.cameras) if camera.reference]
    if not references:
        yield Problem("cameras", "no reference camera", f"add 'reference: true' to one view, e.g. {e.cameras[0].view}")
    for index in references[1:]:
        first = e.cameras[references[0]].view
        yield Problem(f"cameras[{index}].reference", f"a second reference camera beside {first}", "keep exactly one")
    for index, camera in enumerate(e.cameras):
        if not _VIEW.fullmatch(camera.view):
            fix = "use lower-case letters, digits and underscores"
            yield Problem(f"cameras[{index}].view", f"'{camera.view}' cannot become the token <|…_start|>", fix)
        if min(camera.size) < 1:
            yield Problem(f"cameras[{index}].size", f"{list(camera.size)} is no picture", "give [width, height] in px")
    yield from _duplicates(((f"cameras[{i}].view", camera.view) for i, camera in enumerate(e.cameras)), "view")


def _state(e: Embodiment) -> Iterator[Problem]:
    readers: dict[tuple[str, str], str] = {}
    for index, group in enumerate(e.state):
        key = f"state[{index}]"
        if len(group.fields) != len(group.channels):
            yield Problem(
                f"{key}.fields",
                f"{len(group.fields)} fields for {len(group.channels)} channels",
                "name one message field per channel, in the same order",
            )
        for column, name in enumerate(group.fields):
            where = f"{key}.fields[{column}]"
            known = STATE_FIELDS.get(group.source)
            if known is not None and name not in known:
                yield Problem(where, f"'{name}' is no {group.source} field", did_you_mean(name, known))
            elif not _NAME.fullmatch(name):
                yield Problem(where, f"'{name}' is no joint name", "write it as the JointState message has it")
            previous = readers.setdefault((group.topic, name), where)
            if previous != where:
                yield Problem(where, f"'{name}' of {group.topic} is already read by {previous}", "name another field")


def _action_group(group: ActionGroup, key: str) -> Iterator[Problem]:
    count = len(group.channels)
    wrong = list(find_limit_problems(group.limits, count, f"{key}.limits"))
    yield from wrong
    same_length = not any("values for" in problem.problem for problem in wrong)
    if group.start and len(group.start) != count:
        yield Problem(
            f"{key}.start", f"{len(group.start)} values for {count} channels", "give one per channel, or none"
        )
    elif same_length:
        yield from _values(group, key)
    is_pose = group.command.kind == "pose_stamped" or group.command.ik is not None
    if is_pose and group.unit in UNITS_BY_KIND[group.kind] and count != pose_size(group.unit):
        yield Problem(
            f"{key}.channels",
            f"{count} channels, but a pose in '{group.unit}' has {pose_size(group.unit)}",
            "name x, y, z and the numbers of the rotation (x, y, yaw for 'm,rad'), one pose per group",
        )
    yield from _command(group, key)


def _values(group: ActionGroup, key: str) -> Iterator[Problem]:
    for column, channel in enumerate(group.channels):
        lower, upper = group.limits.lower[column], group.limits.upper[column]
        if lower >= upper:
            yield Problem(
                f"{key}.limits.lower[{column}]",
                f"{channel}: lower {lower:g} is not below upper {upper:g}",
                "swap or correct them",
            )
            continue
        for side, value in (("lower", lower), ("upper", upper)):
            where = f"{key}.limits.{side}[{column}]"
            if group.unit == "rad" and abs(value) > _DEGREES_ABOVE:
                yield Problem(
                    where,
                    f"{channel}: {value:g} rad is more than two turns and looks like degrees",
                    f"write radians: {math.radians(value):.4f}",
                )
            if group.unit == "fraction" and not 0.0 <= value <= 1.0:
                yield Problem(where, f"{channel}: {value:g} is no fraction", "use 0 (closed) … 1 (open); map the units")
        if group.kind in VELOCITY_KINDS and not lower <= 0.0 <= upper:
            yield Problem(
                f"{key}.limits.lower[{column}]",
                f"{channel}: the limits {lower:g} … {upper:g} exclude 0, so a time-out could not stop it",
                "include 0",
            )
        if group.start and not lower <= group.start[column] <= upper:
            yield Problem(
                f"{key}.start[{column}]",
                f"{channel}: start {group.start[column]:g} is outside its limits {lower:g} … {upper:g}",
                "correct the start pose or the limits (both in channel units)",
            )


def _command(group: ActionGroup, key: str) -> Iterator[Problem]:
    command, key = group.command, f"{key}.command"
    allowed = COMMAND_KINDS_BY_GROUP[group.kind]
    for name, kind in (("kind", command.kind), ("simulation_kind", command.simulation_kind)):
        if kind is None:
            continue
        if kind not in allowed:
            yield Problem(f"{key}.{name}", f"{kind} cannot command a {group.kind} group", f"use {' or '.join(allowed)}")
            continue
        if kind.startswith("interbotix") and not command.group_name:
            yield Problem(
                f"{key}.group_name", f"missing, but {kind} needs it", "add group_name: the name in the message"
            )
        if kind in ("pose_stamped", "twist_stamped") and not command.frame_id:
            yield Problem(f"{key}.frame_id", f"missing, but {kind} needs it", "add frame_id, e.g. base_link")
        if kind == "interbotix_single" and len(group.channels) != 1:
            yield Problem(
                f"{key}.{name}", f"commands one joint, the group has {len(group.channels)}", "use interbotix_group"
            )
    if group.kind == "waypoint":
        yield from find_tracker_problems(group, key)
        return
    if command.tracker is not None:
        yield Problem(f"{key}.tracker", f"means nothing for a {group.kind} group", "delete it")
    part = command.ik or command.integrate
    channels = part.channels if part is not None else group.channels
    if command.fields and len(command.fields) != len(channels):
        yield Problem(
            f"{key}.fields",
            f"{len(command.fields)} fields for {len(channels)} channels",
            "name one per channel, in the same order, or leave fields out",
        )
    yield from _duplicates(((f"{key}.fields[{i}]", name) for i, name in enumerate(command.fields)), "field")
    if command.kind in ("twist", "twist_stamped") and command.kind in allowed:
        if not command.fields:
            yield Problem(
                f"{key}.fields", f"missing, but {command.kind} needs it", "name one per channel, e.g. [vx, wz]"
            )
        for column, name in enumerate(command.fields):
            if name not in TWIST_FIELDS:
                yield Problem(
                    f"{key}.fields[{column}]", f"'{name}' is no twist field", did_you_mean(name, TWIST_FIELDS)
                )


def _timeout(e: Embodiment, group: ActionGroup, key: str) -> Iterator[Problem]:
    if group.kind in VELOCITY_KINDS and not (group.command.ik or group.command.integrate):
        if group.on_timeout == "hold_measured":
            yield Problem(
                f"{key}.on_timeout", f"a {group.kind} group that holds its measured value keeps moving", "use zero"
            )
        return
    if group.on_timeout == "zero":
        yield Problem(
            f"{key}.on_timeout", f"zero would drive the {group.kind} group to position 0", "use hold_measured"
        )
        return
    if group.command.ik or group.command.integrate:  # holds the positions that are commanded, see check_positions
        return
    measured = {channel: state for state in e.state for channel in state.channels}
    for column, channel in enumerate(group.channels):
        where = f"{key}.channels[{column}]"
        if channel not in measured:
            fix = f"add a state channel named '{channel}'"
            yield Problem(where, f"hold_measured needs the measured '{channel}', which no state group reads", fix)
        elif measured[channel].unit != group.unit:
            yield Problem(
                where,
                f"'{channel}' is commanded in {group.unit} but measured in {measured[channel].unit}",
                "use one unit and let the maps convert",
            )


def _topics(e: Embodiment) -> Iterator[Problem]:
    uses: list[tuple[str, str, str]] = [  # key, topic, message: two users of a topic must agree on the message
        (f"cameras[{i}].topic", camera.topic, f"the images of {camera.view}") for i, camera in enumerate(e.cameras)
    ]
    uses += [(f"state[{i}].topic", group.topic, f"{group.source} messages") for i, group in enumerate(e.state)]
    if e.safety.obstacle_stop is not None:
        uses.append(("safety.obstacle_stop.topic", e.safety.obstacle_stop.topic, "laser scans"))
    command_keys = [f"actions[{i}].command.topic" for i in range(len(e.actions))]
    for key, topic in [(key, topic) for key, topic, _ in uses] + [
        (key, group.command.topic) for key, group in zip(command_keys, e.actions, strict=True)
    ]:
        if not _TOPIC.fullmatch(topic) or len(topic) > _MAX_TOPIC:
            yield Problem(key, f"'{topic}' is no ROS topic name", "use words of letters, digits, '_' joined by '/'")
    seen: dict[str, tuple[str, str]] = {}
    for key, topic, message in uses:
        other, before = seen.setdefault(topic, (message, key))
        if other != message:
            yield Problem(key, f"{topic} already carries {other} ({before})", "name another topic")
    for simulated in (False, True):
        targets: dict[str, tuple[str, str, str]] = {}
        for key, group in zip(command_keys, e.actions, strict=True):
            command = group.command
            kind = command.simulation_kind if simulated and command.simulation_kind else command.kind
            if command.topic in seen:
                if not simulated:
                    yield Problem(
                        key, f"{command.topic} is already read as input ({seen[command.topic][1]})", "use another"
                    )
                continue
            here = (kind, command.group_name, key)
            other_kind, other_name, before = targets.setdefault(command.topic, here)
            shareable = kind == other_kind and kind.startswith("interbotix") and command.group_name != other_name
            if before != key and not shareable:
                where = " in simulation" if simulated else ""
                yield Problem(
                    key,
                    f"{command.topic} is already commanded by {before}{where}, so one would overwrite the other",
                    "give each group a topic of its own, or make them one group",
                )


def _rates(e: Embodiment) -> Iterator[Problem]:
    control = e.control
    if control.controller_rate_hz < control.frequency_hz:
        yield Problem(
            "control.controller_rate_hz",
            f"{control.controller_rate_hz:g} Hz is slower than the policy's {control.frequency_hz:g} Hz",
            f"use at least {control.frequency_hz:g}",
        )
    if control.execute_steps is not None and control.execute_steps > control.horizon:
        yield Problem(
            "control.execute_steps",
            f"{control.execute_steps} of a chunk of {control.horizon} actions",
            f"use at most {control.horizon}",
        )


def _prompt(e: Embodiment) -> Iterator[Problem]:
    kinds = {group.kind for group in e.actions}
    tag = e.prompt.robot_tag
    if not tag.strip() or tag != " ".join(tag.split()) or not tag.isprintable():
        yield Problem("prompt.robot_tag", f"{tag!r} is not one plain line", "name the robot as the model reads it")
    if kinds & BASE_KINDS and not e.prompt.mobile_base:
        named = ", ".join(sorted(kinds & BASE_KINDS))
        yield Problem("prompt.mobile_base", f"is false, but a {named} group drives a base", "set mobile_base: true")
    if e.prompt.arms == "no arm" and kinds & ARM_KINDS:
        named = ", ".join(sorted(kinds & ARM_KINDS))
        yield Problem("prompt.arms", f"is 'no arm', but there are {named} groups", "use single arm or dual arms")
    if e.prompt.arms != "no arm" and e.actions and not kinds & ARM_KINDS:
        yield Problem("prompt.arms", f"is '{e.prompt.arms}', but no group commands an arm", "use 'no arm'")
    needed, refused = CONVENTION_KINDS[e.control.convention]
    if e.actions and needed not in kinds:
        yield Problem(
            "control.convention",
            f"{e.control.convention} needs a {needed} group, there is none",
            "choose the convention of the action groups: "
            + (", ".join(name for name, (kind, _) in CONVENTION_KINDS.items() if kind in kinds) or "none fits them"),
        )
    elif kinds & refused:
        named = ", ".join(sorted(kinds & refused))
        yield Problem(
            "control.convention", f"{e.control.convention} contradicts the {named} groups", "use one convention"
        )


def _simulation(e: Embodiment) -> Iterator[Problem]:
    if e.simulation is not None:
        size = e.simulation.camera_size
        if size is not None and min(size) < 1:
            yield Problem("simulation.camera_size", f"{list(size)} is no picture", "give [width, height] in px")
        if not _NAME.fullmatch(e.simulation.world):
            yield Problem("simulation.world", f"{e.simulation.world!r} is no world name", "see `qwen-vla sim --help`")
