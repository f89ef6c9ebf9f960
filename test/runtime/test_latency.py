"""Latency figures describe the steady state."""

from __future__ import annotations

import pytest

from qwen_vla_core.runtime.latency import LatencyWindow


def test_warm_up_never_counts() -> None:
    window = LatencyWindow(size=10, warm_up=2)
    for seconds in (30.0, 5.0):
        window.add(seconds)
    assert window.p50 is None and len(window) == 0
    window.add(0.1)
    assert window.p50 == window.p95 == window.p99 == 0.1


def test_percentiles_are_of_the_window_only() -> None:
    window = LatencyWindow(size=100, warm_up=0)
    for value in range(1000):
        window.add(float(value))
    assert len(window) == 100
    assert window.p50 == pytest.approx(949.5) and window.p95 == pytest.approx(994.05)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError):
        LatencyWindow(size=0)
