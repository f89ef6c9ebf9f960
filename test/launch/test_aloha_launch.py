"""``aloha.launch.py`` under ``launch_testing``: it starts the four nodes, joints are published, all end cleanly.

Runs where ROS 2's launch is installed (apt, RoboStack, a source build); the wheels from PyPI have none.
"""

from __future__ import annotations

import os
import time
import unittest
from pathlib import Path

import pytest

# `launch` alone would also find this repository's folder of that name.
pytest.importorskip("launch.actions", reason="ROS 2's launch is not installed: the launch files cannot run here")
pytest.importorskip("launch_testing", reason="launch_testing is not installed")
pytest.importorskip("launch_ros.actions", reason="launch_ros is not installed")

import launch_testing.actions
import launch_testing.asserts
import rclpy
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from sensor_msgs.msg import JointState

LAUNCH_FILE = Path(__file__).parents[2] / "launch" / "aloha.launch.py"
NODES = {"controller_node", "recorder_node", "policy_node", "sim_node"}
TIMEOUT_S = 90.0


@pytest.mark.launch_test
def generate_test_description() -> LaunchDescription:
    """The launch file as users start it, recording below a temporary folder."""
    arguments = {"sim": "true", "rollouts": os.environ.get("PYTEST_ROLLOUTS", "/tmp/qwen_vla_launch_test")}
    source = PythonLaunchDescriptionSource(str(LAUNCH_FILE))
    graph = IncludeLaunchDescription(source, launch_arguments=arguments.items())
    return LaunchDescription([graph, launch_testing.actions.ReadyToTest()])


class TestRunning(unittest.TestCase):
    """While the graph runs."""

    def setUp(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("launch_watcher", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def tearDown(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def test_all_nodes_appear_and_joint_states_arrive(self) -> None:
        seen: list[JointState] = []
        self.node.create_subscription(JointState, "/follower_left/joint_states", seen.append, 10)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and not (seen and set(self.node.get_node_names()) >= NODES):
            self.executor.spin_once(timeout_sec=0.1)
        self.assertTrue(seen)
        self.assertGreaterEqual(set(self.node.get_node_names()), NODES)


@launch_testing.post_shutdown_test()
class TestEnded(unittest.TestCase):
    """After Ctrl-C."""

    def test_every_node_exits_cleanly(self, proc_info) -> None:  # type: ignore[no-untyped-def]
        launch_testing.asserts.assertExitCodes(proc_info)
