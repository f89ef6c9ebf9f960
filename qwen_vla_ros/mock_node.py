"""Any robot, without hardware or simulator: the topics of its YAML with a kinematic mock behind them.

Commands are decoded by the same adapters that encode them, state is published with the types that drivers publish, and
cameras show a moving test pattern of the configured size. Stamps come from the node's clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor, ParameterType
from rclpy.node import Node
from sensor_msgs.msg import LaserScan
from std_srvs.srv import Trigger

from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.spec import ActionGroup, CameraSpec, Embodiment
from qwen_vla_core.runtime.mock_robot import MockRobot, moving_pattern, pattern_background
from qwen_vla_core.runtime.mock_scanner import DEFAULT_ROOM, scan_of_boxes
from qwen_vla_ros.commands import adapter_for, command_kind
from qwen_vla_ros.messages import (
    groups_by_topic,
    image_message_type,
    numpy_to_image,
    rgb_to_compressed,
    scan_to_message,
    state_message_type,
    state_to_message,
)
from qwen_vla_ros.node_utils import (
    CAMERA_QOS,
    COMMAND_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
    declare,
    declare_robot,
    heartbeat,
    load_robot,
    ns_to_stamp,
    run_node,
    status_message,
)

MAX_STEP_S = 0.1  # after a longer pause (or a jump of the clock) the mock moves on by this much, not by a leap
DEFAULT_CAMERA_HZ, SCAN_HZ = 15.0, 20.0


class MockNode(Node):
    """See the module's text. Everything runs on the executor: nothing here takes longer than a few milliseconds."""

    def __init__(self) -> None:
        super().__init__("mock_node")
        name = declare_robot(self, "aloha")
        text = (
            "Listen to each command's simulation_kind, where set: the robot's own message packages are then not needed"
        )
        self._simulated: bool = declare(self, "simulated", True, text, read_only=True)
        state_hz = declare(
            self, "state_rate_hz", 50.0, "Rate of the state topics", read_only=True, minimum=1.0, maximum=1000.0
        )
        text = "Rate of the cameras; 0: that of the YAML's simulation section, or 15"
        camera_hz = declare(self, "camera_rate_hz", 0.0, text, read_only=True, minimum=0.0, maximum=120.0)
        self.embodiment: Embodiment = load_robot(self, name)
        self.robot = MockRobot(self.embodiment, self._simulated)
        text = (
            "Obstacles around a robot with a laser scanner: x0, y0, x1, y1 of each box, metres in the odometry's frame"
        )
        descriptor = ParameterDescriptor(description=text, type=ParameterType.PARAMETER_DOUBLE_ARRAY)
        self.declare_parameter("obstacles", list(DEFAULT_ROOM), descriptor)
        self._bad_commands = 0
        self._pictures = 0
        self._last_ns = self._now_ns()
        self._subscribe()
        self._state_topics = groups_by_topic(self.embodiment.state)
        self._state_publishers = {
            topic: self.create_publisher(state_message_type(groups), topic, COMMAND_QOS)
            for topic, groups in self._state_topics.items()
        }
        self._camera_publishers = {
            camera.view: self.create_publisher(image_message_type(camera), camera.topic, CAMERA_QOS)
            for camera in self.embodiment.cameras
        }
        self._backgrounds = {size: pattern_background(*size) for size in {c.size for c in self.embodiment.cameras}}
        stop = self.embodiment.safety.obstacle_stop
        if stop is not None:
            self._scan_publisher = self.create_publisher(LaserScan, stop.topic, CAMERA_QOS)
            self.create_timer(1.0 / SCAN_HZ, partial(self._publish_scan, stop.mount))
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        self.create_service(Trigger, "qwen_vla/mock_reset", self._reset)
        simulation = self.embodiment.simulation
        camera_hz = camera_hz or (simulation.camera_rate_hz if simulation else DEFAULT_CAMERA_HZ)
        self.create_timer(1.0 / state_hz, self._publish_state)
        self.create_timer(1.0 / camera_hz, self._publish_pictures)
        heartbeat(self, 1.0, self._publish_status)
        self.get_logger().info(
            f"{self.embodiment.name}: kinematic mock, state {state_hz:g} Hz, cameras {camera_hz:g} Hz"
        )

    def _subscribe(self) -> None:
        for group in commanded_robot(self.embodiment).actions:
            adapter = adapter_for(command_kind(group, self._simulated))
            callback = partial(self._on_command, group, adapter.decode)
            self.create_subscription(adapter.message_type, group.command.topic, callback, COMMAND_QOS)

    def _on_command(self, group: ActionGroup, decode: Callable[[ActionGroup, Any], np.ndarray], msg: Any) -> None:
        try:
            self.robot.command(group.name, group.command.map.to_channel(decode(group, msg)))
        except ValueError as error:
            self._bad_commands += 1
            self.get_logger().warning(f"command ignored: {error}", throttle_duration_sec=5.0)

    def _publish_state(self) -> None:
        now_ns = self._now_ns()
        self.robot.step(min((now_ns - self._last_ns) * 1e-9, MAX_STEP_S))
        self._last_ns = now_ns
        stamp = ns_to_stamp(now_ns)
        for topic, groups in self._state_topics.items():
            self._state_publishers[topic].publish(state_to_message(groups, self.robot.values, stamp))

    def _publish_scan(self, mount: tuple[float, float, float]) -> None:
        corners = list(self.get_parameter("obstacles").value)
        boxes = np.array(corners[: len(corners) // 4 * 4]).reshape(-1, 4)
        scan = scan_of_boxes(boxes, self.robot.base_pose, mount, self._now_ns())
        self._scan_publisher.publish(scan_to_message(scan, "laser"))

    def _publish_pictures(self) -> None:
        stamp_ns = self._now_ns()
        for index, camera in enumerate(self.embodiment.cameras):
            # A view lags the one before it, so that no two look the same.
            pixels = moving_pattern(self._backgrounds[camera.size], stamp_ns * 1e-9 - 0.3 * index)
            self._publish_picture(camera, pixels, stamp_ns)
        self._pictures += 1

    def _publish_picture(self, camera: CameraSpec, pixels: np.ndarray, stamp_ns: int) -> None:
        stamp, frame = ns_to_stamp(stamp_ns), f"{camera.view}_optical_frame"
        if camera.transport == "compressed":
            self._camera_publishers[camera.view].publish(rgb_to_compressed(pixels, stamp, frame))
        else:
            self._camera_publishers[camera.view].publish(numpy_to_image(pixels, "rgb8", stamp, frame))

    def _reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Puts the mock back where it began."""
        self.robot = MockRobot(self.embodiment, self._simulated)
        response.success, response.message = True, "the mock is at its start pose"
        return response

    def _publish_status(self) -> None:
        values: dict[str, object] = {
            "state": "running",
            "pictures": self._pictures,
            "bad_commands": self._bad_commands,
            **{f"commands.{name}": count for name, count in self.robot.commands.items()},
        }
        level = "warn" if self._bad_commands else "ok"
        self._status_publisher.publish(status_message(self, "mock", level, "running", values))

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    return run_node(MockNode, argv)


if __name__ == "__main__":
    sys.exit(main())
