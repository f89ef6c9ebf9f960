"""The ROS fixtures of ``test/ros``, for the faults that need a running graph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 (rclpy) is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent / "ros"))

from graph_support import checkpoint, ros_domain, watcher  # noqa: F401
