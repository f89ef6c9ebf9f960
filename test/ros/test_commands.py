"""Every command kind can be written and read back; what reaches a driver has the right joints, units and times."""

from __future__ import annotations

import array
import dataclasses
import sys
import types

import numpy as np
import pytest

pytest.importorskip("rclpy")
from builtin_interfaces.msg import Time
from scipy.spatial.transform import Rotation

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import (
    COMMAND_KINDS_BY_GROUP,
    TWIST_FIELDS,
    ActionGroup,
    CommandSpec,
    Limits,
)
from qwen_vla_core.errors import UserError
from qwen_vla_ros.commands import ADAPTERS, TWIST_FIELD_PATHS, adapter_for, command_kind

STAMP = Time(sec=12, nanosec=34)
POSE_UNITS = {"m,axis_angle": 6, "m,euler_xyz": 6, "m,quaternion": 7, "m,rot6d": 9, "m": 3}


def group(
    kind: str, count: int, group_kind: str = "joint_position", unit: str = "rad", **command: object
) -> ActionGroup:
    limits = Limits(*[(1.0,) * count] * 4)
    channels = tuple(f"c{i}" for i in range(count))
    spec = CommandSpec(kind=kind, topic="/t", **command)  # type: ignore[arg-type]
    return ActionGroup("g", group_kind, channels, unit, limits, spec, "hold_measured")  # type: ignore[arg-type]


def round_trip(robot_group: ActionGroup, values: np.ndarray) -> np.ndarray:
    adapter = adapter_for(robot_group.command.kind)
    message = adapter.encode(robot_group, values, np.zeros(len(values)), STAMP, 0.02)
    assert isinstance(message, adapter.message_type)
    return adapter.decode(robot_group, message)


@pytest.fixture
def interbotix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two message classes as rosidl generates them: keyword arguments, float32 array."""

    @dataclasses.dataclass
    class JointGroupCommand:
        name: str = ""
        cmd: array.array = dataclasses.field(default_factory=lambda: array.array("f"))

        def __post_init__(self) -> None:
            assert self.cmd.typecode == "f"

    @dataclasses.dataclass
    class JointSingleCommand:
        name: str = ""
        cmd: float = 0.0

        def __post_init__(self) -> None:
            assert isinstance(self.cmd, float)

    module = types.ModuleType("interbotix_xs_msgs.msg")
    module.JointGroupCommand, module.JointSingleCommand = JointGroupCommand, JointSingleCommand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs", types.ModuleType("interbotix_xs_msgs"))
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs.msg", module)


def test_every_kind_an_embodiment_may_name_has_an_adapter() -> None:
    allowed = {kind for kinds in COMMAND_KINDS_BY_GROUP.values() for kind in kinds}
    assert set(ADAPTERS) == allowed
    assert set(TWIST_FIELD_PATHS) == set(TWIST_FIELDS)
    with pytest.raises(UserError, match="joint_trajectory"):
        adapter_for("no_such_kind")


def test_joint_trajectory_carries_names_velocities_and_one_period() -> None:
    arm = group("joint_trajectory", 2, fields=("elbow", "wrist"))
    adapter = adapter_for("joint_trajectory")
    message = adapter.encode(arm, np.array([0.1, -0.2]), np.array([1.0, 2.0]), STAMP, 0.02)
    point = message.points[0]
    assert message.joint_names == ["elbow", "wrist"] and list(point.velocities) == [1.0, 2.0]
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 20_000_000)
    assert message.header.stamp == Time()  # "now": a stamp in the past would be dropped or jerked to
    message.joint_names.reverse()
    point.positions = [5.0, 6.0]
    np.testing.assert_array_equal(adapter.decode(arm, message), [6.0, 5.0])


def test_a_joint_trajectory_ends_at_rest_where_full_braking_would_take_it() -> None:
    """Stock joint_trajectory_controller refuses one that ends in motion, and plays it out when no other follows."""
    arm = group("joint_trajectory", 2)
    arm = dataclasses.replace(arm, limits=dataclasses.replace(arm.limits, acceleration=(20.0, 5.0)))
    encode = adapter_for("joint_trajectory").encode
    moving, at_rest = encode(arm, np.array([0.1, -0.2]), np.array([1.0, -2.0]), STAMP, 0.02).points
    stop_s = 2.0 / 5.0  # the slower joint to brake
    due_s = at_rest.time_from_start.sec + at_rest.time_from_start.nanosec * 1e-9
    assert due_s == pytest.approx(0.02 + stop_s) and list(at_rest.velocities) == [0.0, 0.0]
    np.testing.assert_allclose(at_rest.positions, [0.1 + stop_s / 2, -0.2 - 2.0 * stop_s / 2])
    np.testing.assert_array_equal(moving.positions, [0.1, -0.2])
    assert len(encode(arm, np.array([0.1, -0.2]), np.zeros(2), STAMP, 0.02).points) == 1
    slow = encode(arm, np.zeros(2), np.array([1e-3, 0.0]), STAMP, 0.02).points[1]
    assert slow.time_from_start.nanosec == 40_000_000  # a stop takes one period at least


@pytest.mark.parametrize("kind", ["joint_trajectory", "forward_command"])
def test_joint_kinds_round_trip_exactly(kind: str) -> None:
    values = np.array([0.1, -1e-9, 3.0])
    np.testing.assert_array_equal(round_trip(group(kind, 3), values), values)


@pytest.mark.usefixtures("interbotix")
def test_interbotix_kinds_round_trip() -> None:
    values = np.array([0.25, -0.5])
    np.testing.assert_array_equal(round_trip(group("interbotix_group", 2, group_name="arm"), values), values)
    single = group("interbotix_single", 1, group_name="gripper")
    np.testing.assert_array_equal(round_trip(single, values[:1]), values[:1])
    message = adapter_for("interbotix_single").encode(single, values[:1], values[:1], STAMP, 0.02)
    with pytest.raises(ValueError, match="gripper"):
        message.name = "other"
        adapter_for("interbotix_single").decode(single, message)


@pytest.mark.parametrize("kind", ["interbotix_group", "interbotix_single"])
def test_a_missing_interbotix_package_says_what_to_install(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs", None)
    monkeypatch.setitem(sys.modules, "interbotix_xs_msgs.msg", None)
    with pytest.raises(UserError, match="source their workspace"):
        _ = adapter_for(kind).message_type


@pytest.mark.parametrize("kind", ["twist", "twist_stamped"])
def test_twists_put_each_field_where_it_belongs(kind: str) -> None:
    base = group(kind, 2, "base_twist", "m/s,rad/s", fields=("vx", "wz"), frame_id="base_link")
    values = np.array([0.3, -0.7])
    np.testing.assert_array_equal(round_trip(base, values), values)
    message = adapter_for(kind).encode(base, values, values, STAMP, 0.02)
    twist = message if kind == "twist" else message.twist
    assert (twist.linear.x, twist.angular.z) == (0.3, -0.7)
    assert (twist.linear.y, twist.linear.z, twist.angular.x, twist.angular.y) == (0, 0, 0, 0)
    if kind == "twist_stamped":
        assert message.header.stamp == STAMP and message.header.frame_id == "base_link"


@pytest.mark.parametrize("unit", POSE_UNITS)
def test_poses_round_trip_in_every_rotation_representation(unit: str) -> None:
    rotation = Rotation.from_euler("xyz", [0.3, -0.8, 2.0])
    parts = {
        "m,axis_angle": rotation.as_rotvec(),
        "m,euler_xyz": [0.3, -0.8, 2.0],
        "m,quaternion": rotation.as_quat(),
        "m,rot6d": rotation.as_matrix()[:, :2].T.reshape(6),
        "m": [],
    }
    arm = group("pose_stamped", POSE_UNITS[unit], "eef_pose", unit, frame_id="base_link")
    values = np.concatenate([[0.1, 0.2, 0.3], parts[unit]])
    np.testing.assert_allclose(round_trip(arm, values), values, atol=1e-12)
    message = adapter_for("pose_stamped").encode(arm, values, values, STAMP, 0.02)
    q = message.pose.orientation
    expected = rotation if unit != "m" else Rotation.identity()
    assert (Rotation.from_quat([q.x, q.y, q.z, q.w]) * expected.inv()).magnitude() < 1e-9
    assert message.header.frame_id == "base_link"


def test_interpolated_rotations_leave_as_unit_quaternions() -> None:
    for unit, values in (("m,quaternion", [0.0, 0.0, 0.3, 0.3]), ("m,rot6d", [0.5, 0.0, 0.1, 0.0, 0.4, 0.4])):
        arm = group("pose_stamped", POSE_UNITS[unit], "eef_pose", unit, frame_id="base_link")
        q = adapter_for("pose_stamped").encode(arm, np.array([0.0] * 3 + values), values, STAMP, 0.02).pose.orientation
        assert np.linalg.norm([q.x, q.y, q.z, q.w]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("unit", "values"), [("m,quaternion", [0.0] * 4), ("m,rot6d", [0.0] * 6), ("m,rot6d", [1.0, 0, 0, 2.0, 0, 0])]
)
def test_numbers_that_are_no_rotation_are_refused(unit: str, values: list[float]) -> None:
    arm = group("pose_stamped", POSE_UNITS[unit], "eef_pose", unit, frame_id="base_link")
    with pytest.raises(ValueError, match="no rotation"):
        adapter_for("pose_stamped").encode(arm, np.array([0.0] * 3 + values), np.zeros(3), STAMP, 0.02)


def test_waypoints_are_planar_poses() -> None:
    base = group("pose_stamped", 3, "waypoint", "m,rad", frame_id="odom")
    values = np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(round_trip(base, values), values)


def test_wrong_joints_or_lengths_are_refused() -> None:
    arm = group("joint_trajectory", 2)
    adapter = adapter_for("joint_trajectory")
    message = adapter.encode(arm, np.zeros(2), np.zeros(2), STAMP, 0.02)
    message.joint_names = ["c0", "other"]
    with pytest.raises(ValueError, match="other"):
        adapter.decode(arm, message)
    message.points = []
    with pytest.raises(ValueError, match="without points"):
        adapter.decode(arm, message)
    flat = adapter_for("forward_command")
    with pytest.raises(ValueError, match="3 values"):
        flat.decode(
            group("forward_command", 2), flat.encode(group("forward_command", 3), np.zeros(3), np.zeros(3), STAMP, 0.02)
        )


def test_simulation_uses_its_own_kind_where_the_robot_needs_a_foreign_package() -> None:
    for action_group in load_embodiment("aloha").actions:
        assert command_kind(action_group, simulated=True) == "forward_command"
        assert command_kind(action_group, simulated=False).startswith("interbotix")
