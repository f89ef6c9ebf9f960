"""Velocities for points that are to be joined by a cubic spline, as joint_trajectory_controller does."""

from __future__ import annotations

import numpy as np


def spline_velocities(rows_tc: np.ndarray, period_s: float) -> np.ndarray:
    """(T, c) rates at evenly spaced points such that the cubic through them never leaves the range of two neighbours.

    Harmonic means of the slopes on both sides, zero where they have opposite signs (Fritsch and Butland 1984): targets
    inside the limits give a spline inside the limits. The first rate is the first slope, the last one zero: the motion
    ends there.
    """
    rows_tc = np.asarray(rows_tc, dtype=np.float64)
    rates_tc = np.zeros_like(rows_tc)
    if len(rows_tc) < 2:
        return rates_tc
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a chunk may hold anything, also NaN
        slopes_tc = np.diff(rows_tc, axis=0) / period_s
        before, after = slopes_tc[:-1], slopes_tc[1:]
        same = before * after > 0
        rates_tc[1:-1] = np.where(
            same, 2.0 / (1.0 / np.where(same, before, 1.0) + 1.0 / np.where(same, after, 1.0)), 0.0
        )
        rates_tc[0] = slopes_tc[0]
    return np.where(np.isfinite(rates_tc), rates_tc, 0.0)
