"""Discrete rules that bring a command to a target inside position, velocity, acceleration and jerk limits.

Let p be the last command, v = Δp/dt its rate and a = Δv/dt the change of that. Every step picks the new rate first and
moves second: p' = p + v'·dt. Both rules keep one promise: from where a step ends, a *stop* still fits into all limits,
whatever the lengths of the later steps are. The first step of that stop is then always allowed, so the limits never
contradict each other and none has to give way.

``AccelerationRule``: a stop decelerates fully. The rates that follow are the right-hand Riemann sum of a decreasing
line, so it needs at most v'²/2A, and v' is bounded by the positive root of v'·dt + v'²/2A = room.

``JerkRule``: a stop turns the acceleration against the motion at full jerk, brakes, and lets go along the curve
v = a²/2J, on which rate and acceleration vanish together. ``reserve`` is the length B(v, a) of that manoeuvre in
continuous time, and no step of it uses up more: v'·dt + B(v', a') ≤ B(v, a). Where the rate falls, right-hand sums are
below the integral. Where it still rises (a' ≥ 0) they are above it by at most a·dt²/2 − 5J·dt³/6, but the step ends
J·dt²/2 slower than in continuous time, and there ∂B/∂v ≥ 2a'/J. A candidate counts as safe when its reserve fits both
ways and the rate it coasts up to fits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

NEGLIGIBLE = 1e-10  # channel units, per unit/s of the velocity limit
GRID = np.linspace(0.0, 1.0, 17)[:, None]


def stopping_speed(room: np.ndarray, acceleration: np.ndarray, dt_s: float) -> np.ndarray:
    """Largest speed for the coming step after which the channel can still stop within ``room``.

    Positive root of ``v·dt + v²/(2a) = room``, in the form that does not cancel for small dt.

    Args:
        room: (c,) distance available, ≥ 0, channel units.
        acceleration: (c,) deceleration available, > 0, units/s².
        dt_s: length of the coming step in seconds, > 0.
    """
    return 2.0 * room / (dt_s + np.sqrt(dt_s * dt_s + 2.0 * room / acceleration))


@dataclass(frozen=True)
class Axes:
    """Limits of c channels in channel units.

    Attributes:
        lower, upper: (c,) position limits.
        fall, rise: (c,) limits of the rate downwards and upwards, both > 0.
        acceleration, jerk: (c,) limits of the change of rate, and of the change of that.
        is_velocity: (c,) bool, True where the channel commands a velocity: stopping means zero, not "stay".
    """

    lower: np.ndarray
    upper: np.ndarray
    fall: np.ndarray
    rise: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    is_velocity: np.ndarray

    def take(self, columns: np.ndarray) -> Axes:
        """The same for some of the channels."""
        return Axes(*(getattr(self, field.name)[columns] for field in fields(self)))


class State(NamedTuple):
    """(c,) each: last command, its rate, and the change of the rate per second."""

    position: np.ndarray
    rate: np.ndarray
    acceleration: np.ndarray


class Goal(NamedTuple):
    """(c,) each: where to be at the end of the step, and how that moves. ``resting``: come to rest instead."""

    target: np.ndarray
    rate: np.ndarray
    acceleration: np.ndarray
    resting: bool


class Choice(NamedTuple):
    """What a rule picked for the coming step.

    Attributes:
        position, rate: (c,) the next command and its rate.
        stop_rate: (c,) the rate of the first step of a stop: always allowed.
        below, above: (c,) how far below and above ``position`` a stop from there may go.
        landed: (c,) bool, the command is the target, bit for bit.
        too_fast, too_sudden: (c,) bool, why it is not: reaching it would take more than the velocity limit, more than
            the acceleration limit (otherwise jerk, or the braking distance before a position limit).
    """

    position: np.ndarray
    rate: np.ndarray
    stop_rate: np.ndarray
    below: np.ndarray
    above: np.ndarray
    landed: np.ndarray
    too_fast: np.ndarray
    too_sudden: np.ndarray


class AccelerationRule:
    """Position, velocity and acceleration limits."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes

    def choose(self, state: State, goal: Goal, dt: float, scale: float) -> Choice:
        """The step towards a goal; ``scale`` 0…1 is the share of the velocity limit."""
        axes, (position, rate, _) = self.axes, state
        acceleration = axes.acceleration
        change = acceleration * dt
        slowed = np.abs(rate) - change  # what a rate above a lowered cap may come down to
        fall, rise = np.maximum(axes.fall * scale, slowed), np.maximum(axes.rise * scale, slowed)
        low = np.maximum(rate - change, -np.minimum(fall, stopping_speed(position - axes.lower, acceleration, dt)))
        high = np.minimum(rate + change, np.minimum(rise, stopping_speed(axes.upper - position, acceleration, dt)))
        wanted = (goal.target - position) / dt
        # Landing on the target in one step is right only when its own motion can be joined in the next one;
        # otherwise close the gap on the curve that can still brake, on top of the target's motion.
        gap = goal.target - position - goal.rate * dt
        landing = np.abs(gap) <= change * dt
        chosen = np.where(landing, wanted, goal.rate + np.sign(gap) * stopping_speed(np.abs(gap), acceleration, dt))
        if goal.resting:
            landing = landing & axes.is_velocity
            chosen = np.where(axes.is_velocity, chosen, 0.0)
        new_rate = np.minimum(np.maximum(chosen, low), high)
        landed = landing & (new_rate == chosen)
        moved = np.where(landed, goal.target, position + new_rate * dt)
        too_fast = (wanted > rise) | (wanted < -fall)
        stop_rate = np.minimum(np.maximum(0.0, low), high)
        return Choice(moved, new_rate, stop_rate, *self.reserves(new_rate, rate), landed, too_fast, ~too_fast)

    def safe(self, state: State, rate: np.ndarray, dt: float, scale: float) -> np.ndarray:
        """(…, c) bool: rates between the chosen one and the stop are always allowed."""
        return np.ones(rate.shape, dtype=bool)

    def reserves(self, rate: np.ndarray, acceleration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(…, c) each: how far below and above the command a stop from ``rate`` may go."""
        distance = rate * rate / (2.0 * self.axes.acceleration)
        return np.where(rate < 0.0, distance, 0.0), np.where(rate > 0.0, distance, 0.0)


class JerkRule:
    """Position, velocity, acceleration and jerk limits."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes

    def choose(self, state: State, goal: Goal, dt: float, scale: float) -> Choice:
        """The step towards a goal; ``scale`` 0…1 is the share of the velocity limit."""
        axes, (position, rate, acceleration) = self.axes, state
        change = axes.jerk * dt
        low = np.maximum(acceleration - change, -axes.acceleration)
        high = np.minimum(acceleration + change, axes.acceleration)
        stop = self._stop(state, low, high, dt)
        wanted_rate = (goal.target - position) / dt
        wanted = (wanted_rate - rate) / dt
        if goal.resting:
            landing = self._joinable(goal, wanted_rate, wanted, low, high, dt) & axes.is_velocity
            # Braking along the curve ends only in the limit: the last bit of it is one step, where that step and the
            # letting go after it move nothing to speak of.
            at_once = -rate / dt
            below, above = self.reserves(np.zeros_like(rate), at_once)
            ends = (at_once >= low) & (at_once <= high) & (np.maximum(below, above) <= NEGLIGIBLE * (1.0 + axes.rise))
            chosen = np.where(ends, at_once, stop)
            if axes.is_velocity.any():
                chosen = np.where(axes.is_velocity, self._approach(state, goal, low, high, dt), chosen)
            chosen = np.where(landing, wanted, chosen)
        else:
            landing = self._joinable(goal, wanted_rate, wanted, low, high, dt)
            chosen = wanted if landing.all() else np.where(landing, wanted, self._approach(state, goal, low, high, dt))
        safe, below, above = self._judge(state, chosen, stop, dt, scale)
        if not safe.all():
            chosen = np.where(safe, chosen, self._nearest_safe(state, chosen, stop, dt, scale))
            below, above = self.reserves(rate + chosen * dt, chosen)
        landed = landing & safe
        new_rate = np.where(landed, wanted_rate, rate + chosen * dt)
        moved = np.where(landed, goal.target, position + new_rate * dt)
        too_fast = (wanted_rate > axes.rise * scale) | (wanted_rate < -axes.fall * scale)
        too_sudden = ~too_fast & (np.abs(wanted) > axes.acceleration)
        return Choice(moved, new_rate, rate + stop * dt, below, above, landed, too_fast, too_sudden)

    def safe(self, state: State, rate: np.ndarray, dt: float, scale: float) -> np.ndarray:
        """(…, c) bool: whether a step at ``rate`` (…, c) keeps every limit and leaves room for a stop."""
        change = self.axes.jerk * dt
        low = np.maximum(state.acceleration - change, -self.axes.acceleration)
        high = np.minimum(state.acceleration + change, self.axes.acceleration)
        return self._judge(state, (rate - state.rate) / dt, self._stop(state, low, high, dt), dt, scale)[0]

    def reserves(self, rate: np.ndarray, acceleration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(…, c) each: how far below and above the command a stop from this motion may go."""
        return self._reserve(-rate, -acceleration), self._reserve(rate, acceleration)

    def _stop(self, state: State, low: np.ndarray, high: np.ndarray, dt: float) -> np.ndarray:
        """(c,) acceleration of the first step of a stop."""
        curve = -np.sign(state.rate) * stopping_speed(np.abs(state.rate), self.axes.jerk, dt)
        return np.minimum(np.maximum(curve, low), high)

    def _judge(
        self, state: State, chosen: np.ndarray, stop: np.ndarray, dt: float, scale: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(…, c) bool for accelerations (…, c) within the jerk and acceleration limits, and their reserves."""
        axes = self.axes
        rate = state.rate + chosen * dt
        position = state.position + rate * dt
        below, above = self.reserves(rate, chosen)
        fits = (position + above <= axes.upper) & (position - below >= axes.lower)
        # The soft start lowers the cap below the present rate: then a stop's first step is what may be asked for.
        stopped = state.rate + stop * dt
        up, down = self._coasts(rate, chosen), self._coasts(-rate, -chosen)
        fits &= up <= np.maximum(axes.rise * scale, self._coasts(stopped, stop))
        fits &= down <= np.maximum(axes.fall * scale, self._coasts(-stopped, -stop))
        return fits, below, above

    def _coasts(self, rate: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
        """Rate that is reached while a rising acceleration is let go."""
        return rate + np.maximum(acceleration, 0.0) ** 2 / (2.0 * self.axes.jerk)

    def _reserve(self, rate: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
        """(…, c) upper bound of how far a stop moves upwards; see the module's docstring."""
        jerk, most = self.axes.jerk, self.axes.acceleration
        coast = rate + acceleration * np.abs(acceleration) / (2.0 * jerk)
        # Moving down but turning up: what counts begins where the rate passes zero.
        rising = np.sqrt(np.maximum(acceleration * acceleration + 2.0 * jerk * np.minimum(rate, 0.0), 0.0))
        a = np.where(rate < 0.0, rising, acceleration)
        v = np.maximum(rate, 0.0)
        peak = np.minimum(np.sqrt(np.maximum(jerk * v + 0.5 * a * a, 0.0)), most)
        t = (a + peak) / jerk
        v_1 = v + t * (a - 0.5 * jerk * t)
        v_2 = peak * peak / (2.0 * jerk)
        distance = t * (v + t * (0.5 * a - jerk * t / 6.0))
        distance = distance + 0.5 * np.maximum(v_1 * v_1 - v_2 * v_2, 0.0) / most
        distance = distance + peak**3 / (6.0 * jerk * jerk)
        curve = (2.0 * jerk * v) ** 1.5 / (6.0 * jerk * jerk)
        return np.where(coast > 0.0, distance, curve)

    def _joinable(
        self, goal: Goal, rate: np.ndarray, wanted: np.ndarray, low: np.ndarray, high: np.ndarray, dt: float
    ) -> np.ndarray:
        """(c,) bool: the target can be reached in this step and its own motion joined in the two that follow."""
        change = self.axes.jerk * dt * (1.0 + 1e-9)
        late = (rate - goal.rate) / dt  # what the next step would have to brake to stay with the target
        following = goal.acceleration - late
        return (
            (wanted >= low)
            & (wanted <= high)
            & (np.abs(following) <= self.axes.acceleration)
            & (np.abs(following - wanted) <= change)
            & (np.abs(late) <= change)
        )

    def _approach(self, state: State, goal: Goal, low: np.ndarray, high: np.ndarray, dt: float) -> np.ndarray:
        """(c,) acceleration after which a stop, seen from the moving target, would end on it."""
        tried = low + GRID * (high - low)  # (17, c)
        rate = state.rate + tried * dt
        past = state.position + rate * dt - goal.target + self._net_stop(rate - goal.rate, tried)
        behind = np.count_nonzero(past <= 0.0, axis=0)  # ``past`` grows with the acceleration
        first = np.clip(behind - 1, 0, len(GRID) - 2)[None]
        from_, to = np.take_along_axis(past, first, 0)[0], np.take_along_axis(past, first + 1, 0)[0]
        share = np.clip(-from_ / np.maximum(to - from_, 1e-300), 0.0, 1.0)
        return low + (first[0] + share) / (len(GRID) - 1) * (high - low)

    def _net_stop(self, rate: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
        """(…, c) where a stop ends, relative to here, in continuous time."""
        jerk, most = self.axes.jerk, self.axes.acceleration
        side = np.sign(rate + acceleration * np.abs(acceleration) / (2.0 * jerk))
        v, a = side * rate, side * acceleration
        peak = np.minimum(np.sqrt(np.maximum(jerk * v + 0.5 * a * a, 0.0)), most)
        t = (a + peak) / jerk
        v_1 = v + t * (a - 0.5 * jerk * t)
        v_2 = peak * peak / (2.0 * jerk)
        distance = t * (v + t * (0.5 * a - jerk * t / 6.0)) + 0.5 * np.maximum(v_1 * v_1 - v_2 * v_2, 0.0) / most
        return side * (distance + peak**3 / (6.0 * jerk * jerk))

    def _nearest_safe(self, state: State, chosen: np.ndarray, stop: np.ndarray, dt: float, scale: float) -> np.ndarray:
        """(c,) the safe acceleration found nearest to ``chosen`` on the way to ``stop``, which always is."""
        near, far = np.zeros_like(chosen), np.ones_like(chosen)  # shares of the way from the stop
        for _ in range(2):
            share = near + GRID * (far - near)
            safe, _, _ = self._judge(state, stop + share * (chosen - stop), stop, dt, scale)
            safe[0] = True
            last = len(GRID) - 1 - np.argmax(safe[::-1], axis=0)[None]
            near = np.take_along_axis(share, last, 0)[0]
            far = np.take_along_axis(share, np.minimum(last + 1, len(GRID) - 1), 0)[0]
        return stop + near * (chosen - stop)
