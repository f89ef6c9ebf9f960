"""From a moving pose to a twist: the plan's waypoints become speeds that a base takes.

The law is that of Kanayama, Kimura, Miyazaki and Noguchi (A stable tracking control method for an autonomous mobile
robot, ICRA 1990): the plan's own velocity is fed forward, its distance ahead changes the speed, its distance to the
side and its heading change the turning rate. Two things are changed, because waypoints also begin, end and turn on the
spot. The gain on the heading does not fade with the speed (Samson's form: Canudas de Wit, Khennouf, Samson and
Sørdalen, 1993), so that a base turns in place. And from where the plan is far away until it is near again, the base
looks at its point instead of looking where the plan looks, as in pure pursuit: a standing point to the side can be
reached only that way (Brockett 1983) [O].

What the law wants is then limited in speed, acceleration and jerk by the rule that limits everything else
(``motion.AccelerationRule``, applied to the speeds), so a stop obeys them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qwen_vla_core.embodiment.spec import ActionGroup
from qwen_vla_core.embodiment.spec_base import TrackerSpec
from qwen_vla_core.runtime.motion import AccelerationRule, Axes, Goal, State

MIN_DT_S = 1e-6
STILL = 1e-12
SLOWEST = 0.05  # m/s: a plan below it stands still
# (wanted, now, acceleration) of the twist (vx, vy, wz) → what may be wanted
Guard = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def wrap(angle: float) -> float:
    """The same direction in (−π, π]."""
    return math.remainder(angle, 2.0 * math.pi)


class PoseTracker:
    """Follows a setpoint that moves. All three speeds are kept; a base that cannot drive sideways has vy = 0.

    Args:
        group: a tracked waypoint group: its ``command.tracker`` and twist fields.
        period_s: of the controller's loop; a longer step counts as two of these at most.

    Attributes:
        twist, acceleration: (3,) vx, vy [m/s], wz [rad/s] as last told, and their change per second.
        linear, angular: (acceleration, jerk) limits, for whoever has to know where a stop ends.
    """

    def __init__(self, group: ActionGroup, period_s: float) -> None:
        spec = group.command.tracker
        if spec is None:
            raise ValueError(f"{group.name}: no tracker")
        self.spec: TrackerSpec = spec
        self.fields = group.twist_fields
        self._columns = [("vx", "vy", "wz").index(name) for name in self.fields]
        self._max_dt_s = 2.0 * period_s
        self.linear = spec.acceleration, spec.jerk or spec.acceleration / period_s
        self.angular = spec.turn_acceleration, spec.turn_jerk or spec.turn_acceleration / period_s
        sideways = spec.max_speed if "vy" in self.fields else 0.0
        change = np.array([spec.acceleration, spec.acceleration, spec.turn_acceleration])
        self._rule = AccelerationRule(
            Axes(
                lower=-np.array([spec.max_reverse, sideways, spec.max_turn]),
                upper=np.array([spec.max_speed, sideways, spec.max_turn]),
                fall=change,
                rise=change,
                acceleration=np.array([self.linear[1], self.linear[1], self.angular[1]]),
                jerk=np.full(3, np.inf),
                is_velocity=np.ones(3, bool),
            )
        )
        self._aiming = False
        self.twist = np.zeros(3)
        self.acceleration = np.zeros(3)

    @property
    def at_rest(self) -> bool:
        """Whether the base is told to stand, and nothing of a braking is left."""
        return not (self.twist.any() or self.acceleration.any())

    def follow(
        self, pose: np.ndarray, setpoint: np.ndarray, rate: np.ndarray, dt_s: float, guard: Guard | None = None
    ) -> None:
        """One step towards a setpoint.

        Args:
            pose: (3,) measured x, y, heading.
            setpoint: (3,) where to be now, in the same frame; headings may be whole turns apart.
            rate: (3,) how the setpoint moves, per second.
            dt_s: seconds since the last step; none: the last twist stays.
            guard: what may still lower the wanted twist (an obstacle).
        """
        wanted = self.law(pose, setpoint, rate)
        if guard is not None:
            wanted = guard(wanted, self.twist, self.acceleration)
        self._advance(wanted, dt_s)

    def rest(self, dt_s: float) -> None:
        """One step of coming to a stand."""
        self._advance(np.zeros(3), dt_s)

    def told(self) -> tuple[np.ndarray, np.ndarray]:
        """Twist and its change per second in the order of ``fields``."""
        return self.twist[self._columns], self.acceleration[self._columns]

    def _advance(self, wanted: np.ndarray, dt_s: float) -> None:
        if not dt_s >= MIN_DT_S:
            return
        state = State(self.twist, self.acceleration, np.zeros(3))
        still = np.zeros(3)
        axes = self._rule.axes
        target = np.minimum(np.maximum(wanted, axes.lower), axes.upper)
        choice = self._rule.choose(state, Goal(target, still, still, False), min(dt_s, self._max_dt_s), 1.0)
        self.twist = np.minimum(np.maximum(choice.position, axes.lower), axes.upper)
        self.acceleration = np.where(np.abs(choice.rate) < STILL, 0.0, choice.rate)

    def law(self, pose: np.ndarray, setpoint: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """(3,) the twist that the law wants; limits come after it."""
        spec = self.spec
        cos, sin = math.cos(pose[2]), math.sin(pose[2])
        dx, dy = setpoint[0] - pose[0], setpoint[1] - pose[1]
        ahead, left = cos * dx + sin * dy, cos * dy - sin * dx
        off = wrap(float(setpoint[2] - pose[2]))
        joined, drifting = cos * rate[0] + sin * rate[1], cos * rate[1] - sin * rate[0]
        away = math.hypot(ahead, left)
        if not np.any(rate) and away <= spec.tolerance and abs(off) <= spec.tolerance:
            return np.zeros(3)
        if spec.law == "holonomic":
            turn = rate[2] + spec.heading * off
            return np.array([joined + spec.along * ahead, drifting + spec.along * left, turn])
        speed = min(max(joined + spec.along * ahead, -spec.max_reverse), spec.max_speed)
        # A plan that drives off is not caught up with by backing after it.
        chased = math.hypot(rate[0], rate[1]) > 0.5 * spec.max_reverse
        backing = spec.max_reverse > 0 and ahead < 0 and away < 2 * spec.far and not chased
        look = math.atan2(-left, -ahead) if backing else math.atan2(left, ahead)
        self._aiming = away > (spec.near if self._aiming else spec.far)
        if self._aiming:
            return np.array([speed * max(math.cos(look), 0.0), 0.0, spec.heading * look])
        # The plan's speed along its own heading; where it stands still, the base's own, as it comes nearer.
        moving = math.cos(setpoint[2]) * rate[0] + math.sin(setpoint[2]) * rate[1]
        moving = moving if abs(moving) > SLOWEST else speed
        sinc = math.sin(off) / off if abs(off) > 1e-6 else 1.0
        return np.array([speed, 0.0, rate[2] + spec.heading * off + moving * spec.across * sinc * left])
