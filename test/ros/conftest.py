"""ROS fixtures: a domain of its own for every test process, a watching node, an untrained checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 (rclpy) is not installed")
sys.path.insert(0, str(Path(__file__).parent))

from graph_support import checkpoint, demo, ros_domain, watcher  # noqa: F401


@pytest.fixture
def no_profile_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Fast DDS profile in the environment, whatever the user has set."""
    for variable in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        monkeypatch.delenv(variable, raising=False)
