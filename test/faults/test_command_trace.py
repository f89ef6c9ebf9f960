"""The check that runs beside every fault finds unsafe commands, and lets safe ones pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from command_trace import Tick, unsafe

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.runtime.safety import SafetyLimiter

ROBOT = load_embodiment("aloha")
PERIOD_S = 1.0 / ROBOT.control.controller_rate_hz
ARM = slice(0, 6)


def ticks(count: int = 100) -> list[Tick]:
    """The left arm on its way through far targets, with jittered periods, as the limiter lets it."""
    rng = np.random.default_rng(0)
    limiter = SafetyLimiter(ROBOT)
    pose = np.array([value for group in ROBOT.actions for value in group.start])
    limiter.reset(pose)
    made, at_s = [Tick(1, 0.0, pose[ARM], np.zeros(6))], 0.0
    for i in range(count):
        dt_s = PERIOD_S * rng.uniform(0.5, 3.0)
        at_s += dt_s
        position = limiter.step(
            rng.uniform(-1, 1, len(pose)) if i % 20 == 0 else limiter._target_c, pose * np.nan, dt_s
        )
        made.append(Tick(i + 2, at_s, position[ARM], limiter.rate_c[ARM].copy()))
    return made


def shifted(at: int, by: float) -> Callable[[list[Tick]], None]:
    def change(made: list[Tick]) -> None:
        made[at:] = [replace(tick, position=tick.position + by) for tick in made[at:]]

    return change


def test_what_the_limiter_lets_through_is_safe_also_with_missed_messages_and_a_restart() -> None:
    made = ticks()
    assert max(np.abs(tick.rate[0]) for tick in made) == pytest.approx(2.5, rel=1e-3)  # it did go to the limit
    assert unsafe(ROBOT, "left_arm", made, lets_go=False) == []
    assert unsafe(ROBOT, "left_arm", made[::3], lets_go=False) == []
    again = [replace(tick, at_s=tick.at_s + 60) for tick in ticks()]
    assert unsafe(ROBOT, "left_arm", made + again, lets_go=False) == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda made: made.append(replace(made[-1], number=200, position=made[-1].position * np.nan)), "not finite"),
        (lambda made: made.append(replace(made[-1], number=200, position=np.full(6, 4.0))), "outside its limits"),
        (lambda made: made.append(replace(made[-1], number=200, rate=np.full(6, 2.6))), "faster than its limit"),
        (shifted(50, 0.02), "position and rate disagree|a step of"),
        (shifted(50, -0.02), "position and rate disagree|a step of"),
        (
            lambda made: made.__setitem__(50, replace(made[50], rate=np.clip(made[50].rate + 0.9, -2.4, 2.4))),
            "a step of|disagree|changed",
        ),
        (lambda made: made.__setitem__(slice(60, 70), []), "a step of [12]\\d\\d.* ms"),
    ],
)
def test_each_kind_of_unsafe_command_is_found(spoil: Callable[[list[Tick]], None], told: str) -> None:
    made = ticks()
    if told.startswith("a step of [12]"):  # ten ticks are gone, but the numbers do not say so
        made = [replace(tick, number=i if i < 60 else i - 10) for i, tick in enumerate(made)]
    spoil(made)
    problems = unsafe(ROBOT, "left_arm", made, lets_go=False)
    assert any(re.search(told, problem) for problem in problems), problems


def test_commands_that_run_ahead_of_real_time_are_found() -> None:
    made = [replace(tick, at_s=tick.at_s / 3) for tick in ticks()]
    assert any("too fast over" in problem for problem in unsafe(ROBOT, "left_arm", made, lets_go=False))


def test_a_jump_after_silence_is_only_allowed_where_the_controller_lets_go() -> None:
    made = [Tick(1, 0.0, np.zeros(6), np.zeros(6)), Tick(2, 1.0, np.full(6, 0.5), np.zeros(6))]
    assert unsafe(ROBOT, "left_arm", made, lets_go=True) == []
    assert "moved too far" in unsafe(ROBOT, "left_arm", made, lets_go=False)[0]
