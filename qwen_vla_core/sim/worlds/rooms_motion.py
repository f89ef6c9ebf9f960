"""A differential-drive base: follows a moving pose, obeys its limits, slides along what it runs into.

Kinematics only, in closed form: no contact solver, so a step costs microseconds and never leaves the base in a wall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vla_core.sim.worlds.rooms_layout import ROBOT_RADIUS, Landmark, Wall, wrap

Pose = tuple[float, float, float]  # x, y in metres, heading in radians


@dataclass(frozen=True)
class BaseConfig:
    """What the base can do and how it follows. Metres, radians, seconds.

    Attributes:
        forward: largest speed ahead.
        backward: largest speed back.
        turn: largest turning rate.
        acceleration: of the speed.
        turn_acceleration: of the turning rate.
        along: gain on the distance ahead, 1/s.
        across: gain on the distance to the side, 1/m.
        heading: gain on the heading, 1/s.
        near: up to this distance from the target pose its heading is followed;
        far: from this distance on the base drives straight at it.
    """

    forward: float = 0.7
    backward: float = 0.3
    turn: float = 1.6
    acceleration: float = 1.2
    turn_acceleration: float = 5.0
    along: float = 2.5
    across: float = 2.0
    heading: float = 4.0
    near: float = 0.15
    far: float = 0.4


@dataclass(frozen=True)
class Wear:
    """How this episode's base differs from its own idea of itself; all 1 and 0 without dynamics randomisation.

    Attributes:
        speed_gain: true speed per commanded speed.
        turn_gain: true turning rate per commanded one.
        pull: radians of turn per metre that the base does not know of.
        odometry_gain: measured distance per true distance.
        delay: control steps until a command takes effect.
    """

    speed_gain: float = 1.0
    turn_gain: float = 1.0
    pull: float = 0.0
    odometry_gain: float = 1.0
    delay: int = 0


class Base:
    """Where the base is, how fast, and where it believes to be.

    Attributes:
        pose: in the plan of the rooms.
        odometry: what the wheels measure, from (0, 0, 0) at the start.
        speed, turning: as of the last step, m/s and rad/s.
        touching: whether the last step ended against something.
        bumps: how often it has run into something; touching on and on counts once.
    """

    def __init__(
        self,
        pose: Pose,
        walls: Sequence[Wall],
        landmarks: Sequence[Landmark],
        config: BaseConfig | None = None,
        wear: Wear | None = None,
    ) -> None:
        self.pose = pose
        self.odometry: Pose = (0.0, 0.0, 0.0)
        self.speed = self.turning = 0.0
        self.touching, self.bumps = False, 0
        self.config, self.wear = config or BaseConfig(), wear or Wear()
        self._walls = tuple((w.x0, w.y0, w.x1, w.y1) for w in walls)
        self._round = tuple((*landmark.centre, landmark.radius) for landmark in landmarks)

    def step(self, target: Pose, before: Pose, dt: float) -> None:
        """Follows the target pose for one control step.

        Args:
            target: where to be now, in the frame of the odometry.
            before: the target of the step before; its motion is joined instead of being chased.
            dt: seconds.
        """
        self.drive(*self._law(target, before, dt), dt)

    def drive(self, speed: float, turning: float, dt: float) -> None:
        """Takes a twist for one control step, as a base's own driver does: within what the base can do.

        Args:
            speed: wanted, m/s.
            turning: wanted, rad/s.
            dt: seconds.
        """
        c = self.config
        speed, turning = min(max(speed, -c.backward), c.forward), min(max(turning, -c.turn), c.turn)
        self.speed += min(max(speed - self.speed, -c.acceleration * dt), c.acceleration * dt)
        change = c.turn_acceleration * dt
        self.turning += min(max(turning - self.turning, -change), change)
        self._move(dt)

    def _law(self, target: Pose, before: Pose, dt: float) -> tuple[float, float]:
        """Wanted speed and turning rate within their limits."""
        c = self.config
        x, y, heading = self.odometry
        cos, sin = math.cos(heading), math.sin(heading)
        dx, dy = before[0] - x, before[1] - y  # where it should be by now; this step's motion is joined below
        ahead, left = cos * dx + sin * dy, cos * dy - sin * dx
        away = math.hypot(ahead, left)
        joined = (cos * (target[0] - before[0]) + sin * (target[1] - before[1])) / dt
        joined = min(max(joined, -c.backward), c.forward)
        turn_joined = min(max(wrap(target[2] - before[2]) / dt, -c.turn), c.turn)
        # Far from its target the base looks at it, near it looks where the target looks.
        backing = ahead < 0 and away < 2 * c.far
        look = math.atan2(-left, -ahead) if backing else math.atan2(left, ahead)
        share = min(max((away - c.near) / (c.far - c.near), 0.0), 1.0)
        speed = joined + c.along * ahead
        turn = wrap(before[2] - heading)
        if share < 1.0 and abs(speed) > 0.05:
            turn += math.atan(c.across * left) * (1.0 if speed > 0 else -1.0)
        turn = (1 - share) * turn + share * look
        speed *= max(math.cos(min(abs(turn), math.pi)), 0.0)
        speed = min(max(speed, -c.backward), c.forward)
        return speed, min(max((1 - share) * turn_joined + c.heading * turn, -c.turn), c.turn)

    def _move(self, dt: float) -> None:
        """Integrates one step, then pushes the base out of whatever it has entered."""
        w = self.wear
        x, y, heading = self.pose
        step = self.speed * w.speed_gain * dt
        turned = self.turning * w.turn_gain * dt + w.pull * step
        course = heading + 0.5 * turned
        free = x + step * math.cos(course), y + step * math.sin(course)
        (nx, ny), hit = self._pushed_out(*free)
        self.bumps += hit and not self.touching
        self.touching = hit
        moved = math.cos(course) * (nx - x) + math.sin(course) * (ny - y)
        if hit:  # what the wall has taken is gone: the wheels do not spin on
            self.speed = math.copysign(math.hypot(nx - x, ny - y), moved) / dt / w.speed_gain
        self.pose = nx, ny, heading + turned
        ox, oy, believed = self.odometry
        scale, believed_course = w.odometry_gain, believed + 0.5 * (turned - w.pull * step)
        sideways = math.cos(course) * (ny - y) - math.sin(course) * (nx - x)
        cos, sin = math.cos(believed_course), math.sin(believed_course)
        self.odometry = (
            ox + scale * (cos * moved - sin * sideways),
            oy + scale * (sin * moved + cos * sideways),
            believed + turned - w.pull * step,
        )

    def _pushed_out(self, x: float, y: float) -> tuple[tuple[float, float], bool]:
        """The nearest free place, and whether (x, y) was not free itself."""
        hit = False
        for _ in range(4):  # in a corner the way out of one wall may lead into the next
            again = False
            for x0, y0, x1, y1 in self._walls:
                px, py = min(max(x, x0), x1), min(max(y, y0), y1)
                dx, dy = x - px, y - py
                away = math.hypot(dx, dy)
                if away >= ROBOT_RADIUS:
                    continue
                again = hit = True
                if away < 1e-9:  # the centre itself is inside: out through the nearest side
                    depth, dx, dy = min((x - x0, -1, 0), (x1 - x, 1, 0), (y - y0, 0, -1), (y1 - y, 0, 1))
                    x, y = x + dx * (depth + ROBOT_RADIUS), y + dy * (depth + ROBOT_RADIUS)
                else:
                    x, y = px + dx / away * ROBOT_RADIUS, py + dy / away * ROBOT_RADIUS
            for cx, cy, radius in self._round:
                dx, dy = x - cx, y - cy
                away = math.hypot(dx, dy)
                if away < radius + ROBOT_RADIUS:
                    again = hit = True
                    dx, dy = (dx / away, dy / away) if away > 1e-9 else (1.0, 0.0)
                    x, y = cx + dx * (radius + ROBOT_RADIUS), cy + dy * (radius + ROBOT_RADIUS)
            if not again:
                break
        return (x, y), hit
