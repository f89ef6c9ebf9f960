"""A gripper is closed no faster, and pressed no harder, than its YAML says; by default too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import Embodiment, GripSpec, Limits
from qwen_vla_core.runtime.grip import BLOCKED_AFTER_S
from qwen_vla_core.runtime.safety import SafetyLimiter

ALOHA = load_embodiment("aloha")
START = np.array([value for group in ALOHA.actions for value in group.start])
GRIP, DT = 6, 0.02


def with_grip(grip: GripSpec | None, limits: Limits | None = None) -> Embodiment:
    groups = tuple(
        dataclasses.replace(g, grip=grip, limits=limits or g.limits) if g.kind == "gripper" else g
        for g in ALOHA.actions
    )
    return dataclasses.replace(ALOHA, actions=groups)


def close_on(robot: Embodiment, object_at: float, seconds: float, target: float = 0.0) -> tuple[SafetyLimiter, list]:
    """Closes on something ``object_at`` wide; the fingers follow the command with a lag until they meet it."""
    limiter, opening, leads = SafetyLimiter(robot), 1.0, []
    limiter.reset(START)
    for _ in range(round(seconds / DT)):
        goal, measured = START.copy(), START.copy()
        goal[GRIP], measured[GRIP] = target, opening
        command = limiter.step(goal, measured, DT)
        opening = max(object_at, opening + 0.25 * (command[GRIP] - opening))
        leads.append(opening - command[GRIP])
    return limiter, leads


def test_by_default_a_blocked_gripper_is_pressed_with_its_default_lead_and_no_more() -> None:
    limiter, leads = close_on(with_grip(None), 0.6, 2.0)
    assert leads[-1] == pytest.approx(GripSpec().max_lead)
    assert limiter.interventions["grip"] > 0
    assert limiter.tally.report("limited")["limited.grip.left_gripper.worst"] == "left_gripper"
    pressed = sum(lead > GripSpec().max_lead + 1e-9 for lead in leads) * DT
    assert pressed < BLOCKED_AFTER_S + 0.35  # what it takes to notice, and to go back under the limits


def test_a_gripper_that_meets_nothing_closes_all_the_way_unhindered() -> None:
    limiter, _ = close_on(with_grip(None), 0.0, 1.5)
    assert limiter.position_c[GRIP] == 0.0 and limiter.interventions["grip"] == 0


def test_an_object_that_gives_way_is_followed() -> None:
    limiter, opening = SafetyLimiter(with_grip(GripSpec(max_lead=0.2))), 0.8
    limiter.reset(START)
    goal, measured = START.copy(), START.copy()
    goal[GRIP] = 0.0
    for tick in range(400):
        if tick > 100:
            opening = max(0.3, opening - 0.005)  # slips slowly
        measured[GRIP] = opening
        command = limiter.step(goal, measured, DT)
    assert command[GRIP] == pytest.approx(0.1)


def test_closing_is_slower_than_opening() -> None:
    limiter = SafetyLimiter(with_grip(GripSpec(closing_velocity=0.5)))
    limiter.reset(START)
    goal = START.copy()
    goal[GRIP] = 0.0
    rates = []
    for tick in range(200):
        goal[GRIP] = 0.0 if tick < 150 else 1.0
        limiter.step(goal, np.full(14, np.nan), DT)
        rates.append(limiter.rate_c[GRIP])
    assert min(rates) == pytest.approx(-0.5) and max(rates) > 2.0


def test_a_gripper_that_closes_upwards_is_bounded_upwards() -> None:
    limits = Limits((0.0,), (2.0,), (50.0,), (500.0,))  # radians; 2 is closed
    robot = with_grip(GripSpec(closing_velocity=1.0, max_lead=0.1, closed="upper"), limits)
    limiter = SafetyLimiter(robot)
    assert limiter.rise_c[GRIP] == 2.0 and limiter.fall_c[GRIP] == 50.0
    start = START.copy()
    start[GRIP] = 0.0
    limiter.reset(start)
    goal, measured = start.copy(), start.copy()
    goal[GRIP], measured[GRIP] = 2.0, 0.5
    limiter.max_jump = 5.0
    for _ in range(150):
        command = limiter.step(goal, measured, DT)
    assert command[GRIP] == pytest.approx(0.5 + 0.1 * 2.0)


def test_an_unmeasured_gripper_and_a_lead_of_the_whole_range_are_left_alone() -> None:
    limiter, _ = close_on(with_grip(GripSpec(max_lead=1.0)), 0.6, 2.0)
    assert limiter.position_c[GRIP] == 0.0 and limiter.interventions["grip"] == 0
    limiter = SafetyLimiter(with_grip(None))
    limiter.reset(START)
    goal = START.copy()
    goal[GRIP] = 0.0
    for _ in range(100):
        command = limiter.step(goal, np.full(14, np.nan), DT)
    assert command[GRIP] == 0.0
