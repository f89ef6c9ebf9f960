"""Two clocks judge a plan: when its chunk came, and when its observation was made; the first one group by group."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, CommandSpec, Embodiment, Limits
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop, ControlOutput
from qwen_vla_core.runtime.watchdog import Watchdog

ALOHA = load_embodiment("aloha")
START = np.array([value for group in ALOHA.actions for value in group.start])
MS = 1_000_000


def with_base(watchdog_ms: float | None = 200.0) -> Embodiment:
    """ALOHA (500 ms) on a base that stops sooner."""
    base = ActionGroup(
        "base", "base_twist", ("vx", "wz"), "m/s,rad/s", Limits((-0.5, -1), (0.5, 1), (1, 2), (20, 40)),
        CommandSpec(kind="twist", topic="/cmd_vel", fields=("vx", "wz")), "zero", watchdog_ms=watchdog_ms,
    )  # fmt: skip
    return dataclasses.replace(ALOHA, actions=(*ALOHA.actions, base))


class Rig:
    """A control loop in fake time, and a robot that stands where it was last told, minus a little sag."""

    def __init__(self, robot: Embodiment) -> None:
        self.robot, self.loop, self.t = robot, ControlLoop(robot), 1_000_000 * MS
        self.pose, self.sag = START.copy(), 0.0
        self.loop.start(self.t)

    def feed(self, action: np.ndarray, age_ms: float = 0.0) -> str | None:
        rows = np.tile(action, (self.robot.control.horizon, 1))
        chunk = ActionChunk(rows, self.robot.channels, self.t - int(age_ms * MS), self.robot.period_s)
        return self.loop.feed(chunk, self.t)

    def run(self, seconds: float, action: np.ndarray | None = None, age_ms: float = 0.0) -> ControlOutput:
        for tick in range(round(seconds / 0.02)):
            self.t += 20 * MS
            self.loop.update_state(dict(zip(ALOHA.state_channels, self.pose - self.sag, strict=True)), self.t)
            if action is not None and tick % 5 == 0:
                self.feed(action, age_ms)
            output = self.loop.tick(self.t)
            if output.commands:
                self.pose = self.loop.limiter.position_c[:14].copy()
        return output


def action(waist: float = 0.3) -> np.ndarray:
    target = np.concatenate([START, [0.5, -1.0]])
    target[0] = waist
    return target


def test_a_group_times_out_by_its_own_limit_while_the_others_play_on() -> None:
    rig = Rig(with_base())
    assert rig.run(3.0, action()).mode == "running"
    assert rig.loop.limiter.position_c[14] == 0.5
    rows = np.linspace(action(0.3), action(0.9), 16)  # the plan's arm moves on while nothing new arrives
    rig.loop.feed(ActionChunk(rows, rig.robot.channels, rig.t, 0.1), rig.t)
    output = rig.run(0.22)
    assert output.mode == "running" and output.reason == "watchdog: no chunk for 220 ms (base timed out)"
    waist = rig.loop.limiter.position_c[0]
    output = rig.run(0.28)  # silent for 500 ms
    assert output.mode == "running" and rig.loop.limiter.position_c[0] > waist + 0.05
    assert (np.abs(rig.loop.limiter.position_c[14:]) < [0.25, 0.5]).all()  # half way to a stop
    output = rig.run(0.02)
    assert output.mode == "holding" and output.reason == "watchdog: no chunk for 520 ms"
    assert rig.loop.counters["group_timeouts"] == 1 and rig.loop.counters["holds"] == 1
    rig.run(0.6)
    np.testing.assert_array_equal(rig.loop.limiter.position_c[14:], 0.0)


def test_a_group_that_comes_back_ramps_up_softly() -> None:
    rig = Rig(with_base())
    rig.run(2.0, action())
    rig.run(0.6)
    assert rig.loop.mode == "holding"
    rig = Rig(with_base())
    rig.run(2.0, action())
    rig.run(0.4)  # the base alone has timed out, and stands
    assert rig.loop.mode == "running" and abs(rig.loop.limiter.position_c[14]) < 0.5
    output = rig.run(0.1, action())
    assert output.mode == "running" and output.reason == "playing chunks"
    assert (np.abs(rig.loop.limiter.rate_c[14:]) <= 0.11 * rig.loop.limiter.velocity_c[14:] + 1e-9).all()
    rig.run(2.0, action())
    assert rig.loop.limiter.position_c[14] == 0.5


def test_an_arm_that_timed_out_alone_holds_one_pose_and_does_not_chase_gravity() -> None:
    groups = tuple(dataclasses.replace(g, watchdog_ms=100.0 if g.name == "left_arm" else 2000.0) for g in ALOHA.actions)
    rig = Rig(dataclasses.replace(ALOHA, actions=groups))
    rig.run(2.0, START)
    rig.sag = 0.02
    output = rig.run(0.5)
    assert output.mode == "running" and "left_arm timed out" in output.reason
    held = rig.loop.limiter.position_c.copy()
    assert held[0] == pytest.approx(-0.02) and held[7] == 0.0
    rig.sag = 0.1
    rig.run(0.5)
    np.testing.assert_array_equal(rig.loop.limiter.position_c, held)


def test_a_policy_that_keeps_talking_about_an_old_observation_trips() -> None:
    rig = Rig(ALOHA)
    rig.run(2.0)
    assert ALOHA.max_observation_age_ms == 1300.0  # watchdog_ms and half of the chunk's 1.6 s
    output = rig.run(0.3, START, age_ms=1290.0)  # accepted each time: it is newer than the one before
    assert output.mode == "holding" and "the plan's observation is 13" in output.reason
    assert rig.loop.buffer.accepted == 3
    assert rig.run(0.3, START, age_ms=300.0).mode == "running"


def test_a_frozen_picture_trips_by_its_age_before_the_plan_runs_out() -> None:
    """Chunks that arrive on time, each from an observation only a little newer than the last."""
    rig = Rig(ALOHA)
    rig.run(1.0, START)
    age_ms, output = 0.0, None
    for _ in range(40):
        age_ms += 90.0  # the camera's clock all but stands still
        output = rig.run(0.1, START, age_ms)
        if output.mode == "holding":
            break
    assert output is not None and output.mode == "holding" and "observation" in output.reason
    assert age_ms < 1500.0


def test_the_limits_of_the_yaml_are_those_that_trip() -> None:
    robot = dataclasses.replace(with_base(None), safety=dataclasses.replace(ALOHA.safety, max_observation_age_ms=700.0))
    watchdog = Watchdog(robot)
    assert not watchdog.check(5).late_c.any()
    watchdog.fresh(0, -100 * MS)
    for t_ms, everything in ((0, False), (500, False), (501, True), (601, True)):
        assert watchdog.check(t_ms * MS).everything is everything
    watchdog.fresh(550 * MS, -100 * MS)
    assert not watchdog.check(600 * MS).everything
    verdict = watchdog.check(601 * MS)
    assert verdict.everything and verdict.reason == "watchdog: the plan's observation is 701 ms old"
    watchdog.clear()
    assert not watchdog.check(10**12).everything
