"""The obstacle stop: what a scan means, and that nothing a base is told ends in what it sees."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import load_embodiment, parse_embodiment
from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.embodiment.spec_base import FootprintSpec, ObstacleStopSpec
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.mock_scanner import scan_of_boxes
from qwen_vla_core.runtime.obstacles import ObstacleStop, Scan, allowed_speed, stopping_distance

SPEC = ObstacleStopSpec("/scan", FootprintSpec(0.25, 0.2, 0.2), stop_distance=0.15, slow_distance=0.8)
LINEAR = (1.2, 24.0)
AROUND = 2 * math.pi / 360
T = 10**12
STILL = np.zeros(3)


def scan(ranges: np.ndarray | float = math.inf, **at: float) -> Scan:
    """All around, from −π on; ``at`` (d90=0.5: 0.5 m at 90 degrees) puts single returns into it."""
    values = np.full(360, ranges) if np.isscalar(ranges) else np.array(ranges)
    for direction, value in at.items():
        values[round(int(direction[1:].replace("m", "-")) + 180) % 360] = value
    return Scan(-math.pi, AROUND, 0.05, 10.0, values)


def stop(seen: Scan, spec: ObstacleStopSpec = SPEC) -> ObstacleStop:
    guard = ObstacleStop(spec, LINEAR, 0.7, 0.05)
    guard.take(seen, T)
    return guard


def allowed(seen: Scan, *twist: float, now: np.ndarray = STILL, spec: ObstacleStopSpec = SPEC) -> np.ndarray:
    return stop(seen, spec).limit(np.array(twist), now, STILL, T)


FREE = scan()


@pytest.mark.parametrize("twist", [(0.7, 0, 0), (-0.3, 0, 0), (0.4, 0, 1.5), (0, 0, 1.6), (0, 0.5, 0)])
def test_with_nothing_around_nothing_changes(twist: tuple[float, ...]) -> None:
    guard = stop(FREE)
    np.testing.assert_array_equal(guard.limit(np.array(twist), STILL, STILL, T), twist)
    assert guard.note == "" and guard.distance == math.inf


def test_the_speed_falls_with_the_distance_and_is_zero_at_the_stop_distance() -> None:
    speeds = [allowed(scan(d0=0.25 + d), 0.7, 0, 0)[0] for d in np.arange(0.10, 1.0, 0.02)]
    assert speeds[0] == 0.0 and speeds[-1] == 0.7
    assert np.all(np.diff(speeds) >= -1e-9)
    at = dict(zip(np.arange(0.10, 1.0, 0.02).round(2), speeds, strict=True))
    assert at[0.14] == 0.0 and 0.2 < at[0.5] < 0.4


@pytest.mark.parametrize(
    ("seen", "twist", "blocked"),
    [
        (scan(d0=0.5), (0.5, 0, 0), True),  # 0.25 m before the front
        (scan(d0=0.5), (-0.3, 0, 0), False),  # the sign says where it goes
        (scan(d180=0.45), (-0.3, 0, 0), True),
        (scan(d180=0.45), (0.5, 0, 0), False),
        (scan(d90=0.24), (0.5, 0, 0), False),  # a wall beside it
        (scan(d90=0.45), (0, 0.5, 0), True),  # for a base that drives sideways
        (scan(d45=0.6), (0.5, 0, 0), False),  # passes the corner ...
        (scan(d45=0.6), (0.4, 0, 1.2), True),  # ... but not when it turns into it
        (scan(d45=0.6), (0.4, 0, -1.2), False),
    ],
)  # fmt: skip
def test_only_what_is_in_the_swept_corridor_slows(seen: Scan, twist: tuple[float, ...], blocked: bool) -> None:
    out = allowed(seen, *twist)
    assert (math.hypot(*out[:2]) < math.hypot(*twist[:2]) - 1e-6) is blocked


def test_turning_in_place_looks_at_the_circle_its_corners_sweep() -> None:
    assert allowed(scan(d45=0.34), 0, 0, 1.0)[2] == 0.0
    assert allowed(scan(d45=0.40), 0, 0, 1.0)[2] == 1.0
    assert allowed(scan(d0=0.5), 0.5, 0, 1.0)[2] == 1.0  # stopped by what is ahead it may still turn away
    assert stop(scan(d45=0.34)).limit(np.array([0, 0, 1.0]), STILL, STILL, T)[2] == 0.0


def test_the_scanner_sits_and_looks_where_the_yaml_says() -> None:
    backwards = dataclasses.replace(SPEC, mount=(-0.1, 0.0, math.pi))
    assert allowed(scan(d0=0.35), -0.3, 0, 0, spec=backwards)[0] > -0.3
    assert allowed(scan(d0=0.35), 0.5, 0, 0, spec=backwards)[0] == 0.5


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (math.inf, "free"),
        (12.0, "free"),
        (math.nan, "unknown"),
        (0.0, "unknown"),
        (0.01, "unknown"),
        (-math.inf, "near"),
    ],
)
def test_ranges_mean_what_rep_117_says(value: float, meaning: str) -> None:
    """Sixty degrees ahead hold the value, everything else is free."""
    ranges = np.full(360, math.inf)
    ranges[150:211] = value
    guard = stop(scan(ranges), dataclasses.replace(SPEC, mount=(0.3, 0.0, 0.0)))
    out = guard.limit(np.array([0.5, 0, 0]), STILL, STILL, T)
    assert bool(out[0] == 0.5) is (meaning == "free")
    assert ("does not see ahead" in guard.note) is (meaning == "unknown")
    if meaning == "near":
        assert "obstacle 0.0" in guard.note
    assert guard.limit(np.array([-0.3, 0, 0]), STILL, STILL, T)[0] == -0.3


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (scan(math.nan), "360 of its 360 ranges are no measurement"),
        (scan(0.0), "no measurement"),
        (dataclasses.replace(FREE, ranges=np.zeros(0)), "no ranges"),
        (dataclasses.replace(FREE, angle_increment=0.0), "not finite"),
        (dataclasses.replace(FREE, angle_min=math.nan), "not finite"),
        (dataclasses.replace(FREE, range_max=0.01), "no range"),
    ],
)
def test_a_scan_that_cannot_be_used_is_a_reason_to_stand(broken: Scan, why: str) -> None:
    guard = stop(FREE)
    assert guard.problem(T) is None
    guard.take(broken, T)
    assert why in str(guard.problem(T))
    assert not guard.limit(np.array([0.5, 0, 1.0]), STILL, STILL, T).any()
    guard.take(FREE, T)
    assert guard.problem(T) is None


def test_no_scan_an_old_one_and_one_that_is_repeated_are_none() -> None:
    guard = ObstacleStop(SPEC, LINEAR, 0.7, 0.05)
    assert guard.problem(T) == "no scan yet on /scan"
    guard.take(FREE, T)
    assert guard.problem(T + 299_000_000) is None
    assert guard.problem(T + 400_000_000) == "stale scan: /scan is 400 ms old"
    guard.take(dataclasses.replace(FREE, stamp_ns=T), T + 2_000_000_000)  # an old stamp that keeps arriving
    assert "2000 ms old" in str(guard.problem(T + 2_000_000_000))
    guard.forget()
    assert guard.problem(T) == "no scan yet on /scan"


@given(st.floats(0, 3), st.floats(0.2, 3), st.floats(0.5, 60))
def test_the_allowed_speed_is_the_inverse_of_the_stopping_distance(
    room: float, acceleration: float, jerk: float
) -> None:
    speed = allowed_speed(room, acceleration, jerk)
    assert stopping_distance(speed, 0.0, acceleration, jerk) == pytest.approx(room, abs=1e-9)
    assert stopping_distance(speed, 0.5, acceleration, jerk) > stopping_distance(speed, 0.0, acceleration, jerk)


def robot(stop_spec: ObstacleStopSpec = SPEC) -> Embodiment:
    base = load_embodiment("mobile_base")
    return dataclasses.replace(base, safety=dataclasses.replace(base.safety, obstacle_stop=stop_spec))


BASE = robot()
TWISTED = """actions:
  - name: motion
    kind: base_twist
    unit: m/s,rad/s
    channels: [v, w]
    limits: {lower: [-0.3, -1.6], upper: [0.7, 1.6], velocity: [1.2, 5.0], acceleration: [24.0, 100.0]}
    command: {kind: twist, topic: /cmd_vel, fields: [vx, wz]}
    on_timeout: zero

safety:"""


def told_velocities() -> Embodiment:
    """The same base, whose policy says velocities itself."""
    head, tail = load_embodiment("mobile_base").source_text.split("actions:")
    text = head.replace("convention: waypoint ", "convention: base_velocity ") + TWISTED + tail.split("\nsafety:")[1]
    made = parse_embodiment(text)
    return dataclasses.replace(made, safety=dataclasses.replace(made.safety, obstacle_stop=SPEC))


class Drive:
    """The control law in a world of boxes: every move is checked for what is left before them."""

    def __init__(self, embodiment: Embodiment, boxes: np.ndarray, scan_every: int = 2) -> None:
        self.robot, self.loop, self.t = embodiment, ControlLoop(embodiment), T
        self.boxes, self.every = boxes, scan_every
        self.pose, self.twist = np.zeros(3), np.zeros(2)
        self.nearest = math.inf
        self.loop.start(self.t)

    def run(self, seconds: float, plan: Callable[[], np.ndarray], scans: bool = True) -> None:
        group, dt = self.robot.actions[0], 0.05
        for tick in range(round(seconds / dt)):
            self.t += 50_000_000
            x, y, yaw = self.pose
            values = (x, y, math.remainder(yaw, 2 * math.pi), *self.twist)
            self.loop.update_state(dict(zip(self.robot.state_channels, values, strict=True)), self.t)
            if scans and tick % self.every == 0:
                self.loop.update_scan(scan_of_boxes(self.boxes, tuple(self.pose), (0.0, 0.0, 0.0), self.t), self.t)
            if tick % 10 == 0:
                self.loop.feed(ActionChunk(plan(), self.robot.channels, self.t, self.robot.period_s), self.t)
            output = self.loop.tick(self.t)
            if output.commands:
                self.twist = output.commands[group.name].values
            course = yaw + 0.5 * self.twist[1] * dt
            self.pose = self.pose + dt * np.array(
                [math.cos(course) * self.twist[0], math.sin(course) * self.twist[0], self.twist[1]]
            )
            self.nearest = min(self.nearest, self.gap())

    def gap(self) -> float:
        """Metres between the base's rectangle and the nearest box corner or face, seen from the base; 0: touching."""
        x, y, yaw = self.pose
        sides = []
        for x0, y0, x1, y1 in self.boxes:
            xs, ys = np.meshgrid(np.linspace(x0, x1, 25), np.linspace(y0, y1, 25))
            dx, dy = xs.ravel() - x, ys.ravel() - y
            ahead, left = math.cos(yaw) * dx + math.sin(yaw) * dy, math.cos(yaw) * dy - math.sin(yaw) * dx
            out_x = np.maximum(np.maximum(ahead - 0.25, -0.2 - ahead), 0.0)
            out_y = np.maximum(np.abs(left) - 0.2, 0.0)
            sides.append(np.hypot(out_x, out_y).min())
        return float(min(sides, default=math.inf))

    def straight(self, speed: float = 0.7) -> np.ndarray:
        if self.robot.actions[0].kind == "base_twist":
            return np.tile([speed, 0.0], (8, 1))
        x, y, yaw = self.pose
        far = speed * 0.5 * np.arange(1, 9)
        return np.column_stack([x + far * math.cos(yaw), y + far * math.sin(yaw), np.full(8, yaw)])


WALL = np.array([[2.0, -3.0, 2.1, 3.0]])


@pytest.mark.parametrize("embodiment", [BASE, told_velocities()], ids=["waypoints", "velocities"])
def test_a_wall_ahead_stops_it_before_the_stop_distance_whatever_commands_it(embodiment: Embodiment) -> None:
    drive = Drive(embodiment, WALL)
    drive.run(8.0, drive.straight)
    assert 0.14 <= drive.gap() < 0.22 and drive.nearest > 0.14  # 1.75 m driven, 1 cm of rounding in the corridor
    assert np.abs(drive.twist[0]) < 1e-3 and drive.loop.mode == "running"
    assert drive.loop.reason.startswith("stopped: obstacle 0.1")
    assert drive.loop.limiter.interventions["obstacle"] > 10


@pytest.mark.parametrize("embodiment", [BASE, told_velocities()], ids=["waypoints", "velocities"])
def test_what_appears_at_speed_is_not_reached(embodiment: Embodiment) -> None:
    """A stop from 0.7 m/s takes 0.22 m, reacting 0.14 m: what appears beyond that and the stop distance is kept off."""
    drive = Drive(embodiment, np.array([[9.0, -1.0, 9.1, 1.0]]))
    drive.run(2.5, drive.straight)
    assert drive.twist[0] == pytest.approx(0.7, abs=0.02)
    front = drive.pose[0] + 0.25
    drive.boxes = np.array([[front + 0.58, -0.1, front + 0.7, 0.1]])
    drive.run(4.0, drive.straight)
    assert drive.nearest > 0.14 and abs(drive.twist[0]) < 1e-3
    drive.boxes = np.array([[9.0, -1.0, 9.1, 1.0]])
    drive.run(1.0, drive.straight)  # gone: it goes on by itself
    assert drive.twist[0] > 0.3


def test_a_scanner_that_falls_silent_stops_it_and_says_so() -> None:
    drive = Drive(BASE, np.array([[9.0, -1.0, 9.1, 1.0]]))
    drive.run(0.5, drive.straight, scans=False)
    assert drive.loop.mode == "holding" and drive.loop.reason == "no scan yet on /scan" and not drive.twist.any()
    drive.run(2.0, drive.straight)
    assert drive.twist[0] > 0.5
    drive.run(1.6, drive.straight, scans=False)
    assert drive.loop.mode == "holding" and "stale scan: /scan is" in drive.loop.reason and not drive.twist.any()
    drive.run(2.0, drive.straight)
    assert drive.loop.mode == "running" and drive.twist[0] > 0.3


box = st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(0.05, 0.8), st.floats(0.05, 0.8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(box, min_size=1, max_size=6), st.sampled_from([BASE, told_velocities()]))
def test_no_plan_drives_into_what_it_sees(seed: int, boxes: list, embodiment: Embodiment) -> None:
    """Any waypoints or velocities, among any boxes that leave the base room to begin with."""
    rng = np.random.default_rng(seed)
    there = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes if math.hypot(max(x, -x - w), max(y, -y - h)) > 0.8])
    drive = Drive(embodiment, there.reshape(-1, 4), scan_every=2)
    if drive.gap() < 0.2:
        return

    def plan() -> np.ndarray:
        if embodiment.actions[0].kind == "base_twist":
            return np.cumsum(rng.normal(0, 0.4, (8, 2)), axis=0) + np.array([0.4, 0.0])
        return drive.pose + np.cumsum(rng.normal([0.1, 0.0, 0.0], [0.25, 0.25, 0.5], (8, 3)), axis=0)

    drive.run(6.0, plan)
    assert drive.nearest > 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slow_distance": 0.1}, "not beyond stop_distance"),
        ({"slow_distance": 0.3}, "of a stop from full speed"),
    ],
)
def test_distances_that_cannot_stop_the_base_are_refused_at_load(change: dict, words: str) -> None:
    text = load_embodiment("mobile_base").source_text
    lines = {"stop_distance": 0.15, "slow_distance": 0.8, **change}
    keys = "".join(f"\n    {key}: {value}" for key, value in lines.items())
    keys += "\n    topic: /scan\n    footprint: {front: 0.2, rear: 0.2, side: 0.2}"
    with pytest.raises(Exception, match=words):
        parse_embodiment(text.replace("  # obstacle_stop:", f"  obstacle_stop:{keys}\n  #"))


def test_a_robot_that_is_told_poses_cannot_be_stopped_here_and_the_yaml_is_told_so() -> None:
    text = load_embodiment("aloha").source_text
    keys = (
        "obstacle_stop: {topic: /scan, stop_distance: 0.1, slow_distance: 1.0, footprint: {front: 1, rear: 1, side: 1}}"
    )
    with pytest.raises(Exception, match="no group drives a base"):
        parse_embodiment(text.replace("\nsafety:", f"\nsafety:\n  {keys}", 1))
