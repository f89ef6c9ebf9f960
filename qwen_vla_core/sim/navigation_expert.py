"""Scripted expert for the rooms: A* over the plan, corners cut, then what a base can do in half a second of it.

A feedback law like the arms' experts: at every decision it plans anew from where the base is, so a push, a slip or a
bump only means another way. It reads the true pose and the plan, which no policy can, and acts through the same action
as any policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.planning import Cell, Point, astar, shorten
from qwen_vla_core.sim.worlds.rooms import RoomsWorld
from qwen_vla_core.sim.worlds.rooms_layout import PASS_AT, ROBOT_RADIUS, wrap
from qwen_vla_core.sim.worlds.rooms_ways import STAND, around, cells, occupancy, passing


@dataclass(frozen=True)
class NavigationExpertConfig:
    """Shape of the expert's motion. Metres, radians, seconds.

    Attributes:
        speed: on a straight way.
        acceleration: of the speed.
        braking: deceleration it plans its stop with; gentler, because a waypoint is met at its average speed.
        turn: largest turning rate.
        turn_acceleration: of the turning rate.
        margin: kept from obstacles beyond the base's own radius.
        look_ahead: how far along the way the base aims.
        turn_first: error of heading from which it turns on the spot.
        push: largest displacement of a waypoint (ahead, left, turn) when a demonstration is pushed off its path.
    """

    speed: float = 0.6
    acceleration: float = 1.0
    braking: float = 0.4
    turn: float = 1.4
    turn_acceleration: float = 4.0
    margin: float = 0.12
    look_ahead: float = 0.5
    turn_first: float = 1.0
    push: tuple[float, float, float] = (0.15, 0.3, 0.7)


class NavigationExpert:
    """Solves the task a ``RoomsWorld`` was reset to.

    Example:
        >>> world.reset(seed)
        >>> expert = NavigationExpert(world)
        >>> while not world.ended() and world.time_s < world.limit_s:
        ...     for command_c in world.play(expert.action()):
        ...         world.step(command_c)
    """

    def __init__(self, world: RoomsWorld, config: NavigationExpertConfig | None = None) -> None:
        """Binds the expert to a world that has been reset; make a new one after the next reset."""
        self.world, self.config = world, config or NavigationExpertConfig()
        layout, task = world.layout, world.task
        goal = layout.landmark(task.goal)
        assert goal is not None
        self._goal = goal
        self._grid = occupancy(layout, ROBOT_RADIUS + self.config.margin)
        self._ends = around(layout, self._grid, goal.centre, STAND)
        self._to_goal = self._grid.distances(cells(self._ends))
        self._between = passing(layout, self._grid, task, PASS_AT)

    def action(self) -> np.ndarray:
        """(3,) waypoint for half a second from now, in the frame of the odometry."""
        return self.chunk(1)[0]

    def chunk(self, horizon: int) -> np.ndarray:
        """(horizon, 3) waypoints, half a second apart, as the expert sees its way from here."""
        way = self._way()
        base = self.world.base
        poses, at = [], (*base.pose, base.speed, base.turning)
        for _ in range(horizon):
            at = self._follow(way, at)
            poses.append(self._in_odometry(*at[:3]))
        return np.array(poses)

    def _follow(
        self, way: list[Point], at: tuple[float, float, float, float, float]
    ) -> tuple[float, float, float, float, float]:
        """x, y, heading, speed and turning rate one decision later, of a base that follows ``way``."""
        c, dt = self.config, 1.0 / self.world.control_hz
        x, y, heading, speed, turning = at
        for _ in range(round(self.world.decision_s * self.world.control_hz)):
            aim, left = _along(way, (x, y), c.look_ahead)
            error = wrap(math.atan2(aim[1] - y, aim[0] - x) - heading) if left > 0.05 else 0.0
            wanted = min(c.speed, math.sqrt(2 * c.braking * max(left - 0.02, 0.0)))
            wanted *= 0.0 if abs(error) > c.turn_first else math.cos(error) ** 2
            speed += min(max(wanted - speed, -c.acceleration * dt), c.acceleration * dt)
            bend = min(max(3.0 * error, -c.turn), c.turn)
            turning += min(max(bend - turning, -c.turn_acceleration * dt), c.turn_acceleration * dt)
            course = heading + 0.5 * turning * dt
            x, y = x + speed * dt * math.cos(course), y + speed * dt * math.sin(course)
            heading += turning * dt
        return x, y, heading, speed, turning

    # --- being pushed while a demonstration is recorded -------------------------------------------------------------

    def draw_push(self, action_c: np.ndarray, rng: np.random.Generator, drop: float = 0.0) -> np.ndarray:
        """(3,) a displacement of the waypoint, ahead, left and in heading, from this one on.

        Raises:
            UserError: it is to drop something.
        """
        if drop:
            raise UserError("--drops: a mobile base holds nothing that could fall; leave it away")
        most = np.array(self.config.push)
        return rng.uniform(-most, most)

    def pushed(self, action_c: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """(3,) what is executed instead of ``action_c`` while pushed."""
        cos, sin = math.cos(action_c[2]), math.sin(action_c[2])
        ahead, left, turn = offset
        return action_c + np.array([cos * ahead - sin * left, sin * ahead + cos * left, turn])

    # --- the way ----------------------------------------------------------------------------------------------------

    def _way(self) -> list[Point]:
        """Polyline from the base over what is to be passed to where it is to stop."""
        here = self.world.base.pose[:2]
        if self._between is None or self.world.passed:
            return self._leg(here, self._ends, self._goal.centre)
        whole = np.where(self._between, self._grid.distances([self._grid.nearest_free(here)]) + self._to_goal, np.inf)
        row, column = np.unravel_index(int(np.argmin(whole)), whole.shape)
        cell: Cell = (int(row), int(column))
        only = np.zeros_like(self._ends)
        only[cell] = True
        there = self._grid.point_of(cell)
        return [*self._leg(here, only, there), *self._leg(there, self._ends, self._goal.centre)[1:]]

    def _leg(self, start: Point, ends: np.ndarray, towards: Point) -> list[Point]:
        way = astar(self._grid, start, ends, towards)
        if way is None:  # nowhere to go: stay
            return [start]
        return [start, *shorten(self._grid, way)[1:]]

    def _in_odometry(self, x: float, y: float, heading: float) -> np.ndarray:
        """A pose of the plan, where the odometry believes it to be: the same step from where the base is."""
        px, py, true = self.world.base.pose
        ox, oy, believed = self.world.base.odometry
        turn = believed - true
        cos, sin = math.cos(turn), math.sin(turn)
        dx, dy = x - px, y - py
        return np.array([ox + cos * dx - sin * dy, oy + sin * dx + cos * dy, heading + turn])


def _along(way: list[Point], here: Point, ahead: float) -> tuple[Point, float]:
    """The point ``ahead`` metres further along a polyline than its point nearest to ``here``, and the metres left."""
    best, at, along = math.inf, 0.0, [0.0]
    for a, b in pairwise(way):
        dx, dy = b[0] - a[0], b[1] - a[1]
        span = math.hypot(dx, dy)
        t = 0.0 if span < 1e-9 else min(max(((here[0] - a[0]) * dx + (here[1] - a[1]) * dy) / span**2, 0.0), 1.0)
        off = math.hypot(here[0] - a[0] - t * dx, here[1] - a[1] - t * dy)
        if off < best - 1e-9:
            best, at = off, along[-1] + t * span
        along.append(along[-1] + span)
    wanted = min(at + ahead, along[-1])
    for (a, b), low, high in zip(pairwise(way), along, along[1:], strict=False):
        if wanted <= high and high > low:
            t = (wanted - low) / (high - low)
            return (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])), along[-1] - at
    return way[-1], max(along[-1] - at, 0.0)
