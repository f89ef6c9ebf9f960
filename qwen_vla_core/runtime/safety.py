"""The last thing between any policy and the motors: position, velocity, acceleration, jump and workspace limits.

One discrete rule carries the guarantee. Let p be the last command and v its rate of change, both per channel. Each
step picks the next rate first and moves second: p' = p + v'·dt. With deceleration a, a channel that leaves the step at
rate v' needs at most v'²/2a to stop, for any later step lengths, because the rates that follow are the right-hand
Riemann sum of a decreasing line. So v' is bounded by the positive root of v'·dt + v'²/2a = room. If the previous step
obeyed it, decelerating fully obeys it too: the bounds of this step always have a common value, and neither the
position limit nor the acceleration limit ever has to give way to the other.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from qwen_vla_core.embodiment.spec import VELOCITY_KINDS, Embodiment

MIN_DT_S = 1e-6
MAX_PERIODS = 2.0


def stopping_speed(room: np.ndarray, acceleration: np.ndarray, dt_s: float) -> np.ndarray:
    """Largest speed for the coming step after which the channel can still stop within ``room``.

    Positive root of ``v·dt + v²/(2a) = room``, in the form that does not cancel for small dt.

    Args:
        room: (c,) distance available, ≥ 0, channel units.
        acceleration: (c,) deceleration available, > 0, units/s².
        dt_s: length of the coming step in seconds, > 0.
    """
    return 2.0 * room / (dt_s + np.sqrt(dt_s * dt_s + 2.0 * room / acceleration))


class SafetyLimiter:
    """Turns any target into a command that is finite, inside the limits and reachable from the previous command.

    Position-like channels are limited in position, rate and acceleration. Velocity-like channels (a mobile base) are
    limited the same way, where "position" is the commanded value itself. A Cartesian box narrows x, y, z of eef_pose
    groups, so that it enjoys the same guarantee. A normal motion below every limit passes through bit-exact, unlagged.

    Attributes:
        lower_c, upper_c: (c,) effective position limits, workspace included, channel units.
        velocity_c: (c,) rate limits, units/s; acceleration_c: (c,) limits of the change of rate, units/s².
        is_velocity_c: (c,) bool, True where the channel commands a velocity (stopping means zero, not "stay").
        interventions: number of steps in which each limit changed the target.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.lower_c, self.upper_c = _position_limits(embodiment)
        limits = [group.limits for group in embodiment.actions]
        self.velocity_c = np.array([x for limit in limits for x in limit.velocity], dtype=np.float64)
        self.acceleration_c = np.array([x for limit in limits for x in limit.acceleration], dtype=np.float64)
        self.is_velocity_c = np.array(
            [group.kind in VELOCITY_KINDS for group in embodiment.actions for _ in group.channels]
        )
        if not (np.isfinite(self.velocity_c).all() and (self.velocity_c > 0).all()):
            raise ValueError("velocity limits must be finite and positive")
        if not (np.isfinite(self.acceleration_c).all() and (self.acceleration_c > 0).all()):
            raise ValueError("acceleration limits must be finite and positive")
        self.max_jump = embodiment.safety.max_jump
        self.max_dt_s = MAX_PERIODS / embodiment.control.controller_rate_hz
        self.interventions: Counter[str] = Counter()
        self._position_c = np.clip(np.zeros_like(self.lower_c), self.lower_c, self.upper_c)
        self._rate_c = np.zeros_like(self.lower_c)
        self._target_c = self._position_c.copy()

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
        return not (self._rate_c.any() or self._position_c[self.is_velocity_c].any())

    def reset(self, position_c: np.ndarray) -> None:
        """Starts from rest at ``position_c`` (c,), finite; the next command leaves from there."""
        if not np.isfinite(position_c).all():
            raise ValueError("the limiter starts from a finite pose only")
        self._position_c = np.clip(position_c, self.lower_c, self.upper_c).astype(np.float64)
        self._rate_c = np.zeros_like(self._position_c)
        self._target_c = self._position_c.copy()

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
        return self._advance(self._safe_target(target_c, measured_c), dt_s, velocity_scale)

    def stop(self, dt_s: float) -> np.ndarray:
        """The next command while coming to rest at full deceleration; velocity-like channels go to zero."""
        return self._advance(None, dt_s, 1.0)

    def _safe_target(self, target_c: np.ndarray, measured_c: np.ndarray) -> np.ndarray:
        finite = np.isfinite(target_c)
        if not finite.all():
            self.interventions["non_finite"] += 1
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
                self.interventions["max_jump"] += 1
                near = np.where(jumped, np.clip(target_c, low, high), near)
            if lost.any():
                self.interventions["measured_out_of_range"] += 1
                near = np.where(lost, self._position_c, near)
        clipped = np.minimum(np.maximum(near, self.lower_c), self.upper_c)
        if (clipped != near).any():
            self.interventions["position"] += 1
        return clipped

    def _advance(self, target_c: np.ndarray | None, dt_s: float, velocity_scale: float) -> np.ndarray:
        """One step of the rule in the module's docstring. ``target_c=None`` means come to rest."""
        if not dt_s >= MIN_DT_S:
            return self._position_c.copy()
        dt = min(dt_s, self.max_dt_s)
        position, rate, acceleration = self._position_c, self._rate_c, self.acceleration_c
        change = acceleration * dt
        cap = np.maximum(self.velocity_c * min(max(velocity_scale, 0.0), 1.0), np.abs(rate) - change)
        low = np.maximum(rate - change, -np.minimum(cap, stopping_speed(position - self.lower_c, acceleration, dt)))
        high = np.minimum(rate + change, np.minimum(cap, stopping_speed(self.upper_c - position, acceleration, dt)))

        resting = target_c is None
        if target_c is None:
            target_c = np.where(self.is_velocity_c, np.clip(0.0, self.lower_c, self.upper_c), position)
        target_rate = (target_c - self._target_c) / dt
        target_rate = np.where(np.abs(target_rate) <= self.velocity_c, target_rate, 0.0)
        wanted = (target_c - position) / dt
        # Landing on the target in one step is right only when its own motion can be joined in the next one;
        # otherwise close the gap on the curve that can still brake, on top of the target's motion.
        gap = target_c - position - target_rate * dt
        landing = np.abs(gap) <= change * dt
        chosen = np.where(landing, wanted, target_rate + np.sign(gap) * stopping_speed(np.abs(gap), acceleration, dt))
        if resting:
            landing = landing & self.is_velocity_c
            chosen = np.where(self.is_velocity_c, chosen, 0.0)
        new_rate = np.minimum(np.maximum(chosen, low), high)
        landed = landing & (new_rate == chosen)
        moved = np.where(landed, target_c, position + new_rate * dt)
        moved = np.minimum(np.maximum(moved, self.lower_c), self.upper_c)
        if not resting:
            self._count(landed, np.abs(wanted) > cap, velocity_scale)
        self._target_c = np.where(self.is_velocity_c, target_c, moved) if resting else target_c
        self._position_c, self._rate_c = moved, new_rate
        return moved.copy()

    def _count(self, landed: np.ndarray, too_fast: np.ndarray, velocity_scale: float) -> None:
        if landed.all():
            return
        if (~landed & too_fast).any():
            self.interventions["velocity" if velocity_scale >= 1.0 else "soft_start"] += 1
        if (~landed & ~too_fast).any():
            self.interventions["acceleration"] += 1


def _position_limits(embodiment: Embodiment) -> tuple[np.ndarray, np.ndarray]:
    """(c,), (c,) position limits; the workspace box narrows the first three channels (x, y, z) of eef_pose groups."""
    lower: list[float] = []
    upper: list[float] = []
    box = embodiment.safety.workspace
    for group in embodiment.actions:
        low, high = list(group.limits.lower), list(group.limits.upper)
        if box is not None and group.kind == "eef_pose":
            low[:3] = [max(a, b) for a, b in zip(low[:3], box.lower, strict=True)]
            high[:3] = [min(a, b) for a, b in zip(high[:3], box.upper, strict=True)]
        lower += low
        upper += high
    lower_c, upper_c = np.array(lower, dtype=np.float64), np.array(upper, dtype=np.float64)
    if not (np.isfinite(lower_c).all() and np.isfinite(upper_c).all() and (lower_c <= upper_c).all()):
        raise ValueError("position limits must be finite, with lower <= upper, and overlap the workspace box")
    return lower_c, upper_c
