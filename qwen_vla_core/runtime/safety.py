"""The last thing between any policy and the motors.

A target is first made sane (finite, near the measured pose, inside the position limits, not through what a gripper
holds); then a motion rule (``motion.py``) takes the next step towards it under velocity, acceleration and jerk limits;
last, the workspace boxes (``workspace.py``) shorten steps of joints that would carry a point out. The steps of a stop
pass all of it, always.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from qwen_vla_core.embodiment.spec import VELOCITY_KINDS, Embodiment
from qwen_vla_core.runtime.grip import GripGuard
from qwen_vla_core.runtime.motion import AccelerationRule, Axes, Choice, Goal, JerkRule, State
from qwen_vla_core.runtime.tally import Tally
from qwen_vla_core.runtime.workspace import JointFence, load_bounded

MIN_DT_S = 1e-6
MAX_PERIODS = 2.0
STILL = 1e-15  # of any unit per second: what a curve towards zero leaves over in floating point


class SafetyLimiter:
    """Turns any target into a command that is finite, inside the limits and reachable from the previous command.

    Position-like channels are limited in position, rate, acceleration and, where the YAML says so, jerk. Velocity-like
    channels (a mobile base) are limited the same way, where "position" is the commanded value itself. A box narrows x,
    y, z of eef_pose groups, so that it enjoys the same guarantee; a box on joints is kept through their kinematics. A
    normal motion below every limit passes through bit-exact, unlagged.

    Attributes:
        lower_c, upper_c: (c,) effective position limits, boxes of eef_pose groups included, channel units.
        velocity_c: (c,) rate limits, units/s; fall_c, rise_c: the same downwards and upwards: a gripper may close more
            slowly than it opens.
        acceleration_c, jerk_c: (c,) limits of the change of rate, units/s², and of the change of that, units/s³
            (infinite where there is none).
        is_velocity_c: (c,) bool, True where the channel commands a velocity (stopping means zero, not "stay").
        tally: how often each limit changed the target, per channel.

    Raises:
        EmbodimentError: the model of a workspace box cannot be used.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.lower_c, self.upper_c = _position_limits(embodiment)
        limits = [group.limits for group in embodiment.actions]
        self.velocity_c = np.array([x for limit in limits for x in limit.velocity], dtype=np.float64)
        self.acceleration_c = np.array([x for limit in limits for x in limit.acceleration], dtype=np.float64)
        self.jerk_c = np.array(
            [x for limit in limits for x in (limit.jerk or [np.inf] * len(limit.velocity))], dtype=np.float64
        )
        self.is_velocity_c = np.array(
            [group.kind in VELOCITY_KINDS for group in embodiment.actions for _ in group.channels]
        )
        for what, values in (("velocity", self.velocity_c), ("acceleration", self.acceleration_c)):
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise ValueError(f"{what} limits must be finite and positive")
        if not (self.jerk_c > 0).all():
            raise ValueError("jerk limits must be positive")
        self._grip = GripGuard(embodiment)
        closing = np.minimum(self.velocity_c, self._grip.closing_c)
        self.fall_c = np.where(self._grip.closes_down_c, closing, self.velocity_c)
        self.rise_c = np.where(self._grip.closes_down_c, self.velocity_c, closing)
        self._smooth_c = np.isfinite(self.jerk_c)
        self.max_jump = embodiment.safety.max_jump
        self.max_dt_s = MAX_PERIODS / embodiment.control.controller_rate_hz
        self.tally = Tally(embodiment)
        self._rules = self._make_rules()
        bounded = load_bounded(embodiment)
        largest_c = np.maximum(np.abs(self.lower_c), np.abs(self.upper_c))
        self.fence = JointFence(embodiment, bounded, largest_c) if bounded else None
        self._start(np.clip(np.zeros_like(self.lower_c), self.lower_c, self.upper_c))

    def _make_rules(self) -> list[tuple[slice | np.ndarray, AccelerationRule | JerkRule]]:
        """The channels with and without a jerk limit; one rule alone needs no indexing."""
        axes = Axes(
            self.lower_c, self.upper_c, self.fall_c, self.rise_c, self.acceleration_c, self.jerk_c, self.is_velocity_c
        )
        smooth = self._smooth_c
        if not smooth.any():
            return [(slice(None), AccelerationRule(axes))]
        if smooth.all():
            return [(slice(None), JerkRule(axes))]
        rough, smooth = np.flatnonzero(~smooth), np.flatnonzero(smooth)
        return [(rough, AccelerationRule(axes.take(rough))), (smooth, JerkRule(axes.take(smooth)))]

    @property
    def interventions(self) -> Counter[str]:
        """Number of steps in which each limit changed the target."""
        return self.tally.steps

    @property
    def position_c(self) -> np.ndarray:
        """(c,) the last command, channel units."""
        return self._position_c

    @property
    def rate_c(self) -> np.ndarray:
        """(c,) rate of change of the last command, units/s."""
        return self._rate_c

    @property
    def at_rest(self) -> bool:
        """Whether the command no longer changes and every velocity-like channel is zero."""
        turning = self._acceleration_c[self._smooth_c]  # at rest for a moment only, while it is not zero
        return not (self._rate_c.any() or self._position_c[self.is_velocity_c].any() or turning.any())

    def reset(self, position_c: np.ndarray) -> None:
        """Starts from rest at ``position_c`` (c,), finite; the next command leaves from there."""
        if not np.isfinite(position_c).all():
            raise ValueError("the limiter starts from a finite pose only")
        self._start(np.clip(position_c, self.lower_c, self.upper_c).astype(np.float64))

    def _start(self, position_c: np.ndarray) -> None:
        self._position_c = position_c
        self._rate_c = np.zeros_like(position_c)
        self._acceleration_c = np.zeros_like(position_c)
        self._target_c = position_c.copy()
        self._target_rate_c = np.zeros_like(position_c)
        self._grip.reset()
        if self.fence is not None:
            self.fence.reset(position_c)

    def rebase(self, columns: slice, values: np.ndarray) -> None:
        """Puts channels that nobody is told (the setpoint of a tracked base) elsewhere, at rest; finite values."""
        value = np.clip(values, self.lower_c[columns], self.upper_c[columns])
        for kept in (self._position_c, self._target_c):
            kept[columns] = value
        for kept in (self._rate_c, self._acceleration_c, self._target_rate_c):
            kept[columns] = 0.0

    def step(
        self, target_c: np.ndarray, measured_c: np.ndarray, dt_s: float, velocity_scale: float = 1.0
    ) -> np.ndarray:
        """The next command towards a target.

        Args:
            target_c: (c,) wanted command in channel units; may hold anything, also NaN and infinities.
            measured_c: (c,) measured pose; NaN where there is none (velocity-like channels).
            dt_s: seconds since the last step. Zero, negative or NaN repeats the last command; more than two control
                periods counts as two, so that a stall never becomes a jump.
            velocity_scale: 0…1, the soft start's share of the velocity limit.

        Returns:
            (c,) float64 command, owned by the caller.
        """
        return self._advance(self._safe_target(target_c, measured_c, dt_s), dt_s, velocity_scale)

    def stop(self, dt_s: float) -> np.ndarray:
        """The next command while coming to rest at full deceleration; velocity-like channels go to zero."""
        return self._advance(None, dt_s, 1.0)

    def _safe_target(self, target_c: np.ndarray, measured_c: np.ndarray, dt_s: float) -> np.ndarray:
        finite = np.isfinite(target_c)
        if not finite.all():
            self.tally.add("non_finite", ~finite)
            target_c = np.where(finite, target_c, self._position_c)
        near = target_c
        checked = np.isfinite(measured_c) & ~self.is_velocity_c
        if checked.any():
            measured = np.where(checked, measured_c, 0.0)
            low, high = measured - self.max_jump, measured + self.max_jump
            sane = checked & (low <= self.upper_c) & (high >= self.lower_c)
            jumped = sane & ((target_c < low) | (target_c > high))
            lost = checked & ~sane
            if jumped.any():
                self.tally.add("max_jump", jumped)
                near = np.where(jumped, np.clip(target_c, low, high), near)
            if lost.any():
                self.tally.add("measured_out_of_range", lost)
                near = np.where(lost, self._position_c, near)
        clipped = np.minimum(np.maximum(near, self.lower_c), self.upper_c)
        self.tally.add("position", clipped != near)
        held, blocked = self._grip.limit(clipped, measured_c, self._position_c, min(dt_s, self.max_dt_s))
        self.tally.add("grip", blocked)
        return held

    def _advance(self, target_c: np.ndarray | None, dt_s: float, velocity_scale: float) -> np.ndarray:
        """One step of the motion rules. ``target_c=None`` means come to rest."""
        if not dt_s >= MIN_DT_S:
            return self._position_c.copy()
        dt, scale = min(dt_s, self.max_dt_s), min(max(velocity_scale, 0.0), 1.0)
        before = State(self._position_c, self._rate_c, self._acceleration_c)
        goal = self._goal(target_c, dt)
        choices = [
            rule.choose(_part(before, columns), _goal_part(goal, columns), dt, scale) for columns, rule in self._rules
        ]
        choice = choices[0] if len(choices) == 1 else self._joined(choices)
        position, rate, acted = choice.position, choice.rate, None
        if self.fence is not None and not goal.resting:
            position, rate, acted = self._confined(self.fence, before, choice, dt, scale)
        position = np.minimum(np.maximum(position, self.lower_c), self.upper_c)
        if not goal.resting:
            self._count(choice, acted, velocity_scale)
        rate = np.where(np.abs(rate) < STILL, 0.0, rate)  # no position changes by it, and rest is rest
        self._target_rate_c = np.zeros_like(rate) if goal.resting else (goal.target - self._target_c) / dt
        self._target_c = np.where(self.is_velocity_c, goal.target, position) if goal.resting else goal.target
        self._acceleration_c = (rate - before.rate) / dt
        self._position_c, self._rate_c = position, rate
        return position.copy()

    def _goal(self, target_c: np.ndarray | None, dt: float) -> Goal:
        """The target and its own motion; what is faster than the limits is a jump, and has no motion to join."""
        if target_c is None:
            target_c = np.where(self.is_velocity_c, np.clip(0.0, self.lower_c, self.upper_c), self._position_c)
            still = np.zeros_like(target_c)
            moving = np.where(self.is_velocity_c, (target_c - self._target_c) / dt, 0.0)
            return Goal(target_c, np.where(np.abs(moving) <= self.velocity_c, moving, 0.0), still, True)
        rate = (target_c - self._target_c) / dt
        change = (rate - self._target_rate_c) / dt
        change = np.where(np.abs(change) <= self.acceleration_c, change, 0.0)
        rate = np.where((rate <= self.rise_c) & (rate >= -self.fall_c), rate, 0.0)
        return Goal(target_c, rate, change, False)

    def _joined(self, choices: list[Choice]) -> Choice:
        """The choices of several rules as one over all channels."""
        parts = []
        for field in range(len(choices[0])):
            values = np.empty(len(self.lower_c), dtype=choices[0][field].dtype)
            for (columns, _), choice in zip(self._rules, choices, strict=True):
                values[columns] = choice[field]
            parts.append(values)
        return Choice(*parts)

    def _confined(
        self, fence: JointFence, before: State, choice: Choice, dt: float, scale: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position and rate of the step that the boxes leave, and (c,) bool, the channels they changed."""

        def reserves(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            below, above = np.empty_like(rate), np.empty_like(rate)
            for columns, rule in self._rules:
                part = rate[..., columns]
                change = (part - before.rate[columns]) / dt
                below[..., columns], above[..., columns] = rule.reserves(part, change)
            return below, above

        def blend(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            rates = choice.stop_rate + shares * (choice.rate - choice.stop_rate)
            allowed = np.ones(rates.shape, bool)
            for columns, rule in self._rules:
                allowed[:, columns] = rule.safe(_part(before, columns), rates[:, columns], dt, scale)
            return (before.position + rates * dt, *reserves(rates), allowed)

        shares = fence.confine(choice.position, choice.below, choice.above, blend)
        if shares is None:
            return choice.position, choice.rate, np.zeros(len(choice.rate), bool)
        slower = np.where(shares < 1.0, choice.stop_rate + shares * (choice.rate - choice.stop_rate), choice.rate)
        acted = slower != choice.rate
        return np.where(acted, before.position + slower * dt, choice.position), slower, acted

    def _count(self, choice: Choice, acted: np.ndarray | None, velocity_scale: float) -> None:
        if acted is not None:
            self.tally.add("workspace", acted)
        if choice.landed.all():
            return
        short = ~choice.landed
        self.tally.add("velocity" if velocity_scale >= 1.0 else "soft_start", short & choice.too_fast)
        self.tally.add("acceleration", short & choice.too_sudden)
        self.tally.add("jerk", short & ~choice.too_fast & ~choice.too_sudden)


def _part(state: State, columns: slice | np.ndarray) -> State:
    return State(*(values[columns] for values in state))


def _goal_part(goal: Goal, columns: slice | np.ndarray) -> Goal:
    return Goal(goal.target[columns], goal.rate[columns], goal.acceleration[columns], goal.resting)


def _position_limits(embodiment: Embodiment) -> tuple[np.ndarray, np.ndarray]:
    """(c,), (c,) position limits; a workspace box narrows the first three channels (x, y, z) of an eef_pose group."""
    lower: list[float] = []
    upper: list[float] = []
    for group in embodiment.actions:
        low, high = list(group.limits.lower), list(group.limits.upper)
        for box in embodiment.safety.workspace:
            if group.kind == "eef_pose" and box.group == group.name:
                low[:3] = [max(a, b) for a, b in zip(low[:3], box.lower, strict=True)]
                high[:3] = [min(a, b) for a, b in zip(high[:3], box.upper, strict=True)]
        lower += low
        upper += high
    lower_c, upper_c = np.array(lower, dtype=np.float64), np.array(upper, dtype=np.float64)
    if not (np.isfinite(lower_c).all() and np.isfinite(upper_c).all() and (lower_c <= upper_c).all()):
        raise ValueError("position limits must be finite, with lower <= upper, and overlap the workspace box")
    return lower_c, upper_c
