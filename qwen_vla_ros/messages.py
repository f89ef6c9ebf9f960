"""ROS messages ↔ NumPy: images, state, action chunks. No model, no maths beyond the embodiment's linear maps.

Images take a short NumPy path (0.03 ms for 640×480) for the encodings robots use; Bayer and YUV encodings go through
cv_bridge where it is installed. Image payloads are always handed to rclpy as ``array.array``: an ndarray makes it check
every byte in Python (37 ms per image).
"""

from __future__ import annotations

import array
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import cv2
import numpy as np
from builtin_interfaces.msg import Duration as DurationMsg
from builtin_interfaces.msg import Time as TimeMsg
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CompressedImage, Image, JointState, LaserScan
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from qwen_vla_core.embodiment.spec import POSE_FIELDS, CameraSpec, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_core.runtime.obstacles import Scan
from qwen_vla_core.runtime.splines import spline_velocities
from qwen_vla_ros.node_utils import ns_to_stamp, stamp_to_ns

StateMessage: TypeAlias = JointState | Odometry | PoseStamped

_NAMED_ENCODINGS: dict[str, tuple[str, int]] = {
    "rgb8": ("u1", 3),
    "bgr8": ("u1", 3),
    "rgba8": ("u1", 4),
    "bgra8": ("u1", 4),
    "mono8": ("u1", 1),
    "rgb16": ("u2", 3),
    "bgr16": ("u2", 3),
    "mono16": ("u2", 1),
}
_GENERIC_ENCODING = re.compile(r"^(8U|8S|16U|16S|32S|32F|64F)C([1-4]?)$")
_GENERIC_DTYPES = {"8U": "u1", "8S": "i1", "16U": "u2", "16S": "i2", "32S": "i4", "32F": "f4", "64F": "f8"}


def encoding_layout(encoding: str) -> tuple[np.dtype, int] | None:
    """(little-endian dtype, number of channels) of an encoding that is plain interleaved samples, else None."""
    if encoding in _NAMED_ENCODINGS:
        code, channels = _NAMED_ENCODINGS[encoding]
        return np.dtype(code).newbyteorder("<"), channels
    match = _GENERIC_ENCODING.match(encoding)
    if match is None:
        return None
    return np.dtype(_GENERIC_DTYPES[match[1]]).newbyteorder("<"), int(match[2] or 1)


def image_message_type(camera: CameraSpec) -> type:
    """ROS type of a camera's topic."""
    return CompressedImage if camera.transport == "compressed" else Image


def image_to_numpy(msg: Image) -> np.ndarray:
    """Image → (height, width) or (height, width, channels) array in the message's own encoding.

    The array shares the message's memory where row padding and byte order allow. One-channel images are 2-D, as in
    cv_bridge.

    Raises:
        UserError: The encoding needs cv_bridge and it is not installed.
        ValueError: step or data length do not fit the size.
    """
    layout = encoding_layout(msg.encoding)
    if layout is None:
        return np.asarray(_cv_bridge(msg.encoding).imgmsg_to_cv2(msg, desired_encoding="passthrough"))
    dtype, channels = layout
    row_bytes = msg.width * channels * dtype.itemsize
    if msg.step < row_bytes:
        raise ValueError(f"image step {msg.step} is smaller than one row of {msg.width} {msg.encoding} pixels")
    expected = msg.step * msg.height
    if len(msg.data) != expected:
        raise ValueError(f"image data has {len(msg.data)} bytes, but step × height = {expected}")
    rows = np.frombuffer(msg.data, dtype=np.uint8).reshape(msg.height, msg.step)[:, :row_bytes]
    if msg.is_bigendian and dtype.itemsize > 1:
        dtype = dtype.newbyteorder(">")
    if dtype.itemsize > 1:
        rows = np.ascontiguousarray(rows).view(dtype).astype(dtype.newbyteorder("="), copy=False)
    if channels == 1:
        return rows
    return rows.reshape(msg.height, msg.width, channels)


def image_to_rgb(msg: Image) -> np.ndarray:
    """Image → (height, width, 3) uint8 RGB, for colour and grey encodings.

    Raises:
        UserError: The encoding is no picture (depth), or needs a cv_bridge that is not installed.
        ValueError: The message is inconsistent.
    """
    encoding = msg.encoding
    if encoding_layout(encoding) is None:
        return np.asarray(_cv_bridge(encoding).imgmsg_to_cv2(msg, desired_encoding="rgb8"))
    pixels = image_to_numpy(msg)
    if encoding in ("rgb8", "8UC3"):  # 8UC3 carries no order; ROS drivers that use it publish RGB
        return pixels
    if encoding == "bgr8":
        return np.ascontiguousarray(pixels[..., ::-1])
    if encoding in ("rgba8", "8UC4"):
        return np.ascontiguousarray(pixels[..., :3])
    if encoding == "bgra8":
        return np.ascontiguousarray(pixels[..., 2::-1])
    if encoding in ("mono8", "8UC1"):
        return np.repeat(pixels[..., None], 3, axis=2)
    if encoding == "mono16":
        return np.repeat((pixels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    raise UserError(f"camera encoding '{encoding}' is not a colour or grey picture; point the camera's topic at one")


def numpy_to_image(pixels: np.ndarray, encoding: str, stamp: TimeMsg | None = None, frame_id: str = "") -> Image:
    """(height, width[, channels]) array → Image of ``encoding``, little-endian, without row padding.

    Raises:
        ValueError: dtype or channel count do not match the encoding.
    """
    layout = encoding_layout(encoding)
    if layout is None:
        raise ValueError(f"encoding '{encoding}' cannot be published; use rgb8, mono8, 16UC1, 32FC1, …")
    dtype, channels = layout
    shape_channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype.newbyteorder("<") != dtype or shape_channels != channels:
        raise ValueError(f"{pixels.dtype} array of shape {pixels.shape} is no '{encoding}' image")
    msg = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, is_bigendian=0)
    msg.step = pixels.shape[1] * channels * dtype.itemsize
    if stamp is not None:
        msg.header.stamp = stamp
    msg.header.frame_id = frame_id
    payload = array.array("B")
    payload.frombytes(np.ascontiguousarray(pixels, dtype=dtype).data.cast("B"))
    msg.data = payload
    return msg


def compressed_to_rgb(msg: CompressedImage) -> np.ndarray:
    """CompressedImage (JPEG, PNG) → (height, width, 3) uint8 RGB.

    Raises:
        ValueError: The bytes are no picture OpenCV can decode.
    """
    if len(msg.data) == 0:
        raise ValueError("compressed image is empty")
    decoded = cv2.imdecode(np.frombuffer(msg.data, dtype=np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError(f"compressed image (format '{msg.format}', {len(msg.data)} bytes) cannot be decoded")
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def rgb_to_compressed(
    pixels: np.ndarray, stamp: TimeMsg | None = None, frame_id: str = "", quality: int = 90
) -> CompressedImage:
    """(height, width, 3) uint8 RGB → JPEG CompressedImage."""
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"cannot encode an array of shape {pixels.shape} as JPEG")
    msg = CompressedImage(format="rgb8; jpeg compressed bgr8")
    if stamp is not None:
        msg.header.stamp = stamp
    msg.header.frame_id = frame_id
    payload = array.array("B")
    payload.frombytes(encoded.data.cast("B"))
    msg.data = payload
    return msg


def _cv_bridge(encoding: str) -> Any:
    try:
        from cv_bridge import CvBridge
    except ImportError as error:
        raise UserError(
            f"image encoding '{encoding}' needs cv_bridge (ROS package ros-$ROS_DISTRO-cv-bridge), which is not "
            "installed; install it or let the driver publish rgb8"
        ) from error
    return CvBridge()


def groups_by_topic(groups: Iterable[StateGroup]) -> dict[str, tuple[StateGroup, ...]]:
    """State topic → its groups. Two arms may use the same joint names, so a message only speaks for its own topic."""
    topics: dict[str, tuple[StateGroup, ...]] = {}
    for group in groups:
        topics[group.topic] = (*topics.get(group.topic, ()), group)
    return topics


def state_message_type(groups: Iterable[StateGroup]) -> type:
    """ROS type of the state topic that ``groups`` share."""
    types = {"joint_state": JointState, "odometry": Odometry, "pose": PoseStamped}
    return types[next(iter(groups)).source]


def state_from_joint_state(groups: Iterable[StateGroup], msg: JointState) -> dict[str, float]:
    """JointState → {channel: value} in channel units, for the groups whose joints the message names.

    A message that carries only some of a topic's groups (arm and gripper published apart) updates only those.
    """
    index = {name: i for i, name in enumerate(msg.name)}
    values: dict[str, float] = {}
    for group in groups:
        if group.source != "joint_state" or not all(field in index for field in group.fields):
            continue
        for channel, field in zip(group.channels, group.fields, strict=True):
            position = index[field]
            if position < len(msg.position):
                values[channel] = float(group.map.to_channel(msg.position[position]))
    return values


def state_from_odometry(groups: Iterable[StateGroup], msg: Odometry) -> dict[str, float]:
    """Odometry → {channel: value}; fields x, y, z [m], yaw [rad], vx, vy [m/s], wz [rad/s]."""
    pose, twist = msg.pose.pose, msg.twist.twist
    q = pose.orientation
    fields = {
        "x": pose.position.x,
        "y": pose.position.y,
        "z": pose.position.z,
        "yaw": math.atan2(2.0 * (q.w * q.z + q.x * q.y), 1.0 - 2.0 * (q.y * q.y + q.z * q.z)),
        "vx": twist.linear.x,
        "vy": twist.linear.y,
        "wz": twist.angular.z,
    }
    return _channels(groups, "odometry", fields)


def state_from_pose(groups: Iterable[StateGroup], msg: PoseStamped) -> dict[str, float]:
    """PoseStamped → {channel: value}; fields x, y, z [m], qx, qy, qz, qw."""
    position, q = msg.pose.position, msg.pose.orientation
    fields = dict(zip(POSE_FIELDS, (position.x, position.y, position.z, q.x, q.y, q.z, q.w), strict=True))
    return _channels(groups, "pose", fields)


def _channels(groups: Iterable[StateGroup], source: str, fields: Mapping[str, float]) -> dict[str, float]:
    """{channel: value} in channel units of the groups that read ``source``, from its message's fields."""
    return {
        channel: float(group.map.to_channel(fields[field]))
        for group in groups
        if group.source == source
        for channel, field in zip(group.channels, group.fields, strict=True)
    }


def _message_fields(groups: Iterable[StateGroup], values: Mapping[str, float]) -> dict[str, float]:
    """{field: value} in message units; the inverse of ``_channels``."""
    return {
        field: float(group.map.to_message(values[channel]))
        for group in groups
        for channel, field in zip(group.channels, group.fields, strict=True)
    }


def state_from_message(groups: Iterable[StateGroup], msg: StateMessage) -> dict[str, float]:
    """State message of any source → {channel: value} in channel units."""
    if isinstance(msg, PoseStamped):
        return state_from_pose(groups, msg)
    return state_from_odometry(groups, msg) if isinstance(msg, Odometry) else state_from_joint_state(groups, msg)


def state_to_joint_state(groups: Iterable[StateGroup], values: Mapping[str, float], stamp: TimeMsg) -> JointState:
    """{channel: value} → JointState in message units: what a simulator publishes in a driver's place."""
    msg = JointState()
    msg.header.stamp = stamp
    for group in groups:
        for channel, field in zip(group.channels, group.fields, strict=True):
            msg.name.append(field)
            msg.position.append(float(group.map.to_message(values[channel])))
    return msg


def state_to_odometry(groups: Iterable[StateGroup], values: Mapping[str, float], stamp: TimeMsg) -> Odometry:
    """{channel: value} → Odometry in message units; the inverse of ``state_from_odometry``."""
    fields = _message_fields(groups, values)
    msg = Odometry()
    msg.header.stamp = stamp
    msg.header.frame_id, msg.child_frame_id = "odom", "base_link"  # REP-105
    position, orientation, twist = msg.pose.pose.position, msg.pose.pose.orientation, msg.twist.twist
    position.x, position.y, position.z = fields.get("x", 0.0), fields.get("y", 0.0), fields.get("z", 0.0)
    orientation.z, orientation.w = math.sin(fields.get("yaw", 0.0) / 2), math.cos(fields.get("yaw", 0.0) / 2)
    twist.linear.x, twist.linear.y = fields.get("vx", 0.0), fields.get("vy", 0.0)
    twist.angular.z = fields.get("wz", 0.0)
    return msg


def state_to_pose(groups: Iterable[StateGroup], values: Mapping[str, float], stamp: TimeMsg) -> PoseStamped:
    """{channel: value} → PoseStamped in message units; the inverse of ``state_from_pose``."""
    fields = _message_fields(groups, values)
    msg = PoseStamped()
    msg.header.stamp = stamp
    position, q = msg.pose.position, msg.pose.orientation
    position.x, position.y, position.z = (fields.get(name, 0.0) for name in ("x", "y", "z"))
    q.x, q.y, q.z = (fields.get(name, 0.0) for name in ("qx", "qy", "qz"))
    q.w = fields.get("qw", 1.0)
    return msg


def state_to_message(groups: Iterable[StateGroup], values: Mapping[str, float], stamp: TimeMsg) -> StateMessage:
    """State of one topic's groups → the message its driver would publish."""
    groups = list(groups)
    convert = {"joint_state": state_to_joint_state, "odometry": state_to_odometry, "pose": state_to_pose}
    return convert[groups[0].source](groups, values, stamp)


def scan_from_message(msg: LaserScan) -> Scan:
    """LaserScan → Scan, unchecked: judging it is the obstacle stop's job."""
    return Scan(
        angle_min=msg.angle_min,
        angle_increment=msg.angle_increment,
        range_min=msg.range_min,
        range_max=msg.range_max,
        ranges=np.array(msg.ranges, dtype=np.float64),
        stamp_ns=stamp_to_ns(msg.header.stamp),
    )


def scan_to_message(scan: Scan, frame_id: str) -> LaserScan:
    """Scan → LaserScan; what a simulator publishes in a scanner's place."""
    msg = LaserScan(
        angle_min=float(scan.angle_min),
        angle_max=float(scan.angle_min + scan.angle_increment * (len(scan.ranges) - 1)),
        angle_increment=float(scan.angle_increment),
        range_min=float(scan.range_min),
        range_max=float(scan.range_max),
        ranges=array.array("f", np.asarray(scan.ranges, dtype=np.float32).tobytes()),
    )
    msg.header.stamp, msg.header.frame_id = ns_to_stamp(scan.stamp_ns), frame_id
    return msg


def _trajectory(rows_tc: np.ndarray, channels: tuple[str, ...], stamp_ns: int, first: int, period_s: float) -> Any:
    """JointTrajectory of rows due at ``stamp + (first + index) · period``, with velocities for a spline."""
    msg = JointTrajectory()
    msg.header.stamp = ns_to_stamp(stamp_ns)
    msg.joint_names = list(channels)
    rows_tc = np.ascontiguousarray(rows_tc, dtype=np.float64)
    for index, (row, rate) in enumerate(zip(rows_tc, spline_velocities(rows_tc, period_s), strict=True)):
        point = JointTrajectoryPoint(
            positions=array.array("d", row.tobytes()), velocities=array.array("d", rate.tobytes())
        )
        seconds, nanoseconds = divmod(round((first + index) * period_s * 1e9), 1_000_000_000)
        point.time_from_start = DurationMsg(sec=seconds, nanosec=nanoseconds)
        msg.points.append(point)
    return msg


def _rows(msg: JointTrajectory, what: str) -> np.ndarray:
    """(T, c) positions."""
    if not msg.points or not msg.joint_names:
        raise ValueError(f"{what} without points or joint_names")
    width = len(msg.joint_names)
    if any(len(point.positions) != width for point in msg.points):
        raise ValueError(f"{what} rows do not have {width} positions each, as joint_names says")
    return np.array([point.positions for point in msg.points], dtype=np.float64)


def chunk_to_message(chunk: ActionChunk) -> JointTrajectory:
    """ActionChunk → JointTrajectory: joint_names are channels, header.stamp is the observation's stamp.

    Point i is due at ``stamp + (i + 1) · period``; positions are in channel units, before the command maps, velocities
    those of a spline through them, which ends at rest.
    """
    return _trajectory(np.asarray(chunk.actions_hc), chunk.channels, chunk.stamp_ns, 1, chunk.period_s)


def chunk_from_message(msg: JointTrajectory) -> ActionChunk:
    """JointTrajectory → ActionChunk. Values pass unchecked (NaN included): judging them is the controller's job.

    Raises:
        ValueError: No points, rows that do not fit joint_names, or unevenly spaced points.
    """
    actions_hc = _rows(msg, "chunk")
    due_ns = [p.time_from_start.sec * 1_000_000_000 + p.time_from_start.nanosec for p in msg.points]
    period_ns = due_ns[0]
    if period_ns <= 0 or any(abs(due - (i + 1) * period_ns) > 1_000_000 for i, due in enumerate(due_ns)):
        raise ValueError("chunk points are not evenly spaced from one period after the stamp")
    return ActionChunk(
        actions_hc=actions_hc,
        channels=tuple(msg.joint_names),
        stamp_ns=stamp_to_ns(msg.header.stamp),
        period_s=due_ns[-1] / len(due_ns) * 1e-9,
    )


def plan_to_message(rest: PlanRest, channels: tuple[str, ...], period_s: float) -> JointTrajectory:
    """What is left of a plan → JointTrajectory: point 0 is now (header.stamp), point i is i periods later."""
    return _trajectory(rest.rows_tc, channels, rest.t_ns, 0, period_s)


def plan_from_message(msg: JointTrajectory, channels: tuple[str, ...]) -> PlanRest:
    """JointTrajectory → what is left of a plan, its columns in the order of ``channels``.

    Raises:
        ValueError: No points, or other channels.
    """
    rows_tc = _rows(msg, "plan")
    if sorted(msg.joint_names) != sorted(channels):
        raise ValueError(f"plan of {', '.join(msg.joint_names)}, expected {', '.join(channels)}")
    order = [msg.joint_names.index(name) for name in channels]
    return PlanRest(stamp_to_ns(msg.header.stamp), rows_tc[:, order])
