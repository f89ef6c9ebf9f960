"""The way from the core to the part that needs ROS: found when asked for, never imported by the core."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from qwen_vla_core.errors import UserError

LIVE_MODULE = "qwen_vla_ros.live"  # `graph_topics(...)` and `check_live(...)`


def live_module(flag: str) -> Any:
    """The module that looks at a running graph.

    Raises:
        UserError: there is no rclpy; names ``flag``.
    """
    if importlib.util.find_spec("rclpy") is None:
        raise UserError(
            f"{flag} needs ROS 2 (rclpy): source /opt/ros/$ROS_DISTRO/setup.bash, "
            "or pip install 'qwen_vla_ros[ros-wheels]'"
        )
    return importlib.import_module(LIVE_MODULE)
