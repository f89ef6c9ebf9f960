"""Rules of the watchdogs, the gripper's force and the workspace boxes; ``check.py`` runs them with all others.

What can be judged from the YAML alone is judged here. Whether a model file exists and has the named joints is judged
when it is opened (``runtime/kinematics.py``): an embodiment may be read where the file is not.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vla_core.embodiment.errors import Problem, did_you_mean
from qwen_vla_core.embodiment.spec import ActionGroup, Embodiment, Kinematics, Workspace

MODEL_SUFFIXES = (".urdf", ".xml", ".mjcf")
# What a box needs to know of the point it bounds, by the kind of the group that moves it.
BOXED_KINDS = {"eef_pose": "", "eef_delta": "position", "joint_position": "kinematics"}


def find_safety_problems(e: Embodiment) -> Iterator[Problem]:
    """Every broken rule of ``safety`` and of the groups' own safety keys."""
    yield from _watchdogs(e)
    for index, group in enumerate(e.actions):
        if group.grip is not None and group.kind != "gripper":
            yield Problem(f"actions[{index}].grip", f"the group is a {group.kind}, not a gripper", "delete it")
    for index, box in enumerate(e.safety.workspace):
        yield from _box(e, box, f"safety.workspace[{index}]")


def _watchdogs(e: Embodiment) -> Iterator[Problem]:
    period_ms = 1000.0 / e.control.frequency_hz
    fix = f"use at least {period_ms:g}, better three periods"
    limits = {"safety.watchdog_ms": e.safety.watchdog_ms}
    limits |= {f"actions[{i}].watchdog_ms": g.watchdog_ms for i, g in enumerate(e.actions) if g.watchdog_ms is not None}
    if e.safety.max_observation_age_ms is not None:
        limits["safety.max_observation_age_ms"] = e.safety.max_observation_age_ms
    for key, value in limits.items():
        if value < period_ms:
            problem = f"{value:g} ms is shorter than one policy period ({period_ms:g} ms): it would always trip"
            yield Problem(key, problem, fix)


def _box(e: Embodiment, box: Workspace, key: str) -> Iterator[Problem]:
    crossed = False
    for column, (axis, lower, upper) in enumerate(zip("xyz", box.lower, box.upper, strict=True)):
        if lower >= upper:
            crossed = True
            problem = f"{axis}: lower {lower:g} is not below upper {upper:g}"
            yield Problem(f"{key}.lower[{column}]", problem, "swap or correct them")
    groups = {group.name: group for group in e.actions}
    group = groups.get(box.group)
    if group is None:
        yield Problem(f"{key}.group", f"'{box.group}' is no action group", did_you_mean(box.group, tuple(groups)))
        return
    if group.kind not in BOXED_KINDS:
        yield Problem(
            f"{key}.group",
            f"{group.name} is a {group.kind} group, whose point in space is unknown",
            f"name a group of kind {', '.join(BOXED_KINDS)}",
        )
        return
    needed = BOXED_KINDS[group.kind] if group.command.ik is None and group.command.integrate is None else ""
    for name, given in (("kinematics", box.kinematics is not None), ("position", bool(box.position))):
        if given and name != needed:
            yield Problem(f"{key}.{name}", f"means nothing for the {group.kind} group {group.name}", "delete it")
        if name == needed and not given:
            fix = {
                "kinematics": "add kinematics: {model: robot.urdf, tip: link}",
                "position": "add position: the three state channels of x, y, z",
            }[name]
            yield Problem(f"{key}.{name}", f"missing, but a {group.kind} group needs it", fix)
    if box.position:
        yield from _position(e, box, f"{key}.position")
    if box.kinematics is not None and needed == "kinematics":
        yield from _kinematics(e, group, box.kinematics, f"{key}.kinematics")
    if group.kind == "eef_pose" and group.command.ik is None and not crossed:
        for column, axis in enumerate("xyz"):
            low, high = group.limits.lower[column : column + 1], group.limits.upper[column : column + 1]
            if low and high and (box.lower[column] > high[0] or box.upper[column] < low[0]):
                problem = f"{axis}: the box does not meet the limits {low[0]:g} … {high[0]:g} of {group.name}"
                yield Problem(f"{key}.lower[{column}]", problem, "let them overlap")


def _position(e: Embodiment, box: Workspace, key: str) -> Iterator[Problem]:
    if len(box.position) != 3:
        yield Problem(key, f"{len(box.position)} channels for x, y, z", "name three state channels")
    units = {channel: group.unit for group in e.state for channel in group.channels}
    for column, channel in enumerate(box.position):
        if channel not in units:
            yield Problem(f"{key}[{column}]", f"'{channel}' is no state channel", did_you_mean(channel, tuple(units)))
        elif units[channel].split(",")[0] != "m":
            problem = f"'{channel}' is measured in {units[channel]}, not in metres"
            yield Problem(f"{key}[{column}]", problem, "name the channels of the point's position")


def _kinematics(e: Embodiment, group: ActionGroup, spec: Kinematics, key: str) -> Iterator[Problem]:
    if not spec.model.lower().endswith(MODEL_SUFFIXES):
        problem = f"'{spec.model}' is neither URDF nor MJCF"
        yield Problem(f"{key}.model", problem, f"name a file that ends in {', '.join(MODEL_SUFFIXES)}")
    positions = tuple(c for g in e.actions if g.kind == "joint_position" for c in g.channels)
    for column, channel in enumerate(spec.channels):
        if channel not in positions:
            problem = f"'{channel}' is no channel of a joint_position group"
            yield Problem(f"{key}.channels[{column}]", problem, did_you_mean(channel, positions))
    count = len(spec.channels or group.channels)
    if spec.joints and len(spec.joints) != count:
        yield Problem(
            f"{key}.joints",
            f"{len(spec.joints)} joints for {count} channels",
            "name one per channel, in the same order",
        )
