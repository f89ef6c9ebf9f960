"""The control law between chunks: late ones, new instructions, and every strategy under the limits."""

from __future__ import annotations

import numpy as np
import pytest
from test_controller import ALOHA, START, Rig, assert_smooth, moved, reached

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.continuity import STRATEGIES
from qwen_vla_core.runtime.controller import ControlLoop


def ramp(rig: Rig, speed: float = 0.5) -> ActionChunk:
    """The left waist moves on at ``speed`` rad/s from where it is commanded to be."""
    chunk = rig.chunk(rig.commands[-1])
    chunk.actions_hc[:, 0] += speed * 0.1 * np.arange(1, len(chunk.actions_hc) + 1)
    return chunk


def waist_speed(rig: Rig) -> float:
    return float(rig.commands[-1][0] - rig.commands[-2][0]) / 0.02


def test_a_late_chunk_slows_the_motion_down_smoothly_and_says_so_and_the_next_speeds_it_up() -> None:
    rig = reached(Rig(), START)
    assert rig.loop.feed(ramp(rig), rig.t) is None
    output = rig.run(0.36)
    assert output.reason == "playing chunks" and waist_speed(rig) == pytest.approx(0.5, rel=0.05)
    output = rig.run(0.1)
    assert output.mode == "running" and output.reason.startswith("slowed to ") and "chunk late by" in output.reason
    assert 0.0 < waist_speed(rig) < 0.35 and rig.loop.counters["slowed"] == 1
    assert rig.loop.feed(ramp(rig), rig.t) is None
    assert rig.run(0.2).reason == "playing chunks" and waist_speed(rig) == pytest.approx(0.5, rel=0.05)
    speeds = np.diff(np.array(rig.commands)[:, 0]) / 0.02
    assert np.abs(np.diff(speeds[-30:])).max() < 0.5 * 0.02 / rig.loop.buffer.clock.brake_s * 1.3


def test_the_watchdog_still_wins_over_a_plan_that_was_slowed_down() -> None:
    rig = reached(Rig(), START)
    rig.loop.feed(ramp(rig), rig.t)
    output = rig.run(0.5)
    assert output.mode == "running" and waist_speed(rig) < 0.05
    before = rig.commands[-1].copy()
    output = rig.run(0.06)
    assert output.mode == "holding" and output.reason.startswith("watchdog: no chunk for 5")
    np.testing.assert_allclose(rig.commands[-1], before, atol=2e-3)  # it stood nearly still: nothing is thrown back
    assert_smooth(rig)


def test_what_is_skipped_of_a_chunk_is_what_was_played_also_after_a_slow_down() -> None:
    rig = reached(Rig(), START)
    rig.loop.feed(ramp(rig), rig.t)
    rig.run(0.3)
    seen = ramp(rig, speed=0.5)
    rig.run(0.18)  # slowed down meanwhile
    played_s = rig.loop.buffer.clock.now_s - rig.loop.buffer.clock.at(seen.stamp_ns)
    assert 0.08 < played_s < 0.17
    rig.loop.feed(seen, rig.t)
    plan_c = rig.loop.buffer._plan.at(rig.loop.buffer.clock.now_s)
    assert plan_c[0] == pytest.approx(seen.actions_hc[0, 0] + 0.5 * (played_s - 0.1), abs=0.003)
    assert abs(plan_c[0] - rig.commands[-1][0]) < 0.01  # where it is; by the world's clock it would be ahead by 0.03


@pytest.mark.parametrize("hold", [False, True])
def test_a_chunk_for_the_old_instruction_in_flight_is_never_played_after_a_new_one(hold: bool) -> None:
    rig = reached(Rig(), START)
    rig.run(0.2, moved(left_waist=0.3))
    in_flight = rig.chunk(moved(left_waist=2.0))
    rig.run(0.04)
    rig.loop.instruct(rig.t, hold=hold)
    assert rig.loop.feed(in_flight, rig.t) == "before_epoch"
    output = rig.tick()
    assert output.mode == ("holding" if hold else "running")
    rig.run(0.04)
    assert rig.feed(moved(left_waist=-0.3)) is None
    assert rig.run(0.6, moved(left_waist=-0.3)).mode == "running"
    assert max(command[0] for command in rig.commands) < 0.35
    assert_smooth(rig)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_obeys_the_limits_and_arrives(name: str) -> None:
    rig, rng = Rig(), np.random.default_rng(2)
    rig.loop = ControlLoop(ALOHA, strategy=STRATEGIES[name])
    rig.loop.start(rig.t)
    for _ in range(12):
        rig.feed(START * 0.8 + rng.uniform(0.0, 0.3, 14), age_ms=90)
        rig.run(0.18)
    assert rig.run(4.0, moved(left_waist=0.4)).mode == "running"
    np.testing.assert_allclose(rig.commands[-1], moved(left_waist=0.4), atol=2e-3)
    assert_smooth(rig)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_replayed_sequence_of_events_gives_the_same_commands(name: str) -> None:
    """Irregular ticks, late and refused chunks, an instruction, a stop: all that counts is what came when."""

    def play() -> np.ndarray:
        rig, rng = Rig(), np.random.default_rng(5)
        rig.loop = ControlLoop(ALOHA, strategy=STRATEGIES[name])
        rig.loop.start(rig.t)
        for index in range(60):
            if rng.random() < 0.3:
                rig.feed(START * 0.9 + rng.uniform(0, 0.2, 14), age_ms=float(rng.uniform(20, 400)))
            if index == 30:
                rig.loop.instruct(rig.t, hold=False)
            if index == 45:
                rig.loop.stop(rig.t)
                rig.loop.start(rig.t)
            rig.tick(int(rng.integers(5, 60)) * 1_000_000)
        return np.array(rig.commands)

    first = play()
    np.testing.assert_array_equal(play(), first)
    assert np.ptp(first, axis=0).max() > 0.01
