"""The mobile base of a robot inside the control law: waypoints become twists, and a scanner may lower any twist.

A tracked group (waypoints commanded as a twist) has two commands. The limiter moves its pose, the *setpoint*, which
nobody hears; the tracker follows that with a twist, which is published. While the robot holds or rests the base comes
to a stand under the tracker's limits and the setpoint stays with the measured pose, so that it neither backs up to
where it was told to stop nor leaps when it may go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from qwen_vla_core.embodiment.spec import BASE_KINDS, Embodiment
from qwen_vla_core.runtime.obstacles import ObstacleStop, Scan
from qwen_vla_core.runtime.safety import SafetyLimiter
from qwen_vla_core.runtime.tracking import PoseTracker

TWIST = ("vx", "vy", "wz")


@dataclass(frozen=True)
class _Tracked:
    """A waypoint group whose twist is published; ``columns`` are those of its x, y, heading in the action vector."""

    name: str
    columns: slice
    tracker: PoseTracker


@dataclass(frozen=True)
class _Twisted:
    """A group that commands a twist itself: (n,) its columns, which of vx, vy, wz they are, message units per unit."""

    columns: np.ndarray
    axes: np.ndarray
    scale: float


class BaseDrive:
    """See the module's text.

    Args:
        embodiment: the robot.
        limiter: its limiter; the setpoint of a tracked group is put where the base is, while it stands.
        simulated: command kinds are those of simulation.

    Attributes:
        guard: the obstacle stop; None where the YAML has none.
    """

    def __init__(self, embodiment: Embodiment, limiter: SafetyLimiter, simulated: bool) -> None:
        self._limiter = limiter
        period_s = 1.0 / embodiment.control.controller_rate_hz
        self._tracked: list[_Tracked] = []
        self._twisted: _Twisted | None = None
        self.guard: ObstacleStop | None = None
        self.guarded_c = np.zeros(len(embodiment.channels), bool)
        start = 0
        for group in embodiment.actions:
            columns = slice(start, start + len(group.channels))
            start = columns.stop
            if group.kind not in BASE_KINDS:
                continue
            if group.tracked(simulated):
                tracker = PoseTracker(group, period_s)
                self._tracked.append(_Tracked(group.name, columns, tracker))
                linear, fastest = tracker.linear, tracker.spec.max_speed
            elif group.kind == "base_twist":
                axes = np.array([TWIST.index(name) for name in group.command.fields if name in TWIST])
                own = np.array([i for i, name in enumerate(group.command.fields) if name in TWIST])
                scale = abs(group.command.map.scale)
                self._twisted = _Twisted(columns.start + own, axes, group.command.map.scale)
                driving = [int(i) for i, axis in zip(own, axes, strict=True) if axis < 2]
                limits = group.limits
                linear = (
                    scale * min((limits.velocity[i] for i in driving), default=1.0),
                    scale * min((limits.acceleration[i] for i in driving), default=1.0),
                )
                fastest = scale * max((max(-limits.lower[i], limits.upper[i]) for i in driving), default=1.0)
            else:
                continue
            if embodiment.safety.obstacle_stop is not None:
                self.guard = ObstacleStop(embodiment.safety.obstacle_stop, linear, fastest, period_s)
                self.guarded_c[columns] = True

    @property
    def at_rest(self) -> bool:
        """Whether every tracked base is told to stand."""
        return all(base.tracker.at_rest for base in self._tracked)

    @property
    def tracks(self) -> bool:
        """Whether any base is tracked."""
        return bool(self._tracked)

    @property
    def note(self) -> str:
        """What the obstacle stop did in this step; empty when nothing."""
        return self.guard.note if self.guard is not None else ""

    def take(self, scan: Scan, t_ns: int) -> None:
        """A scan that arrived at ``t_ns``."""
        if self.guard is not None:
            self.guard.take(scan, t_ns)

    def problem(self, t_ns: int) -> str | None:
        """Why no base may move; None where nothing is wrong, or nothing is to be looked at."""
        return None if self.guard is None else self.guard.problem(t_ns)

    def clear_note(self) -> None:
        """A new step begins."""
        if self.guard is not None:
            self.guard.note = ""

    def clip(self, target_c: np.ndarray, t_ns: int) -> np.ndarray:
        """(c,) the target of the limiter, with the twist that a group commands itself lowered by obstacles."""
        base, limiter = self._twisted, self._limiter
        if base is None or self.guard is None:
            return target_c
        wanted, now, rising = np.zeros(3), np.zeros(3), np.zeros(3)
        finite = np.nan_to_num(target_c[base.columns], nan=0.0, posinf=0.0, neginf=0.0)
        low, high = limiter.lower_c[base.columns], limiter.upper_c[base.columns]
        wanted[base.axes] = base.scale * np.clip(finite, low, high)
        now[base.axes] = base.scale * limiter.position_c[base.columns]
        rising[base.axes] = base.scale * limiter.rate_c[base.columns]
        allowed = self.guard.limit(wanted, now, rising, t_ns)
        if np.array_equal(allowed, wanted):
            return target_c
        clipped = target_c.copy()
        clipped[base.columns] = allowed[base.axes] / base.scale
        return clipped

    def begin(self, measured_c: np.ndarray) -> None:
        """The robot may go on after a hold: every setpoint starts where its base has come to."""
        for base in self._tracked:
            self._limiter.rebase(base.columns, measured_c[base.columns])

    def standing(self, target_c: np.ndarray) -> np.ndarray:
        """(c,) a hold pose in which no setpoint is asked to move."""
        if not self._tracked:
            return target_c
        target_c = target_c.copy()
        for base in self._tracked:
            target_c[base.columns] = self._limiter.position_c[base.columns]
        return target_c

    def follow(self, measured_c: np.ndarray, late_c: np.ndarray, dt_s: float, t_ns: int) -> None:
        """One step of every tracked base after its setpoint; one whose group has timed out comes to a stand."""
        for base in self._tracked:
            if late_c[base.columns].any():
                self._stand(base, measured_c, dt_s)
                continue
            setpoint, rate = self._limiter.position_c[base.columns], self._limiter.rate_c[base.columns]
            guard = None if self.guard is None else partial(self.guard.limit, t_ns=t_ns)
            base.tracker.follow(measured_c[base.columns], setpoint, rate, dt_s, guard)

    def stand(self, measured_c: np.ndarray | None, dt_s: float) -> None:
        """One step of coming to a stand, or of standing; ``measured_c`` None: where the base is is not known."""
        for base in self._tracked:
            self._stand(base, measured_c, dt_s)

    def _stand(self, base: _Tracked, measured_c: np.ndarray | None, dt_s: float) -> None:
        base.tracker.rest(dt_s)
        if measured_c is not None and np.isfinite(measured_c[base.columns]).all():
            self._limiter.rebase(base.columns, measured_c[base.columns])

    def told(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Tracked group → its twist and the twist's change per second, in the order of its fields."""
        return {base.name: base.tracker.told() for base in self._tracked}
