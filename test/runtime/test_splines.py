"""Velocities: a cubic through the points stays between them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen_vla_core.runtime.splines import spline_velocities


def cubic(p0: np.ndarray, v0: np.ndarray, p1: np.ndarray, v1: np.ndarray, period: float, u: float) -> np.ndarray:
    """What joint_trajectory_controller plays between two points with positions and velocities."""
    h00, h10, h01, h11 = 2 * u**3 - 3 * u**2 + 1, u**3 - 2 * u**2 + u, 3 * u**2 - 2 * u**3, u**3 - u**2
    return h00 * p0 + h10 * period * v0 + h01 * p1 + h11 * period * v1


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, (6, 3), elements=st.floats(-10, 10)), st.floats(0.02, 0.5))
def test_the_spline_never_leaves_the_range_of_two_neighbours(rows: np.ndarray, period: float) -> None:
    rates = spline_velocities(rows, period)
    for i in range(5):
        low, high = np.minimum(rows[i], rows[i + 1]) - 1e-9, np.maximum(rows[i], rows[i + 1]) + 1e-9
        for u in np.linspace(0, 1, 11):
            value = cubic(rows[i], rates[i], rows[i + 1], rates[i + 1], period, u)
            assert (value >= low).all() and (value <= high).all()


def test_a_steady_motion_has_its_speed_and_ends_at_rest() -> None:
    rows = 0.3 * np.arange(5.0)[:, None] * np.array([1.0, -2.0])
    rates = spline_velocities(rows, 0.1)
    np.testing.assert_allclose(rates[:-1], np.tile([3.0, -6.0], (4, 1)))
    np.testing.assert_array_equal(rates[-1], 0.0)


def test_whatever_a_chunk_holds_the_velocities_are_finite() -> None:
    rows = np.array([[0.0, 1e308], [np.nan, -1e308], [np.inf, 1e308]])
    assert np.isfinite(spline_velocities(rows, 0.1)).all()
    assert spline_velocities(rows[:1], 0.1).tolist() == [[0.0, 0.0]]
