"""Ways through a plan of rooms: occupancy grid, A*, corners cut off where a straight line is free, distances.

Nothing here knows a robot or a simulator. Points are (x, y) in metres; cells are (row, column) with rows along y.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

Point = tuple[float, float]
Cell = tuple[int, int]
_SQRT2 = math.sqrt(2.0)
# Half of the 16 neighbours whose steps are at most a knight's move: lengths are then at most 2.8 % too long.
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1))


@dataclass(frozen=True)
class Grid:
    """Where the centre of a robot can be.

    Attributes:
        free: (rows, columns) bool.
        origin: (x, y) of the centre of cell (0, 0).
        cell: edge of a cell, metres.
    """

    free: np.ndarray
    origin: Point
    cell: float

    def cell_of(self, point: Sequence[float]) -> Cell:
        """The cell a point lies in, at the edge of the grid the nearest one."""
        rows, columns = self.free.shape
        column = min(max(round((point[0] - self.origin[0]) / self.cell), 0), columns - 1)
        row = min(max(round((point[1] - self.origin[1]) / self.cell), 0), rows - 1)
        return row, column

    def point_of(self, cell: Cell) -> Point:
        """Centre of a cell."""
        return self.origin[0] + cell[1] * self.cell, self.origin[1] + cell[0] * self.cell

    @cached_property
    def points(self) -> np.ndarray:
        """(rows, columns, 2) centres of all cells."""
        rows, columns = np.indices(self.free.shape)
        return np.stack([self.origin[0] + columns * self.cell, self.origin[1] + rows * self.cell], axis=-1)

    def nearest_free(self, point: Sequence[float]) -> Cell:
        """The free cell nearest to a point.

        Raises:
            ValueError: there is no free cell.
        """
        cell = self.cell_of(point)
        if self.free[cell]:
            return cell
        if not self.free.any():
            raise ValueError("no free cell")
        away = np.where(self.free, ((self.points - np.asarray(point)[:2]) ** 2).sum(axis=-1), np.inf)
        row, column = np.unravel_index(int(np.argmin(away)), self.free.shape)
        return int(row), int(column)

    def clear(self, a: Sequence[float], b: Sequence[float]) -> bool:
        """Whether the straight line between two points stays in free cells."""
        steps = max(int(math.dist(a[:2], b[:2]) / (0.4 * self.cell)), 1)
        t = np.arange(steps + 1) / steps
        columns = np.rint((a[0] + t * (b[0] - a[0]) - self.origin[0]) / self.cell).astype(int)
        rows = np.rint((a[1] + t * (b[1] - a[1]) - self.origin[1]) / self.cell).astype(int)
        inside = (rows >= 0) & (rows < self.free.shape[0]) & (columns >= 0) & (columns < self.free.shape[1])
        return bool(inside.all() and self.free[rows, columns].all())

    @cached_property
    def graph(self) -> csr_matrix:
        """Sparse symmetric graph of free cells, metres; a knight's move needs both cells it passes between."""
        free, (rows, columns) = self.free, self.free.shape
        number = np.arange(rows * columns).reshape(rows, columns)
        starts, ends, lengths = [], [], []
        for dr, dc in _STEPS:
            here, there = _windows(rows, columns, dr, dc)
            open_ = free[here] & free[there]
            if abs(dr) + abs(dc) == 2:
                between: tuple[Cell, ...] = ((dr, 0), (0, dc))
            elif abs(dr) + abs(dc) == 3:
                half = (int(dr / 2), int(dc / 2))
                between = (half, (dr - half[0], dc - half[1]))
            else:
                between = ()
            for step in between:
                open_ = open_ & free[_shifted(here, step)]
            starts.append(number[here][open_])
            ends.append(number[there][open_])
            lengths.append(np.full(int(open_.sum()), math.hypot(dr, dc) * self.cell))
        a, b, w = np.concatenate(starts), np.concatenate(ends), np.concatenate(lengths)
        size = rows * columns
        return csr_matrix((np.tile(w, 2), (np.concatenate([a, b]), np.concatenate([b, a]))), shape=(size, size))

    def distances(self, sources: Sequence[Cell]) -> np.ndarray:
        """(rows, columns) metres from each cell to the nearest source along free cells; infinite where no way leads."""
        numbers = [row * self.free.shape[1] + column for row, column in sources]
        result = dijkstra(self.graph, indices=numbers, min_only=True)
        return np.asarray(result).reshape(self.free.shape)

    def descend(self, distances: np.ndarray, cell: Cell) -> list[Cell]:
        """The way from ``cell`` down to a source of ``distances``.

        Raises:
            ValueError: there is no way.
        """
        if not np.isfinite(distances[cell]):
            raise ValueError(f"no way from {self.point_of(cell)}")
        columns = self.free.shape[1]
        flat, graph, way = distances.ravel(), self.graph, [cell]
        here = cell[0] * columns + cell[1]
        while flat[here] > 0:
            span = slice(graph.indptr[here], graph.indptr[here + 1])
            there = graph.indices[span]
            here = int(there[np.argmin(flat[there] + graph.data[span])])
            way.append((here // columns, here % columns))
        return way


def _windows(rows: int, columns: int, dr: int, dc: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Index windows of all cells that have a neighbour (dr, dc) away, and of those neighbours; dr ≥ 0."""
    first, last = max(0, -dc), columns - max(0, dc)
    return (slice(0, rows - dr), slice(first, last)), (slice(dr, rows), slice(first + dc, last + dc))


def _shifted(window: tuple[slice, slice], step: Cell) -> tuple[slice, slice]:
    rows, columns = window
    return (
        slice(rows.start + step[0], rows.stop + step[0]),
        slice(columns.start + step[1], columns.stop + step[1]),
    )


def astar(grid: Grid, start: Sequence[float], goals: np.ndarray, towards: Sequence[float]) -> list[Point] | None:
    """The shortest way over the 8 neighbours of a cell.

    Args:
        grid: where one can be.
        start: point; the nearest free cell is taken.
        goals: (rows, columns) bool, cells that end the way; free ones count.
        towards: a point such that no goal is nearer to a cell than the cell is to it, minus the farthest goal's
            distance from it: what the estimate is made of.

    Returns:
        centres of the cells from start to goal, or None when no goal can be reached.
    """
    free, columns, cell = grid.free, grid.free.shape[1], grid.cell
    wanted = goals & free
    if not wanted.any():
        return None
    reach = float(np.linalg.norm(grid.points[wanted] - np.asarray(towards)[:2], axis=-1).max())
    ahead = np.maximum(np.linalg.norm(grid.points - np.asarray(towards)[:2], axis=-1) - reach, 0.0).ravel().tolist()
    blocked = np.pad(~free, 1, constant_values=True)  # a border, so that no neighbour needs a range check
    width = columns + 2
    shut = blocked.ravel().tolist()
    done = np.pad(wanted, 1).ravel().tolist()
    row, column = grid.nearest_free(start)
    first = (row + 1) * width + column + 1
    cost, came = {first: 0.0}, {first: first}
    queue = [(0.0, first)]
    closed: set[int] = set()
    moves = (
        *((step, cell, 0, 0) for step in (1, -1, width, -width)),
        *((r + c, cell * _SQRT2, r, c) for r in (width, -width) for c in (1, -1)),
    )
    while queue:
        _, here = heapq.heappop(queue)
        if done[here]:
            way = [here]
            while came[here] != here:
                here = came[here]
                way.append(here)
            return [grid.point_of((n // width - 1, n % width - 1)) for n in reversed(way)]
        if here in closed:
            continue
        closed.add(here)
        so_far = cost[here]
        for step, length, side_a, side_b in moves:
            there = here + step
            if shut[there] or (side_a and (shut[here + side_a] or shut[here + side_b])):
                continue  # no diagonal step past a corner
            through = so_far + length
            if through < cost.get(there, math.inf):
                cost[there], came[there] = through, here
                estimate = ahead[(there // width - 1) * columns + there % width - 1]
                heapq.heappush(queue, (through + estimate, there))
    return None


def shorten(grid: Grid, way: Sequence[Point]) -> list[Point]:
    """The same way with every detour left out that a straight free line makes unnecessary."""
    result, here = [way[0]], 0
    while here < len(way) - 1:
        there = here + 1
        low, high = here + 1, len(way) - 1
        if grid.clear(way[here], way[high]):
            there = high
        else:
            # Sight along a shortest way is nearly monotone: the last visible point lies near a bisection's end.
            while low < high - 1:
                middle = (low + high) // 2
                low, high = (middle, high) if grid.clear(way[here], way[middle]) else (low, middle)
            there = low
        result.append(way[there])
        here = there
    return result


def length(way: Sequence[Sequence[float]]) -> float:
    """Metres along a polyline."""
    return sum(math.dist(a[:2], b[:2]) for a, b in pairwise(way))


def resample(way: Sequence[Point] | np.ndarray, spacing: float) -> np.ndarray:
    """(n, 2) points along a polyline, ``spacing`` metres apart and its end."""
    points = np.asarray(way, dtype=np.float64).reshape(-1, 2)
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.append(np.arange(0.0, along[-1], spacing), along[-1])
    return np.column_stack([np.interp(at, along, points[:, 0]), np.interp(at, along, points[:, 1])])
