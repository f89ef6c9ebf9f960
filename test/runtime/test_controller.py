"""The control law in fake time: what the robot is told when things go well, and when they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, CommandSpec, Embodiment, Limits
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.continuity import STRATEGIES
from qwen_vla_core.runtime.controller import ControlLoop, ControlOutput

ALOHA = load_embodiment("aloha")
START = np.array([value for group in ALOHA.actions for value in group.start])
GRIPPERS = [6, 13]
ARMS = [i for i in range(14) if i not in GRIPPERS]
MS = 1_000_000
TICK = 20 * MS
WATCHDOG_MS = ALOHA.safety.watchdog_ms


class Rig:
    """A control loop, a clock, and a robot that stands where it was last told (minus ``sag``)."""

    def __init__(self, embodiment: Embodiment = ALOHA, start: bool = True) -> None:
        self.loop = ControlLoop(embodiment)
        self.embodiment = embodiment
        self.t = 1_000_000 * MS
        self.pose = START.copy()
        self.sag = 0.0
        self.follow = True
        self.state_arrives = True
        self.commands: list[np.ndarray] = []
        if start:
            self.loop.start(self.t)

    def chunk(self, action: np.ndarray | float, age_ms: float = 0.0) -> ActionChunk:
        shape = (self.embodiment.control.horizon, len(self.embodiment.channels))
        stamp_ns = self.t - int(age_ms * MS)
        return ActionChunk(np.broadcast_to(action, shape).copy(), self.embodiment.channels, stamp_ns, 0.1)

    def feed(self, action: np.ndarray | float, age_ms: float = 0.0) -> str | None:
        return self.loop.feed(self.chunk(action, age_ms), self.t)

    def tick(self, dt_ns: int = TICK) -> ControlOutput:
        self.t += dt_ns
        if self.state_arrives:
            names = self.embodiment.state_channels
            self.loop.update_state(dict(zip(names, self.pose - self.sag, strict=True)), self.t)
        output = self.loop.tick(self.t)
        if output.commands:
            command = np.concatenate(
                [g.command.map.to_channel(output.commands[g.name].values) for g in self.embodiment.actions]
            )
            self.commands.append(command)
            if self.follow:
                self.pose = command[: len(self.pose)].copy()
        return output

    def run(self, seconds: float, action: np.ndarray | None = None) -> ControlOutput:
        for tick in range(round(seconds / 0.02)):
            if action is not None and tick % 5 == 0:
                self.feed(action)
            output = self.tick()
        return output


def reached(rig: Rig, action: np.ndarray) -> Rig:
    assert rig.run(3.0, action).mode == "running"
    np.testing.assert_allclose(rig.commands[-1], action, atol=1e-9)
    return rig


def moved(**changes: float) -> np.ndarray:
    target = START.copy()
    for name, value in changes.items():
        target[ALOHA.channels.index(name)] = value
    return target


def assert_smooth(rig: Rig) -> None:
    """Invariant 4 on the published sequence, constant tick."""
    limiter, commands = rig.loop.limiter, np.array(rig.commands)
    rate = np.diff(commands, axis=0) / 0.02
    assert (commands >= limiter.lower_c - 1e-9).all() and (commands <= limiter.upper_c + 1e-9).all()
    assert (np.abs(rate) <= limiter.velocity_c + 1e-6).all()
    assert (np.abs(np.diff(rate, axis=0)) <= limiter.acceleration_c * 0.02 + 1e-6).all()


def test_nothing_is_published_before_every_state_channel_was_measured() -> None:
    rig = Rig()
    rig.state_arrives = False
    rig.feed(START)
    assert not rig.tick().commands
    for name, value in list(zip(ALOHA.state_channels, START, strict=True))[:-1]:
        rig.loop.update_state({name: value}, rig.t)
        output = rig.tick(0)
        assert not output.commands and output.reason == "no state yet: " + next(
            g.name
            for g in ALOHA.state
            if any(c not in ALOHA.state_channels[: ALOHA.state_channels.index(name) + 1] for c in g.channels)
        )
    rig.loop.update_state({ALOHA.state_channels[-1]: START[-1]}, rig.t)
    assert rig.tick(0).commands


def test_first_command_is_the_measured_pose_even_with_a_distant_plan() -> None:
    rig = Rig()
    rig.pose = START + 0.05
    rig.pose[GRIPPERS] = 0.4
    measured = rig.pose.copy()
    rig.feed(moved(left_waist=2.0))
    output = rig.tick()
    assert output.mode == "running"
    np.testing.assert_allclose(rig.commands[0], measured, atol=1e-9)


def test_commands_are_in_message_units_per_group() -> None:
    rig = Rig()
    output = rig.tick()
    assert set(output.commands) == {g.name for g in ALOHA.actions}
    np.testing.assert_allclose(output.commands["left_gripper"].values, [1.6214])  # open, in gripper joint radians
    rig.run(2.0, moved(left_gripper=0.0))
    assert rig.loop.limiter.position_c[6] == 0.0
    np.testing.assert_allclose(rig.tick().commands["left_gripper"].values, [0.6197])


def test_watchdog_holds_measured_pose_when_policy_dies() -> None:
    target = moved(left_waist=0.5, right_elbow=0.9, left_gripper=0.2)
    rig = reached(Rig(), target)
    rig.follow, rig.sag = False, 0.03  # gravity: the arms hang a little below the command
    rig.feed(target)
    died, measured = rig.t, rig.pose - rig.sag
    while (output := rig.tick()).mode == "running":
        assert rig.t - died <= (WATCHDOG_MS + 20) * MS
    assert rig.t - died <= (WATCHDOG_MS + 20) * MS
    assert output.reason.startswith("watchdog: no chunk for 5")
    rig.run(1.0)
    np.testing.assert_allclose(rig.commands[-1][ARMS], measured[ARMS], atol=1e-9)
    assert rig.commands[-1][6] == pytest.approx(0.2)  # a gripper keeps its command: the grasp force is the difference
    assert rig.loop.counters["holds"] == 1
    assert_smooth(rig)


def test_hold_target_is_fixed_so_sag_is_not_chased() -> None:
    rig = reached(Rig(), START)
    rig.run(1.0)
    held = rig.commands[-1].copy()
    for _ in range(50):
        rig.pose = rig.pose - 0.001
        rig.follow = False
        rig.tick()
    np.testing.assert_array_equal(rig.commands[-1][ARMS], held[ARMS])


def test_policy_dying_in_full_motion_stays_within_the_limits_and_stops() -> None:
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.3, moved(left_waist=2.5, right_waist=-2.5))
    assert rig.run(2.0).mode == "holding"
    np.testing.assert_array_equal(rig.commands[-1], rig.commands[-2])
    assert_smooth(rig)


def test_recovery_is_automatic_and_soft() -> None:
    rig = reached(Rig(), START)
    assert rig.run(1.0).mode == "holding"
    before = len(rig.commands)
    output = rig.run(0.2, moved(left_waist=1.5))
    assert output.mode == "running"
    rate = np.diff(np.array(rig.commands[before - 1 :])[:, 0]) / 0.02
    assert (rate <= 2.5 * (np.arange(len(rate)) * 0.02) / ALOHA.safety.soft_start_s + 1e-9).all() and rate[-1] > 0.3
    reached(rig, moved(left_waist=1.5))
    assert_smooth(rig)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: np.where(np.arange(14) == 3, np.nan, a), "non_finite"),
        (lambda a: a * np.inf, "non_finite"),
    ],
)
def test_non_finite_chunks_are_rejected_counted_and_end_in_a_hold(spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    rig = reached(Rig(), START)
    pose = rig.commands[-1]
    with np.errstate(invalid="ignore"):
        for _ in range(6):
            assert rig.feed(spoil(np.ones(14))) == reason
            output = rig.run(0.1)
    assert rig.loop.buffer.rejections[reason] == 6
    assert output.mode == "holding" and "watchdog" in output.reason
    np.testing.assert_allclose(rig.commands[-1], pose)


def test_finite_garbage_is_followed_only_within_the_limits() -> None:
    rig, rng = Rig(), np.random.default_rng(1)
    for _ in range(100):
        rig.feed(rng.choice([1e308, -1e308, 50.0, -50.0, 0.0], 14))
        with np.errstate(all="ignore"):
            rig.run(0.1)
    assert_smooth(rig)
    assert rig.loop.limiter.interventions["position"] > 0


def test_estop_brakes_latches_and_only_reset_and_start_move_again() -> None:
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.3, moved(left_waist=2.5))
    speed = rig.loop.limiter.rate_c[0]
    assert speed > 0.5
    rig.loop.estop(rig.t)
    here = rig.commands[-1][0]
    output = rig.run(2.0, moved(left_waist=2.5))
    assert output.mode == "estopped" and output.commands
    assert 0 < rig.commands[-1][0] - here <= speed**2 / (2 * 20) + 0.02 * speed
    np.testing.assert_array_equal(rig.commands[-1], rig.commands[-80])
    assert rig.loop.start(rig.t)[0] is False
    rig.loop.stop(rig.t)
    assert rig.tick().mode == "estopped"
    assert rig.loop.reset(rig.t)[0]
    assert rig.run(0.5, START).mode == "idle"
    assert rig.loop.start(rig.t)[0]
    reached(rig, moved(left_waist=2.5))
    assert_smooth(rig)


@pytest.mark.parametrize("interrupt", ["stop", "estop"])
def test_a_chunk_observed_before_the_interruption_never_plays(interrupt: str) -> None:
    rig = reached(Rig(), START)
    old = rig.chunk(moved(left_waist=1.0))
    rig.run(0.1)
    getattr(rig.loop, interrupt)(rig.t)
    assert rig.loop.feed(old, rig.t) == "not_started"
    rig.loop.reset(rig.t)
    rig.loop.start(rig.t)
    assert rig.loop.feed(old, rig.t) == "before_epoch"
    assert rig.run(0.1).reason == "waiting for the first chunk"
    assert rig.feed(START) is None


def test_stop_settles_then_falls_silent_and_start_begins_at_the_measured_pose() -> None:
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.3, moved(left_waist=2.5))
    rig.loop.stop(rig.t)
    assert rig.tick().commands
    output = rig.run(0.5)
    assert output.mode == "idle" and not output.commands
    rig.pose[0] = -1.2  # a teleoperator moved the arm meanwhile
    rig.loop.start(rig.t)
    rig.tick()
    assert rig.commands[-1][0] == pytest.approx(-1.2)


def test_start_right_after_stop_comes_to_rest_first() -> None:
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.3, moved(left_waist=2.5))
    rig.loop.stop(rig.t)
    rig.loop.start(rig.t)
    rig.run(1.0, START)
    assert_smooth(rig)


def test_start_after_the_robot_was_put_elsewhere_forgets_the_old_command() -> None:
    """A simulator resets the world between stop and start, faster than the arms come to rest."""
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.5, moved(left_waist=2.5, right_waist=2.5))
    rig.loop.stop(rig.t)
    rig.pose = moved(left_waist=-1.0)
    rig.loop.start(rig.t)
    rig.tick()
    assert rig.commands[-1][0] == pytest.approx(-1.0)


def test_stale_state_brakes_in_place_and_names_the_group() -> None:
    rig = Rig()
    rig.run(1.0, START)
    rig.run(0.3, moved(left_waist=2.5))
    rig.state_arrives = False
    output = rig.run(0.5, moved(left_waist=2.5))
    assert output.mode == "holding" and output.reason.startswith("stale state: left_arm is ")
    np.testing.assert_array_equal(rig.commands[-1], rig.commands[-2])
    rig.state_arrives = True
    assert rig.run(0.2, START).mode == "running"
    assert_smooth(rig)


def test_non_finite_state_is_ignored_and_counted_and_becomes_stale() -> None:
    rig = reached(Rig(), START)
    rig.follow, rig.pose = False, np.where(np.arange(14) == 2, np.nan, START)
    output = rig.run(0.4, START)
    assert output.mode == "holding" and "stale state: left_arm" in output.reason
    assert rig.loop.counters["bad_states"] == 20


def test_a_start_far_outside_the_limits_is_a_fault_and_publishes_nothing() -> None:
    rig = Rig()
    rig.pose[1] = -2.5  # shoulder limit is -1.85
    output = rig.tick()
    assert output.mode == "fault" and "left_shoulder = -2.500" in output.reason and not output.commands
    assert not rig.run(0.5, START).commands
    rig.pose[1] = -1.9  # a little outside (encoder offset) starts at the limit
    rig.loop.reset(rig.t)
    rig.loop.start(rig.t)
    assert rig.tick().commands and rig.commands[0][1] == pytest.approx(-1.85005)


def test_internal_fault_latches_like_an_emergency_stop() -> None:
    rig = reached(Rig(), START)
    rig.loop.fault("internal error: boom", rig.t)
    output = rig.run(0.2, START)
    assert output.mode == "fault" and output.reason == "internal error: boom" and output.commands
    assert rig.loop.start(rig.t)[0] is False


def test_a_clock_that_goes_back_voids_plan_and_state() -> None:
    rig = reached(Rig(), START)
    count = len(rig.commands)
    rig.t -= 60_000 * MS
    rig.state_arrives = False
    output = rig.tick()
    rig.state_arrives = True
    assert (
        output.mode == "holding" and output.reason.startswith("no state yet") and rig.loop.counters["clock_jumps"] == 1
    )
    assert rig.run(0.2, START).mode == "running"
    assert len(rig.commands) > count
    assert_smooth(rig)


def test_a_paused_clock_repeats_the_command() -> None:
    rig = reached(Rig(), START)
    for _ in range(100):
        output = rig.tick(0)
    assert output.mode == "running"
    np.testing.assert_array_equal(rig.commands[-1], rig.commands[-100])


def with_base() -> Embodiment:
    base = ActionGroup(
        "base", "base_twist", ("vx", "wz"), "m/s,rad/s", Limits((-0.5, -1), (0.5, 1), (1, 2), (20, 40)),
        CommandSpec(kind="twist", topic="/cmd_vel", fields=("vx", "wz")), "zero",
    )  # fmt: skip
    return dataclasses.replace(ALOHA, actions=(*ALOHA.actions, base))


def interruptions() -> Iterable[str]:
    return ("policy dies", "state stale", "estop", "stop", "fault")


@pytest.mark.parametrize("interruption", interruptions())
def test_a_base_stops_whatever_happens(interruption: str) -> None:
    rig = Rig(with_base())
    action = np.concatenate([START, [0.5, -1.0]])
    reached(rig, action)
    if interruption == "state stale":
        rig.state_arrives = False
    elif interruption in ("estop", "stop"):
        getattr(rig.loop, interruption)(rig.t)
    elif interruption == "fault":
        rig.loop.fault("boom", rig.t)
    rig.run(WATCHDOG_MS / 1000 + 0.02 + 0.6)  # 0.5 m/s at 1 m/s² plus the time to build up that deceleration
    np.testing.assert_array_equal(rig.commands[-1][14:], 0.0)
    assert_smooth(rig)


def test_new_plans_join_without_a_jump() -> None:
    """Two plans 0.04 rad apart, alternating at 10 Hz, each late: no limit is ever needed to hide the seam."""
    rig = reached(Rig(), START)
    rig.loop.limiter.interventions.clear()
    commands = len(rig.commands)
    for _ in range(20):
        for offset in (0.02, -0.02):
            rig.feed(START * 0.9 + 0.05 + offset, age_ms=90)
            rig.run(0.1)
    steps = np.abs(np.diff(np.array(rig.commands[commands:]), axis=0))
    assert steps[25:].max() < 0.012  # 0.04 apart, spread over 200 ms and more; a bare swap would step 0.04


def told_poses(robot: Embodiment) -> Embodiment:
    """The base without its tracker: its poses are published."""
    (group,) = robot.actions
    command = dataclasses.replace(group.command, kind="pose_stamped", frame_id="odom", fields=(), tracker=None)
    return dataclasses.replace(robot, actions=(dataclasses.replace(group, command=command),))


BASE = told_poses(load_embodiment("mobile_base"))


def base_chunk(stamp_ns: int, yaw: np.ndarray) -> ActionChunk:
    return ActionChunk(np.column_stack([np.zeros(8), np.zeros(8), yaw]), BASE.channels, stamp_ns, 0.5)


def turn_over_the_seam(policy_sees: float) -> list[float]:
    """A base at 3.0 rad turns left to 3.6 rad; the odometer tells headings in (−π, π], the policy starts from one."""
    loop, t, yaw, told = (
        ControlLoop(BASE, strategy=dataclasses.replace(STRATEGIES["blend"], blend_s=0.5)),
        1_000_000 * MS,
        3.0,
        [],
    )
    loop.start(t)
    for tick in range(80):
        t += 50 * MS
        measured = float(np.remainder(yaw + np.pi, 2 * np.pi) - np.pi)
        loop.update_state(dict(zip(BASE.state_channels, [0.0, 0.0, measured, 0.0, 0.0], strict=True)), t)
        if tick % 10 == 0:
            seen = measured + policy_sees
            assert loop.feed(base_chunk(t, np.minimum(seen + 0.2 * np.arange(1, 9), seen + 3.6 - yaw)), t) is None
        output = loop.tick(t)
        if output.commands:
            yaw = float(output.commands["pose"].values[2])
            told.append(yaw)
    return told


@pytest.mark.parametrize("turns", [0, 1, -2])
def test_a_heading_goes_the_short_way_over_the_seam_of_the_odometer(turns: int) -> None:
    told = turn_over_the_seam(2 * np.pi * turns)
    assert told[0] == pytest.approx(3.0, abs=0.01) and told[-1] == pytest.approx(3.6, abs=0.02)
    assert np.diff(told).min() > -1e-3 and np.diff(told).max() < 0.1
