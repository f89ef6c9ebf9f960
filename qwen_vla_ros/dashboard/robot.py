"""What the server needs of a robot, and what the page needs to know of it once. No ROS in here."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.embodiment.spec import ActionGroup
from qwen_vla_core.rollouts.index import OUTCOMES

MAX_TEXT = 500  # characters of an instruction or a note
ACTIONS = ("instruction", "start", "stop", "estop", "reset", "robot_reset", *OUTCOMES)
TEXT_ACTIONS = ("instruction", *OUTCOMES)  # these carry an instruction or a note


@dataclass(frozen=True)
class Answer:
    """What became of a pressed button."""

    ok: bool
    message: str


class Robot(Protocol):
    """The other side of the buttons."""

    def act(self, action: str, text: str) -> Awaitable[Answer]:
        """Does one of ``ACTIONS``; called and awaited in the server's event loop, and never blocks it."""
        ...


@dataclass(frozen=True)
class Row:
    """One line of "commands against limits": an action channel, or a field of the twist that waypoints become.

    Attributes:
        measured: state channel that measures it; empty: none does.
    """

    name: str
    group: str
    kind: str
    unit: str
    lower: float
    upper: float
    measured: str


def rows(robot: Embodiment, simulated: bool) -> list[Row]:
    """The action channels in their order, then the twist fields of groups whose waypoints become a twist."""
    found = []
    for group in robot.actions:
        for index, channel in enumerate(group.channels):
            unit = _unit(group.unit, index, len(group.channels))
            limits = group.limits.lower[index], group.limits.upper[index]
            measured = channel if channel in robot.state_channels else ""
            found.append(Row(channel, group.name, group.kind, unit, *limits, measured))
    for group in filter(lambda group: group.tracked(simulated), robot.actions):
        tracker = group.command.tracker
        assert tracker is not None  # the YAML was checked
        for field in group.twist_fields:
            turning = field.startswith("w")
            fastest = tracker.max_turn if turning else tracker.max_speed
            lower = -tracker.max_reverse if field == "vx" else -fastest
            unit = "rad/s" if turning else "m/s"
            found.append(Row(field, f"{group.name} as speed", "twist", unit, lower, fastest, _odometry(robot, field)))
    return found


def command_rows(robot: Embodiment, group: ActionGroup, simulated: bool) -> list[int]:
    """Which rows the values of a group's command message belong to."""
    shown = rows(robot, simulated)
    if group.tracked(simulated):
        return [i for i, row in enumerate(shown) if row.group == f"{group.name} as speed"]
    return [robot.channels.index(channel) for channel in group.channels]


def _odometry(robot: Embodiment, field: str) -> str:
    """The state channel that reads this field of an odometry message."""
    read = [
        channel
        for group in robot.state
        if group.source == "odometry"
        for channel, name in zip(group.channels, group.fields, strict=True)
        if name == field
    ]
    return read[0] if read else ""


def describe(robot: Embodiment, simulated: bool) -> dict[str, Any]:
    """The robot as the page needs it: rows with limits, cameras, states, rates. Plain JSON values.

    ``rows`` begin with the action channels, of which there are ``channels``.
    """
    return {
        "name": robot.name,
        "description": robot.description,
        "simulated": simulated,
        "rows": [asdict(row) for row in rows(robot, simulated)],
        "channels": len(robot.channels),
        "cameras": [
            {"view": camera.view, "topic": camera.topic, "size": list(camera.size), "max_age_ms": camera.max_age_ms}
            for camera in robot.cameras
        ],
        "period_s": robot.period_s,
        "horizon": robot.control.horizon,
        "controller_rate_hz": robot.control.controller_rate_hz,
        "watchdog_ms": robot.safety.watchdog_ms,
        "max_observation_age_ms": robot.max_observation_age_ms,
    }


def _unit(unit: str, index: int, count: int) -> str:
    """The unit of one channel of a group: ``m,axis_angle`` are metres and then angles, ``m/s,rad/s`` turns last."""
    first, _, second = unit.partition(",")
    if not second:
        return unit
    if second in ("rad", "rad/s"):
        return second if index == count - 1 else first
    if index < 3:
        return first
    return "rad" if second in ("axis_angle", "euler_xyz") else ""
