from __future__ import annotations

import math

from qwen_vla_core.evaluation.metrics import Rate


def test_wilson_interval_matches_the_textbook_value():
    low, high = Rate(8, 10).interval  # Wilson (1927), z = 1.959964: centre 0.7168, half-width 0.2271
    assert math.isclose(low, 0.4902, abs_tol=5e-4)
    assert math.isclose(high, 0.9433, abs_tol=5e-4)


def test_no_trials_claims_nothing():
    assert Rate(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Rate(0, 0).value)


def test_rate_prints_count_rate_and_interval():
    assert str(Rate(30, 50)) == "30/50 = 60% [46%, 72%]"
