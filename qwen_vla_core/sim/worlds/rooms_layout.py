"""Rooms, doorways and landmarks drawn from a seed: geometry in plain numbers, without a simulator.

A scene is drawn before anyone says what to do in it, and only kept when it offers every kind of task at least twice
from its start pose, with everything that is named in sight when it is needed. So a policy that sees one picture at a
time can do all of them, and each can be asked for two different goals in the same scene [O].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.sim.navigation_tasks import COLOURS, SHAPES, NavigationTask

Point = tuple[float, float]

WALL = 0.12  # metres, thickness
ROBOT_RADIUS = 0.20
RADIUS: dict[str, float] = {"pillar": 0.18, "ball": 0.25, "box": 0.29}  # of the circle that holds the footprint
IN_VIEW = math.radians(42)  # largest bearing that counts as in sight at the start; the camera sees 50° to each side
AFTER = math.radians(45)  # largest turn towards the goal where something has been passed
SIGHT = 6.5  # metres
APART = 1.9  # least distance of two landmarks: twice what counts as reached, so that a stop names at most one
PASS_AT = 0.75  # metres from a landmark's centre at which a walker passes it
END = 0.3  # metres of wall that stay at least beside a doorway


@dataclass(frozen=True)
class Wall:
    """An upright slab: least and largest x and y in metres."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Doorway:
    """A gap in a wall with a coloured frame.

    Attributes:
        colour: of the frame.
        centre: of the gap.
        normal: unit vector across the wall, from the first of ``rooms`` to the second.
        width: of the gap, metres.
        rooms: the two rooms it joins.
    """

    colour: str
    centre: Point
    normal: Point
    width: float
    rooms: tuple[int, int]

    @property
    def name(self) -> str:
        """As in an instruction."""
        return f"{self.colour} doorway"

    @property
    def ends(self) -> tuple[Point, Point]:
        """Both ends of the threshold."""
        (x, y), (nx, ny) = self.centre, self.normal
        h = 0.5 * self.width
        return (x - ny * h, y + nx * h), (x + ny * h, y - nx * h)


@dataclass(frozen=True)
class Landmark:
    """A coloured thing on the floor; ``yaw`` turns a box."""

    colour: str
    shape: str
    centre: Point
    yaw: float = 0.0

    @property
    def name(self) -> str:
        """As in an instruction."""
        return f"{self.colour} {self.shape}"

    @property
    def radius(self) -> float:
        """Of its footprint, metres."""
        return RADIUS[self.shape]


@dataclass(frozen=True)
class Layout:
    """One scene. Rooms are (x0, y0, x1, y1); the start is (x, y, heading)."""

    rooms: tuple[tuple[float, float, float, float], ...]
    walls: tuple[Wall, ...]
    doorways: tuple[Doorway, ...]
    landmarks: tuple[Landmark, ...]
    start: tuple[float, float, float]

    def room_of(self, point: Point) -> int:
        """Index of the room a point lies in; the nearest one inside a wall or a doorway."""
        outside = [max(x0 - point[0], point[0] - x1, y0 - point[1], point[1] - y1) for x0, y0, x1, y1 in self.rooms]
        return int(np.argmin(outside))

    def landmark(self, name: str) -> Landmark | None:
        """By name, or None."""
        return next((landmark for landmark in self.landmarks if landmark.name == name), None)

    def doorway(self, name: str) -> Doorway | None:
        """By name, or None."""
        return next((doorway for doorway in self.doorways if doorway.name == name), None)


@dataclass(frozen=True)
class LayoutConfig:
    """Ranges of the rooms; metres.

    Attributes:
        width: of the whole, along x.
        depth: of the whole, along y.
        door: width of a doorway.
        third_room: chance that one of the two rooms is divided again.
        landmarks: fewest and most in the room of the start; every other room has one or two.
    """

    width: tuple[float, float] = (7.0, 9.0)
    depth: tuple[float, float] = (5.0, 6.5)
    door: tuple[float, float] = (1.2, 1.5)
    third_room: float = 0.3
    landmarks: tuple[int, int] = (2, 3)


# --- sight ----------------------------------------------------------------------------------------------------------


def blocked_by_wall(a: Point, b: Point, walls: Iterable[Wall], margin: float = 0.0) -> bool:
    """Whether the straight line from ``a`` to ``b`` comes closer than ``margin`` (in x or y) to a wall."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    for w in walls:
        low, high = 0.0, 1.0
        for start, step, least, most in ((a[0], dx, w.x0, w.x1), (a[1], dy, w.y0, w.y1)):
            least, most = least - margin, most + margin
            if abs(step) < 1e-12:
                if not least < start < most:
                    high = -1.0
                    break
                continue
            t0, t1 = (least - start) / step, (most - start) / step
            low, high = max(low, min(t0, t1)), min(high, max(t0, t1))
        if low < high:
            return True
    return False


def distance_to_line(p: Point, a: Point, b: Point) -> float:
    """From a point to the line between ``a`` and ``b``, metres."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = ((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / max(dx * dx + dy * dy, 1e-12)
    t = min(max(t, 0.0), 1.0)
    return math.hypot(p[0] - a[0] - t * dx, p[1] - a[1] - t * dy)


def clear(a: Point, b: Point, walls: Iterable[Wall], landmarks: Iterable[Landmark], margin: float) -> bool:
    """Whether something of radius ``margin`` fits along a straight line."""
    return not blocked_by_wall(a, b, walls, margin) and all(
        distance_to_line(other.centre, a, b) >= other.radius + margin for other in landmarks
    )


def wrap(angle: float) -> float:
    """The same angle in (−π, π]."""
    return math.remainder(angle, 2 * math.pi)


def _bearing(pose: tuple[float, float, float], point: Point) -> float:
    return wrap(math.atan2(point[1] - pose[1], point[0] - pose[0]) - pose[2])


def _turn(a: Point, b: Point, c: Point) -> float:
    """How far one turns at ``b`` on the way from ``a`` to ``c``."""
    return abs(wrap(math.atan2(c[1] - b[1], c[0] - b[0]) - math.atan2(b[1] - a[1], b[0] - a[0])))


# --- what can be asked for -------------------------------------------------------------------------------------------


def offers(layout: Layout) -> list[NavigationTask]:
    """Every task that can be done from the start by looking: what is named is in sight when it is its turn."""
    here = layout.start[:2]
    seen = [landmark for landmark in layout.landmarks if in_sight(layout, landmark)]
    tasks = [NavigationTask("goto", goal.name) for goal in seen if math.dist(here, goal.centre) >= 2.0]
    for via in seen:
        others = [other for other in layout.landmarks if other is not via]
        for goal in others:
            if math.dist(here, via.centre) >= 1.4 and _passable(layout, via, goal):
                tasks.append(NavigationTask("past", goal.name, via.name))
    for door in layout.doorways:
        if not _door_in_sight(layout, door):
            continue
        side = 1.0 if layout.room_of(here) == door.rooms[0] else -1.0
        ahead = (door.normal[0] * side, door.normal[1] * side)
        beyond = (door.centre[0] + 0.3 * ahead[0], door.centre[1] + 0.3 * ahead[1])
        for goal in layout.landmarks:
            others = [other for other in layout.landmarks if other is not goal]
            there = door.rooms[1] if side > 0 else door.rooms[0]
            far = math.dist(beyond, goal.centre)
            to_goal = wrap(math.atan2(goal.centre[1] - beyond[1], goal.centre[0] - beyond[0]))
            turn = abs(wrap(to_goal - math.atan2(ahead[1], ahead[0])))
            ahead_of_it = layout.room_of(goal.centre) == there and 1.0 <= far <= SIGHT and turn <= AFTER
            if ahead_of_it and clear(beyond, goal.centre, layout.walls, others, 0.0):
                tasks.append(NavigationTask("through", goal.name, door.name))
    return tasks


def in_sight(layout: Layout, landmark: Landmark) -> bool:
    """Whether the camera shows a landmark at the start: inside the picture, near enough, nothing in front of it."""
    here = layout.start[:2]
    others = [other for other in layout.landmarks if other is not landmark]
    return (
        abs(_bearing(layout.start, landmark.centre)) <= IN_VIEW
        and math.dist(here, landmark.centre) <= SIGHT
        and clear(here, landmark.centre, layout.walls, others, 0.0)
    )


def _door_in_sight(layout: Layout, door: Doorway) -> bool:
    here = layout.start[:2]
    if layout.room_of(here) not in door.rooms or abs(_bearing(layout.start, door.centre)) > IN_VIEW:
        return False
    return 1.2 <= math.dist(here, door.centre) <= SIGHT and clear(
        here, door.centre, layout.walls, layout.landmarks, 0.0
    )


def _passable(layout: Layout, via: Landmark, goal: Landmark) -> bool:
    """Whether a walk past ``via`` has ``goal`` ahead of it on one of its two sides."""
    here, (x, y) = layout.start[:2], via.centre
    course = math.atan2(y - here[1], x - here[0])
    others = [other for other in layout.landmarks if other is not goal and other is not via]
    for side in (-1.0, 1.0):
        p = (x - side * PASS_AT * math.sin(course), y + side * PASS_AT * math.cos(course))
        if (
            _turn(here, p, goal.centre) <= AFTER
            and clear(here, p, layout.walls, [*others, goal], ROBOT_RADIUS)
            and clear(p, goal.centre, layout.walls, [*others, via], ROBOT_RADIUS)
        ):
            return True
    return False


# --- drawing a scene -------------------------------------------------------------------------------------------------


def draw_layout(seed: int, config: LayoutConfig | None = None) -> tuple[Layout, list[NavigationTask]]:
    """The scene of a seed and what can be asked for in it: two tasks of every kind at least, with different goals."""
    config = config or LayoutConfig()
    rng = np.random.default_rng([seed, 10])
    while True:
        rooms, walls, doorways = _rooms(config, rng)
        landmarks = _landmarks(config, rooms, doorways, rng)
        if landmarks is None:
            continue
        for _ in range(40):
            start = _start(rooms[0], landmarks, doorways, rng)
            if start is None:
                continue
            layout = Layout(rooms, walls, doorways, landmarks, start)
            tasks = offers(layout)
            if enough(tasks):
                return layout, tasks


def enough(tasks: Sequence[NavigationTask]) -> bool:
    """Whether every kind of task has two goals, the two with a landmark or a doorway on the way the same one."""
    goals: dict[tuple[str, str | None], set[str]] = {}
    for task in tasks:
        goals.setdefault((task.name, task.via), set()).add(task.goal)
    return all(
        any(len(found) >= 2 for (name, _), found in goals.items() if name == kind)
        for kind in ("goto", "past", "through")
    )


def _rooms(
    config: LayoutConfig, rng: np.random.Generator
) -> tuple[tuple[tuple[float, float, float, float], ...], tuple[Wall, ...], tuple[Doorway, ...]]:
    """Two or three rooms with the walls around and between them; room 0 is where the start will be."""
    w, d = float(rng.uniform(*config.width)) / 2, float(rng.uniform(*config.depth)) / 2
    half = WALL / 2
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    walls = [
        Wall(-w - half, -d - half, w + half, -d + half),
        Wall(-w - half, d - half, w + half, d + half),
        Wall(-w - half, -d - half, -w + half, d + half),
        Wall(w - half, -d - half, w + half, d + half),
    ]
    x = float(rng.uniform(-0.1, 0.1)) * w
    rooms = [(-w, -d, x, d), (x, -d, w, d)]
    width = float(rng.uniform(*config.door))
    if rng.random() < config.third_room:
        divided = int(rng.integers(2))
        y = float(rng.uniform(-0.15, 0.15)) * d
        x0, _, x1, _ = rooms[divided]
        # The part that keeps its number also keeps the doorway to the other room.
        upper = bool(rng.integers(2))
        kept, cut = ((x0, y, x1, d), (x0, -d, x1, y)) if upper else ((x0, -d, x1, y), (x0, y, x1, d))
        rooms[divided] = kept
        rooms.append(cut)
        second = float(rng.uniform(*config.door))
        at = float(rng.uniform(x0 + END + second / 2, x1 - END - second / 2))
        walls += [
            Wall(x0 + half, y - half, at - second / 2, y + half),
            Wall(at + second / 2, y - half, x1 - half, y + half),
        ]
        normal = (0.0, -1.0) if upper else (0.0, 1.0)
        inner = [Doorway(colours[1], (at, y), normal, second, (divided, 2))]
        low, high = max(rooms[0][1], rooms[1][1]), min(rooms[0][3], rooms[1][3])
    else:
        inner, low, high = [], -d, d
    at = float(rng.uniform(low + END + width / 2, high - END - width / 2))
    walls += [
        Wall(x - half, -d + half, x + half, at - width / 2),
        Wall(x - half, at + width / 2, x + half, d - half),
    ]
    doorways = [Doorway(colours[0], (x, at), (1.0, 0.0), width, (0, 1)), *inner]
    return tuple(rooms), tuple(walls), tuple(doorways)


def _landmarks(
    config: LayoutConfig,
    rooms: Sequence[tuple[float, float, float, float]],
    doorways: Sequence[Doorway],
    rng: np.random.Generator,
) -> tuple[Landmark, ...] | None:
    """Different things, away from walls, doorways and each other; None where they do not fit."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    order = rng.permutation(len(kinds))
    placed: list[Landmark] = []
    for number, (x0, y0, x1, y1) in enumerate(rooms):
        low, high = config.landmarks if number == 0 else (2, 2) if number == 1 else (1, 1)
        for _ in range(int(rng.integers(low, high + 1))):
            for _ in range(30):
                centre = (float(rng.uniform(x0 + 0.7, x1 - 0.7)), float(rng.uniform(y0 + 0.7, y1 - 0.7)))
                if all(math.dist(centre, other.centre) >= APART for other in placed) and all(
                    math.dist(centre, door.centre) >= 1.3 for door in doorways
                ):
                    colour, shape = kinds[order[len(placed)]]
                    placed.append(Landmark(colour, shape, centre, float(rng.uniform(0, math.pi / 2))))
                    break
            else:
                return None
    return tuple(placed)


def _start(
    room: tuple[float, float, float, float],
    landmarks: Sequence[Landmark],
    doorways: Sequence[Doorway],
    rng: np.random.Generator,
) -> tuple[float, float, float] | None:
    """A place in room 0 that is free, looking somewhere towards the doorway; None where the drawn place is taken."""
    x0, y0, x1, y1 = room
    x, y = float(rng.uniform(x0 + 0.5, x1 - 0.5)), float(rng.uniform(y0 + 0.5, y1 - 0.5))
    if any(math.dist((x, y), landmark.centre) < 1.4 for landmark in landmarks):
        return None
    door = doorways[int(rng.integers(len(doorways)))].centre
    heading = math.atan2(door[1] - y, door[0] - x) + float(rng.uniform(-IN_VIEW, IN_VIEW))
    return x, y, wrap(heading)
