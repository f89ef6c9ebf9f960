"""Every command a controller published, and whether any of it was unsafe.

The graph under test commands with ``joint_trajectory`` messages: they carry the position and the rate of every tick.
What the limiter promises can then be checked tick by tick without a clock, because position and rate give the length
of the step: p' = p + v'·dt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qwen_vla_core.embodiment import Embodiment

PERIODS = 2  # the limiter lets a late tick count as so many periods at most
WINDOW = 25  # ticks over which the speed in real time is checked
SLACK_S = 0.25  # a message may leave the process so much later than its tick was computed
SILENCE_S = 0.15  # a controller that let go for longer begins anew at the measured pose
TINY = 1e-6


@dataclass(frozen=True)
class Tick:
    """One group's command: its publisher's sequence number and clock, and the values in channel units."""

    number: int
    at_s: float
    position: np.ndarray
    rate: np.ndarray


def unsafe(robot: Embodiment, group_name: str, ticks: Sequence[Tick], *, lets_go: bool) -> list[str]:
    """What is wrong with one group's commands; empty where nothing is.

    Args:
        robot: whose limits hold; group_name: one of its action groups.
        ticks: in the order they were published; a number that falls back is a restarted controller.
        lets_go: the controller may fall silent and begin again at a pose that someone else has brought about.
    """
    group = next(group for group in robot.actions if group.name == group_name)
    lower, upper = np.array(group.limits.lower), np.array(group.limits.upper)
    velocity, acceleration = np.array(group.limits.velocity), np.array(group.limits.acceleration)
    step_s = PERIODS / robot.control.controller_rate_hz
    problems: list[str] = []

    def check(holds: np.ndarray | bool, what: str, tick: Tick) -> None:
        if not np.all(holds):
            channel = group.channels[int(np.argmin(holds))]
            problems.append(f"{group_name} tick {tick.number}: {what} at {channel}: {tick.position} {tick.rate}")

    segments: list[list[Tick]] = [[]]
    for tick in ticks:
        check(np.isfinite(tick.position) & np.isfinite(tick.rate), "not finite", tick)
        check((tick.position >= lower - TINY) & (tick.position <= upper + TINY), "outside its limits", tick)
        check(np.abs(tick.rate) <= velocity + TINY, "faster than its limit", tick)
        before = segments[-1][-1] if segments[-1] else None
        if before and (tick.number <= before.number or (lets_go and tick.at_s - before.at_s > SILENCE_S)):
            segments.append([])
        segments[-1].append(tick)
    if problems:
        return problems
    for segment in segments:
        for before, tick in pairwise(segment):
            missed = tick.number - before.number  # a queue of one may skip a message under load
            moved, change = tick.position - before.position, tick.rate - before.rate
            dt_s = step_s * missed
            if missed == 1:
                fastest = int(np.argmax(np.abs(tick.rate) / velocity))
                if np.abs(tick.rate[fastest]) > 0.01 * velocity[fastest]:
                    dt_s = float(moved[fastest] / tick.rate[fastest])
                    check(-TINY <= dt_s <= step_s + TINY, f"a step of {dt_s * 1e3:.1f} ms", tick)
                    check(np.abs(moved - tick.rate * dt_s) <= 1e-4, "position and rate disagree", tick)
            check(np.abs(moved) <= velocity * dt_s + 1e-4, "moved too far", tick)
            check(np.abs(change) <= acceleration * dt_s * 1.01 + 1e-3, "rate changed too fast", tick)
        for before, tick in zip(segment, segment[WINDOW:], strict=False):
            real_s = tick.at_s - before.at_s + SLACK_S
            check(np.abs(tick.position - before.position) <= velocity * real_s, f"too fast over {real_s:.2f} s", tick)
    return problems
