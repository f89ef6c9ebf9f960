"""A mobile base with a laser scanner: controller and mock as real processes, and a bench between mock and controller.

The mock's scans and odometry reach the controller through the bench, which may spoil them. Commands carry the
controller's stamps, so that every change of the twist is judged by its own time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from geometry_msgs.msg import TwistStamped
from graph_support import Graph, Watcher
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import QoSProfile
from sensor_msgs.msg import LaserScan
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.mock_scanner import DEFAULT_ROOM
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.messages import chunk_to_message
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATE_QOS, stamp_to_ns

STOP_M, SLOW_M, SCAN_AGE_MS = 0.15, 0.8, 300
SIDE = 0.2  # of the footprint, on every side
SPEED = 0.6  # of the plan, m/s
TIMEOUT_S = 60.0
EVERY_QOS = QoSProfile(depth=1000)
OBSTACLE_STOP = f"""  obstacle_stop:
    topic: /scan
    footprint: {{front: {SIDE}, rear: {SIDE}, side: {SIDE}}}
    stop_distance: {STOP_M}
    slow_distance: {SLOW_M}
    max_age_ms: {SCAN_AGE_MS}
  #"""


def base_yaml(folder: Path) -> Path:
    """The shipped base, with stamped twists, a scanner, and pictures that cost nothing."""
    text = load_embodiment("mobile_base").source_text
    for old, new in (
        ("kind: twist  ", "kind: twist_stamped  "),
        ("  # obstacle_stop:", OBSTACLE_STOP),
        ("size: [640, 480]", "size: [64, 48]"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "base.yaml"
    path.write_text(text)
    return path


class BaseBench:
    """Runs controller and mock and drives straight on.

    Attributes:
        spoil_scan, spoil_odometry: what becomes of each message on its way; None: it is lost.
        ticks: (seconds, vx, wz) of every command since ``healthy``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = base_yaml(folder)
        self.robot: Embodiment = load_embodiment(self.path)
        self.watcher = Watcher()
        node = self.watcher.node
        self.ticks: list[tuple[float, float, float]] = []
        self.pose = np.zeros(3)
        self.statuses: list[tuple[float, str, str]] = []
        self.heal()
        self._scans = node.create_publisher(LaserScan, "/scan", COMMAND_QOS)
        self._odometry = node.create_publisher(Odometry, "/odom", COMMAND_QOS)
        self._chunks = node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
        node.create_subscription(LaserScan, "/scan_of_mock", self._on_scan, STATE_QOS)
        node.create_subscription(Odometry, "/odom_of_mock", self._on_odometry, STATE_QOS)
        node.create_subscription(TwistStamped, "/cmd_vel", self._on_command, EVERY_QOS)
        node.create_timer(0.25, self._publish_plan)
        specs = {spec.name: spec for spec in build_graph(str(self.path), mock=True, policy=False, record=False)}
        moved = (("/scan", "/scan_of_mock"), ("/odom", "/odom_of_mock"))
        mock = replace(specs["mock_node"], remappings=moved)
        self.graph = Graph([specs["controller_node"], mock], folder)

    def heal(self) -> None:
        self.spoil_scan: Callable[[LaserScan], LaserScan | None] = lambda msg: msg
        self.spoil_odometry: Callable[[Odometry], Odometry | None] = lambda msg: msg

    # --- between the mock and the controller -------------------------------------------------------------------------

    def _on_scan(self, msg: LaserScan) -> None:
        spoiled = self.spoil_scan(msg)
        if spoiled is not None:
            self._scans.publish(spoiled)

    def _on_odometry(self, msg: Odometry) -> None:
        pose = msg.pose.pose
        heading = 2.0 * math.atan2(pose.orientation.z, pose.orientation.w)
        self.pose = np.array([pose.position.x, pose.position.y, heading])
        spoiled = self.spoil_odometry(msg)
        if spoiled is not None:
            self._odometry.publish(spoiled)

    def _on_command(self, msg: TwistStamped) -> None:
        assert msg.header.frame_id == "base_link"
        self.ticks.append((stamp_to_ns(msg.header.stamp) * 1e-9, msg.twist.linear.x, msg.twist.angular.z))

    def _publish_plan(self) -> None:
        """Straight ahead from where it is."""
        x, y, heading = self.pose
        far = SPEED * self.robot.period_s * np.arange(1, self.robot.control.horizon + 1)
        rows = np.column_stack([x + far * np.cos(heading), y + far * np.sin(heading), np.full(len(far), heading)])
        stamp_ns = self.watcher.node.get_clock().now().nanoseconds
        self._chunks.publish(chunk_to_message(ActionChunk(rows, self.robot.channels, stamp_ns, self.robot.period_s)))

    # --- what a fault needs ------------------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], what: str) -> object:
        return self.watcher.wait_for(condition, TIMEOUT_S, what)

    @property
    def status(self) -> dict[str, str]:
        return self.watcher.status.get("controller", {})

    @property
    def speed(self) -> float:
        return self.ticks[-1][1] if self.ticks else 0.0

    def says(self, text: str) -> None:
        self.wait(lambda: text in self.status.get("reason", ""), text)

    def stands(self) -> None:
        """Waits until the last half second of commands was zero."""
        seen = len(self.ticks)
        self.wait(lambda: len(self.ticks) > seen + 10 and not np.any([t[1:] for t in self.ticks[-10:]]), "a stand")

    def place(self, *boxes: tuple[float, float, float, float]) -> None:
        """Puts obstacles (x0, y0, x1, y1, metres) beside the walls of the room."""
        values = [float(v) for v in (*DEFAULT_ROOM, *(v for box in boxes for v in box))]
        value = ParameterValue(type=ParameterType.PARAMETER_DOUBLE_ARRAY, double_array_value=values)
        request = SetParameters.Request(parameters=[Parameter(name="obstacles", value=value)])
        assert self.watcher.call(SetParameters, "mock_node/set_parameters", request).results[0].successful

    # --- the ledger's side -------------------------------------------------------------------------------------------

    def healthy(self) -> None:
        """Nothing in the way, everything heard, back at the start, and driving."""
        self.heal()
        self.place()
        assert self.watcher.call(Trigger, "qwen_vla/stop", Trigger.Request()).success
        self.wait(lambda: self.status.get("mode") == "idle", "the controller to let go")
        assert self.watcher.call(Trigger, "qwen_vla/mock_reset", Trigger.Request()).success
        self.wait(lambda: np.abs(self.pose).max() < 0.01, "the start")
        self.ticks.clear()
        assert self.watcher.call(Trigger, "qwen_vla/start", Trigger.Request()).success
        self.wait(lambda: self.speed > 0.8 * SPEED and self.status.get("mode") == "running", "motion")

    def unsafe(self) -> list[str]:
        """What was wrong with the twists since ``healthy``."""
        spec = self.robot.actions[0].command.tracker
        assert spec is not None
        found = []
        for (t0, v0, w0), (t1, v1, w1) in zip(self.ticks, self.ticks[1:], strict=False):
            if not (math.isfinite(v1) and -spec.max_reverse <= v1 <= spec.max_speed and abs(w1) <= spec.max_turn):
                found.append(f"twist {v1:g} m/s, {w1:g} rad/s")
            dt = t1 - t0
            if dt > 0 and (
                abs(v1 - v0) > spec.acceleration * dt + 1e-6 or abs(w1 - w0) > spec.turn_acceleration * dt + 1e-6
            ):
                found.append(f"{(v1 - v0) / dt:g} m/s², {(w1 - w0) / dt:g} rad/s²")
        return found

    def close(self) -> None:
        self.graph.close()
        self.watcher.close()


def now_s() -> float:
    return time.time()
