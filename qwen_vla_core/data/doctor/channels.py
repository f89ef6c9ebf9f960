"""What is known about a channel before its values are seen: unit, limits, arm, and how large a large motion is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.embodiment.spec import ActionGroup, Embodiment

Side = Literal["state", "action"]
DELTA_KINDS = frozenset({"joint_delta", "eef_delta"})  # values are changes within one step
RATE_KINDS = frozenset({"base_twist"})  # values are changes per second
# A large motion in a channel without limits [O].
_USUAL = {"rad": math.pi, "m": 1.0, "fraction": 1.0, "m/s": 1.0, "rad/s": math.pi, "eigengrasp": 4.0, "": 2.0}
_SIDE = re.compile(r"(?:^|_)(left|right|l|r)(?:_|$)")
_TURN = re.compile(r"(?:^|_)(?:wx|wy|wz|yaw|theta|omega|angular|rotation)(?:_|$)")


@dataclass(frozen=True)
class Channel:
    """One column of a side.

    Attributes:
        name: of the channel.
        column: its number.
        kind: of its group.
        unit: of this channel alone (``rad`` for the rotation of an ``m,axis_angle`` group; empty for numbers without
            unit such as quaternions).
        lower: limit, or None.
        upper: limit, or None.
        velocity: limit of the rate of change, or None.
        scale: full scale: the range of the limits, or what is usual for the unit.
        arm: ``left``, ``right`` or empty.
    """

    name: str
    column: int
    kind: str
    unit: str
    lower: float | None
    upper: float | None
    velocity: float | None
    scale: float
    arm: str

    @property
    def is_change(self) -> bool:
        """Whether the values are changes rather than places."""
        return self.kind in DELTA_KINDS or self.kind in RATE_KINDS


def channels_of(contract: DataContract, robot: Embodiment | None, side: Side) -> tuple[Channel, ...]:
    """The channels of a dataset, with the limits that a robot gives to those of the same name, kind and unit."""
    groups = contract.state if side == "state" else contract.action
    limits = {name: (group, i) for group in (robot.actions if robot else ()) for i, name in enumerate(group.channels)}
    found: list[Channel] = []
    for group in groups:
        for i, name in enumerate(group.channels):
            found.append(_channel(group, i, len(found), limits.get(name)))
    return tuple(found)


def _channel(group: ChannelGroup, i: int, column: int, known: tuple[ActionGroup, int] | None) -> Channel:
    name, unit = group.channels[i], _own_unit(group, i)
    lower = upper = velocity = None
    if known and (known[0].kind, known[0].unit) == (group.kind, group.unit):
        limits, j = known[0].limits, known[1]
        lower, upper, velocity = limits.lower[j], limits.upper[j], limits.velocity[j]
    scale = _USUAL[unit]
    # The limits of a change are those of one step; a large motion is still one of places.
    if lower is not None and upper is not None and upper > lower and group.kind not in DELTA_KINDS:
        scale = upper - lower
    side = _SIDE.search(name.lower()) or _SIDE.search(group.name.lower())
    arm = {"l": "left", "r": "right"}.get(side[1], side[1]) if side else ""
    return Channel(name, column, group.kind, unit, lower, upper, velocity, scale, arm)


def _own_unit(group: ChannelGroup, i: int) -> str:
    """Unit of one channel of a group whose unit may name several."""
    first, _, second = group.unit.partition(",")
    if not second:
        return first if first in _USUAL else ""
    if group.unit == "m/s,rad/s":
        turns = [bool(_TURN.search(name.lower())) for name in group.channels]
        return second if (turns[i] if any(turns) else i == len(turns) - 1) else first
    if second == "rad":  # x, y, heading
        return second if i % 3 == 2 else first
    if i < 3:
        return first
    return "rad" if second in ("axis_angle", "euler_xyz") else ""


def names(channels: Sequence[Channel]) -> str:
    """Channel names for a sentence."""
    return ", ".join(channel.name for channel in channels)
