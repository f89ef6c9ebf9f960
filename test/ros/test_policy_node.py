"""The policy node by itself: which checkpoint may drive which YAML, its lifecycle, and what a new instruction does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rclpy
from rclpy.lifecycle import TransitionCallbackReturn
from std_msgs.msg import String

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_ros.policy_node import PolicyNode

ROBOT = load_embodiment("aloha")


@pytest.fixture
def make_node() -> Iterator[Callable[..., PolicyNode]]:
    """Creates a PolicyNode with parameters; closes it and ROS at the end."""
    nodes: list[PolicyNode] = []

    def make(**parameters: object) -> PolicyNode:
        arguments = ["--ros-args"]
        for key, value in parameters.items():
            arguments += ["-p", f"{key}:={value}"]
        rclpy.init(args=arguments)
        nodes.append(PolicyNode())
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
        node.destroy_node()
    rclpy.try_shutdown()


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """The shipped robot with one edit."""
    assert old in ROBOT.source_text
    path = tmp_path / "edited.yaml"
    path.write_text(ROBOT.source_text.replace(old, new))
    return path


def test_a_different_yaml_is_refused_naming_both_hashes(make_node: Callable, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(tmp_path, "watchdog_ms: 500", "watchdog_ms: 400")
    node = make_node(checkpoint=checkpoint, embodiment=path)
    with pytest.raises(UserError) as caught:
        node.start()
    for part in (ROBOT.hash[:12], load_embodiment(path).hash[:12], checkpoint.name, "accept_embodiment_change"):
        assert part in str(caught.value)


def test_edited_limits_can_be_accepted(make_node: Callable, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(tmp_path, "watchdog_ms: 500", "watchdog_ms: 400")
    node = make_node(checkpoint=checkpoint, embodiment=path, accept_embodiment_change="true")
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS


def test_another_horizon_cannot_be_accepted(make_node: Callable, checkpoint: Path, tmp_path: Path) -> None:
    path = edited(tmp_path, "horizon: 16", "horizon: 15")
    node = make_node(checkpoint=checkpoint, embodiment=path, accept_embodiment_change="true")
    with pytest.raises(UserError, match=r"control\.horizon differ"):
        node.start()


def test_without_a_yaml_the_checkpoints_own_robot_is_used_through_the_whole_lifecycle(
    make_node: Callable, checkpoint: Path
) -> None:
    node = make_node(checkpoint=checkpoint)
    for transition in ("configure", "activate", "deactivate", "activate", "deactivate", "cleanup", "configure"):
        assert getattr(node, f"trigger_{transition}")() == TransitionCallbackReturn.SUCCESS, transition
    assert node._buffer.embodiment.hash == ROBOT.hash


def test_a_chunk_computed_for_an_old_instruction_is_never_published(make_node: Callable, checkpoint: Path) -> None:
    node = make_node(checkpoint=checkpoint, instruction='"pick up the red cube"')
    started, go_on, asked, published = threading.Event(), threading.Event(), [], []

    def predict(observation: Observation) -> ActionChunk:
        asked.append(observation.instruction)
        started.set()
        assert go_on.wait(10)
        actions = np.zeros((ROBOT.control.horizon, len(ROBOT.channels)))
        return ActionChunk(actions, ROBOT.channels, observation.stamp_ns, ROBOT.period_s)

    def observe() -> None:
        now_ns = node.get_clock().now().nanoseconds
        for view in ROBOT.views:
            node._buffer.add_image(view, now_ns, lambda: np.zeros((4, 4, 3), np.uint8))
        node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), now_ns)

    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    node._predict = predict
    node._chunk_publisher.publish = published.append
    observe()
    node.trigger_activate()
    assert started.wait(10)
    node._on_instruction(String(data="pick up the green cube"))
    observe()
    go_on.set()
    deadline = time.monotonic() + 10
    while not published and time.monotonic() < deadline:
        time.sleep(0.01)
        observe()
    assert asked[:2] == ["pick up the red cube", "pick up the green cube"]
    assert node._counts["discarded"] == 1
    assert len(published) == node._counts["inferences"] or len(published) == node._counts["inferences"] + 1


def test_withdrawing_the_instruction_forgets_what_was_seen(make_node: Callable, checkpoint: Path) -> None:
    node = make_node(checkpoint=checkpoint, instruction="go")
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    now_ns = node.get_clock().now().nanoseconds
    for view in ROBOT.views:
        node._buffer.add_image(view, now_ns, lambda: np.zeros((4, 4, 3), np.uint8))
    node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), now_ns)
    assert isinstance(node._buffer.observe(now_ns, "go"), Observation)
    node._on_instruction(String(data=""))
    assert "no image received" in node._buffer.observe(now_ns, "go")
