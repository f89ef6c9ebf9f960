"""Rotations survive the trip to a ROS quaternion and back, and what is no rotation is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import (
    ROTATION_SIZES,
    from_quaternion,
    join_pose,
    pose_size,
    split_pose,
    to_quaternion,
)

UNITS = ("m", "m,rad", *(f"m,{representation}" for representation in ROTATION_SIZES))


@pytest.fixture(scope="module")
def quaternions() -> np.ndarray:
    """(20, 10, 4) random rotations with w ≥ 0."""
    return Rotation.random(200, random_state=0).as_quat(canonical=True).reshape(20, 10, 4)


@pytest.mark.parametrize("representation", ROTATION_SIZES)
def test_round_trip(representation: str, quaternions: np.ndarray) -> None:
    values = from_quaternion(quaternions, representation)
    assert values.shape == (20, 10, ROTATION_SIZES[representation])
    np.testing.assert_allclose(to_quaternion(values, representation), quaternions, atol=1e-9)


@pytest.mark.parametrize(
    ("representation", "values"),
    [
        ("axis_angle", [0, 0, np.pi / 2]),
        ("euler_xyz", [0, 0, np.pi / 2]),
        ("quaternion", [0, 0, -np.sqrt(2), -np.sqrt(2)]),
        ("rot6d", [0, 2, 0, -3, 1, 0]),
    ],
)
def test_a_quarter_turn_about_z_is_the_same_quaternion_everywhere(representation: str, values: list[float]) -> None:
    half = np.sqrt(0.5)
    np.testing.assert_allclose(to_quaternion(np.array(values), representation), [0, 0, half, half], atol=1e-12)


def test_euler_angles_are_about_fixed_axes_as_rep_103_says() -> None:
    quaternion = to_quaternion(np.array([np.pi / 2, 0, np.pi / 2]), "euler_xyz")  # roll first, then yaw
    np.testing.assert_allclose(Rotation.from_quat(quaternion).apply([0, 1, 0]), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(Rotation.from_quat(quaternion).apply([1, 0, 0]), [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("representation", "values"),
    [
        ("quaternion", [0.0, 0.0, 0.0, 0.0]),
        ("rot6d", [0.0] * 6),
        ("rot6d", [1.0, 0.0, 0.0, 2.0, 0.0, 0.0]),
        ("axis_angle", [np.nan, 0.0, 0.0]),
        ("axis_angle", [0.0] * 4),
        ("matrix", [0.0] * 9),
    ],
)
def test_what_is_no_rotation_is_refused(representation: str, values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no rotation|non-finite|numbers on the last axis|unknown rotation"):
        to_quaternion(np.array(values), representation)


@pytest.mark.parametrize("unit", UNITS)
def test_poses_round_trip_in_every_unit(unit: str) -> None:
    rng = np.random.default_rng(1)
    pose = rng.uniform(-1, 1, size=(7, pose_size(unit)))
    position, quaternion = split_pose(pose, unit)
    assert position.shape == (7, 3) and quaternion.shape == (7, 4)
    again = join_pose(position, quaternion, unit)
    assert again.shape == pose.shape
    position_2, quaternion_2 = split_pose(again, unit)
    np.testing.assert_allclose(position_2, position, atol=1e-12)
    np.testing.assert_allclose(quaternion_2, quaternion, atol=1e-9)


def test_a_pose_of_the_wrong_length_or_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="has 7 numbers"):
        split_pose(np.zeros(6), "m,quaternion")
    with pytest.raises(ValueError, match="no pose unit"):
        pose_size("rad")
