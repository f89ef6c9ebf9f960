"""Invariant 4 for every shipped robot, through the whole control law: any chunk, any state, any clock, any request."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import load_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.spec import ActionGroup, Embodiment, Limits
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop

MS = 1_000_000
ROBOTS = {name: load_embodiment(name) for name in shipped_embodiments(runnable=True)}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-308, 1e12])


def jerky(robot: Embodiment) -> Embodiment:
    """The robot with a jerk limit on every channel, tight enough to matter."""

    def tight(limits: Limits) -> Limits:
        return dataclasses.replace(limits, jerk=tuple(10 * value for value in limits.acceleration))

    groups = []
    for g in robot.actions:
        ik = g.command.ik and dataclasses.replace(g.command.ik, limits=tight(g.command.ik.limits))
        command = dataclasses.replace(g.command, ik=ik)
        groups.append(dataclasses.replace(g, limits=tight(g.limits), command=command))
    return dataclasses.replace(robot, actions=tuple(groups))


def told_poses(robot: Embodiment) -> Embodiment:
    """The base without its tracker: its poses are published."""
    (group,) = robot.actions
    command = dataclasses.replace(group.command, kind="pose_stamped", frame_id="odom", fields=(), tracker=None)
    return dataclasses.replace(robot, actions=(dataclasses.replace(group, command=command),))


CASES = {**ROBOTS, **{f"{name}, jerk everywhere": jerky(robot) for name, robot in ROBOTS.items()}}
CASES["mobile_base, told poses"] = told_poses(ROBOTS["mobile_base"])
CASES["mobile_base, told poses, jerk everywhere"] = jerky(CASES["mobile_base, told poses"])


def start_pose(robot: Embodiment) -> dict[str, float]:
    """A measured state to begin with: the start pose, or the middle of the limits; zero for what has none."""
    pose = dict.fromkeys(robot.state_channels, 0.0)
    for group in commanded_robot(robot).actions:
        start = group.start or [0.5 * (a + b) for a, b in zip(group.limits.lower, group.limits.upper, strict=True)]
        pose |= {c: float(x) for c, x in zip(group.channels, start, strict=True) if c in pose}
    return pose


def any_chunk(robot: Embodiment, rng: np.random.Generator, kind: str, t_ns: int) -> ActionChunk:
    """A chunk of one of many kinds, most of them wrong."""
    h, c = robot.control.horizon, len(robot.channels)
    lower = np.array([x for g in robot.actions for x in g.limits.lower])
    upper = np.array([x for g in robot.actions for x in g.limits.upper])
    rows = {
        "inside": lambda: rng.uniform(lower, upper, (h, c)),
        "bang": lambda: np.where(rng.random((h, c)) < 0.5, lower, upper),
        "outside": lambda: rng.uniform(3 * lower - 1, 3 * upper + 1, (h, c)),
        "huge": lambda: rng.choice([1e308, -1e308, 1e300, 0.0], (h, c)),
        "garbage": lambda: np.where(rng.random((h, c)) < 0.2, rng.choice(GARBAGE, (h, c)), 0.1),
        "short": lambda: np.zeros((h - 1, c)),
        "empty": lambda: np.zeros((0, c)),
        "narrow": lambda: np.zeros((h, c - 1)),
        "flat": lambda: np.zeros(h * c),
        "deep": lambda: np.zeros((h, c, 1)),
    }[kind]()
    names = tuple(rng.permutation(robot.channels)) if rng.random() < 0.2 else robot.channels
    age_ms = float(rng.choice([0, 20, 150, 600, 5000, -30, -500]))
    period_s = float(rng.choice([robot.period_s, robot.period_s, robot.period_s, np.nan, 0.0, -1.0]))
    return ActionChunk(rows, names, t_ns - int(age_ms * MS), period_s)


KINDS = ("inside", "bang", "bang", "outside", "huge", "garbage", "short", "empty", "narrow", "flat", "deep")
event = st.one_of(
    st.tuples(st.just("chunk"), st.sampled_from(KINDS)),
    st.tuples(st.just("request"), st.sampled_from(["start", "start", "stop", "estop", "reset"])),
    st.tuples(st.just("state"), st.sampled_from(["noise", "nan", "far", "silent", "back"])),
)
moment = st.tuples(event, st.integers(1, 12), st.sampled_from([0, 1, 7, 20, 20, 20, 33, 60, 400, -30, -2000]))


class Check:
    """Judges the published sequence alone, over one stretch that begins at rest."""

    def __init__(self, loop: ControlLoop, command: np.ndarray) -> None:
        self.limiter = loop.limiter
        self.published = ~np.array([group.tracked() for group in loop.embodiment.actions for _ in group.channels])
        self.last, self.rate, self.acceleration = command, np.zeros_like(command), np.zeros_like(command)
        fence = loop.limiter.fence
        boxes = [box for box in loop.commanded.safety.workspace if box.kinematics is not None]
        if fence is not None:
            here = fence.points(command)
            self.low = np.minimum([box.lower for box in boxes], here)
            self.high = np.maximum([box.upper for box in boxes], here)

    def step(self, command: np.ndarray, dt: float) -> None:
        limiter = self.limiter
        assert np.isfinite(command).all()
        own = self.published  # nobody is told the setpoint of a tracked base
        assert (command >= limiter.lower_c).all() and (command <= limiter.upper_c).all()
        if limiter.fence is not None:
            points = limiter.fence.points(command)
            assert (points >= self.low - 1e-8).all() and (points <= self.high + 1e-8).all()
        if dt <= 0.0:
            np.testing.assert_array_equal(command[own], self.last[own])
            return
        dt = min(dt, limiter.max_dt_s)
        rate = (command - self.last) / dt
        acceleration = (rate - self.rate) / dt
        jerk = (acceleration - self.acceleration) / dt
        slack = 1e-15 * np.maximum(np.abs(command), 1.0) / dt  # of the differences
        assert (rate <= limiter.rise_c + 4 * slack)[own].all() and (rate >= -limiter.fall_c - 4 * slack)[own].all()
        assert (np.abs(acceleration) <= limiter.acceleration_c * (1 + 1e-9) + 16 * slack / dt)[own].all()
        assert (np.abs(jerk) <= limiter.jerk_c * (1 + 1e-6) + 64 * slack / dt**2)[own].all()
        self.last, self.rate, self.acceleration = command, rate, acceleration


class TwistCheck:
    """The same for the twist of a tracked base; it is never begun anew, because it only ever leaves rest by itself."""

    def __init__(self, group: ActionGroup, robot: Embodiment) -> None:
        spec = group.command.tracker
        assert spec is not None
        self.low, self.high = np.array([-spec.max_reverse, -spec.max_turn]), np.array([spec.max_speed, spec.max_turn])
        self.change = np.array([spec.acceleration, spec.turn_acceleration])
        self.jerk = self.change * robot.control.controller_rate_hz
        self.max_dt_s = 2 / robot.control.controller_rate_hz
        self.last, self.rate = np.zeros(2), np.zeros(2)

    def step(self, twist: np.ndarray, dt: float) -> None:
        assert np.isfinite(twist).all()
        assert (twist >= self.low).all() and (twist <= self.high).all()
        if dt <= 0.0:
            np.testing.assert_array_equal(twist, self.last)
            return
        dt = min(dt, self.max_dt_s)
        rate = (twist - self.last) / dt
        assert (np.abs(rate) <= self.change * (1 + 1e-9) + 1e-12).all()
        assert (np.abs(rate - self.rate) / dt <= self.jerk * (1 + 1e-6) + 1e-9).all()
        self.last, self.rate = twist, rate


def play(robot: Embodiment, seed: int, moments: list) -> int:
    """Runs a control loop through everything; returns how many commands were checked."""
    rng, loop, t = np.random.default_rng(seed), ControlLoop(robot), 1_000_000 * MS
    pose, spoil, check, checked = start_pose(robot), "", None, 0
    commanded = loop.commanded
    loop.start(t)
    last_tick = t
    twists = {group.name: TwistCheck(group, robot) for group in robot.actions if group.tracked()}
    for (what, kind), ticks, step_ms in moments:
        if what == "chunk":
            loop.feed(any_chunk(robot, rng, kind, t), t)
        elif what == "request":
            getattr(loop, kind)(t)
            check = None if kind == "start" else check  # may begin anew, from what is measured then
        else:
            spoil = kind
        for _ in range(ticks):
            t += step_ms * MS
            state = dict(pose)
            if spoil == "nan":
                state[str(rng.choice(robot.state_channels))] = float(rng.choice(GARBAGE[:3]))
            elif spoil in ("noise", "far"):
                size = 0.02 if spoil == "noise" else 50.0
                state = {name: value + float(rng.normal(0, size)) for name, value in state.items()}
            if spoil != "silent":
                loop.update_state(state, t)
            output = loop.tick(t)
            dt = max(t - last_tick, 0) / 1e9
            last_tick = t
            if not output.commands:
                check = None
                continue
            command = loop.limiter.position_c.copy()
            for group in commanded.actions:  # what is published is what was limited
                columns = [commanded.channels.index(name) for name in group.channels]
                told = output.commands[group.name].values
                if group.name in twists:
                    twists[group.name].step(told, dt)
                    continue
                np.testing.assert_allclose(group.command.map.to_channel(told), command[columns], rtol=1e-9, atol=1e-12)
            if check is None:
                check = Check(loop, command) if loop.limiter.at_rest else None
            else:
                check.step(command, dt)
                checked += 1
            pose |= {c: float(x) for c, x in zip(commanded.channels, command, strict=True) if c in pose}
    return checked


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), moments=st.lists(moment, min_size=1, max_size=12))
def test_nothing_that_arrives_can_make_a_command_leave_a_limit(name: str, seed: int, moments: list) -> None:
    with np.errstate(all="ignore"):
        play(CASES[name], seed, moments)


@pytest.mark.parametrize("name", CASES)
def test_a_policy_that_jumps_between_the_limits_on_a_healthy_robot_breaks_none(name: str) -> None:
    """The worst case that is really reached: full speed into every limit, with uneven ticks."""
    moments = [(("chunk", kind), 4, step) for step in (20, 7, 33) for kind in ("bang", "inside", "outside") * 6]
    with np.errstate(all="ignore"):
        assert play(CASES[name], 0, moments) > 150
