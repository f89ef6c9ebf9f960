"""When to look again: rarely, but in time."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.runtime.latency import LatencyWindow
from qwen_vla_core.runtime.schedule import LookSchedule

ALOHA = LookSchedule.of(load_embodiment("aloha"), execute_steps=2)


def window(*seconds: float) -> LatencyWindow:
    latency = LatencyWindow(warm_up=0)
    for value in seconds:
        latency.add(value)
    return latency


def test_looks_are_as_far_apart_as_asked_while_chunks_come_in_time() -> None:
    assert ALOHA.next_look_s(10.0, 10.1, 11.6, window(0.1)) == pytest.approx(10.2)


def test_without_experience_the_next_takes_as_long_as_the_last() -> None:
    base = load_embodiment("mobile_base")  # five of its actions take longer than its watchdog
    looks = [
        LookSchedule.of(base, 5).next_look_s(10.0, 10.3, 14.0, latency) for latency in (LatencyWindow(), window(0.3))
    ]
    assert looks[0] == pytest.approx(looks[1]) and looks[0] + 0.3 < 10.3 + base.safety.watchdog_ms / 1000
    assert ALOHA.next_look_s(10.0, 10.1, None, LatencyWindow()) == pytest.approx(10.2)
    assert ALOHA.next_look_s(10.0, None, None, window(0.4)) == pytest.approx(10.2)


@pytest.mark.parametrize("steps", [5, 100])
@pytest.mark.parametrize("takes_s", [0.05, 0.1, 0.2])
def test_the_next_chunk_comes_before_the_controller_slows_down(steps: int, takes_s: float) -> None:
    robot = load_embodiment("aloha")
    schedule = LookSchedule.of(robot, steps)
    look_s = schedule.next_look_s(10.0, 10.0 + takes_s, 11.6, window(takes_s))
    slowed_s = 10.0 + takes_s + robot.safety.watchdog_ms / 1000 - schedule.brake_s
    assert look_s + takes_s == pytest.approx(slowed_s - schedule.margin_s)


def test_a_plan_that_ends_soon_is_renewed_in_time() -> None:
    assert ALOHA.next_look_s(10.0, 10.1, 10.3, window(0.1)) == pytest.approx(10.3 - ALOHA.brake_s / 2 - 0.1 - 0.02)


def test_the_slow_inferences_count_not_the_usual_ones() -> None:
    schedule = LookSchedule.of(load_embodiment("aloha"), 5)
    looks = [schedule.next_look_s(10.0, 10.1, None, window(*[0.1] * 17, *slow)) for slow in ([], [0.3, 0.3, 0.3])]
    assert looks[1] < looks[0] - 0.15


def test_as_fast_as_it_can() -> None:
    schedule = LookSchedule.of(load_embodiment("aloha"), 0)
    assert schedule.next_look_s(10.0, 10.1, 11.6, window(0.1)) == 10.0


def test_how_often_is_the_robots_own_unless_told_otherwise() -> None:
    robot = load_embodiment("mobile_base")
    assert LookSchedule.of(robot).execute_s == robot.execute_steps * robot.period_s
    assert LookSchedule.of(robot, 3).execute_s == 3 * robot.period_s
    control = dataclasses.replace(robot.control, execute_steps=None)
    assert [
        dataclasses.replace(robot, control=dataclasses.replace(control, horizon=horizon)).execute_steps
        for horizon in (8, 4)
    ] == [5, 4]
