"""What stands in a base's way, and how fast it may still go: one planar scan, whatever commands the base.

The base sweeps a corridor: its rectangle along the arc that its twist describes, ahead or back by the sign of the
speed. The nearest return inside it leaves so many metres; the speed allowed falls with them, and is never above that
from which a stop under the base's own acceleration and jerk limits ends ``stop_distance`` before it, the age of the
scan and two ticks of reaction included. Turning in place looks at the circle that the rectangle sweeps.

Ranges are read as REP 117 says: +inf is nothing there, −inf something too close to measure, NaN no measurement. What is
below ``range_min`` (many drivers send 0) is no measurement either, beyond ``range_max`` there is nothing. Where half of
the directions that matter have no measurement, nothing is known, and the base does not go there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.spec_base import ObstacleStopSpec

MILLI = 1_000_000
STEP_M = 0.02  # along the arc
SECTOR = math.radians(45)  # to both sides of the way, in which directions must have been measured
KNOWN_SHARE = 0.5  # of the directions in a sector, or of the whole scan [O]
CREEP = 0.02  # m/s: slower is turning in place
FUTURE_NS = 100 * MILLI
NEAR_SHARES = np.array([0.25, 0.5, 0.75, 1.0])  # where on its beam "too close to measure" may be, in range_min


@dataclass(frozen=True)
class Scan:
    """A sensor_msgs/LaserScan without ROS: radians, metres; ``stamp_ns`` 0 where the driver stamps nothing."""

    angle_min: float
    angle_increment: float
    range_min: float
    range_max: float
    ranges: np.ndarray
    stamp_ns: int = 0


@dataclass(frozen=True)
class _Seen:
    """A scan in the base's frame.

    Attributes:
        points_n2: what was hit. bearing_b, known_b: every direction, and whether it was measured at all.
        spacing: radians between two directions. at_ns: when it was true.
    """

    points_n2: np.ndarray
    bearing_b: np.ndarray
    known_b: np.ndarray
    spacing: float
    at_ns: int


def scan_problem(scan: Scan) -> str | None:
    """Why a scan cannot be used at all; None: it can."""
    numbers = (scan.angle_min, scan.angle_increment, scan.range_min, scan.range_max)
    if not all(math.isfinite(value) for value in numbers) or scan.angle_increment == 0.0:
        return "its angles and range limits are not finite numbers"
    if scan.range_min < 0 or scan.range_max <= scan.range_min:
        return f"range_min {scan.range_min:g} and range_max {scan.range_max:g} are no range"
    if scan.ranges.ndim != 1 or len(scan.ranges) < 2:
        return "it has no ranges"
    return None


def stopping_distance(speed: float, rising: float, acceleration: float, jerk: float) -> float:
    """Metres until a stand from ``speed`` (≥ 0) while the speed still grows by ``rising`` per second, both limits kept.

    The acceleration is let go at full jerk, then the speed falls along the symmetrical profile to rest.
    """
    rising = max(rising, 0.0)
    peak = speed + rising * rising / (2.0 * jerk)
    before = speed * rising / jerk + rising**3 / (3.0 * jerk * jerk)
    full = acceleration * acceleration / jerk  # from here on the deceleration reaches its limit
    seconds = peak / acceleration + acceleration / jerk if peak >= full else 2.0 * math.sqrt(peak / jerk)
    return before + 0.5 * peak * seconds


def allowed_speed(room: float, acceleration: float, jerk: float) -> float:
    """The speed from which ``stopping_distance`` is ``room``; 0 where there is none."""
    if room <= 0.0:
        return 0.0
    full = acceleration * acceleration / jerk
    if stopping_distance(full, 0.0, acceleration, jerk) >= room:
        return float((room * room * jerk) ** (1.0 / 3.0))
    # v·(v/A + A/J)/2 = room
    half = 0.5 * full
    return math.sqrt(half * half + 2.0 * acceleration * room) - half


class ObstacleStop:
    """Lowers twists (vx, vy, wz) so that the base stops before what its scanner sees.

    Args:
        spec: what the YAML says.
        linear: (acceleration, jerk) that the base keeps, m/s², m/s³.
        max_speed: m/s; at ``slow_distance`` it is still allowed.
        period_s: of the controller's loop.

    Attributes:
        note: what it last did to a wanted twist, for the status; empty when nothing.
        distance: metres to what is in the way of the last twist; infinite when nothing is.
    """

    def __init__(self, spec: ObstacleStopSpec, linear: tuple[float, float], max_speed: float, period_s: float) -> None:
        self.spec = spec
        self._acceleration, self._jerk = linear
        self._max_speed = max_speed
        self._period_s = period_s
        self._seen: _Seen | None = None
        self._broken = ""
        self.note = ""
        self.distance = math.inf
        footprint = spec.footprint
        self._circle = math.hypot(max(footprint.front, footprint.rear), footprint.side) + spec.margin

    # ---- the scan ---------------------------------------------------------------------------------------------------

    def take(self, scan: Scan, t_ns: int) -> None:
        """A scan that arrived at ``t_ns``."""
        problem = scan_problem(scan)
        if problem is not None:
            self._broken, self._seen = problem, None
            return
        ranges = np.asarray(scan.ranges, dtype=np.float64)
        bearing = scan.angle_min + scan.angle_increment * np.arange(len(ranges))
        near = np.isneginf(ranges)
        with np.errstate(invalid="ignore"):
            known = near | (ranges >= max(scan.range_min, 1e-9))
            hit = known & ~near & (ranges <= scan.range_max)
        if np.count_nonzero(known) < KNOWN_SHARE * len(known):
            self._seen = None
            self._broken = f"{np.count_nonzero(~known)} of its {len(known)} ranges are no measurement"
            return
        x, y, yaw = self.spec.mount
        reach = np.concatenate([ranges[hit], np.outer(np.full(near.sum(), scan.range_min), NEAR_SHARES).ravel()])
        along = np.concatenate([bearing[hit], np.repeat(bearing[near], len(NEAR_SHARES))]) + yaw
        points = np.column_stack([x + reach * np.cos(along), y + reach * np.sin(along)])
        at_ns = t_ns
        if 0 < scan.stamp_ns <= t_ns + FUTURE_NS:
            at_ns = min(scan.stamp_ns, t_ns)
        near_n = np.hypot(points[:, 0], points[:, 1]) <= self.spec.slow_distance + 2.0 * self._circle
        self._broken = ""
        self._seen = _Seen(points[near_n], bearing + yaw, known, abs(scan.angle_increment), at_ns)

    def forget(self) -> None:
        """The clock has gone back: what was seen is void."""
        self._seen, self._broken = None, ""

    def problem(self, t_ns: int) -> str | None:
        """Why the base must stand: no scan yet, an old one, or one that cannot be used."""
        if self._broken:
            return f"unusable scan on {self.spec.topic}: {self._broken}"
        if self._seen is None:
            return f"no scan yet on {self.spec.topic}"
        age_ns = t_ns - self._seen.at_ns
        if age_ns > self.spec.max_age_ms * MILLI:
            return f"stale scan: {self.spec.topic} is {age_ns / MILLI:.0f} ms old"
        return None

    def sees(self, direction: float) -> bool:
        """Whether the last scan measured enough around a direction of travel, radians from ahead to the left."""
        return self._seen is not None and self._knows(np.array([math.cos(direction), math.sin(direction), 0.0]))

    # ---- the twist --------------------------------------------------------------------------------------------------

    def limit(self, wanted: np.ndarray, now: np.ndarray, acceleration: np.ndarray, t_ns: int) -> np.ndarray:
        """What of a wanted twist may be aimed at.

        Args:
            wanted, now, acceleration: (3,) vx, vy [m/s], wz [rad/s]: what is wanted, what is told now, how that changes
                per second.
            t_ns: the time.

        Returns:
            (3,) with the same direction of driving and the same turning rate, or less of either.
        """
        self.note, self.distance = "", math.inf
        if self._seen is None or self.problem(t_ns) is not None:
            self.note = self.problem(t_ns) or ""
            return np.zeros(3)
        out = np.array(wanted, dtype=np.float64)
        lag_s = max(t_ns - self._seen.at_ns, 0) * 1e-9 + 2.0 * self._period_s
        speed_now = math.hypot(now[0], now[1])
        if speed_now > CREEP:
            rising = float(acceleration[:2] @ now[:2]) / speed_now
            room = self._distance(now) - self.spec.stop_distance - lag_s * speed_now
            if stopping_distance(speed_now, rising, self._acceleration, self._jerk) > room:
                self._tell(now, 0.0)
                out[:2] = 0.0
        for _ in range(3):  # a lower speed at the same turning rate is another arc
            speed = math.hypot(out[0], out[1])
            if speed < 1e-9:
                break
            distance = self._distance(out)
            room = distance - self.spec.stop_distance
            slope = room / max(self.spec.slow_distance - self.spec.stop_distance, 1e-9) * self._max_speed
            cap = max(min(allowed_speed(room - lag_s * speed_now, self._acceleration, self._jerk), slope), 0.0)
            cap = cap if cap >= CREEP else 0.0
            if cap >= speed:
                self.distance = min(self.distance, distance)
                break
            self.distance = distance
            self._tell(out, cap)
            out[:2] *= cap / speed
        if out[2] and math.hypot(out[0], out[1]) < CREEP and self._circled():
            self.note = self.note or "stopped: an obstacle inside the circle that turning in place sweeps"
            out[2] = 0.0
        return out

    def _tell(self, twist: np.ndarray, cap: float) -> None:
        side = "behind" if twist[0] < -abs(twist[1]) else "beside" if abs(twist[1]) > abs(twist[0]) else "ahead"
        distance = self._distance(twist)
        what = f"obstacle {distance:.2f} m {side}" if self._knows(twist) else f"the scan does not see {side}"
        self.distance = min(self.distance, distance)
        self.note = f"stopped: {what}" if cap == 0.0 else f"obstacle: at most {cap:.2f} m/s, {what[9:]}"

    def _knows(self, twist: np.ndarray) -> bool:
        """Whether enough of the directions around the way were measured."""
        assert self._seen is not None
        off = np.abs(
            np.remainder(self._seen.bearing_b - math.atan2(twist[1], twist[0]) + math.pi, 2 * math.pi) - math.pi
        )
        measured = np.count_nonzero(self._seen.known_b & (off <= SECTOR))
        return bool(measured >= KNOWN_SHARE * 2.0 * SECTOR / self._seen.spacing)

    def _circled(self) -> bool:
        assert self._seen is not None
        points = self._seen.points_n2
        return bool((np.hypot(points[:, 0], points[:, 1]) < self._circle).any())

    def _distance(self, twist: np.ndarray) -> float:
        """Metres that the base can go along a twist until it touches something seen; infinite: further than matters."""
        assert self._seen is not None
        if not self._knows(twist):
            return 0.0
        points = self._seen.points_n2
        if not len(points):
            return math.inf
        speed = math.hypot(twist[0], twist[1])
        ux, uy = twist[0] / speed, twist[1] / speed
        curve = twist[2] / speed
        footprint, margin = self.spec.footprint, self.spec.margin
        reach = self.spec.slow_distance + self.spec.stop_distance
        if abs(curve) * reach > math.pi:  # beyond half a turn an arc says nothing about where the base will be
            reach = math.pi / abs(curve)
        s = np.arange(0.0, reach + STEP_M, STEP_M)[:, None]
        turned = curve * s
        if abs(curve) < 1e-6:
            along, across = s, np.zeros_like(s)
        else:
            along, across = np.sin(turned) / curve, (1.0 - np.cos(turned)) / curve
        dx = points[:, 0] - (ux * along - uy * across)
        dy = points[:, 1] - (uy * along + ux * across)
        cos, sin = np.cos(turned), np.sin(turned)
        x, y = cos * dx + sin * dy, np.abs(cos * dy - sin * dx)
        inside = (x <= footprint.front) & (x >= -footprint.rear)
        touches, grazes = inside & (y <= footprint.side), inside & (y <= footprint.side + margin)
        # What is beside the base already, nearer than the margin, is no obstacle unless the base itself touches it.
        hits = np.where(grazes[0], touches, grazes)
        # What is inside the rectangle now blocks the way towards it, not the way out.
        towards = points[:, 0] * ux + points[:, 1] * uy > 0.0
        hits[:, touches[0]] = towards[touches[0]]
        first = hits.any(axis=1)
        return max(float(s[np.argmax(first), 0]) - STEP_M, 0.0) if first.any() else math.inf
