"""Waypoints to twists: it converges, keeps every limit, never reverses unasked, and stops where it must."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import load_embodiment, parse_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, Embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.tracking import PoseTracker, wrap

BASE = load_embodiment("mobile_base")
DT = 0.05
MS = 1_000_000


def group(fields: tuple[str, ...] = ("vx", "wz"), **tracker: object) -> ActionGroup:
    """The shipped base's waypoints, with another tracker."""
    (own,) = BASE.actions
    assert own.command.tracker is not None
    changed = dataclasses.replace(own.command.tracker, **tracker)  # type: ignore[arg-type]
    return dataclasses.replace(own, command=dataclasses.replace(own.command, fields=fields, tracker=changed))


class Plant:
    """A base that does what it is told, and the limits that its twists must keep."""

    def __init__(self, tracker: PoseTracker, pose: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self.tracker, self.pose = tracker, np.array(pose)
        self.before, self.change = np.zeros(3), np.zeros(3)
        self.slowest = 0.0

    def step(self, setpoint: np.ndarray, rate: np.ndarray, dt: float = DT) -> None:
        self.tracker.follow(self.pose, setpoint, rate, dt)
        self.moved(dt)

    def moved(self, dt: float) -> None:
        t, spec = self.tracker, self.tracker.spec
        twist = t.twist.copy()
        assert np.isfinite(twist).all()
        assert -spec.max_reverse <= twist[0] <= spec.max_speed and abs(twist[2]) <= spec.max_turn
        change = (twist - self.before) / dt
        most = np.array([t.linear[0], t.linear[0], t.angular[0]])
        jerk = np.array([t.linear[1], t.linear[1], t.angular[1]])
        assert (np.abs(change) <= most * (1 + 1e-9) + 1e-12).all()
        assert (np.abs(change - self.change) / dt <= jerk * (1 + 1e-6) + 1e-9).all()
        self.before, self.change = twist, change
        self.slowest = min(self.slowest, twist[0])
        heading = self.pose[2] + 0.5 * twist[2] * dt
        cos, sin = math.cos(heading), math.sin(heading)
        self.pose += dt * np.array([cos * twist[0] - sin * twist[1], sin * twist[0] + cos * twist[1], twist[2]])

    def off(self, setpoint: np.ndarray) -> tuple[float, float]:
        return math.hypot(*(setpoint - self.pose)[:2]), abs(wrap(float(setpoint[2] - self.pose[2])))


def circle(t: float, speed: float = 0.4, radius: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Where a plan around a circle is, and how it moves."""
    a = speed * t / radius
    where = np.array([radius * math.sin(a), radius * (1 - math.cos(a)), a])
    return where, np.array([speed * math.cos(a), speed * math.sin(a), speed / radius])


pose = st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-7, 7))


@settings(max_examples=30, deadline=None)
@given(start=pose, goal=pose, reverse=st.sampled_from([0.0, 0.3]), jerk=st.sampled_from([None, 4.0]))
def test_it_reaches_any_standing_pose_and_stops_there(start, goal, reverse, jerk) -> None:  # type: ignore[no-untyped-def]
    plant = Plant(PoseTracker(group(max_reverse=reverse, jerk=jerk, turn_jerk=jerk and 20.0), DT), start)
    goal = np.array(goal)
    far = plant.off(goal)[0] > plant.tracker.spec.far  # nearer than that, what is to the side stays there
    for _ in range(round(30 / DT)):
        plant.step(goal, np.zeros(3))
    away, turned = plant.off(goal)
    assert away < (plant.tracker.spec.near + 0.02 if far else plant.tracker.spec.far) and turned < 0.1
    assert math.hypot(*plant.before[:2]) < 0.01 and abs(plant.before[2]) < 0.02
    assert plant.slowest >= -reverse  # and 0: not once


@settings(max_examples=20, deadline=None)
@given(start=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-3, 3)), turns=st.integers(-2, 2))
def test_it_joins_a_plan_that_moves_and_stays_with_it(start, turns) -> None:  # type: ignore[no-untyped-def]
    plant = Plant(PoseTracker(group(), DT), start)
    for tick in range(round(20 / DT)):
        setpoint, rate = circle(tick * DT)
        plant.step(setpoint + np.array([0.0, 0.0, 2 * math.pi * turns]), rate)
        if tick * DT > 12:
            away, turned = plant.off(circle((tick + 1) * DT)[0])
            assert away < 0.01 and turned < 0.03


def test_a_base_that_drives_sideways_goes_straight_there_without_turning() -> None:
    plant = Plant(PoseTracker(group(("vx", "vy", "wz"), law="holonomic", max_reverse=0.7), DT))
    goal = np.array([0.0, 1.0, 0.0])
    for _ in range(round(8 / DT)):
        plant.step(goal, np.zeros(3))
        assert abs(plant.pose[2]) < 1e-9 and abs(plant.pose[0]) < 1e-9
    assert plant.off(goal)[0] < 0.011


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(pose, pose, pose, st.sampled_from([0.0, 0.003, 0.02, 0.05, 0.1, 0.5, -1.0])), max_size=40))
def test_no_setpoint_pose_or_clock_makes_a_twist_break_a_limit(steps) -> None:  # type: ignore[no-untyped-def]
    plant = Plant(PoseTracker(group(max_reverse=0.0, jerk=6.0), DT))
    for measured, setpoint, rate, dt in steps:
        before = plant.tracker.twist.copy()
        plant.tracker.follow(np.array(measured), 100 * np.array(setpoint), 50 * np.array(rate), dt)
        if dt > 0:
            plant.moved(min(dt, 2 * DT))
        else:
            np.testing.assert_array_equal(plant.tracker.twist, before)
    assert plant.slowest == 0.0


class Rig:
    """The control law of a base and its plant, in fake time."""

    def __init__(self, robot: Embodiment = BASE) -> None:
        self.robot, self.loop, self.t = robot, ControlLoop(robot), 10**12
        self.pose, self.twist = np.zeros(3), np.zeros(2)
        self.told: list[np.ndarray] = []
        self.loop.start(self.t)

    def chunk(self, way: Callable[[np.ndarray], np.ndarray]) -> None:
        due = self.robot.period_s * np.arange(1, self.robot.control.horizon + 1)
        assert self.loop.feed(ActionChunk(way(due), self.robot.channels, self.t, self.robot.period_s), self.t) is None

    def run(self, seconds: float, odometry: bool = True) -> None:
        for _ in range(round(seconds / DT)):
            self.t += round(DT * 1e9)
            if odometry:
                x, y, yaw = self.pose
                values = (x, y, wrap(yaw), *self.twist)
                self.loop.update_state(dict(zip(self.robot.state_channels, values, strict=True)), self.t)
            output = self.loop.tick(self.t)
            if output.commands:
                self.twist = output.commands["pose"].values
                self.told.append(self.twist)
            course = self.pose[2] + 0.5 * self.twist[1] * DT
            self.pose += DT * np.array(
                [math.cos(course) * self.twist[0], math.sin(course) * self.twist[0], self.twist[1]]
            )


def straight(due: np.ndarray) -> np.ndarray:
    return np.column_stack([0.5 * due, np.zeros_like(due), np.zeros_like(due)])


def test_a_chunk_is_driven_and_a_silent_policy_stops_the_base_where_it_is() -> None:
    rig = Rig()
    rig.run(0.2)
    rig.chunk(straight)
    rig.run(1.0)
    assert rig.twist[0] == pytest.approx(0.5, abs=0.1) and rig.loop.mode == "running"
    rig.run(2.4)
    assert rig.loop.mode == "holding" and rig.loop.at_rest
    stopped = rig.pose.copy()
    rig.run(1.0)
    np.testing.assert_array_equal(rig.pose, stopped)
    assert min(twist[0] for twist in rig.told) >= -1e-3  # it does not back up to where the watchdog struck


def test_stale_odometry_brakes_at_the_limit_and_it_goes_on_from_where_it_came_to() -> None:
    rig = Rig()
    rig.run(0.2)
    rig.chunk(straight)
    rig.run(1.2)
    speed, told = rig.twist[0], len(rig.told)
    rig.run(1.5, odometry=False)
    assert rig.loop.mode == "holding" and "stale state: pose" in rig.loop.reason
    np.testing.assert_array_equal(rig.twist, 0.0)
    braking = [twist[0] for twist in rig.told[told:] if 0 < twist[0] < speed - 1e-9]
    assert len(braking) * DT < speed / 1.2 + 0.2
    told = len(rig.told)
    rig.run(0.1)
    assert rig.loop.mode == "holding"  # the old plan lies behind it
    rig.chunk(lambda due: straight(due) + np.array([rig.pose[0], 0.0, 0.0]))
    rig.run(1.0)
    assert rig.loop.mode == "running" and min(twist[0] for twist in rig.told[told:]) >= 0.0


def test_a_heading_over_the_seam_of_the_odometer_turns_the_short_way() -> None:
    rig = Rig()
    rig.pose[2] = 3.0
    rig.run(0.2)
    for _ in range(3):
        rig.chunk(lambda due: np.column_stack([np.zeros_like(due), np.zeros_like(due), np.full_like(due, -2.9)]))
        rig.run(1.0)
    assert wrap(rig.pose[2] + 2.9) == pytest.approx(0.0, abs=0.02)
    assert rig.pose[2] < 3.6 and min(twist[1] for twist in rig.told) > -0.3


def test_an_emergency_stop_brakes_and_latches() -> None:
    rig = Rig()
    rig.run(0.2)
    rig.chunk(straight)
    rig.run(1.2)
    rig.loop.estop(rig.t)
    rig.run(1.0)
    assert rig.loop.at_rest and rig.loop.mode == "estopped"
    assert rig.loop.reset(rig.t)[0] and rig.loop.start(rig.t)[0]
    told = len(rig.told)
    rig.run(0.5)
    assert not np.array(rig.told[told:]).any()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fields: [vx, wz]\n      tracker", "fields: [vx, vy, wz]\n      tracker", "do not fit the law kanayama"),
        ("max_reverse: 0.3 ", "law: holonomic\n        max_reverse: 0.3 ", "do not fit the law holonomic"),
        ("max_reverse: 0.3 ", "near: 0.5\n        max_reverse: 0.3 ", "not below far"),
        ("fields: [vx, wz]\n      tracker", "map: {scale: 2}\n      tracker", "a map of waypoints"),
        ("kind: twist  ", "kind: pose_stamped  ", "means nothing for pose_stamped"),
        ("max_turn: 1.6", "max_turn: 0", "too small"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_at_load(old: str, new: str, words: str) -> None:
    assert old in BASE.source_text
    with pytest.raises(Exception, match=words):
        parse_embodiment(BASE.source_text.replace(old, new))


def test_a_twist_without_a_tracker_is_refused_at_load() -> None:
    head, rest = BASE.source_text.split("      tracker:")
    tail = rest[rest.index("    on_timeout") :]
    with pytest.raises(Exception, match="tracker: missing, but waypoints commanded as a twist need it"):
        parse_embodiment(head + tail)
