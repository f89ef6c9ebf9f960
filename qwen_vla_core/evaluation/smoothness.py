"""How smoothly a robot was commanded: jerk, jumps between plans, and how long the plan stood still."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_vla_core.embodiment.spec import VELOCITY_KINDS, ActionGroup, Embodiment


def moving_columns(robot: Embodiment) -> dict[str, list[int]]:
    """Unit → the action columns whose smoothness is judged.

    Joints in radians where the robot has them, else positions (or displacements) in metres: numbers in different units
    have no common mean. Grippers are left out, they are meant to snap.
    """
    columns: dict[str, list[int]] = {}
    first = 0
    for group in robot.actions:
        unit, count = _unit(group)
        if unit:
            columns.setdefault(unit, []).extend(range(first, first + count))
        first += len(group.channels)
    best = "rad" if "rad" in columns else "m"
    return {best: columns[best]} if best in columns else {}


def _unit(group: ActionGroup) -> tuple[str, int]:
    """(unit, how many leading channels have it) of a group; ("", 0) where it is not judged."""
    if group.kind in ("joint_position", "joint_delta"):
        return "rad", len(group.channels)
    if group.kind in ("eef_pose", "eef_delta"):
        return "m", 3
    if group.kind == "waypoint":
        return "m", 2
    return "", 0


def jerks(commands_tc: np.ndarray, robot: Embodiment, control_hz: float) -> np.ndarray:
    """(T', n) absolute jerk of the judged columns in unit/s³, empty for fewer than four commands.

    Third differences of commanded positions. A displacement per period is a velocity: its second differences.
    """
    columns = next(iter(moving_columns(robot).values()), [])
    is_rate_c = np.array([group.kind in VELOCITY_KINDS for group in robot.actions for _ in group.channels])
    positions_tc = np.array(commands_tc, dtype=np.float64)
    if len(positions_tc) < 4 or not columns:
        return np.zeros((0, len(columns)))
    velocity_tc = np.diff(positions_tc, axis=0) * control_hz
    velocity_tc[:, is_rate_c] = positions_tc[1:, is_rate_c] / robot.period_s
    return np.abs(np.diff(velocity_tc, n=2, axis=0)[:, columns]) * control_hz**2


class PlayStatistics:
    """Collects one episode.

    Args:
        robot: whose commands these are.
        control_hz: commands per second.
        planned: whose plans these are, where it is not commanded as the policy says.
    """

    def __init__(self, robot: Embodiment, control_hz: float, planned: Embodiment | None = None) -> None:
        self._robot = robot
        self._control_hz = control_hz
        self._columns = next(iter(moving_columns(planned or robot).values()), [])
        self._commands: list[np.ndarray] = []
        self._jumps: list[float] = []

    def add_command(self, command_c: np.ndarray) -> None:
        """What was commanded in one control step."""
        self._commands.append(np.array(command_c))

    def add_switch(self, jump_c: np.ndarray | None) -> None:
        """A chunk took over; ``jump_c`` (c,) new minus old plan at that moment, None for a first one."""
        if jump_c is not None and self._columns:
            self._jumps.append(float(np.abs(jump_c[self._columns]).max()))

    def metrics(self, played_s: float, seconds: float) -> dict[str, float]:
        """All measures, the same names in every episode.

        Args:
            played_s: how far the plan's clock has moved.
            seconds: how long the episode was.

        Returns:
            jerk_mean and jerk_max over time and judged columns (unit/s³); jump_mean and jump_max over the switches, the
            largest column of each (unit); idle: share of the time by which the plan stood still or was slowed down.
        """
        jerk = jerks(np.array(self._commands), self._robot, self._control_hz) if self._commands else np.zeros((0, 0))
        return {
            "jerk_mean": float(jerk.mean()) if jerk.size else 0.0,
            "jerk_max": float(jerk.max()) if jerk.size else 0.0,
            "jump_mean": float(np.mean(self._jumps)) if self._jumps else 0.0,
            "jump_max": max(self._jumps, default=0.0),
            "idle": 1.0 - played_s / seconds if seconds > 0 else 0.0,
        }


class Smoothness:
    """A watcher of an episode in which the world waits for its policy: jerk alone, of the commands that were played."""

    def __init__(self, robot: Embodiment, control_hz: float) -> None:
        """
        Args:
            robot: whose commands these are.
            control_hz: commands per second.
        """
        self._statistics = PlayStatistics(robot, control_hz)

    def step(self, world: Any) -> None:
        """After each control step."""
        self._statistics.add_command(world.command())

    def metrics(self, world: Any) -> dict[str, float]:
        """jerk_mean and jerk_max, see ``PlayStatistics``."""
        found = self._statistics.metrics(0.0, 0.0)
        return {name: found[name] for name in ("jerk_mean", "jerk_max")}
