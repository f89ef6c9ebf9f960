"""Every shipped robot without hardware or simulator: chunks reach the mock, it moves, its topics are a driver's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graph_support import Graph, Watcher
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import Embodiment, load_embodiment, parse_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.spec import DELTA_KINDS
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.mock_robot import MockRobot
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.messages import (
    chunk_to_message,
    compressed_to_rgb,
    groups_by_topic,
    image_message_type,
    image_to_rgb,
    state_from_message,
    state_message_type,
)
from qwen_vla_ros.node_utils import CAMERA_QOS, CHUNK_TOPIC, COMMAND_QOS, STATE_QOS
from qwen_vla_ros.observation import ObservationBuffer


def goal(robot: Embodiment) -> np.ndarray:
    """(c,) a small motion of every channel, away from where the mock begins."""
    values: list[float] = []
    for group in robot.actions:
        for i, (low, up) in enumerate(zip(group.limits.lower, group.limits.upper, strict=True)):
            start = group.start[i] if group.start else min(max(0.0, low), up)
            away = 0.3 * up if group.kind in DELTA_KINDS else min(0.2, 0.1 * (up - low))
            values.append(start + away if start + away <= up else start - away)
    return np.array(values)


def moved_channels(robot: Embodiment) -> set[str]:
    """State channels that the goal must move: those commanded by name, and the hand that is displaced."""
    named = set(robot.channels) & set(robot.state_channels)
    hand = {
        channel
        for state in robot.state
        for channel in state.channels
        if state.kind == "eef_pose" and any(group.kind == "eef_delta" for group in robot.actions)
    }
    return named | hand


@pytest.mark.parametrize("name", shipped_embodiments(runnable=True))
def test_a_shipped_robot_moves_on_its_mock(name: str, tmp_path: Path, watcher: Watcher) -> None:
    robot = load_embodiment(name)
    # One robot gets its pictures compressed, so that both transports are seen.
    if len(robot.cameras) == 1:
        path = tmp_path / f"{name}.yaml"
        path.write_text(robot.source_text.replace("{view: ego, ", "{view: ego, transport: compressed, "))
        robot = load_embodiment(path)
    seen = ObservationBuffer(robot, frozen_after_s=0.5)
    values: dict[str, list[float]] = {channel: [] for channel in robot.state_channels}
    sizes: dict[str, tuple[int, ...]] = {}

    def on_state(groups, msg) -> None:  # type: ignore[no-untyped-def]
        heard = state_from_message(groups, msg)
        for channel, value in heard.items():
            values[channel].append(value)
        seen.add_state(heard, msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec)

    def on_image(view: str, msg) -> None:  # type: ignore[no-untyped-def]
        pixels = image_to_rgb(msg) if isinstance(msg, Image) else compressed_to_rgb(msg)
        sizes[view] = pixels.shape
        seen.add_image(view, msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec, lambda: pixels)

    for topic, groups in groups_by_topic(robot.state).items():
        kind = state_message_type(groups)
        watcher.node.create_subscription(kind, topic, lambda msg, g=groups: on_state(g, msg), STATE_QOS)
    for camera in robot.cameras:
        kind = image_message_type(camera)
        watcher.node.create_subscription(kind, camera.topic, lambda msg, v=camera.view: on_image(v, msg), CAMERA_QOS)
    chunks = watcher.node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    actions_hc = np.tile(goal(robot), (robot.control.horizon, 1))

    def plan() -> None:
        stamp_ns = watcher.node.get_clock().now().nanoseconds
        chunks.publish(chunk_to_message(ActionChunk(actions_hc, robot.channels, stamp_ns, robot.period_s)))

    watcher.node.create_timer(0.1, plan)
    graph = Graph(build_graph(robot.source_path, mock=True, policy=False, record=False), tmp_path)
    try:
        moving, rest = moved_channels(robot), MockRobot(robot).values
        watcher.wait_for(
            lambda: all(values[c] and abs(values[c][-1] - rest[c]) > 0.01 for c in moving), 60, "its state to move"
        )
        now = lambda: watcher.node.get_clock().now().nanoseconds  # noqa: E731
        watcher.wait_for(lambda: not isinstance(seen.observe(now(), "go"), str), 30, "an observation a policy may use")
        status = watcher.wait_for(lambda: watcher.status.get("mock"), 10, "the mock's status")
        watcher.wait_for(
            lambda: all(int(watcher.status["mock"][f"commands.{g.name}"]) > 0 for g in robot.actions), 10, "commands"
        )
        assert status["bad_commands"] == "0"
        assert sizes == {camera.view: (camera.size[1], camera.size[0], 3) for camera in robot.cameras}
        assert graph.end("controller_node") == 0
        assert watcher.call(Trigger, "qwen_vla/mock_reset", Trigger.Request()).success
        assert graph.end("mock_node") == 0
    except BaseException:
        print(graph.log())
        raise
    finally:
        graph.close()


def test_the_mock_takes_the_place_of_the_simulator_for_robots_without_a_world(tmp_path: Path) -> None:
    names = [spec.name for spec in build_graph("widowx", mock=True)]
    assert names == ["controller_node", "recorder_node", "policy_node", "mock_node"]
    specs = {spec.name: spec for spec in build_graph("widowx", mock=True, instruction="go")}
    assert specs["policy_node"].parameters["instruction"] == "go"
    assert specs["controller_node"].parameters["simulated"] and specs["controller_node"].parameters["start_on_activate"]
    text = load_embodiment("widowx").source_text.split("\nsimulation:")[0] + "\n"
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert parse_embodiment(text).simulation is None
    assert "mock_node" in {spec.name for spec in build_graph(str(path), mock=True)}
    with pytest.raises(UserError, match="--mock"):
        build_graph(str(path))
    with pytest.raises(UserError, match="both stand in"):
        build_graph("widowx", sim=True, mock=True)
