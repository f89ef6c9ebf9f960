"""The kinematic mock: limits, displacements, bases, and pictures that a policy would accept."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.embodiment import Embodiment, load_embodiment, parse_embodiment, shipped_embodiments
from qwen_vla_core.runtime.mock_robot import SERVO_TIMEOUT_S, MockRobot, moving_pattern, pattern_background

DT = 0.02


def run(mock: MockRobot, seconds: float) -> None:
    for _ in range(round(seconds / DT)):
        mock.step(DT)


def edited(name: str, *changes: tuple[str, str]) -> Embodiment:
    text = Path(load_embodiment(name).source_path).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_embodiment(text)


def test_positions_start_at_the_start_pose_and_move_no_faster_than_their_limits() -> None:
    mock = MockRobot(load_embodiment("aloha"))
    group = mock.embodiment.actions[0]
    assert [mock.values[channel] for channel in group.channels] == list(group.start)
    goal = np.add(group.start, (1.0, 0, 0, 0, 0, -0.01))
    mock.command("left_arm", goal)
    mock.step(DT)
    assert mock.values["left_waist"] == pytest.approx(group.limits.velocity[0] * DT)
    assert mock.values["left_wrist_rotate"] == pytest.approx(-0.01)  # near enough to land
    run(mock, 1.0)
    assert [mock.values[channel] for channel in group.channels] == pytest.approx(goal.tolist())
    mock.command("left_arm", goal + 100.0)  # a mock has stops as a robot has
    run(mock, 5.0)
    assert mock.values["left_waist"] == pytest.approx(group.limits.upper[0])


def test_displacements_add_up_to_what_was_commanded_and_end_when_not_repeated() -> None:
    mock = MockRobot(load_embodiment("widowx"))
    x, z = mock.values["hand_x"], mock.values["hand_z"]
    (box,) = mock.embodiment.safety.workspace
    assert box.lower[0] < x < box.upper[0] and box.lower[2] < z < box.upper[2]
    for _ in range(round(mock.embodiment.period_s / DT)):  # one action period
        mock.command("arm", np.array([0.05, 0.0, -0.02, 0.0, 0.0, 0.3]))
        mock.step(DT)
    assert (mock.values["hand_x"], mock.values["hand_z"]) == pytest.approx((x + 0.05, z - 0.02))
    run(mock, 2.0)
    periods = SERVO_TIMEOUT_S / mock.embodiment.period_s
    assert mock.values["hand_x"] == pytest.approx(
        x + 0.05 * (1 + periods), abs=0.05 * 2 * DT / mock.embodiment.period_s
    )
    assert mock.values["waist"] == 0.0  # it knows no kinematic chain


def test_a_measured_orientation_turns_with_the_hand() -> None:
    robot = edited(
        "widowx",
        ("fields: [x, y, z]", "fields: [x, y, z, qx, qy, qz, qw]"),
        ("channels: [hand_x, hand_y, hand_z]", "channels: [hand_x, hand_y, hand_z, a, b, c, d]"),
        ("unit: m                   #", 'unit: "m,quaternion"      #'),
    )
    mock = MockRobot(robot)
    assert [mock.values[name] for name in "abcd"] == [0, 0, 0, 1]
    for _ in range(round(robot.period_s / DT)):
        mock.command("arm", np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.4]))
        mock.step(DT)
    assert [mock.values[name] for name in "abcd"] == pytest.approx([0, 0, math.sin(0.2), math.cos(0.2)], abs=1e-6)


def told_poses() -> Embodiment:
    """The base without its tracker."""
    robot = load_embodiment("mobile_base")
    (group,) = robot.actions
    command = dataclasses.replace(group.command, kind="pose_stamped", fields=(), tracker=None)
    return dataclasses.replace(robot, actions=(dataclasses.replace(group, command=command),))


def test_a_base_whose_waypoints_are_tracked_takes_the_twist_within_what_it_can_do() -> None:
    mock = MockRobot(load_embodiment("mobile_base"))
    mock.command("pose", np.array([9.0, 0.0]))
    run(mock, 0.1)
    assert mock.values["vx"] == pytest.approx(0.7) and mock.base_pose[0] == pytest.approx(0.07)
    mock.command("pose", np.array([-9.0, 0.5]))
    run(mock, 0.1)
    assert (mock.values["vx"], mock.values["wz"]) == pytest.approx((-0.3, 0.5))
    run(mock, 0.5)  # not told again: a driver's own time-out
    assert (mock.values["vx"], mock.values["wz"]) == (0.0, 0.0)


def test_a_base_told_poses_reports_the_twist_that_took_it_there() -> None:
    mock = MockRobot(told_poses())
    mock.command("pose", np.array([0.0, 1.0, 0.0]))
    mock.step(DT)
    assert mock.values["vx"] == pytest.approx(0.0)
    assert mock.values["y"] == pytest.approx(0.9 * DT)
    mock = MockRobot(told_poses())
    mock.command("pose", np.array([1.0, 0.0, 3.0]))
    mock.step(DT)
    assert mock.values["wz"] == pytest.approx(2.0)
    run(mock, 3.0)
    mock.command("pose", np.array([1.0, 0.0, -3.0]))  # the short way round is 0.28 rad
    run(mock, 0.2)
    assert math.remainder(mock.values["yaw"] + 3.0, 2 * math.pi) == pytest.approx(0.0, abs=1e-9)


def test_a_base_told_twists_integrates_its_pose_and_stops_when_not_told_again() -> None:
    before = load_embodiment("mobile_base").source_text
    head, tail = before.split("actions:")
    action = """actions:
  - name: motion
    kind: base_twist
    unit: m/s,rad/s
    channels: [vx, wz]
    limits: {lower: [-1, -2], upper: [1, 2], velocity: [9, 9], acceleration: [90, 90]}
    command: {kind: twist, topic: /cmd_vel, fields: [vx, wz]}
    on_timeout: zero

safety:""" + tail.split("\nsafety:")[1]
    mock = MockRobot(parse_embodiment(head.replace("convention: waypoint ", "convention: base_velocity ") + action))
    for _ in range(100):  # a quarter of a circle of radius 0.5 / (π/4)
        mock.command("motion", np.array([0.5, math.pi / 4]))
        mock.step(DT)
    radius = 0.5 / (math.pi / 4)
    assert (mock.values["x"], mock.values["y"]) == pytest.approx((radius, radius), rel=1e-3)
    assert (mock.values["vx"], mock.values["wz"]) == (0.5, math.pi / 4)
    run(mock, 0.5)
    assert (mock.values["vx"], mock.values["wz"]) == (0.0, 0.0)


@pytest.mark.parametrize("name", shipped_embodiments(runnable=True))
def test_bad_commands_change_nothing(name: str) -> None:
    mock = MockRobot(load_embodiment(name))
    before = dict(mock.values)
    group = mock.embodiment.actions[0]
    with pytest.raises(ValueError, match="not finite"):
        mock.command(group.name, np.full(len(group.twist_fields if group.tracked() else group.channels), np.nan))
    with pytest.raises(ValueError, match="values for the"):
        mock.command(group.name, np.zeros(len(group.channels) + 1))
    mock.step(float("nan"))
    run(mock, 0.1)
    assert mock.values == pytest.approx(before) and mock.commands[group.name] == 0


def test_the_test_pattern_moves_is_bright_and_has_the_size_asked_for() -> None:
    background = pattern_background(64, 48)
    first, second = moving_pattern(background, 10.0), moving_pattern(background, 10.1)
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8
    assert (first != second).any() and np.array_equal(first, moving_pattern(background, 10.0))
    assert np.count_nonzero(first > 16) > 0.5 * first.size
