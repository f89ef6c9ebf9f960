"""The rule with a jerk limit: four limits that never contradict each other, for steps of any length."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, CommandSpec, Embodiment, Limits
from qwen_vla_core.runtime.motion import Axes, Goal, JerkRule, State
from qwen_vla_core.runtime.safety import SafetyLimiter

ALOHA = load_embodiment("aloha")
DT, MAX_DT = 0.02, 0.04
NOTHING = np.full(4, np.nan)
GARBAGE = [np.nan, np.inf, -np.inf, 1e308, -1e308, 0.0]


def smooth_robot(jerk: float = 20.0) -> Embodiment:
    """Two joints with jerk limits, one without, and a base's velocity with one. ``jerk`` × acceleration."""
    command = CommandSpec(kind="forward_command", topic="/a")
    arm = Limits((-1, -0.2), (1, 0.2), (1, 3), (5, 40), (5 * jerk, 40 * jerk))
    rough = Limits((-1,), (1,), (2,), (20,))
    base = Limits((-0.5,), (0.5,), (1,), (8,), (8 * jerk,))
    groups = (
        ActionGroup("arm", "joint_position", ("j0", "j1"), "rad", arm, command, "hold_measured"),
        ActionGroup("rough", "joint_position", ("j2",), "rad", rough, command, "hold_measured"),
        ActionGroup("base", "base_twist", ("vx",), "m/s", base, command, "zero"),
    )
    return dataclasses.replace(ALOHA, actions=groups, safety=dataclasses.replace(ALOHA.safety, workspace=()))


def assert_within_limits(limiter: SafetyLimiter, commands: list[np.ndarray], steps_s: list[float]) -> None:
    """Checks the published sequence alone: differences of it, divided by the lengths of the steps."""
    commands_tc, dt = np.array(commands), np.array(steps_s)[:, None]
    assert (commands_tc >= limiter.lower_c).all() and (commands_tc <= limiter.upper_c).all()
    rate = np.diff(commands_tc, axis=0) / dt
    acceleration = np.diff(np.vstack([0 * rate[:1], rate]), axis=0) / dt
    jerk = np.diff(np.vstack([0 * rate[:1], acceleration]), axis=0) / dt
    slack = 1e-14 / dt  # of the differences
    assert (rate <= limiter.rise_c * (1 + 1e-9) + slack).all() and (rate >= -limiter.fall_c * (1 + 1e-9) - slack).all()
    assert (np.abs(acceleration) <= limiter.acceleration_c * (1 + 1e-9) + 4 * slack / dt).all()
    assert (np.abs(jerk) <= limiter.jerk_c * (1 + 1e-6) + 16 * slack / dt**2).all()


values = st.one_of(st.sampled_from(GARBAGE), st.floats(-1.5, 1.5))
step = st.tuples(
    st.lists(values, min_size=4, max_size=4),
    st.floats(1e-3, MAX_DT),
    st.sampled_from(["step", "step", "step", "stop"]),
    st.floats(0, 1.5),
    st.integers(1, 6),
)


@settings(max_examples=100, deadline=None)
@given(jerk=st.sampled_from([2.0, 10.0, 60.0, 400.0]), steps=st.lists(step, min_size=1, max_size=25))
def test_no_sequence_of_targets_and_step_lengths_breaks_a_limit(jerk: float, steps: list) -> None:
    limiter = SafetyLimiter(smooth_robot(jerk))
    limiter.reset(np.zeros(4))
    commands, durations = [limiter.position_c.copy()], []
    with np.errstate(all="ignore"):
        for target, dt, action, scale, repeat in steps:
            for _ in range(repeat):
                stop = action == "stop"
                commands.append(limiter.stop(dt) if stop else limiter.step(np.array(target), NOTHING, dt, scale))
                durations.append(dt)
    assert_within_limits(limiter, commands, durations)


@pytest.mark.parametrize("jerk", [2.0, 10.0, 60.0, 400.0])
def test_racing_between_both_limits_with_uneven_steps_stays_within_them(jerk: float) -> None:
    rng = np.random.default_rng(0)
    limiter = SafetyLimiter(smooth_robot(jerk))
    limiter.reset(np.zeros(4))
    commands, durations, fastest = [limiter.position_c.copy()], [], np.zeros(4)
    for tick in range(1200):
        target = limiter.upper_c if tick // 61 % 2 else limiter.lower_c
        durations.append(float(rng.choice([0.001, 0.01, 0.02, 0.04]) * rng.uniform(0.5, 1.0)))
        commands.append(limiter.step(target, NOTHING, durations[-1]))
        fastest = np.maximum(fastest, np.abs(limiter.rate_c))
    assert_within_limits(limiter, commands, durations)
    assert (fastest[[0, 2]] > 0.9 * limiter.velocity_c[[0, 2]]).all()  # and it really moves


@settings(max_examples=150, deadline=None)
@given(
    drive=st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-3, MAX_DT)), min_size=1, max_size=30),
    steps=st.lists(st.floats(1e-4, MAX_DT), min_size=1, max_size=40),
)
def test_a_stop_never_goes_further_than_its_reserve_whatever_the_steps(drive: list, steps: list[float]) -> None:
    limiter = SafetyLimiter(smooth_robot(10.0))
    limiter.reset(np.zeros(4))
    for target, dt in drive:
        limiter.step(np.full(4, target), NOTHING, dt)
    arm = slice(0, 2)
    start = limiter.position_c[arm].copy()
    rule = limiter._rules[1][1]  # of the channels with a jerk limit: the two joints and the base
    below, above = (r[arm] for r in rule.reserves(limiter.rate_c[[0, 1, 3]], limiter._acceleration_c[[0, 1, 3]]))
    for dt in steps:
        moved = limiter.stop(dt)[arm] - start
        assert (moved <= above + 1e-9).all() and (moved >= -below - 1e-9).all()


def test_each_step_of_a_stop_stays_within_the_reserve_and_leaves_a_smaller_one() -> None:
    """The lemma the rule rests on, at 40 000 states at once: every state is a channel of its own."""
    rng, count = np.random.default_rng(0), 40_000
    ones = np.ones(count)
    for dt in (1e-4, 0.003, 0.02, 0.04, 0.5):
        most, jerk = 5.0 * ones, rng.choice([5.0, 50.0, 500.0, 5000.0], count)
        far = 1e6 * ones
        rule = JerkRule(Axes(-far, far, far, far, most, jerk, np.zeros(count, bool)))
        change = rng.uniform(-1, 1, count) * most
        rate = rng.uniform(-1, 1, count) * rng.choice([0.003, 0.05, 1.0], count) - change * np.abs(change) / jerk / 2
        state = State(np.zeros(count), rate, change)
        below, above = rule.reserves(rate, change)
        still = Goal(np.zeros(count), np.zeros(count), np.zeros(count), True)
        stopped = rule.choose(state, still, dt, 1.0).stop_rate
        moved = stopped * dt
        below_then, above_then = rule.reserves(stopped, (stopped - rate) / dt)
        assert (moved + above_then <= above + 1e-9 * (1 + above)).all()
        assert (moved - below_then >= -below - 1e-9 * (1 + below)).all()


def test_motion_below_all_limits_passes_bit_exact_without_lag() -> None:
    limiter = SafetyLimiter(smooth_robot(60.0))
    limiter.reset(np.zeros(4))
    for tick in range(1, 600):
        share = min(tick * DT / 2.0, 1.0)
        ease = share**3 * (10 - 15 * share + 6 * share**2)
        target = np.array([0.4, 0.15, 0.4, 0.15]) * ease * np.sin(2.0 * tick * DT + np.arange(4))
        np.testing.assert_array_equal(limiter.step(target, NOTHING, DT), target)
    assert not limiter.interventions


@pytest.mark.parametrize("jerk", [2.0, 10.0, 60.0, 400.0])
def test_a_distant_target_is_reached_exactly_without_overshoot_about_as_fast_as_possible(jerk: float) -> None:
    limiter = SafetyLimiter(smooth_robot(jerk))
    limiter.reset(np.array([-0.9, -0.2, 0.0, 0.0]))
    target, ticks = np.array([0.9, 0.2, 0.5, 0.4]), 0
    while not np.array_equal(limiter.position_c, target):
        assert (limiter.step(target, NOTHING, DT) <= target + 1e-12).all()
        ticks += 1
        assert ticks < 500
    ideal_s = 1.8 / 1.0 + 1.0 / 5.0 + 1.0 / jerk  # distance / velocity + velocity / acceleration + acceleration / jerk
    assert ticks * DT < 1.3 * ideal_s
    for _ in range(5):
        np.testing.assert_array_equal(limiter.step(target, NOTHING, DT), target)


def test_a_stop_ends_at_rest_and_a_base_at_zero() -> None:
    limiter = SafetyLimiter(smooth_robot(10.0))
    limiter.reset(np.zeros(4))
    for _ in range(20):
        limiter.step(np.array([1.0, 0.2, 1.0, 0.5]), NOTHING, DT)
    assert np.abs(limiter.rate_c[:3]).max() > 0.1 and not limiter.at_rest
    ticks = 0
    while not limiter.at_rest:
        limiter.stop(DT)
        ticks += 1
        assert ticks < 60
    assert limiter.position_c[3] == 0.0
    before = limiter.position_c.copy()
    np.testing.assert_array_equal(limiter.stop(DT), before)


def test_what_cut_a_motion_short_is_counted_by_its_name_with_the_channel() -> None:
    limiter = SafetyLimiter(smooth_robot(2.0))
    limiter.reset(np.zeros(4))
    limiter.step(
        np.array([0.0003, 0.0, 0.0, 0.0]), NOTHING, DT
    )  # 0.015 rad/s and 0.75 rad/s² are allowed, 37 rad/s³ not
    assert dict(limiter.interventions) == {"jerk": 1}
    assert limiter.tally.report("limited") == {
        "limited.jerk": 1,
        "limited.jerk.arm": 1,
        "limited.jerk.arm.worst": "j0",
    }
