"""Displacements, base twists, rewritten rotations: invertible in every unit and frame, also at the awkward places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.continuous import continue_poses
from qwen_vla_core.actions.displacements import (
    from_displacements,
    from_twists,
    share_of_turn,
    to_displacements,
    to_twists,
)
from qwen_vla_core.actions.rotations import join_pose, split_pose
from qwen_vla_core.embodiment.spec import LinearMap

ROTATED = ("m,axis_angle", "m,euler_xyz", "m,quaternion", "m,rot6d")
FRAMES = ("base", "tool")
H = 4


@st.composite
def turns(draw: st.DrawFn) -> np.ndarray:
    """A quaternion: anywhere, within a hair of half a turn, or where Euler angles lose a degree of freedom."""
    kind = draw(st.sampled_from(["any", "half a turn", "gimbal lock"]))
    roll, yaw = draw(st.floats(-np.pi, np.pi)), draw(st.floats(-np.pi, np.pi))
    if kind == "gimbal lock":
        pitch = draw(st.sampled_from([-1.0, 1.0])) * np.pi / 2 + draw(st.sampled_from([0.0, 1e-9, -1e-5]))
        return np.asarray(Rotation.from_euler("xyz", [roll, pitch, yaw]).as_quat())
    axis = np.array([draw(st.floats(-1, 1)), draw(st.floats(-1, 1)), draw(st.floats(-1, 1))])
    axis = axis / np.linalg.norm(axis) if np.linalg.norm(axis) > 1e-3 else np.array([0.0, 0.0, 1.0])
    angle = np.pi + draw(st.sampled_from([0.0, 1e-9, -1e-9, 1e-4, -1e-4])) if kind == "half a turn" else roll
    return np.asarray(Rotation.from_rotvec(axis * angle).as_quat()) * draw(st.sampled_from([-1.0, 1.0]))


@st.composite
def paths(draw: st.DrawFn, unit: str) -> np.ndarray:
    """(H + 1, n) poses."""
    place = np.array([[draw(st.floats(-2, 2)) for _ in range(3)] for _ in range(H + 1)])
    return join_pose(place, np.stack([draw(turns()) for _ in range(H + 1)]), unit)


def assert_same_poses(one: np.ndarray, other: np.ndarray, unit: str, tolerance: float = 1e-9) -> None:
    (place, turn), (place_2, turn_2) = split_pose(one, unit), split_pose(other, unit)
    # Euler angles at their poles carry only half the digits of a double.
    tolerance = 1e-6 if unit == "m,euler_xyz" else tolerance
    np.testing.assert_allclose(place_2, place, atol=tolerance)
    between = (Rotation.from_quat(turn_2) * Rotation.from_quat(turn).inv()).magnitude()
    assert between.max() < tolerance


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("unit", [*ROTATED, "m"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_displaced_poses_add_up_to_the_same_poses(unit: str, frame: str, data: st.DataObject) -> None:
    path = data.draw(paths(unit))
    moves = to_displacements(path[1:], path[0], unit, frame)
    assert moves.shape == path[1:].shape
    assert_same_poses(path[1:], from_displacements(moves, path[0], unit, frame), unit, 1e-8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-7, 7), min_size=3 * (H + 1), max_size=3 * (H + 1)))
def test_displaced_joints_add_up_to_the_same_joints(values: list[float]) -> None:
    path = np.array(values).reshape(H + 1, 3)
    moves = to_displacements(path[1:], path[0], "rad", "joint")
    np.testing.assert_array_equal(moves[0], path[1] - path[0])
    np.testing.assert_allclose(from_displacements(moves, path[0], "rad", "joint"), path[1:], atol=1e-9)
    both = np.stack([path[1:], path[1:] + 1.0])  # batches, sample by sample
    np.testing.assert_allclose(
        to_displacements(both, np.stack([path[0], path[0] + 1.0]), "rad", "joint")[1], moves, atol=1e-12
    )


def test_tool_axes_turn_with_the_hand_and_base_axes_do_not() -> None:
    quarter = Rotation.from_rotvec([0, 0, np.pi / 2])
    start = np.concatenate([[0.1, 0.2, 0.3], quarter.as_rotvec()])
    ahead = np.array([[0.05, 0, 0, 0, 0, 0.1]])
    tool = from_displacements(ahead, start, "m,axis_angle", "tool")[0]
    base = from_displacements(ahead, start, "m,axis_angle", "base")[0]
    np.testing.assert_allclose(tool[:3], [0.1, 0.25, 0.3], atol=1e-12)
    np.testing.assert_allclose(base[:3], [0.15, 0.2, 0.3], atol=1e-12)
    with pytest.raises(ValueError, match="unknown frame"):
        from_displacements(ahead, start, "m,axis_angle", "world")


@pytest.mark.parametrize("unit", ROTATED)
def test_shares_of_a_displaced_turn_add_up_to_it_also_while_the_plan_is_slowed_down(unit: str) -> None:
    whole = Rotation.from_rotvec([0.3, -0.2, 0.4])
    numbers = join_pose(np.zeros(3), whole.as_quat(), unit)
    for rate, ticks in ((1.0, 10), (0.25, 40)):  # a slowed plan scales its numbers
        turned = np.eye(3)
        for _ in range(ticks):
            turned = share_of_turn(numbers * rate, unit, 0.1) @ turned
        away = (Rotation.from_matrix(turned) * whole.inv()).magnitude()
        assert away < (1e-9 if unit != "m,euler_xyz" or rate == 1.0 else 0.06)  # Euler angles: to first order
    np.testing.assert_array_equal(share_of_turn(np.zeros(len(numbers)), unit, 0.5), np.eye(3))


@pytest.mark.parametrize("unit", ROTATED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rewritten_poses_are_the_same_poses_without_a_jump(unit: str, data: st.DataObject) -> None:
    start = np.asarray(data.draw(turns()))
    steps = [Rotation.from_rotvec([data.draw(st.floats(-0.15, 0.15)) for _ in range(3)]) for _ in range(H)]
    path, here = [], Rotation.from_quat(start)
    for step in steps:
        here = step * here
        path.append(here.as_quat() * data.draw(st.sampled_from([-1.0, 1.0])))
    poses = join_pose(np.zeros((H, 3)), np.stack(path), unit)
    if unit == "m,quaternion":
        poses[:, 3:] = path  # join_pose writes the sign that w ≥ 0 has
    began = join_pose(np.zeros(3), start, unit)
    again = continue_poses(poses, began, unit)
    assert_same_poses(poses, again, unit)
    rows = np.vstack([began, again])[:, 3:]
    if unit != "m,euler_xyz":  # which may turn by any angle at their poles, however small the step is
        # The numbers of axis-angle move by up to a turn's length times the change of the axis.
        assert np.linalg.norm(np.diff(rows, axis=0), axis=1).max() < (1.5 if unit == "m,axis_angle" else 0.5)


@pytest.mark.parametrize(
    ("unit", "before", "after", "written"),
    [
        ("m,axis_angle", [0, 0, 3.1], [0, 0, -3.1], [0, 0, 2 * np.pi - 3.1]),
        ("m,axis_angle", [0, 0, 6.2], [0, 0, 0], [0, 0, 2 * np.pi]),
        ("m,euler_xyz", [3.1, 0.2, -3.1], [-3.1, 0.2, 3.1], [2 * np.pi - 3.1, 0.2, 3.1 - 2 * np.pi]),
        ("m,euler_xyz", [0.0, 1.5, 0.0], [np.pi, 1.5, np.pi], [0.0, np.pi - 1.5, 0.0]),  # over the pole
        ("m,quaternion", [0, 0, 1, 0.02], [0, 0, -0.9998, -0.02], [0, 0, 0.9998, 0.02]),
    ],
)
def test_wrapped_numbers_are_counted_on(unit: str, before: list, after: list, written: list) -> None:
    start, pose = np.array([0.0, 0, 0, *before]), np.array([[0.0, 0, 0, *after]])
    np.testing.assert_allclose(continue_poses(pose, start, unit)[0, 3:], written, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    twists=st.lists(st.tuples(*[st.floats(-1, 1)] * 2, st.floats(-1.5, 1.5)), min_size=H, max_size=H),
    start=st.tuples(*[st.floats(-50, 50)] * 2, st.floats(-7, 7)),
    modulo=st.booleans(),
)
def test_base_twists_come_back_from_the_poses_they_lead_to(twists: list, start: tuple, modulo: bool) -> None:
    poses = from_twists(np.array(twists), np.array(start), 2.0)
    if modulo:
        poses[:, 2] = np.remainder(poses[:, 2] + np.pi, 2 * np.pi) - np.pi
    np.testing.assert_allclose(to_twists(poses, np.array(start), 2.0), twists, atol=1e-8)


def test_a_twist_drives_an_arc() -> None:
    quarter = from_twists(np.array([[1.0, 0.0, np.pi / 2]]), np.zeros(3), 1.0)[0]
    radius = 1.0 / (np.pi / 2)
    np.testing.assert_allclose(quarter, [radius, radius, np.pi / 2], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1), st.sampled_from([((0, 1), (0.044, 0.0579)), ((0, 1), (1.6214, 0.6197)), ((-1, 1), (0.0, 0.08))])
)
def test_gripper_maps_come_back_metres_radians_and_inverted(opening: float, ranges: tuple) -> None:
    (c0, c1), (m0, m1) = ranges
    scale = (m1 - m0) / (c1 - c0)
    linear = LinearMap(scale, m0 - scale * c0)
    channel = c0 + opening * (c1 - c0)
    assert linear.to_channel(linear.to_message(channel)) == pytest.approx(channel, abs=1e-12)
    assert min(m0, m1) - 1e-12 <= linear.to_message(channel) <= max(m0, m1) + 1e-12
