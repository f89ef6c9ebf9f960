"""Images, states and chunks survive the way into ROS messages and back, and broken messages are refused."""

from __future__ import annotations

import array
import importlib.util
import math

import numpy as np
import pytest
from builtin_interfaces.msg import Duration as DurationMsg
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.embodiment.spec import LinearMap, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_core.runtime.splines import spline_velocities
from qwen_vla_ros.messages import (
    chunk_from_message,
    chunk_to_message,
    compressed_to_rgb,
    encoding_layout,
    groups_by_topic,
    image_to_numpy,
    image_to_rgb,
    numpy_to_image,
    plan_from_message,
    plan_to_message,
    rgb_to_compressed,
    state_from_message,
    state_message_type,
    state_to_message,
)

ENCODINGS = [
    *("rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16", "rgb16", "bgr16"),
    *("8UC1", "8UC2", "8UC3", "8UC4", "16UC1", "16SC1", "32SC2", "32FC1", "32FC3", "64FC1"),
]
HAVE_CV_BRIDGE = importlib.util.find_spec("cv_bridge") is not None


def picture(encoding: str, height: int = 5, width: int = 7) -> np.ndarray:
    layout = encoding_layout(encoding)
    assert layout is not None
    dtype, channels = layout
    rng = np.random.default_rng(len(encoding))
    shape = (height, width) if channels == 1 else (height, width, channels)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 120, size=shape).astype(dtype)


def padded(msg: Image, padding: int) -> Image:
    """The same picture with ``padding`` bytes of rubbish behind every row."""
    rows = np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.step)
    wide = np.full((msg.height, msg.step + padding), 255, np.uint8)
    wide[:, : msg.step] = rows
    msg.step += padding
    msg.data = array.array("B", wide.tobytes())
    return msg


def big_endian(msg: Image, pixels: np.ndarray) -> Image:
    msg.is_bigendian = 1
    msg.data = array.array("B", pixels.astype(pixels.dtype.newbyteorder(">")).tobytes())
    return msg


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("padding", [0, 3])
def test_every_encoding_survives_with_and_without_row_padding(encoding: str, padding: int) -> None:
    pixels = picture(encoding)
    msg = numpy_to_image(pixels, encoding, Time(sec=3, nanosec=4), "camera")
    assert (msg.header.stamp.sec, msg.header.frame_id, msg.encoding) == (3, "camera", encoding)
    np.testing.assert_array_equal(image_to_numpy(padded(msg, padding) if padding else msg), pixels)


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if encoding_layout(e)[0].itemsize > 1])  # type: ignore[index]
def test_big_endian_pixels_are_read_as_what_they_mean(encoding: str) -> None:
    pixels = picture(encoding)
    np.testing.assert_array_equal(image_to_numpy(big_endian(numpy_to_image(pixels, encoding), pixels)), pixels)


@pytest.mark.skipif(not HAVE_CV_BRIDGE, reason="cv_bridge is not installed")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("padding", [0, 4])
def test_the_fast_path_equals_cv_bridge(encoding: str, padding: int) -> None:
    from cv_bridge import CvBridge

    msg = numpy_to_image(picture(encoding), encoding)
    msg = padded(msg, padding) if padding else msg
    np.testing.assert_array_equal(image_to_numpy(msg), CvBridge().imgmsg_to_cv2(msg))


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "8UC3", "8UC4"])
def test_colour_encodings_all_give_the_same_rgb(encoding: str) -> None:
    rgb = picture("rgb8")
    pixels = rgb[..., ::-1] if encoding.startswith("bgr") else rgb
    if encoding_layout(encoding)[1] == 4:  # type: ignore[index]
        pixels = np.dstack([pixels, np.full(rgb.shape[:2], 9, np.uint8)])
    seen = image_to_rgb(numpy_to_image(np.ascontiguousarray(pixels), encoding))
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, rgb)


def test_grey_pictures_become_grey_rgb() -> None:
    grey = picture("mono8")
    np.testing.assert_array_equal(image_to_rgb(numpy_to_image(grey, "mono8")), np.dstack([grey] * 3))
    deep = grey.astype(np.uint16) << 8
    np.testing.assert_array_equal(image_to_rgb(numpy_to_image(deep, "mono16")), np.dstack([grey] * 3))


def test_broken_images_are_refused_with_the_reason() -> None:
    msg = numpy_to_image(picture("rgb8"), "rgb8")
    msg.data = msg.data[:-1]
    with pytest.raises(ValueError, match="104 bytes, but step × height = 105"):
        image_to_numpy(msg)
    msg.step = 3
    with pytest.raises(ValueError, match="step 3 is smaller"):
        image_to_numpy(msg)
    with pytest.raises(ValueError, match="no 'rgb8' image"):
        numpy_to_image(picture("mono8"), "rgb8")
    with pytest.raises(UserError, match="'32FC1' is not a colour"):
        image_to_rgb(numpy_to_image(picture("32FC1"), "32FC1"))


@pytest.mark.skipif(HAVE_CV_BRIDGE, reason="cv_bridge is installed")
def test_an_encoding_that_needs_cv_bridge_says_so() -> None:
    with pytest.raises(UserError, match=r"bayer_rggb8.*cv-bridge"):
        image_to_rgb(Image(encoding="bayer_rggb8", width=2, height=2, step=2, data=array.array("B", [0] * 4)))


def test_compressed_pictures_come_back_close_and_rubbish_is_refused() -> None:
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:, :32, 0], rgb[:, 32:, 2] = 200, 100
    seen = compressed_to_rgb(rgb_to_compressed(rgb, quality=95))
    assert np.abs(seen.astype(int) - rgb).mean() < 4
    for data in (b"", b"no picture"):
        with pytest.raises(ValueError, match="compressed image"):
            compressed_to_rgb(CompressedImage(format="jpeg", data=array.array("B", data)))


def test_state_of_both_arms_with_equal_joint_names_survives() -> None:
    robot = load_embodiment("aloha")
    values = {channel: 0.01 * i for i, channel in enumerate(robot.state_channels)}
    seen: dict[str, float] = {}
    for groups in groups_by_topic(robot.state).values():
        msg = state_to_message(groups, values, Time(sec=1))
        assert msg.position[msg.name.index("left_finger")] > 0.04  # metres, not the fraction
        seen.update(state_from_message(groups, msg))
    assert seen == pytest.approx(values)


def test_a_message_with_part_of_the_joints_updates_only_complete_groups() -> None:
    groups = next(iter(groups_by_topic(load_embodiment("aloha").state).values()))
    msg = JointState(name=["left_finger", "waist"], position=[0.0579, 1.0])
    assert state_from_message(groups, msg) == pytest.approx({"left_gripper": 1.0})
    assert state_from_message(groups, JointState(name=["left_finger"])) == {}


def test_odometry_survives_with_its_map() -> None:
    group = StateGroup(
        name="base",
        kind="base_twist",
        channels=("x", "heading", "speed", "turn"),
        unit="m",
        topic="odom",
        fields=("x", "yaw", "vx", "wz"),
        source="odometry",
        map=LinearMap(scale=2.0, offset=0.25),
    )
    values = {"x": 0.5, "heading": -0.75, "speed": 0.2, "turn": -1.0}
    msg = state_to_message([group], values, Time())
    assert msg.pose.pose.position.x == pytest.approx(1.25)
    assert 2 * math.atan2(msg.pose.pose.orientation.z, msg.pose.pose.orientation.w) == pytest.approx(-1.25)
    assert state_from_message([group], msg) == pytest.approx(values)


def test_a_pose_survives_with_its_map() -> None:
    group = StateGroup(
        name="hand",
        kind="eef_pose",
        channels=("height", "turn", "real"),
        unit="m",
        topic="ee_pose",
        fields=("z", "qx", "qw"),
        source="pose",
        map=LinearMap(scale=2.0),
    )
    values = {"height": 0.25, "turn": 0.1, "real": 0.4}
    msg = state_to_message([group], values, Time(sec=3))
    assert isinstance(msg, state_message_type([group])) and msg.header.stamp.sec == 3
    assert (msg.pose.position.z, msg.pose.orientation.x, msg.pose.orientation.w) == pytest.approx((0.5, 0.2, 0.8))
    assert state_from_message([group], msg) == pytest.approx(values)


def test_a_chunk_survives_with_stamp_names_and_times() -> None:
    chunk = ActionChunk(np.random.default_rng(0).normal(size=(16, 3)), ("a", "b", "c"), 1_700_000_000_123_456_789, 0.1)
    msg = chunk_to_message(chunk)
    assert msg.points[0].time_from_start.nanosec == 100_000_000
    assert (msg.points[15].time_from_start.sec, msg.points[15].time_from_start.nanosec) == (1, 600_000_000)
    back = chunk_from_message(msg)
    np.testing.assert_array_equal(back.actions_hc, chunk.actions_hc)
    assert (back.channels, back.stamp_ns) == (chunk.channels, chunk.stamp_ns)
    assert back.period_s == pytest.approx(0.1)
    rates = spline_velocities(chunk.actions_hc, 0.1)
    np.testing.assert_array_equal([point.velocities for point in msg.points], rates)
    assert np.any(rates[0]) and not np.any(rates[-1])


def test_the_rest_of_a_plan_survives_and_comes_back_in_the_order_that_is_asked_for() -> None:
    rest = PlanRest(1_700_000_000_123_456_789, np.arange(12.0).reshape(4, 3))
    msg = plan_to_message(rest, ("a", "b", "c"), 0.2)
    assert msg.points[0].time_from_start == DurationMsg() and msg.points[3].time_from_start.nanosec == 600_000_000
    back = plan_from_message(msg, ("c", "a", "b"))
    assert back.t_ns == rest.t_ns
    np.testing.assert_array_equal(back.rows_tc, rest.rows_tc[:, [2, 0, 1]])
    for names in (("a", "b"), ("a", "b", "d")):
        with pytest.raises(ValueError, match="expected"):
            plan_from_message(msg, names)
    with pytest.raises(ValueError, match="without points"):
        plan_from_message(JointTrajectory(), ("a",))


def test_a_chunk_keeps_nan_for_the_controller_to_judge_but_not_a_broken_shape() -> None:
    actions = np.zeros((4, 2))
    actions[1, 1] = np.nan
    msg = chunk_to_message(ActionChunk(actions, ("a", "b"), 0, 0.1))
    assert np.isnan(chunk_from_message(msg).actions_hc[1, 1])
    msg.points[2].positions = array.array("d", [0.0])
    with pytest.raises(ValueError, match="2 positions each"):
        chunk_from_message(msg)
    del msg.points[2]
    with pytest.raises(ValueError, match="evenly spaced"):
        chunk_from_message(msg)
    del msg.points[:]
    with pytest.raises(ValueError, match="without points"):
        chunk_from_message(msg)
