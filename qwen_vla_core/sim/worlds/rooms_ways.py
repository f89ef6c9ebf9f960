"""Ways through a layout: where a base fits, the shortest walk that does a task, what is left to the goal."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from qwen_vla_core.sim.navigation_tasks import NavigationTask
from qwen_vla_core.sim.planning import Cell, Grid, Point, shorten
from qwen_vla_core.sim.worlds.rooms_layout import Doorway, Landmark, Layout, blocked_by_wall

CELL = 0.1
REACH = 1.0  # metres from a landmark's centre within which a stop counts as being at it
STAND = 0.7  # where a perfect walk ends
PASS = 1.0  # metres from a landmark's centre within which it counts as passed


def occupancy(layout: Layout, radius: float, ignore: Iterable[Landmark] = ()) -> Grid:
    """Where the centre of something round can be.

    Args:
        layout: the scene.
        radius: of what is to fit, metres.
        ignore: landmarks that are no obstacles.
    """
    x0, y0 = min(room[0] for room in layout.rooms), min(room[1] for room in layout.rooms)
    x1, y1 = max(room[2] for room in layout.rooms), max(room[3] for room in layout.rooms)
    columns, rows = math.ceil((x1 - x0) / CELL) + 1, math.ceil((y1 - y0) / CELL) + 1
    grid = Grid(np.ones((rows, columns), bool), (x0, y0), CELL)
    x, y = grid.points[..., 0], grid.points[..., 1]
    for wall in layout.walls:
        dx = np.maximum(np.maximum(wall.x0 - x, x - wall.x1), 0.0)
        dy = np.maximum(np.maximum(wall.y0 - y, y - wall.y1), 0.0)
        grid.free[dx * dx + dy * dy < radius * radius] = False
    ignored = set(ignore)
    for landmark in layout.landmarks:
        if landmark not in ignored:
            away = (x - landmark.centre[0]) ** 2 + (y - landmark.centre[1]) ** 2
            grid.free[away < (landmark.radius + radius) ** 2] = False
    return grid


def around(layout: Layout, grid: Grid, centre: Point, reach: float) -> np.ndarray:
    """(rows, columns) bool: free cells within ``reach`` of a point, with no wall between."""
    near = grid.free & (np.linalg.norm(grid.points - np.asarray(centre), axis=-1) <= reach)
    for row, column in zip(*np.nonzero(near), strict=True):
        near[row, column] = not blocked_by_wall(grid.point_of((int(row), int(column))), centre, layout.walls)
    return near


def threshold(grid: Grid, door: Doorway) -> np.ndarray:
    """(rows, columns) bool: free cells in the gap of a doorway."""
    off = grid.points - np.asarray(door.centre)
    across = np.abs(off @ np.asarray(door.normal))
    along = np.abs(off @ np.array([-door.normal[1], door.normal[0]]))
    return np.asarray(grid.free & (across <= 0.6 * grid.cell) & (along <= 0.5 * door.width))


def passing(layout: Layout, grid: Grid, task: NavigationTask, reach: float) -> np.ndarray | None:
    """Cells one of which a walk must come through; None where nothing was named."""
    if task.via is None:
        return None
    door = layout.doorway(task.via)
    if door is not None:
        return threshold(grid, door)
    landmark = layout.landmark(task.via)
    assert landmark is not None
    return around(layout, grid, landmark.centre, reach)


def cells(mask: np.ndarray) -> list[Cell]:
    """(row, column) of every true element."""
    return [(int(row), int(column)) for row, column in zip(*np.nonzero(mask), strict=True)]


def shortest(layout: Layout, grid: Grid, task: NavigationTask) -> list[Point]:
    """The shortest walk from the start that does a task and ends ``STAND`` from the goal's centre.

    Raises:
        ValueError: there is none.
    """
    goal = layout.landmark(task.goal)
    assert goal is not None
    start: Point = layout.start[:2]
    ends = cells(around(layout, grid, goal.centre, STAND))
    if not ends:
        raise ValueError(f"no room to stand at the {goal.name}")
    to_goal = grid.distances(ends)
    first = grid.nearest_free(start)
    must = passing(layout, grid, task, PASS)
    if must is None:
        return [start, *shorten(grid, [grid.point_of(cell) for cell in grid.descend(to_goal, first)])[1:]]
    from_start = grid.distances([first])
    whole = np.where(must, from_start + to_goal, np.inf)
    best = np.unravel_index(int(np.argmin(whole)), whole.shape)
    between = (int(best[0]), int(best[1]))
    legs = (grid.descend(from_start, between)[::-1], grid.descend(to_goal, between))
    there, back = (shorten(grid, [grid.point_of(cell) for cell in leg]) for leg in legs)
    return [start, *there[1:], *back[1:]]


def remaining(layout: Layout, path_n2: np.ndarray, goal: Landmark, radius: float) -> np.ndarray:
    """(n,) metres of the shortest free way from each point to the centre of ``goal``."""
    grid = occupancy(layout, radius, ignore=(goal,))
    field = grid.distances([grid.nearest_free(goal.centre)])
    away = []
    for x, y in path_n2.tolist():
        straight = math.dist((x, y), goal.centre)
        if straight <= 2 * REACH and not blocked_by_wall((x, y), goal.centre, layout.walls):
            away.append(straight)
        else:
            away.append(max(float(field[grid.nearest_free((x, y))]), straight))
    return np.array(away)
