"""Rules of limits, of commands that make positions of displacements and hand poses, and of what is only trained on."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vla_core.actions.rotations import pose_size
from qwen_vla_core.embodiment.commanded import measured_by
from qwen_vla_core.embodiment.errors import Problem, did_you_mean
from qwen_vla_core.embodiment.spec import ActionGroup, Embodiment, Limits

MODEL_SUFFIXES = (".urdf", ".xml", ".mjcf")
JOINT_COMMANDS = ("joint_trajectory", "forward_command", "interbotix_group")
# What displacements may be added up to, by group kind: the kind of the state group that measures it.
SUMS = {"joint_delta": ("joint_position", "hand"), "eef_delta": ("eef_pose",)}


def find_limit_problems(limits: Limits, count: int, key: str) -> Iterator[Problem]:
    """Lengths and signs of one set of limits."""
    for name in ("lower", "upper", "velocity", "acceleration", "jerk"):
        values = getattr(limits, name)
        if len(values) != count and (values or name != "jerk"):
            yield Problem(f"{key}.{name}", f"{len(values)} values for {count} channels", "give one per channel")
        if name in ("velocity", "acceleration", "jerk"):
            for column, value in enumerate(values):
                if value <= 0:
                    yield Problem(
                        f"{key}.{name}[{column}]", f"{value:g} is not positive", "give the largest rate allowed"
                    )


def find_training_problems(e: Embodiment) -> Iterator[Problem]:
    """What belongs to a robot that runs, in an embodiment for training only."""
    given = {f"cameras[{i}].topic": camera.topic for i, camera in enumerate(e.cameras)}
    given |= {f"state[{i}].topic": group.topic for i, group in enumerate(e.state)}
    given |= {f"actions[{i}].command": group.command.topic for i, group in enumerate(e.actions)}
    given |= {f"actions[{i}].limits": "given" * bool(group.limits.lower) for i, group in enumerate(e.actions)}
    given["simulation"] = "given" * (e.simulation is not None)
    for key, value in given.items():
        if value:
            yield Problem(key, "means nothing with training_only: true", "delete it, or delete training_only")


def find_position_problems(e: Embodiment) -> Iterator[Problem]:
    """Every broken rule of ``ik``, ``integrate`` and ``frame``."""
    names: dict[str, str] = {}
    for index, group in enumerate(e.actions):
        key = f"actions[{index}]"
        part = group.command.ik or group.command.integrate
        for channel in part.channels if part is not None else group.channels:
            if channel in names and (part is not None or names[channel].endswith(("ik", "integrate"))):
                yield Problem(key, f"commands '{channel}', as {names[channel]} does", "command a joint once")
            names.setdefault(
                channel, key if part is None else f"{key}.command.{'ik' if group.command.ik else 'integrate'}"
            )
        yield from _fits(group, f"{key}.command")
        yield from _frame(e, group, f"{key}.frame")
        for name, positions in (("ik", group.command.ik), ("integrate", group.command.integrate)):
            if positions is not None:
                where = f"{key}.command.{name}"
                yield from find_limit_problems(positions.limits, len(positions.channels), f"{where}.limits")
                yield from _ordered(positions.limits, positions.channels, f"{where}.limits")
                yield from _measured(e, group, positions.channels, where)
                if group.on_timeout != "hold_measured":
                    problem = "the positions that are commanded cannot be zeroed"
                    yield Problem(f"{key}.on_timeout", problem, "use hold_measured")
        ik = group.command.ik
        if ik is not None:
            where = f"{key}.command.ik"
            if not ik.model.lower().endswith(MODEL_SUFFIXES):
                fix = f"name a file that ends in {', '.join(MODEL_SUFFIXES)}"
                yield Problem(f"{where}.model", f"'{ik.model}' is neither URDF nor MJCF", fix)
            for column, value in enumerate(ik.start):
                inside = column >= len(ik.limits.lower) or ik.limits.lower[column] <= value <= ik.limits.upper[column]
                if len(ik.start) != len(ik.channels) or not inside:
                    fix = "give one value per channel, inside the limits"
                    yield Problem(f"{where}.start[{column}]", f"{value:g} is no start position", fix)
                    break
            if ik.joints and len(ik.joints) != len(ik.channels):
                text = f"{len(ik.joints)} joints for {len(ik.channels)} channels"
                yield Problem(f"{where}.joints", text, "name one per channel, in the same order")


def _fits(group: ActionGroup, key: str) -> Iterator[Problem]:
    """Whether the command's kind can carry what the group means."""
    command = group.command
    by_joints = command.kind in JOINT_COMMANDS
    if command.ik is not None and command.integrate is not None:
        yield Problem(f"{key}.integrate", "ik already adds displacements up", "delete it")
    elif command.ik is not None and (group.kind not in ("eef_pose", "eef_delta") or not by_joints):
        problem = f"means nothing for a {group.kind} group commanded by {command.kind}"
        yield Problem(f"{key}.ik", problem, f"use it where {' or '.join(JOINT_COMMANDS)} commands a hand")
    elif command.ik is None and group.kind in ("eef_pose", "eef_delta") and by_joints:
        problem = f"missing, but {command.kind} commands joints and the policy says where the hand goes"
        yield Problem(f"{key}.ik", problem, "add ik: {model: robot.urdf, tip: hand, channels: […], limits: {…}}")
    elif command.integrate is not None:
        wanted = "pose_stamped" if group.kind == "eef_delta" else " or ".join(JOINT_COMMANDS)
        if group.kind not in SUMS or command.kind not in wanted:
            problem = f"means nothing for a {group.kind} group commanded by {command.kind}"
            yield Problem(f"{key}.integrate", problem, f"delete it, or command by {wanted}")
    elif group.kind == "joint_delta" and command.kind == "joint_trajectory":
        problem = "a joint_trajectory holds positions, these are displacements: the arm would go to zero"
        yield Problem(f"{key}.integrate", problem, "add integrate: {channels: […], limits: {…}}")
    elif command.kind == "pose_stamped" and group.kind == "eef_delta" and group.unit in ("m,quaternion", "m,rot6d"):
        problem = f"a displacement in '{group.unit}' cannot be stopped by zeros"
        yield Problem(f"{key}.integrate", problem, "add integrate: {channels: […], limits: {…}}, or use m,axis_angle")
    twist = command.kind in ("twist", "twist_stamped")
    if twist and group.kind == "eef_delta" and group.unit not in ("m", "m,axis_angle"):
        problem = f"'{group.unit}' cannot be scaled to an angular velocity"
        yield Problem(f"{key}.kind", problem, "use unit m,axis_angle, or ik, or pose_stamped with integrate")


def _frame(e: Embodiment, group: ActionGroup, key: str) -> Iterator[Problem]:
    if not group.frame:
        return
    command = group.command
    relative = group.kind == "eef_pose" and e.control.convention == "relative_eef"
    if group.kind != "eef_delta" and not relative:
        yield Problem(key, f"means nothing for a {group.kind} group under {e.control.convention}", "delete it")
    elif group.kind == "eef_delta" and command.ik is None and command.integrate is None and command.frame_id == "":
        fix = "name the hand's or base's frame in command.frame_id and delete it"
        yield Problem(key, f"{command.kind} has no frame to say it in", fix)


def _ordered(limits: Limits, channels: tuple[str, ...], key: str) -> Iterator[Problem]:
    for column, (lower, upper) in enumerate(zip(limits.lower, limits.upper, strict=False)):
        if lower >= upper:
            name = channels[column] if column < len(channels) else "?"
            problem = f"{name}: lower {lower:g} is not below upper {upper:g}"
            yield Problem(f"{key}.lower[{column}]", problem, "swap or correct them")


def _measured(e: Embodiment, group: ActionGroup, channels: tuple[str, ...], key: str) -> Iterator[Problem]:
    """Positions start from where they are measured, so one state group must have them."""
    known = {channel: state for state in e.state for channel in state.channels}
    for column, channel in enumerate(channels):
        if channel not in known:
            yield Problem(
                f"{key}.channels[{column}]", f"'{channel}' is no state channel", did_you_mean(channel, tuple(known))
            )
            return
    state = measured_by(e, channels)
    kinds = ("joint_position",) if group.command.ik is not None else SUMS.get(group.kind, ())
    if state is None or state.kind not in kinds:
        named = " or ".join(kinds) or "none"
        problem = "are not the channels of one state group of kind " + named
        yield Problem(f"{key}.channels", problem, "name channels of one such group")
        return
    if group.kind == "joint_delta" and len(channels) != len(group.channels):
        problem = f"{len(channels)} joints for {len(group.channels)} displacements"
        yield Problem(f"{key}.channels", problem, "name one per channel, in the same order")
    if state.kind == "eef_pose" and len(channels) != pose_size(state.unit):
        problem = f"{len(channels)} channels, but a pose in '{state.unit}' has {pose_size(state.unit)}"
        yield Problem(f"{key}.channels", problem, "measure the hand's whole pose, and name all of it")
