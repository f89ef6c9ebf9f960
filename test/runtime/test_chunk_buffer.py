"""The plan is read by time, replaced without a jump, and refuses what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.chunk_buffer import ChunkBuffer

CHANNELS = ("a", "b")
H, PERIOD = 5, 0.1
MS = 1_000_000


def make(stamp_ms: float, values: np.ndarray | float = 0.0, **changes: object) -> ActionChunk:
    fields = {
        "actions_hc": np.broadcast_to(np.asarray(values, dtype=float), (H, 2)).copy(),
        "channels": CHANNELS,
        "stamp_ns": int(stamp_ms * MS),
        "period_s": PERIOD,
    }
    return ActionChunk(**{**fields, **changes})  # type: ignore[arg-type]


def buffer(**arguments: Any) -> ChunkBuffer:
    return ChunkBuffer(CHANNELS, H, PERIOD, **arguments)


RAMP = np.arange(1, H + 1)[:, None] * np.array([1.0, -10.0])


def test_actions_are_placed_by_observation_time_and_interpolated() -> None:
    plan = buffer()
    assert plan.sample(0) is None
    assert plan.push(make(1000, RAMP), 1000 * MS) is None
    for t_ms, expected in [(1100, 1.0), (1150, 1.5), (1230, 2.3), (1500, 5.0)]:
        np.testing.assert_allclose(plan.sample(t_ms * MS), [expected, -10 * expected])


def test_latency_skips_exactly_the_elapsed_actions_and_pads_nothing() -> None:
    plan = buffer()
    plan.push(make(1000, RAMP), 1340 * MS)  # inference took 340 ms
    np.testing.assert_allclose(plan.sample(1340 * MS), [3.4, -34])
    assert plan.consumed_count(1340 * MS) == 3


def test_before_the_first_action_and_past_the_last_the_nearest_action_holds() -> None:
    plan = buffer()
    plan.push(make(1000, RAMP), 1000 * MS)
    np.testing.assert_array_equal(plan.sample(1010 * MS), RAMP[0])
    np.testing.assert_array_equal(plan.sample(9000 * MS), RAMP[-1])


def test_replacement_is_continuous_and_ends_on_the_new_plan() -> None:
    plan = buffer(blend_s=0.2)
    plan.push(make(1000, RAMP), 1000 * MS)
    before = plan.sample(1300 * MS)
    plan.push(make(1250, 7.0), 1300 * MS)
    times = np.arange(1300, 1560, 5)
    path = np.array([plan.sample(int(t) * MS) for t in times])
    np.testing.assert_allclose(path[0], before)
    assert np.abs(np.diff(path[:, 0])).max() < (7 - 3) * 5 / 200 + 1e-9
    np.testing.assert_array_equal(path[times >= 1500], 7.0)


def test_replacements_faster_than_the_blend_stay_continuous() -> None:
    plan, rng = buffer(blend_s=0.2), np.random.default_rng(0)
    plan.push(make(0, 0.0), 0)
    previous = plan.sample(0)
    for t_ms in range(5, 3000, 5):
        if t_ms % 100 == 0:
            held = plan.sample(t_ms * MS)
            assert plan.push(make(t_ms - 40, rng.uniform(-1, 1, 2)), t_ms * MS) is None
            np.testing.assert_allclose(plan.sample(t_ms * MS), held)
        now = plan.sample(t_ms * MS)
        assert np.abs(now - previous).max() < 0.25  # slope ≤ (sum of open differences) / blend, never a step of 1
        previous = now


def test_columns_are_matched_by_name() -> None:
    plan = buffer()
    plan.push(make(0, np.array([1.0, 2.0]), channels=("b", "a")), 0)
    np.testing.assert_array_equal(plan.sample(0), [2.0, 1.0])


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (make(1000, channels=("a", "c")), "wrong_channels"),
        (make(1000, channels=("a", "a")), "wrong_channels"),
        (make(1000, channels=("a",)), "wrong_channels"),
        (make(1000, channels=("a", "b", "c")), "wrong_channels"),
        (make(1000, actions_hc=np.zeros((H - 1, 2))), "wrong_length"),
        (make(1000, actions_hc=np.zeros((H + 1, 2))), "wrong_length"),
        (make(1000, actions_hc=np.zeros(H)), "wrong_length"),
        (make(1000, np.array([0.0, np.nan])), "non_finite"),
        (make(1000, np.array([-np.inf, 0.0])), "non_finite"),
        (make(1000, period_s=0.05), "wrong_period"),
        (make(1000, period_s=float("nan")), "wrong_period"),
        (make(1200), "future_stamp"),
        (make(400), "expired"),
        (make(849), "before_epoch"),
    ],
)
def test_refusals_name_their_reason_are_counted_and_leave_the_plan(chunk: ActionChunk, reason: str) -> None:
    plan = buffer()
    plan.flush(850 * MS)
    plan.push(make(900, 3.0), 950 * MS)
    assert plan.push(chunk, 1000 * MS) == reason
    assert plan.rejections == {reason: 1} and plan.accepted == 1
    np.testing.assert_array_equal(plan.sample(1000 * MS), 3.0)


def test_older_and_repeated_observations_are_refused_even_after_the_plan_was_dropped() -> None:
    plan = buffer()
    plan.push(make(900), 950 * MS)
    plan.clear()
    assert plan.push(make(900), 960 * MS) == "not_newer"
    assert plan.push(make(880), 960 * MS) == "not_newer"
    assert plan.empty
    assert plan.push(make(910), 960 * MS) is None


def test_flush_begins_an_epoch_that_older_observations_cannot_enter() -> None:
    plan = buffer()
    plan.push(make(900), 950 * MS)
    plan.flush(1000 * MS)
    assert plan.empty and plan.epoch == 1
    assert plan.push(make(999), 1100 * MS) == "before_epoch"
    assert plan.push(make(1000), 1100 * MS) is None


def test_consumed_prefix_holds_the_actions_due_so_far() -> None:
    plan = buffer()
    assert plan.consumed(0) is None
    plan.push(make(1000, RAMP), 1000 * MS)
    assert plan.consumed(1099 * MS) is None
    prefix = plan.consumed(1300 * MS)
    assert prefix is not None and prefix.stamp_ns == 1000 * MS
    np.testing.assert_array_equal(prefix.actions_hc, RAMP[:3])
    assert plan.consumed_count(9000 * MS) == H


def test_displacements_are_held_add_up_and_end_with_the_plan() -> None:
    plan = buffer(held_c=np.array([True, False]))
    plan.push(make(1000, RAMP), 1000 * MS)
    samples = np.array([plan.sample(t_ms * MS) for t_ms in range(1000, 1900, 10)])
    assert samples[:, 0].sum() / 10 == pytest.approx(RAMP[:, 0].sum())  # ten ticks of a tenth per period
    assert samples[:10, 0].tolist() == [1.0] * 10 and samples[10:20, 0].tolist() == [2.0] * 10
    assert not samples[50:, 0].any()
    np.testing.assert_allclose(samples[15, 1], -15.0)
    assert samples[-1, 1] == RAMP[-1, 1]
    plan.push(make(1305, 0.5), 1340 * MS)  # late: what has not been played of it still is
    assert plan.sample(2000 * MS)[0] == 0.0
