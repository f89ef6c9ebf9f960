"""Invariant 4: whatever the policy sends, no command is non-finite, out of limits, or too fast."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, CommandSpec, Embodiment, Limits, Workspace
from qwen_vla_core.runtime.safety import SafetyLimiter

ALOHA = load_embodiment("aloha")
FREE = dataclasses.replace(ALOHA, safety=dataclasses.replace(ALOHA.safety, workspace=()))  # joints alone
DT = 0.02
GARBAGE = [np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-308, 0.0]


def small_robot(**safety: object) -> Embodiment:
    """Two joints, an end effector's x y z, and a base: every kind of channel with limits of different sizes."""
    command = CommandSpec(kind="forward_command", topic="/a")
    groups = (
        ActionGroup(
            "arm",
            "joint_position",
            ("j0", "j1"),
            "rad",
            Limits((-1, -2), (1, 2), (1, 3), (5, 40)),
            command,
            "hold_measured",
        ),
        ActionGroup(
            "hand",
            "eef_pose",
            ("x", "y", "z"),
            "m",
            Limits((-1,) * 3, (1,) * 3, (0.5,) * 3, (3,) * 3),
            command,
            "hold_measured",
        ),
        ActionGroup(
            "base",
            "base_twist",
            ("vx", "wz"),
            "m/s,rad/s",
            Limits((-0.5, -1), (0.5, 1), (1, 2), (8, 15)),
            command,
            "zero",
        ),
    )
    return dataclasses.replace(
        ALOHA, actions=groups, safety=dataclasses.replace(ALOHA.safety, **{"workspace": (), **safety})
    )


def assert_within_limits(limiter: SafetyLimiter, commands: list[np.ndarray], steps_s: list[float]) -> None:
    """Checks what a robot would see: the published sequence alone."""
    commands_tc, dt = np.array(commands), np.array(steps_s)[:, None]
    assert np.isfinite(commands_tc).all()
    assert (commands_tc >= limiter.lower_c).all() and (commands_tc <= limiter.upper_c).all()
    rate = np.diff(commands_tc, axis=0) / dt
    slack = 1e-12 / dt
    assert (np.abs(rate) <= limiter.velocity_c + slack).all()
    change = np.abs(np.diff(np.vstack([np.zeros_like(rate[:1]), rate]), axis=0))
    assert (change <= limiter.acceleration_c * dt + 4 * slack + 1e-9).all()


values = st.one_of(st.sampled_from(GARBAGE), st.floats(-10, 10), st.floats(allow_nan=True, allow_infinity=True))
step = st.tuples(
    st.lists(values, min_size=7, max_size=7),
    st.lists(values, min_size=7, max_size=7),
    st.floats(1e-3, 0.04),
    st.sampled_from(["step", "step", "step", "stop"]),
    st.floats(-1, 2),
)


@settings(max_examples=150, deadline=None)
@given(start=st.lists(st.floats(-3, 3), min_size=7, max_size=7), steps=st.lists(step, min_size=1, max_size=40))
def test_garbage_never_leaves_the_limits(start: list[float], steps: list) -> None:
    limiter = SafetyLimiter(
        small_robot(max_jump=0.3, workspace=(Workspace("hand", (-0.4, -0.4, 0.1), (0.4, 0.4, 0.8)),))
    )
    limiter.reset(np.array(start))
    commands, durations = [limiter.position_c.copy()], []
    with np.errstate(all="ignore"):
        for target, measured, dt, action, scale in steps:
            if action == "stop":
                commands.append(limiter.stop(dt))
            else:
                commands.append(limiter.step(np.array(target), np.array(measured), dt, scale))
            durations.append(dt)
    assert_within_limits(limiter, commands, durations)


def test_long_random_runs_with_every_adversary_stay_within_limits() -> None:
    """Targets that race between both limits are the worst case for braking distance."""
    rng = np.random.default_rng(0)
    for pattern in ("bang", "noise", "ramps", "garbage"):
        limiter = SafetyLimiter(FREE)
        limiter.reset(np.array([x for group in ALOHA.actions for x in group.start]))
        commands, durations = [limiter.position_c.copy()], []
        for tick in range(1500):
            span = limiter.upper_c - limiter.lower_c
            if pattern == "bang":
                target = np.where(tick // 37 % 2 == 0, limiter.upper_c, limiter.lower_c)
            elif pattern == "noise":
                target = rng.uniform(-5, 5, 14)
            elif pattern == "ramps":
                target = limiter.lower_c + span * (tick % 61) / 60 * rng.uniform(0.5, 1.5)
            else:
                target = rng.choice(GARBAGE, 14)
            dt = float(rng.uniform(0.002, 0.04))
            measured = commands[-1] + rng.normal(0, 0.02, 14)
            commands.append(limiter.step(target, measured, dt) if rng.random() > 0.02 else limiter.stop(dt))
            durations.append(dt)
        assert_within_limits(limiter, commands, durations)


def test_motion_below_the_limits_passes_bit_exact_without_lag() -> None:
    limiter = SafetyLimiter(FREE)
    pose = np.array([x for group in ALOHA.actions for x in group.start]) * 0.5
    limiter.reset(pose)
    fastest = 0.0
    for tick in range(1, 500):
        ease = min(tick * DT, 1.0) ** 2 * (3 - 2 * min(tick * DT, 1.0))
        target = pose + 0.45 * ease * np.sin(4.0 * tick * DT + np.arange(14) * 0.1)
        fastest = max(fastest, float(np.abs(target - limiter.position_c).max()) / DT)
        np.testing.assert_array_equal(limiter.step(target, target, DT), target)
    assert fastest > 1.7  # rad/s: a good part of the limit, much more than one step of acceleration
    assert not limiter.interventions


def test_a_distant_target_is_reached_without_overshoot_and_about_as_fast_as_the_limits_allow() -> None:
    limiter = SafetyLimiter(FREE)
    limiter.reset(np.zeros(14))
    target = np.clip(np.full(14, 0.9), limiter.lower_c, limiter.upper_c)
    ticks = 0
    while not np.array_equal(limiter.position_c, target):
        command = limiter.step(target, limiter.position_c, DT)
        assert (command <= target + 1e-12).all()
        ticks += 1
        assert ticks < 100
    ideal_s = np.max(np.abs(target) / limiter.velocity_c + limiter.velocity_c / limiter.acceleration_c)
    assert ticks * DT < 1.5 * ideal_s
    assert limiter.interventions["velocity"] and limiter.interventions["acceleration"]


def test_stop_brakes_at_full_deceleration_and_then_stays() -> None:
    limiter = SafetyLimiter(small_robot())
    limiter.reset(np.zeros(7))
    for _ in range(12):
        limiter.step(np.array([1, 2, 1, 1, 1, 0.5, 1.0]), limiter.position_c, DT)
    rate = limiter.rate_c.copy()
    assert (rate > 0).all()
    ticks_needed = int(np.ceil(np.max(rate[:5] / (limiter.acceleration_c[:5] * DT)) + 1e-9))
    for _ in range(ticks_needed):
        stopped = limiter.stop(DT)
    np.testing.assert_array_equal(limiter.rate_c[:5], 0.0)
    for _ in range(100):
        later = limiter.stop(DT)
    np.testing.assert_array_equal(later[:5], stopped[:5])
    np.testing.assert_array_equal(later[5:], 0.0)  # a base comes to zero velocity, not to a constant one
    assert limiter.at_rest


def test_command_stays_within_max_jump_of_the_measured_pose() -> None:
    limiter = SafetyLimiter(small_robot(max_jump=0.1))
    limiter.reset(np.zeros(7))
    measured = np.array([0.0] * 5 + [np.nan] * 2)
    for _ in range(200):
        command = limiter.step(np.full(7, 0.4), measured, DT)
    np.testing.assert_allclose(command, [0.1] * 5 + [0.4] * 2)
    assert limiter.interventions["max_jump"] > 0


def test_workspace_box_bounds_cartesian_targets() -> None:
    limiter = SafetyLimiter(small_robot(workspace=(Workspace("hand", (-0.1, -0.1, 0.0), (0.1, 0.1, 0.3)),)))
    limiter.reset(np.zeros(7))
    for _ in range(300):
        command = limiter.step(np.array([0, 0, 9, -9, 9, 0, 0]), limiter.position_c, DT)
    np.testing.assert_allclose(command[2:5], [0.1, -0.1, 0.3])


def test_non_finite_target_holds_that_channel_only() -> None:
    limiter = SafetyLimiter(small_robot())
    limiter.reset(np.zeros(7))
    for _ in range(100):
        command = limiter.step(np.array([np.nan, 0.2, 0, 0, 0, 0, 0]), limiter.position_c, DT)
    assert command[0] == 0.0 and command[1] == 0.2
    assert limiter.interventions["non_finite"] == 100


@pytest.mark.parametrize("dt", [0.0, -1.0, np.nan, 1e-300])
def test_a_clock_that_does_not_advance_repeats_the_command(dt: float) -> None:
    limiter = SafetyLimiter(small_robot())
    limiter.reset(np.zeros(7))
    before = limiter.step(np.full(7, 0.4), limiter.position_c, DT)
    np.testing.assert_array_equal(limiter.step(np.full(7, -0.4), limiter.position_c, dt), before)


@pytest.mark.parametrize("dt", [0.5, 1e9, np.inf])
def test_a_stall_moves_no_further_than_two_periods_would(dt: float) -> None:
    limiter = SafetyLimiter(small_robot())
    limiter.reset(np.zeros(7))
    for _ in range(20):
        before = limiter.step(np.array([0.9, 1.9, 0.9, 0.9, 0.9, 0.5, 1.0]), limiter.position_c, DT)
    after = limiter.step(np.array([0.9, 1.9, 0.9, 0.9, 0.9, 0.5, 1.0]), limiter.position_c, dt)
    assert (np.abs(after - before) <= limiter.velocity_c * 2 * DT + 1e-12).all()


def test_soft_start_scales_the_velocity_limit() -> None:
    limiter = SafetyLimiter(small_robot())
    limiter.reset(np.zeros(7))
    for _ in range(60):
        limiter.step(np.array([1.0, 2, 1, 1, 1, 0, 0]), np.full(7, np.nan), DT, 0.1)
        assert (np.abs(limiter.rate_c) <= 0.1 * limiter.velocity_c + 1e-12).all()
    assert limiter.interventions["soft_start"] > 0 and limiter.interventions["velocity"] == 0
