"""Rules of a mobile base: the tracker that makes twists of waypoints, and the obstacle stop. ``check.py`` runs them."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vla_core.embodiment.errors import Problem
from qwen_vla_core.embodiment.spec import BASE_KINDS, TWIST_KINDS, ActionGroup, Embodiment, LinearMap

TRACKED_FIELDS = {"kanayama": ("vx", "wz"), "holonomic": ("vx", "vy", "wz")}


def find_tracker_problems(group: ActionGroup, key: str) -> Iterator[Problem]:
    """Rules of a waypoint group's command; ``key`` is that of the command."""
    command = group.command
    kinds = {kind for kind in (command.kind, command.simulation_kind) if kind in TWIST_KINDS}
    if not kinds:
        if command.tracker is not None:
            yield Problem(f"{key}.tracker", f"means nothing for {command.kind}", "delete it, or use kind: twist")
        return
    if command.tracker is None:
        fix = "add tracker: {max_speed: …, max_turn: …, acceleration: …, turn_acceleration: …} of the base"
        yield Problem(f"{key}.tracker", f"missing, but waypoints commanded as a {sorted(kinds)[0]} need it", fix)
        return
    if group.unit != "m,rad" or len(group.channels) != 3:
        problem = f"{len(group.channels)} channels in '{group.unit}' are no x, y, heading"
        yield Problem(key.removesuffix(".command") + ".channels", problem, "name x, y, yaw with unit 'm,rad'")
    if command.map != LinearMap():
        yield Problem(f"{key}.map", "a map of waypoints means nothing for the twist they become", "delete it")
    wanted = TRACKED_FIELDS[command.tracker.law]
    if sorted(group.twist_fields) != sorted(wanted):
        problem = f"[{', '.join(group.twist_fields)}] do not fit the law {command.tracker.law}"
        yield Problem(f"{key}.fields", problem, f"use [{', '.join(wanted)}], or another tracker.law")
    if command.tracker.near >= command.tracker.far:
        problem = f"{command.tracker.near:g} m is not below far = {command.tracker.far:g} m"
        yield Problem(f"{key}.tracker.near", problem, "give the smaller distance")


def find_obstacle_problems(e: Embodiment) -> Iterator[Problem]:
    """Rules of ``safety.obstacle_stop``."""
    stop = e.safety.obstacle_stop
    if stop is None:
        return
    key = "safety.obstacle_stop"
    bases = [group for group in e.actions if group.kind == "base_twist" or group.tracked()]
    if not bases:
        driven = ", ".join(group.name for group in e.actions if group.kind in BASE_KINDS)
        problem = f"{driven} is told poses, whose follower drives" if driven else "no group drives a base"
        yield Problem(key, f"{problem}: nothing here could stop it", "command a twist (kind: twist), or delete this")
        return
    if len(bases) > 1:
        names = " and ".join(group.name for group in bases)
        yield Problem(key, f"{names} both drive a base", "one scanner stops one base")
        return
    if stop.slow_distance <= stop.stop_distance:
        problem = f"{stop.slow_distance:g} m is not beyond stop_distance = {stop.stop_distance:g} m"
        yield Problem(f"{key}.slow_distance", problem, "leave room to slow down")
        return
    needed = _braking(e, bases[0])
    if needed is not None and stop.stop_distance + needed > stop.slow_distance:
        yield Problem(
            f"{key}.slow_distance",
            f"{stop.slow_distance:g} m is less than stop_distance and the {needed:.2f} m of a stop from full speed",
            f"use at least {stop.stop_distance + needed:.2f}, or a lower top speed",
        )


def _braking(e: Embodiment, group: ActionGroup) -> float | None:
    """Metres of a stop from full speed; None where the limits do not say."""
    if group.command.tracker is not None:
        tracker = group.command.tracker
        speed, acceleration = max(tracker.max_speed, tracker.max_reverse), tracker.acceleration
        jerk = tracker.jerk or acceleration * e.control.controller_rate_hz
    else:
        if "vx" not in group.command.fields or len(group.limits.lower) != len(group.command.fields):
            return None
        column = group.command.fields.index("vx")
        limits, scale = group.limits, abs(group.command.map.scale)
        if min(len(limits.upper), len(limits.velocity), len(limits.acceleration)) <= column:
            return None
        speed = scale * max(limits.upper[column], -limits.lower[column])
        acceleration, jerk = scale * limits.velocity[column], scale * limits.acceleration[column]
        if min(acceleration, jerk) <= 0:
            return None
    return 0.5 * speed * (speed / acceleration + acceleration / jerk)
