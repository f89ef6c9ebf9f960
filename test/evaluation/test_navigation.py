"""The published measures on walks small enough to do by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qwen_vla_core.evaluation.navigation import dtw, measure, ndtw, path_length, spl
from qwen_vla_core.sim.track import Track

LINE = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
BESIDE = LINE + np.array([0.0, 1.0])
WALK = Track(
    path_n2=np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]),
    to_goal_n=np.array([5.0, 4.5, 0.5]),
    reference_m2=np.array([[0.0, 0.0], [3.0, 4.0]]),
    reach=1.0,
    stopped=True,
    passed=True,
    bumps=2,
)


def test_length_is_that_of_the_legs() -> None:
    assert path_length(WALK.path_n2) == pytest.approx(7.0)
    assert path_length(WALK.path_n2[:1]) == 0.0


def test_spl_is_the_share_of_the_shortest_way_and_zero_without_success() -> None:
    assert spl(True, 5.0, 7.0) == pytest.approx(5 / 7)
    assert spl(True, 5.0, 4.0) == 1.0  # shorter than the reference is not better than perfect
    assert spl(False, 5.0, 5.0) == 0.0
    assert spl(True, 0.0, 0.0) == 1.0


def test_dtw_pairs_points_in_order() -> None:
    assert dtw(LINE, LINE) == 0.0
    assert dtw(LINE, BESIDE) == pytest.approx(3.0)  # each of the three to its neighbour
    assert dtw(LINE, np.repeat(LINE, 2, axis=0)) == 0.0  # waiting costs nothing
    assert dtw(LINE, LINE[::-1]) == pytest.approx(4.0)  # 2 + 0 + 2, the middle paired with the middle
    assert dtw(LINE[:1], LINE) == pytest.approx(0 + 1 + 2)


def test_ndtw_is_the_published_exponential() -> None:
    assert ndtw(LINE, LINE, 1.0) == 1.0
    assert ndtw(BESIDE, LINE, 1.0) == pytest.approx(math.exp(-1.0))
    assert ndtw(BESIDE, LINE, 3.0) == pytest.approx(math.exp(-1 / 3))


def test_a_walk_is_measured_as_a_whole() -> None:
    found = measure(WALK)
    assert found["navigation_error_m"] == 0.5 and found["oracle_success"] == 1.0
    assert found["spl"] == pytest.approx(5 / 7) and found["path_m"] == pytest.approx(7.0) and found["bumps"] == 2.0
    assert 0.0 < found["ndtw"] < 1.0


@pytest.mark.parametrize(
    ("change", "oracle"),
    [
        ({"stopped": False}, 1.0),  # came by, did not stop
        ({"to_goal_n": np.array([5.0, 0.9, 1.1])}, 1.0),  # came by, stopped too far on
        ({"to_goal_n": np.array([5.0, 4.0, 1.1])}, 0.0),
        ({"passed": False}, 0.0),
    ],
)
def test_what_is_no_success_has_no_spl(change: dict[str, object], oracle: float) -> None:
    found = measure(replace(WALK, **change))
    assert found["spl"] == 0.0 and found["oracle_success"] == oracle


def test_waiting_is_no_detour() -> None:
    waiting = replace(WALK, path_n2=np.repeat(WALK.path_n2, 20, axis=0))
    assert measure(waiting)["ndtw"] == pytest.approx(measure(WALK)["ndtw"])


def test_no_walk_has_no_measures() -> None:
    assert measure(None) == {}
