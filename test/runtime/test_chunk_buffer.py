"""The plan is read by its own time, joined without a jump, and refuses what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.chunk_buffer import ChunkBuffer
from qwen_vla_core.runtime.continuity import STRATEGIES

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


def run(plan: ChunkBuffer, until_ms: int, from_ms: int = 0, every_ms: int = 10) -> list[np.ndarray | None]:
    """Samples on the way, as a control loop does."""
    return [plan.sample(t_ms * MS) for t_ms in range(from_ms, until_ms + 1, every_ms)]


def playing(values: np.ndarray | float = 0.0, stamp_ms: int = 0, until_ms: int = 200, **arguments: Any) -> ChunkBuffer:
    """A buffer that has played a chunk for a while, from a standstill."""
    plan = buffer(**arguments)
    plan.push(make(stamp_ms, values), stamp_ms * MS, np.zeros(2))
    run(plan, until_ms, stamp_ms)
    return plan


def test_a_chunk_starts_where_the_robot_was_and_reaches_each_action_when_it_is_due() -> None:
    plan = buffer()
    assert plan.sample(0) is None
    assert plan.push(make(1000, RAMP), 1000 * MS, np.array([0.0, 0.0])) is None
    for t_ms in range(1000, 1400, 10):  # RAMP's action i is i + 1 and due after (i + 1) · 100 ms of plan time
        value_c, due = plan.sample(t_ms * MS), plan.clock.now_s / PERIOD
        np.testing.assert_allclose(value_c, [due, -10 * due], atol=1e-6)
    assert plan.clock.rate == 1.0 and due > 2


def test_what_was_played_since_the_observation_is_skipped_and_nothing_else() -> None:
    plan = playing(RAMP, until_ms=300, strategy=STRATEGIES["replace"])
    played_ms = 1000 * plan.clock.now_s  # less than 300: it started from a standstill
    assert 150 < played_ms < 200
    plan.push(make(100, RAMP + 100), 300 * MS)
    skipped = (played_ms - 1000 * plan.clock.at(100 * MS)) / 100  # actions; by the world's clock it would be two
    assert 1.5 < skipped < 1.8 and plan.consumed_count(300 * MS) == 1
    assert plan.sample(300 * MS)[0] == pytest.approx(100 + skipped)


def test_a_robot_that_stood_while_the_model_was_thinking_skips_nothing() -> None:
    plan = buffer()
    run(plan, 1340)
    plan.push(make(1000, RAMP), 1340 * MS, np.array([0.5, 0.0]))  # inference took 340 ms
    np.testing.assert_allclose(plan.sample(1340 * MS), [0.5, 0.0])
    assert plan.consumed_count(1340 * MS) == 0


def test_past_the_last_action_that_action_holds() -> None:
    plan = playing(RAMP, until_ms=2000)
    np.testing.assert_allclose(plan.sample(9000 * MS), RAMP[-1])
    assert plan.clock.rate == 0.0


@pytest.mark.parametrize("name", [name for name, each in STRATEGIES.items() if each.joining != "replace"])
def test_replacement_is_continuous_and_ends_on_the_new_plan(name: str) -> None:
    plan = playing(RAMP, strategy=STRATEGIES[name])
    before = plan.sample(200 * MS)
    plan.push(make(100, np.full((H, 2), 7.0)), 200 * MS)
    path = np.array(run(plan, 1500, 200, 5))
    np.testing.assert_allclose(path[0], before, atol=1e-9)
    assert np.abs(np.diff(path[:, 0])).max() < 0.5  # 5.5 apart, never in one step
    np.testing.assert_allclose(path[-1], 7.0)


def test_replace_takes_the_new_plan_at_once() -> None:
    plan = playing(RAMP, until_ms=300, strategy=STRATEGIES["replace"])
    plan.push(make(10, np.full((H, 2), 7.0)), 300 * MS)
    np.testing.assert_allclose(plan.sample(300 * MS), 7.0)
    assert plan.last_jump_c is not None and plan.last_jump_c[0] > 4


@pytest.mark.parametrize("name", ["blend", "ensemble_act", "ensemble_adaptive"])
def test_replacements_faster_than_the_fade_stay_continuous(name: str) -> None:
    plan, rng = buffer(strategy=STRATEGIES[name]), np.random.default_rng(0)
    plan.push(make(0, 0.0), 0)
    previous = plan.sample(0)
    for t_ms in range(5, 3000, 5):
        if t_ms % 100 == 0:
            held = plan.sample(t_ms * MS)
            assert plan.push(make(t_ms - 40, rng.uniform(-1, 1, 2)), t_ms * MS) is None
            np.testing.assert_allclose(plan.sample(t_ms * MS), held, atol=1e-9)
        now = plan.sample(t_ms * MS)
        assert np.abs(now - previous).max() < 0.25  # slope ≤ (sum of open differences) / fade, never a step of 1
        previous = now


def test_ensembles_average_what_was_predicted_for_the_same_moment() -> None:
    plan = playing(0.0, strategy=STRATEGIES["ensemble_act"])
    plan.push(make(150, 1.0), 200 * MS)
    run(plan, 450, 200)  # past the fade of the step, before the first plan's last period
    assert 0.49 < plan.sample(450 * MS)[0] < 0.5  # the older one counts a little more


def test_the_adaptive_ensemble_listens_to_plans_that_go_the_same_way() -> None:
    ahead, back = make(0, RAMP), make(0, -RAMP)
    shares = {}
    for name, first in (("same", ahead), ("opposite", back)):
        plan = buffer(strategy=STRATEGIES["ensemble_adaptive"])
        plan.push(first, 0, np.zeros(2))
        run(plan, 150)
        plan.push(make(100, RAMP), 150 * MS)
        joiner = plan._joiner
        shares[name] = joiner._weights[0] / sum(joiner._weights)
    assert shares["same"] == pytest.approx(0.5, abs=0.01) and shares["opposite"] < 0.05


def test_a_new_epoch_lets_the_plan_go_on_but_averages_nothing_of_it_in() -> None:
    plan = playing(0.0, strategy=STRATEGIES["ensemble_act"])
    plan.begin_epoch(180 * MS)
    assert not plan.empty and plan.push(make(170, 1.0), 200 * MS) == "before_epoch"
    assert plan.push(make(190, 1.0), 200 * MS) is None
    np.testing.assert_allclose(run(plan, 900, 200)[-1], 1.0)


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


def test_consumed_prefix_holds_the_actions_played_so_far() -> None:
    plan = buffer()
    assert plan.consumed(0) is None
    plan.push(make(1000, RAMP), 1000 * MS)
    run(plan, 1060, 1000)
    assert plan.consumed(1060 * MS) is None
    run(plan, 1350, 1060)
    prefix = plan.consumed(1350 * MS)
    assert prefix is not None and prefix.stamp_ns == 1000 * MS and 0.2 < plan.clock.now_s < 0.3
    np.testing.assert_array_equal(prefix.actions_hc, RAMP[:2])
    run(plan, 9000, 1350)
    assert plan.consumed_count(9000 * MS) == H


@pytest.mark.parametrize("every_ms", [10, 7, 20])
def test_displacements_are_held_add_up_and_end_with_the_plan(every_ms: int) -> None:
    plan = buffer(held_c=np.array([True, False]))
    plan.sample(1000 * MS)
    plan.push(make(1000, RAMP), 1000 * MS)
    samples = np.array(run(plan, 2500, 1000, every_ms))
    assert samples[:, 0].sum() * every_ms / 100 == pytest.approx(RAMP[:, 0].sum(), rel=2e-3)  # of a tenth per period
    assert not samples[-20:, 0].any()
    np.testing.assert_allclose(samples[-1, 1], RAMP[-1, 1])


def test_the_rest_of_a_plan_is_what_will_be_played() -> None:
    """Told now, it is what a chunk observed now is aligned with: row i is due i periods of plan time later."""
    plan = playing(RAMP, until_ms=150, held_c=np.array([False, True]))
    plan.push(make(100, 2 * RAMP), 150 * MS)
    rest, now_s = plan.rest(), plan.clock.now_s
    assert rest is not None and len(rest) == 1 + int((plan._plan.end_s - now_s) / PERIOD + 1e-6)
    played = {}
    for t_ms in range(150, 3000):
        value = plan.sample(t_ms * MS)
        played[round(plan.clock.now_s - now_s, 3)] = value[0]
    for index, row in enumerate(rest[:-1]):
        due = min(played, key=lambda s, index=index: abs(s - index * PERIOD))
        assert played[due] == pytest.approx(row[0], abs=0.05)
