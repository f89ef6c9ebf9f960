"""The way from ``eval run --ros`` to the part that needs ROS: found when asked for, never imported by the core."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Settings
from qwen_vla_core.evaluation.suites.protocol import Suite, Trial

GRAPH_MODULE = "qwen_vla_ros.suite_runner"


def open_graph(
    suite: Suite, settings: Settings, trials: Sequence[Trial], stored: Mapping[str, Any], rollouts: str = ""
) -> Any:
    """A ``Runner`` whose trials run in the ROS graph, to be entered as a context.

    Args:
        suite: whose.
        settings: of the run.
        trials: all of the run.
        stored: keys of those that need not be run.
        rollouts: folder for recordings; empty: nothing is recorded.

    Raises:
        UserError: there is no rclpy, or the suite is not one of our own worlds.
    """
    if importlib.util.find_spec("rclpy") is None:
        raise UserError(
            "--ros needs ROS 2 (rclpy): source /opt/ros/$ROS_DISTRO/setup.bash, "
            "or pip install 'qwen_vla_ros[ros-wheels]'"
        )
    if not hasattr(suite, "options_of"):
        raise UserError(f"--ros: suite {suite.name} runs in another simulator, which has no ROS graph of ours")
    return importlib.import_module(GRAPH_MODULE).GraphRunner(suite, settings, trials, stored, rollouts)
