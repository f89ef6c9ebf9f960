"""What the server needs of a robot, and what the page needs to know of it once. No ROS in here."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_vla_core.embodiment import Embodiment
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


def describe(robot: Embodiment, simulated: bool) -> dict[str, Any]:
    """The robot as the page needs it: channels with limits, cameras, states, rates. Plain JSON values."""
    measured = set(robot.state_channels)
    channels = []
    for group in robot.actions:
        for index, channel in enumerate(group.channels):
            channels.append(
                {
                    "name": channel,
                    "group": group.name,
                    "kind": group.kind,
                    "unit": _unit(group.unit, index, len(group.channels)),
                    "lower": group.limits.lower[index],
                    "upper": group.limits.upper[index],
                    "measured": channel in measured,
                }
            )
    return {
        "name": robot.name,
        "description": robot.description,
        "simulated": simulated,
        "channels": channels,
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
