"""Ways on grids that can be checked by eye, and against each other on random ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qwen_vla_core.sim.planning import Grid, astar, length, resample, shorten


def grid(rows: str, cell: float = 1.0) -> Grid:
    """'#' is blocked; the first row is y = 0."""
    return Grid(np.array([[c != "#" for c in row] for row in rows.split()]), (0.0, 0.0), cell)


def to(g: Grid, point: tuple[float, float]) -> np.ndarray:
    ends = np.zeros_like(g.free)
    ends[g.cell_of(point)] = True
    return ends


WALL = grid(
    """
    .......
    .......
    ..###..
    .......
    .......
    """
)


def test_a_way_leads_around_a_wall_and_is_the_shortest() -> None:
    way = astar(WALL, (3.0, 1.0), to(WALL, (3.0, 3.0)), (3.0, 3.0))
    assert way is not None and way[0] == (3.0, 1.0) and way[-1] == (3.0, 3.0)
    assert length(way) == pytest.approx(6.0)  # two aside, two on, two back: every diagonal would cut a corner
    assert all(WALL.free[WALL.cell_of(point)] for point in way)


def test_no_diagonal_step_goes_past_a_corner() -> None:
    corner = grid(".# ..")
    way = astar(corner, (0.0, 0.0), to(corner, (1.0, 1.0)), (1.0, 1.0))
    assert way == [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]


def test_no_way_is_said_so() -> None:
    split = grid(".#. .#. .#.")
    assert astar(split, (0.0, 0.0), to(split, (2.0, 0.0)), (2.0, 0.0)) is None
    assert astar(split, (0.0, 0.0), np.zeros_like(split.free), (2.0, 0.0)) is None
    assert np.isinf(split.distances([(0, 0)])[0, 2])
    with pytest.raises(ValueError, match="no way"):
        split.descend(split.distances([(0, 0)]), (0, 2))


@pytest.mark.parametrize("seed", range(6))
def test_astar_and_distances_agree_on_random_plans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = Grid(rng.random((15, 20)) > 0.25, (-1.0, 2.0), 0.1)
    start, end = g.nearest_free((-1.0, 2.0)), g.nearest_free((0.9, 3.4))
    away = g.distances([end])
    way = astar(g, g.point_of(start), to(g, g.point_of(end)), g.point_of(end))
    if way is None:
        assert np.isinf(away[start])
        return
    # 16 neighbours are never longer than 8, and 8 never more than 8.3 % longer than a straight line.
    assert away[start] <= length(way) + 1e-9 <= 1.083 * away[start] + 1e-9
    short = shorten(g, way)
    assert length(short) <= length(way) + 1e-9 and (short[0], short[-1]) == (way[0], way[-1])
    steps = set(pairwise(way))
    assert all(g.clear(a, b) for a, b in pairwise(short) if (a, b) not in steps)
    down = g.descend(away, start)
    assert down[0] == start and down[-1] == end
    assert length([g.point_of(cell) for cell in down]) == pytest.approx(away[start])


def test_distances_in_the_open_are_at_most_three_percent_too_long() -> None:
    g = Grid(np.ones((41, 41), bool), (0.0, 0.0), 0.1)
    away = g.distances([(0, 0)])
    straight = np.linalg.norm(g.points, axis=-1)
    assert np.all(away >= straight - 1e-9) and np.all(away <= 1.03 * straight + 1e-9)


def test_points_outside_the_grid_are_taken_at_its_edge() -> None:
    assert WALL.cell_of((-5.0, 99.0)) == (4, 0)
    assert WALL.nearest_free((3.0, 2.0)) in {(1, 3), (3, 3)}
    assert not WALL.clear((0.0, 0.0), (-1.0, 0.0))
    with pytest.raises(ValueError, match="no free cell"):
        grid("##").nearest_free((0.0, 0.0))


def test_resampling_keeps_both_ends_and_the_spacing() -> None:
    points = resample([(0.0, 0.0), (1.0, 0.0), (1.0, 0.5)], 0.4)
    np.testing.assert_allclose(points, [[0, 0], [0.4, 0], [0.8, 0], [1, 0.2], [1, 0.5]], atol=1e-12)
    assert resample([(1.0, 2.0)], 0.4).tolist() == [[1.0, 2.0]]
