"""Command messages: one adapter per command kind, each able to write a message and to read it back.

The controller encodes; the simulator decodes the same topics, so a robot driver and the simulated robot cannot drift
apart. Values are in message units and message order (after the embodiment's command map).
"""

from __future__ import annotations

import array
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from builtin_interfaces.msg import Time as TimeMsg
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from qwen_vla_core.actions.rotations import join_pose, split_pose
from qwen_vla_core.embodiment.spec import ActionGroup, CommandKind
from qwen_vla_core.errors import UserError

TWIST_FIELD_PATHS: dict[str, tuple[str, str]] = {
    "vx": ("linear", "x"),
    "vy": ("linear", "y"),
    "vz": ("linear", "z"),
    "wx": ("angular", "x"),
    "wy": ("angular", "y"),
    "wz": ("angular", "z"),
}


@dataclass(frozen=True)
class CommandAdapter:
    """One command kind.

    Attributes:
        kind: its name in the embodiment YAML.
        load_message_type: imports the message class; only called when the kind is used.
        encode: (group, values, velocities, stamp, period_s) → message. ``values`` (n,) in message order and units,
            ``velocities`` (n,) their rate of change, ``period_s`` the time in which the robot should get there.
        decode: (group, message) → (n,) float64 values in message order. Raises ValueError for a message that does not
            command exactly this group's joints.

    A waypoint group may be commanded with a pose (values are its channels) or a twist (values are ``twist_fields``,
    which the controller's tracker makes of the waypoints).
    """

    kind: CommandKind
    load_message_type: Callable[[], type]
    encode: Callable[[ActionGroup, np.ndarray, np.ndarray, TimeMsg, float], Any]
    decode: Callable[[ActionGroup, Any], np.ndarray]

    @property
    def message_type(self) -> type:
        """The ROS message class. Raises UserError where its package is not installed."""
        return self.load_message_type()


def adapter_for(kind: str) -> CommandAdapter:
    """The adapter of a command kind."""
    try:
        return ADAPTERS[kind]
    except KeyError:
        raise UserError(f"command kind '{kind}' is unknown; use one of {', '.join(ADAPTERS)}") from None


def command_kind(group: ActionGroup, simulated: bool) -> CommandKind:
    """The kind a group is commanded with on the robot, or in simulation."""
    return group.command_kind(simulated)


def field_names(group: ActionGroup) -> tuple[str, ...]:
    """Joint names (or twist fields) in message order; the channels where the YAML names none."""
    return group.twist_fields if group.kind == "waypoint" else group.command.fields or group.channels


def _doubles(values: np.ndarray) -> array.array[float]:
    return array.array("d", np.asarray(values, dtype=np.float64).tobytes())


def _joint_values(group: ActionGroup, names: list[str], values: Any) -> np.ndarray:
    """Values by joint name → (n,) in message order."""
    wanted = field_names(group)
    if set(names) != set(wanted) or len(names) != len(wanted) or len(values) != len(wanted):
        raise ValueError(f"command for joints {list(names)}, expected {list(wanted)}")
    index = {name: i for i, name in enumerate(names)}
    return np.array([values[index[name]] for name in wanted], dtype=np.float64)


def _encode_trajectory(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> JointTrajectory:
    """Where to be in one period and how fast, and, if that is in motion, where a stop from there would end.

    joint_trajectory_controller refuses trajectories that end in motion unless told otherwise, and follows the last one
    to its end when no other comes: then it stops at the limits' deceleration. The next command replaces it before.
    """
    del stamp  # stamp 0 means "now" to joint_trajectory_controller; a real stamp would be late by the time it arrives
    msg = JointTrajectory(joint_names=list(field_names(group)))
    msg.points.append(_trajectory_point(values, velocities, period_s))
    if np.any(velocities):
        # A parabola: the cubic between (p, v) and (p + v·t/2, 0) after t is one, with deceleration v/t.
        deceleration = np.array(group.limits.acceleration) * abs(group.command.map.scale)
        stop_s = max(period_s, float(np.max(np.abs(velocities) / deceleration)))
        at_rest = _trajectory_point(values + velocities * stop_s / 2, np.zeros_like(velocities), period_s + stop_s)
        msg.points.append(at_rest)
    return msg


def _trajectory_point(values: np.ndarray, velocities: np.ndarray, due_s: float) -> JointTrajectoryPoint:
    seconds, nanoseconds = divmod(round(due_s * 1e9), 1_000_000_000)
    point = JointTrajectoryPoint(positions=_doubles(values), velocities=_doubles(velocities))
    point.time_from_start = Duration(sec=seconds, nanosec=nanoseconds)
    return point


def _decode_trajectory(group: ActionGroup, msg: JointTrajectory) -> np.ndarray:
    if not msg.points:
        raise ValueError("joint trajectory without points")
    return _joint_values(group, list(msg.joint_names), msg.points[0].positions)  # the others are for if none follows


def _encode_array(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> Float64MultiArray:
    return Float64MultiArray(data=_doubles(values))


def _decode_array(group: ActionGroup, msg: Float64MultiArray) -> np.ndarray:
    if len(msg.data) != len(group.channels):
        raise ValueError(f"{len(msg.data)} values for the {len(group.channels)} channels of {group.name}")
    return np.array(msg.data, dtype=np.float64)


def _interbotix(name: str) -> Callable[[], type]:
    def load() -> type:
        try:
            module = importlib.import_module("interbotix_xs_msgs.msg")
        except ImportError as error:
            raise UserError(
                "interbotix_xs_msgs is not installed: install Interbotix' ROS 2 packages and source their workspace, "
                "or run with simulated:=true, or choose another command.kind in the embodiment"
            ) from error
        message_type: type = getattr(module, name)
        return message_type

    return load


_load_group_type = _interbotix("JointGroupCommand")
_load_single_type = _interbotix("JointSingleCommand")


def _encode_interbotix_group(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> Any:
    command = array.array("f", np.asarray(values, dtype=np.float32).tobytes())
    return _load_group_type()(name=group.command.group_name, cmd=command)


def _encode_interbotix_single(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> Any:
    return _load_single_type()(name=group.command.group_name, cmd=float(values[0]))


def _check_name(group: ActionGroup, name: str) -> None:
    if name != group.command.group_name:
        raise ValueError(f"command for '{name}', expected '{group.command.group_name}'")


def _decode_interbotix_group(group: ActionGroup, msg: Any) -> np.ndarray:
    _check_name(group, msg.name)
    if len(msg.cmd) != len(group.channels):
        raise ValueError(f"{len(msg.cmd)} values for the {len(group.channels)} channels of {group.name}")
    return np.array(msg.cmd, dtype=np.float64)


def _decode_interbotix_single(group: ActionGroup, msg: Any) -> np.ndarray:
    _check_name(group, msg.name)
    return np.array([msg.cmd], dtype=np.float64)


def _encode_twist(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> Twist:
    msg = Twist()
    for name, value in zip(field_names(group), values, strict=True):
        part, axis = _twist_path(name)
        setattr(getattr(msg, part), axis, float(value))
    return msg


def _decode_twist(group: ActionGroup, msg: Twist) -> np.ndarray:
    paths = [_twist_path(name) for name in field_names(group)]
    return np.array([getattr(getattr(msg, part), axis) for part, axis in paths], dtype=np.float64)


def _twist_path(name: str) -> tuple[str, str]:
    if name not in TWIST_FIELD_PATHS:
        raise UserError(f"command.fields: '{name}' is no twist field; use {', '.join(TWIST_FIELD_PATHS)}")
    return TWIST_FIELD_PATHS[name]


def _encode_twist_stamped(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> TwistStamped:
    msg = TwistStamped(twist=_encode_twist(group, values, velocities, stamp, period_s))
    msg.header.stamp, msg.header.frame_id = stamp, group.command.frame_id
    return msg


def _decode_twist_stamped(group: ActionGroup, msg: TwistStamped) -> np.ndarray:
    return _decode_twist(group, msg.twist)


def _encode_pose(
    group: ActionGroup, values: np.ndarray, velocities: np.ndarray, stamp: TimeMsg, period_s: float
) -> PoseStamped:
    msg = PoseStamped()
    msg.header.stamp, msg.header.frame_id = stamp, group.command.frame_id
    position, quaternion = split_pose(np.asarray(values, dtype=np.float64), group.unit)
    for axis, value in zip("xyz", position, strict=True):
        setattr(msg.pose.position, axis, float(value))
    for axis, value in zip("xyzw", quaternion, strict=True):
        setattr(msg.pose.orientation, axis, float(value))
    return msg


def _decode_pose(group: ActionGroup, msg: PoseStamped) -> np.ndarray:
    position, q = msg.pose.position, msg.pose.orientation
    return join_pose(np.array([position.x, position.y, position.z]), np.array([q.x, q.y, q.z, q.w]), group.unit)


ADAPTERS: dict[str, CommandAdapter] = {
    adapter.kind: adapter
    for adapter in (
        CommandAdapter("joint_trajectory", lambda: JointTrajectory, _encode_trajectory, _decode_trajectory),
        CommandAdapter("forward_command", lambda: Float64MultiArray, _encode_array, _decode_array),
        CommandAdapter("interbotix_group", _load_group_type, _encode_interbotix_group, _decode_interbotix_group),
        CommandAdapter("interbotix_single", _load_single_type, _encode_interbotix_single, _decode_interbotix_single),
        CommandAdapter("twist", lambda: Twist, _encode_twist, _decode_twist),
        CommandAdapter("twist_stamped", lambda: TwistStamped, _encode_twist_stamped, _decode_twist_stamped),
        CommandAdapter("pose_stamped", lambda: PoseStamped, _encode_pose, _decode_pose),
    )
}
