"""A dry run of one robot: the real control loop and its limits against a kinematic mock, in fake time, without ROS.

First a plan that stands still, then a small sine of every channel. Both must come through unchanged: what the limiter
changes here it will change on the robot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.findings import Finding
from qwen_vla_core.embodiment.spec import DELTA_KINDS, VELOCITY_KINDS, ActionGroup, Embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.mock_robot import MockRobot

START_NS = 1_000_000_000_000
HOLD_S = 2.0  # of standing still, beyond the soft start
SHARE_OF_RANGE = 0.05  # the sine moves a channel by so much of its range, or less where its rates do not allow it [O]
UNCHANGED = 1e-3  # of the sine: less than this is the plan's own rounding at a limit, not a change
SWING = (0.02, 0.05)  # metres, radians: how far a hand that is commanded through its joints goes [O]
SHARE_OF_RATES = 0.4  # of the largest velocity and acceleration that the sine may need [O]
NO_ROTATION_SINE = ("m,quaternion", "m,rot6d")  # their numbers cannot be moved one by one


@dataclass(frozen=True)
class Rehearsal:
    """What was planned, commanded and measured, tick by tick; channel units.

    Attributes:
        robot: as it is commanded; all columns are of its channels.
        times_s: (T,) since the first tick; sine_s: when the sine began; period_s: of the controller.
        planned_tc: (T, c) what the limiter was asked for; command_tc: (T, c) what it let pass.
        measured_tc: (T, c) the mock; NaN where a channel has no measured counterpart.
        amplitude_c: (c,) how far the sine goes.
        changes: phase (hold, sine) → kind of limit → ticks in which it changed something.
        mode, reason: how it ended.
    """

    robot: Embodiment
    times_s: np.ndarray
    sine_s: float
    period_s: float
    planned_tc: np.ndarray
    command_tc: np.ndarray
    measured_tc: np.ndarray
    amplitude_c: np.ndarray
    changes: Mapping[str, Mapping[str, int]]
    mode: str
    reason: str

    @property
    def rates_tc(self) -> np.ndarray:
        """(T, c) change of the command per second; zero at the first tick."""
        return _rates(self.command_tc, self.period_s)

    @property
    def accelerations_tc(self) -> np.ndarray:
        """(T, c) change of the rate per second."""
        return _rates(self.rates_tc, self.period_s)


def _rates(values_tc: np.ndarray, period_s: float) -> np.ndarray:
    return np.diff(values_tc, axis=0, prepend=values_tc[:1]) / period_s


def rehearse(robot: Embodiment, scale: float = 1.0) -> Rehearsal:
    """Plays both plans through ``ControlLoop``.

    Args:
        robot: the embodiment.
        scale: multiplies the sine, to see the limits at work.
    """
    loop, mock = ControlLoop(robot), MockRobot(robot, simulated=False)
    tick_ns = round(1e9 / robot.control.controller_rate_hz)
    commanded = loop.commanded
    rest_c = np.array([mock.values.get(channel, 0.0) for channel in commanded.channels])
    rest_c = np.where(loop.limiter.is_velocity_c, 0.0, rest_c)
    if loop.targets is not None:
        rest_c = loop.targets.plan_now(rest_c)
    is_velocity_c = np.array([group.kind in VELOCITY_KINDS for group in robot.actions for _ in group.channels])
    upper_c = np.array([x for group in robot.actions for x in group.limits.upper])
    cycle_s = max(4.0, 8 * robot.period_s)
    amplitude_c = scale * _amplitudes(robot, 2 * math.pi / cycle_s)
    hold_s = robot.safety.soft_start_s + HOLD_S
    sine_s = hold_s - robot.period_s  # the first action of the sine is approached from the one before it
    total_s = hold_s + 2 * cycle_s + max(1.0, 2 * robot.period_s)
    sign_c = np.where(rest_c + np.abs(amplitude_c) <= upper_c, 1.0, -1.0)

    def plan(seconds: np.ndarray) -> np.ndarray:
        """(n, c) where to be at each time; velocities swing around zero, positions away from rest and back."""
        phase = np.clip(seconds - hold_s, 0.0, 2 * cycle_s)[:, None] * (2 * math.pi / cycle_s)
        swing = np.where(is_velocity_c, np.sin(phase), 0.5 * (1.0 - np.cos(phase)) * sign_c)
        return np.asarray(rest_c + amplitude_c * swing)

    rows: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
    changes: dict[str, Counter[str]] = {"hold": Counter(), "sine": Counter()}
    replan_ns = max(tick_ns, min(200_000_000, round(robot.control.horizon * robot.period_s * 0.5e9)))
    next_chunk_ns = 0
    loop.start(START_NS)
    output = None
    for t_ns in range(tick_ns, round(total_s * 1e9), tick_ns):
        now_ns = START_NS + t_ns
        loop.update_state(mock.values, now_ns)
        if t_ns >= next_chunk_ns:
            # Observed one period ago: a chunk is played from its first action on, which is due one period after that.
            stamp_ns = max(now_ns - round(robot.period_s * 1e9), START_NS)
            due_s = (stamp_ns - START_NS) * 1e-9 + robot.period_s * np.arange(1, robot.control.horizon + 1)
            loop.feed(ActionChunk(plan(due_s), robot.channels, stamp_ns, robot.period_s), now_ns)
            next_chunk_ns = t_ns + replan_ns
        before = Counter(loop.limiter.interventions)
        output = loop.tick(now_ns)
        changes["sine" if t_ns * 1e-9 > sine_s else "hold"].update(loop.limiter.interventions - before)
        if not output.commands or output.mode != "running":
            break
        command_c = loop.limiter.position_c.copy()
        planned_c = loop.buffer.sample(now_ns) if loop.targets is None else loop.asked_c
        for group in commanded.actions:
            mock.command(group.name, group.command.map.to_channel(output.commands[group.name].values))
        mock.step(tick_ns * 1e-9)
        measured_c = np.array([mock.values.get(channel, math.nan) for channel in commanded.channels])
        rows.append((t_ns * 1e-9, command_c if planned_c is None else planned_c, command_c, measured_c))
    assert output is not None
    empty = np.zeros((0, len(commanded.channels)))
    times, planned, command, measured = (
        [np.array(column) for column in zip(*rows, strict=True)] if rows else [np.zeros(0), empty, empty, empty]
    )
    measured = np.where(loop.limiter.is_velocity_c, math.nan, measured)
    if loop.targets is not None and len(planned):
        amplitude_c = np.ptp(planned, axis=0)
    return Rehearsal(
        commanded,
        times,
        sine_s,
        tick_ns * 1e-9,
        planned,
        command,
        measured,
        amplitude_c,
        changes,
        output.mode,
        output.reason,
    )


def _amplitudes(robot: Embodiment, omega: float) -> np.ndarray:
    """(c,) a sine small enough for position, velocity and acceleration limits, also as the controller plays it.

    Between two actions the controller interpolates, so that the velocity changes at each action, within one tick; a
    displacement per period is held, so that the command itself steps within one tick.
    """
    tick_s = 1.0 / robot.control.controller_rate_hz
    parts = []
    for group in robot.actions:
        amplitude = _group_amplitudes(group, robot.period_s, omega, tick_s)
        if group.command.ik is not None:  # small enough for the joints too: all axes swing at once
            far = np.array([SWING[0]] * 3 + [SWING[1]] * (len(amplitude) - 3))
            amplitude = np.minimum(amplitude, far * omega * robot.period_s / 2 if group.kind in DELTA_KINDS else far)
        parts.append(amplitude)
    return np.concatenate(parts)


def _group_amplitudes(group: ActionGroup, period_s: float, omega: float, tick_s: float) -> np.ndarray:
    limits = group.limits
    lower, upper = np.array(limits.lower), np.array(limits.upper)
    velocity, acceleration = np.array(limits.velocity), np.array(limits.acceleration)
    reach = SHARE_OF_RANGE * (upper - lower)
    if group.kind in VELOCITY_KINDS:
        reach = 2 * SHARE_OF_RANGE * np.minimum(-lower, upper)
    steepest = omega * period_s / tick_s if group.kind in DELTA_KINDS else omega
    sharpest = steepest / tick_s if group.kind in VELOCITY_KINDS else omega * omega * period_s / tick_s
    allowed = SHARE_OF_RATES * np.minimum(velocity / steepest, acceleration / sharpest)
    amplitude = np.minimum(reach, allowed)
    if group.command.tracker is not None and group.tracked() and group.command.tracker.law == "kanayama":
        amplitude[1] = 0.0  # it cannot go sideways, and its start looks along x
    if group.unit in NO_ROTATION_SINE:
        amplitude[3:] = 0.0
    return np.asarray(amplitude)


def report(run: Rehearsal) -> list[Finding]:
    """What a person must know before the robot moves."""
    findings: list[Finding] = []
    channels = run.robot.channels
    if run.mode != "running":
        findings.append(Finding("error", "control loop", f"{run.mode}: {run.reason}", "see docs/safety.md"))
    if not len(run.times_s):
        return findings
    findings += [_hold(run), *_sine(run)]
    limits = [group.limits for group in run.robot.actions]
    velocity_c = np.array([x for limit in limits for x in limit.velocity])
    acceleration_c = np.array([x for limit in limits for x in limit.acceleration])
    for what, used_c in (
        ("velocity", np.abs(run.rates_tc).max(axis=0) / velocity_c),
        ("acceleration", np.abs(run.accelerations_tc).max(axis=0) / acceleration_c),
    ):
        worst = int(np.argmax(used_c))
        text = f"at most {used_c[worst]:.0%} of the limit, by {channels[worst]}"
        findings.append(Finding("ok" if used_c[worst] <= 1 + 1e-6 else "error", what, text))
    return findings


def _hold(run: Rehearsal) -> Finding:
    still_tc = run.command_tc[run.times_s <= run.sine_s]
    drift_c = np.abs(still_tc - still_tc[0]).max(axis=0) if len(still_tc) else np.zeros(len(run.robot.channels))
    worst = int(np.argmax(drift_c))
    if drift_c[worst] > 1e-9:
        text = f"a plan that stands still moved {run.robot.channels[worst]} by {drift_c[worst]:.3g}"
        return Finding("error", "standing still", text, "give a start pose inside the limits, or correct the limits")
    return Finding("ok", "standing still", f"no command changed in {run.sine_s:g} s")


def _sine(run: Rehearsal) -> list[Finding]:
    moving = run.times_s > run.sine_s
    off_tc = np.abs(run.command_tc - run.planned_tc)[moving]
    changed = {name: count for name, count in run.changes["sine"].items() if count}
    off_c = off_tc.max(axis=0) if len(off_tc) else np.zeros(len(run.robot.channels))
    off_c = np.where(off_c > UNCHANGED * run.amplitude_c, off_c, 0.0)
    if not changed or not off_c.any():
        return [Finding("ok", "small sine", "the limiter changed nothing")]
    ticks = ", ".join(f"{name} in {count}" for name, count in changed.items())
    findings = [
        Finding("warn", "small sine", f"the limiter changed it; of {int(moving.sum())} ticks, {ticks}", "see below")
    ]
    for column in np.argsort(-off_c)[:5]:
        if off_c[column] > 0:
            name = run.robot.channels[int(column)]
            text = f"commanded up to {off_c[column]:.3g} away from the plan"
            findings.append(
                Finding("warn", name, text, "compare its limits with the robot's manual; a smaller --scale")
            )
    return findings
