"""Plan time: in step with the world's, slowed smoothly for a late chunk, remembered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.runtime.plan_clock import PlanClock

MS = 1_000_000
BRAKE = 0.125


def play(clock: PlanClock, until_ms: int, end_s: float, from_ms: int = 0, stop_by_ms: int | None = None, dt: int = 5):
    """(T, 3) ms, plan time and rate at every tick."""
    rows = []
    for t_ms in range(from_ms, until_ms + 1, dt):
        clock.advance(t_ms * MS, end_s, None if stop_by_ms is None else stop_by_ms * MS)
        rows.append((t_ms, clock.now_s, clock.rate))
    return np.array(rows)


def test_it_starts_smoothly_runs_with_the_world_and_comes_to_rest_exactly_at_the_end() -> None:
    rows = play(PlanClock(BRAKE, 5.0), 2000, end_s=1.0)
    ms, plan_s, rate = rows.T
    assert rate[ms == 300][0] == 1.0 and plan_s[ms == 800][0] - plan_s[ms == 300][0] == pytest.approx(0.5)
    assert plan_s[-1] == pytest.approx(1.0, abs=1e-6) and rate[-1] == 0.0
    assert np.abs(np.diff(rate)).max() <= 0.005 / BRAKE + 1e-9


def test_it_stands_by_the_time_it_has_to_and_speeds_up_again_when_a_chunk_comes() -> None:
    clock = PlanClock(BRAKE, 5.0)
    rows = play(clock, 500, end_s=9.0, stop_by_ms=500)
    assert rows[rows[:, 0] == 370, 2] == 1.0 and rows[-1, 2] < 0.05
    assert np.abs(np.diff(rows[:, 2])).max() <= 0.005 / BRAKE + 1e-9
    assert clock.late_since_ns == pytest.approx(375 * MS, abs=10 * MS)
    clock.released()
    again = play(clock, 700, end_s=9.0, from_ms=505, stop_by_ms=1000)
    assert again[-1, 2] == 1.0 and clock.late_since_ns is None
    assert np.abs(np.diff(again[:, 2])).max() <= 0.005 / BRAKE + 1e-9


def test_the_past_is_remembered_and_a_hold_is_not_played() -> None:
    clock = PlanClock(BRAKE, 5.0)
    rows = play(clock, 400, end_s=9.0)
    for t_ms, plan_s, _ in rows[::7]:
        assert clock.at(int(t_ms) * MS) == pytest.approx(plan_s, abs=1e-9)
    assert clock.at(50 * MS + MS) == pytest.approx((rows[10, 1] * 4 + rows[11, 1]) / 5)
    here = clock.now_s
    clock.hold(1000 * MS)
    assert clock.now_s == here == clock.at(900 * MS) == clock.at(2000 * MS)
    assert clock.at(-5 * MS) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    ticks=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    end_s=st.floats(0.01, 2.0),
    patience=st.integers(50, 2000),
)
def test_whatever_the_ticks_it_never_goes_back_overtakes_the_world_or_passes_the_end(ticks, end_s, patience) -> None:
    clock, t_ms = PlanClock(BRAKE, 5.0), 0
    clock.advance(0, end_s)
    for tick in ticks:
        before = clock.now_s
        t_ms += tick
        clock.advance(t_ms * MS, end_s, patience * MS)
        assert before <= clock.now_s <= min(before + tick / 1000, end_s) + 1e-9
        assert 0.0 <= clock.rate <= 1.0
    assert t_ms <= patience + 20 or clock.rate == 0.0  # after its time it stands


def test_how_far_it_gets_hardly_depends_on_the_tick() -> None:
    ends = [play(PlanClock(BRAKE, 5.0), 600, end_s=0.6, dt=dt)[-1, 1] for dt in (4, 20, 100)]
    assert np.ptp(ends) < 0.01
