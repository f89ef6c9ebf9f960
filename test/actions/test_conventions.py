"""Relative chunks: invertible in every unit, equal wherever the robot stands, and refused where nothing is measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.conventions import relative_parts, to_absolute, to_relative
from qwen_vla_core.actions.rotations import join_pose, pose_size, split_pose
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.hands.eigengrasps import Eigengrasps, Moments
from qwen_vla_core.data.hands.track import contract_of
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError

POSE_UNITS = ("m", "m,axis_angle", "m,euler_xyz", "m,quaternion", "m,rot6d")
H = 5


def group(kind: str, unit: str, size: int, name: str = "arm", frame: str = "") -> ChannelGroup:
    return ChannelGroup(name, kind, unit, tuple(f"{name}_{i}" for i in range(size)), frame)


@st.composite
def rotations(draw: st.DrawFn) -> np.ndarray:
    """A quaternion; half of the angles are within a hair of half a turn, where axis-angle and signs flip."""
    axis = np.array([draw(st.floats(-1, 1)) for _ in range(3)])
    if np.linalg.norm(axis) < 1e-3:
        axis = np.array([0.0, 0.0, 1.0])
    near = st.sampled_from([np.pi, np.pi - 1e-9, np.pi + 1e-9, np.pi - 1e-6, np.pi + 1e-6])
    angle = draw(st.one_of(st.floats(-np.pi, np.pi), near))
    return np.asarray(Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle).as_quat())


@st.composite
def poses(draw: st.DrawFn, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, n) chunk and (n,) state in a unit."""
    place = np.array([[draw(st.floats(-2, 2)) for _ in range(3)] for _ in range(H + 1)])
    turn = np.stack([draw(rotations()) for _ in range(H + 1)])
    values = join_pose(place, turn, unit)
    return values[:H], values[H]


@pytest.mark.parametrize("frame", ["", "base"])
@pytest.mark.parametrize("unit", POSE_UNITS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_eef_poses_come_back_as_the_same_poses(unit: str, frame: str, data: st.DataObject) -> None:
    chunk, state = data.draw(poses(unit))
    hand = group("eef_pose", unit, pose_size(unit), frame=frame)
    parts = relative_parts("relative_eef", (hand,), (hand,))
    again = to_absolute(parts, to_relative(parts, chunk, state), state)
    place, turn = split_pose(chunk, unit)
    place_again, turn_again = split_pose(again, unit)
    np.testing.assert_allclose(place_again, place, atol=1e-9)
    between = (Rotation.from_quat(turn_again) * Rotation.from_quat(turn).inv()).magnitude()
    # At the poles of the Euler angles the angles themselves carry only half the digits of a double.
    tolerance = 1e-9 if unit != "m,euler_xyz" or _off_the_poles(turn, state, unit) else 1e-6
    assert between.max() < tolerance


def _off_the_poles(turn: np.ndarray, state: np.ndarray, unit: str) -> bool:
    here = Rotation.from_quat(split_pose(state, unit)[1])
    both = Rotation.concatenate([Rotation.from_quat(turn), here.inv() * Rotation.from_quat(turn), here])
    return bool(np.abs(both.as_matrix()[:, 2, 0]).max() < 1 - 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.lists(st.tuples(*[st.floats(-50, 50)] * 2, st.floats(-7, 7)), min_size=H, max_size=H),
    state=st.tuples(*[st.floats(-50, 50)] * 2, st.floats(-7, 7)),
)
def test_waypoints_come_back_with_headings_the_same_up_to_whole_turns(
    chunk: list[tuple[float, ...]], state: tuple[float, ...]
) -> None:
    base = group("waypoint", "m,rad", 3)
    parts = relative_parts("waypoint", (base,), (base,))
    relative = to_relative(parts, np.array(chunk), np.array(state))
    again = to_absolute(parts, relative, np.array(state))
    np.testing.assert_allclose(again[:, :2], np.array(chunk)[:, :2], atol=1e-9)
    turns = (again[:, 2] - np.array(chunk)[:, 2]) / (2 * np.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-9)
    assert np.abs(np.diff(relative[:, 2], prepend=0.0)).max() <= np.pi + 1e-9  # no jump by a turn


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=6 * H + 6, max_size=6 * H + 6))
def test_joints_come_back_and_the_gripper_never_moves(values: list[float]) -> None:
    chunk, state = np.array(values[: 6 * H]).reshape(H, 6), np.array(values[6 * H :])
    groups = (
        group("joint_position", "rad", 3),
        group("gripper", "fraction", 1, "grip"),
        group("hand", "rad", 2, "hand"),
    )
    parts = relative_parts("relative_joint", groups, groups)
    relative = to_relative(parts, chunk, state)
    np.testing.assert_array_equal(relative[:, :3], chunk[:, :3] - state[:3])
    np.testing.assert_array_equal(relative[:, 3:], chunk[:, 3:])
    np.testing.assert_allclose(to_absolute(parts, relative, state), chunk, atol=1e-9)


def test_a_relative_pose_is_the_same_wherever_the_hand_points() -> None:
    hand = group("eef_pose", "m,axis_angle", 6)
    parts = relative_parts("relative_eef", (hand,), (hand,))
    step = np.array([0.05, 0, 0])  # 5 cm along the hand's own x, and a quarter turn about it
    quarter = Rotation.from_rotvec([np.pi / 2, 0, 0])
    for seed in range(5):
        frame, place = Rotation.random(random_state=seed), np.random.default_rng(seed).normal(size=3)
        state = np.concatenate([place, frame.as_rotvec()])
        target = np.concatenate([place + frame.apply(step), (frame * quarter).as_rotvec()])
        np.testing.assert_allclose(
            to_relative(parts, target[None], state)[0], [0.05, 0, 0, np.pi / 2, 0, 0], atol=1e-12
        )


def test_in_base_axes_a_relative_pose_is_what_the_base_sees() -> None:
    hand = group("eef_pose", "m,axis_angle", 6, frame="base")
    parts = relative_parts("relative_eef", (hand,), (hand,))
    state = np.concatenate([[0.3, 0.1, 0.2], Rotation.random(random_state=3).as_rotvec()])
    up = Rotation.from_rotvec([0, 0, 0.4]) * Rotation.from_rotvec(state[3:])
    # Turned about the base's z, 5 cm along its x.
    target = np.concatenate([state[:3] + np.array([0.05, 0, 0]), up.as_rotvec()])
    np.testing.assert_allclose(to_relative(parts, target[None], state)[0], [0.05, 0, 0, 0, 0, 0.4], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_wrists_and_eigengrasps_of_two_hands_come_back(data: st.DataObject) -> None:
    """32 channels as `data/hands` makes them: wrists relative to the first frame, grasps as they are."""
    contract = contract_of("both", 30.0, ("ego",))
    assert contract == DataContract.of(load_embodiment("human_hands"))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    grasps = Eigengrasps.fit(Moments.of(rng.normal(size=(80, 45))), "points", 10)
    fingers = grasps.poses(rng.normal(size=(H + 1, 2, 10)))  # finger poses inside what the components can say
    coefficients = grasps.coefficients(fingers)
    np.testing.assert_allclose(grasps.poses(coefficients), fingers, atol=1e-9)
    wrists = [np.vstack(data.draw(poses("m,axis_angle"))) for _ in range(2)]
    rows = np.hstack([wrists[0], coefficients[:, 0], wrists[1], coefficients[:, 1]])
    parts = relative_parts(contract.convention, contract.action, contract.state)
    relative = to_relative(parts, rows[:H], rows[H])
    again = to_absolute(parts, relative, rows[H])
    np.testing.assert_array_equal(relative[:, 6:16], rows[:H, 6:16])
    for start in (0, 16):
        place, turn = split_pose(rows[:H, start : start + 6], "m,axis_angle")
        place_again, turn_again = split_pose(again[:, start : start + 6], "m,axis_angle")
        np.testing.assert_allclose(place_again, place, atol=1e-9)
        assert (Rotation.from_quat(turn_again) * Rotation.from_quat(turn).inv()).magnitude().max() < 1e-9
    assert DataContract.from_json(contract.to_json(), "here") == contract


def test_waypoints_are_forward_and_left_of_the_present_pose() -> None:
    base = group("waypoint", "m,rad", 3)
    parts = relative_parts("waypoint", (base,), (base,))
    # Standing at (1, 2) and looking along +y: one metre on +y is ahead, one on −x is to the left.
    chunk = np.array([[1.0, 3.0, np.pi / 2], [0.0, 3.0, np.pi], [0.0, 3.0, -np.pi + 0.1]])
    relative = to_relative(parts, chunk, np.array([1.0, 2.0, np.pi / 2]))
    np.testing.assert_allclose(relative, [[1, 0, 0], [1, 1, np.pi / 2], [1, 1, np.pi / 2 + 0.1]], atol=1e-12)


def test_batches_are_treated_sample_by_sample_and_inputs_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    groups = (group("waypoint", "m,rad", 3), group("eef_pose", "m,rot6d", 9, "hand"))
    for convention in ("waypoint", "relative_eef"):
        parts = relative_parts(convention, groups, groups)
        chunk, state = rng.normal(size=(4, H, 12)).astype(np.float32), rng.normal(size=(4, 12)).astype(np.float32)
        before = chunk.copy()
        together = to_relative(parts, chunk, state)
        assert together.dtype == np.float64
        np.testing.assert_array_equal(chunk, before)
        for one, here, result in zip(chunk, state, together, strict=True):
            np.testing.assert_allclose(to_relative(parts, one, here), result, atol=1e-12)
        shared = to_relative(parts, chunk, state[0])
        np.testing.assert_allclose(shared[2], to_relative(parts, chunk[2], state[0]), atol=1e-12)


@pytest.mark.parametrize("convention", ["absolute_joint", "absolute_eef", "delta_eef", "delta_joint", "base_velocity"])
def test_other_conventions_change_nothing(convention: str) -> None:
    groups = (group("joint_position", "rad", 3), group("eef_pose", "m,rot6d", 9, "hand"))
    assert relative_parts(convention, groups, ()) == ()
    chunk = np.ones((H, 12))
    np.testing.assert_array_equal(to_relative((), chunk, np.ones(12)), chunk)


def test_what_is_not_measured_cannot_be_relative_to_it() -> None:
    arm = group("joint_position", "rad", 2)
    with pytest.raises(UserError, match=r"'arm_1'.*is missing; add a state channel 'arm_1' in rad"):
        relative_parts("relative_joint", (arm,), (ChannelGroup("arm", "joint_position", "rad", ("arm_0",)),))
    with pytest.raises(UserError, match=r"'arm_0'.*is in m; add"):
        relative_parts("relative_joint", (arm,), (group("joint_position", "m", 2),))
    two = group("eef_pose", "m,axis_angle", 12)
    with pytest.raises(UserError, match="one group per pose"):
        relative_parts("relative_eef", (two,), (two,))
