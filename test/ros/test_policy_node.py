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
from qwen_vla_core.interfaces import ActionChunk, Committed, Observation
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_core.runtime.latency import LatencyWindow
from qwen_vla_ros.messages import plan_to_message
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


@pytest.mark.parametrize(
    ("old", "new"), [("watchdog_ms: 500", "watchdog_ms: 400"), ("/cam_high/camera/color/image_rect_raw", "/top/image")]
)
def test_what_belongs_to_the_robot_at_hand_may_be_edited(
    old: str, new: str, make_node: Callable, checkpoint: Path, tmp_path: Path
) -> None:
    path = edited(tmp_path, old, new)
    node = make_node(checkpoint=checkpoint, embodiment=path)
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert node._buffer.embodiment == load_embodiment(path)  # the edit counts, not the checkpoint's copy


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("horizon: 16", "horizon: 15", "control.horizon is 15, but 16 in the checkpoint"),
        ("view: cam_right_wrist", "view: cam_front", "cameras[2].view is 'cam_front', but 'cam_right_wrist' in the"),
    ],
)
def test_what_the_policy_learned_may_not_be_edited_and_both_values_are_named(
    old: str, new: str, told: str, make_node: Callable, checkpoint: Path, tmp_path: Path
) -> None:
    node = make_node(checkpoint=checkpoint, embodiment=edited(tmp_path, old, new))
    with pytest.raises(UserError) as caught:
        node.start()
    assert told in str(caught.value) and checkpoint.name in str(caught.value) and "\n" not in str(caught.value)


def test_an_unexpected_failure_to_configure_is_told_not_swallowed(make_node: Callable, checkpoint: Path) -> None:
    node = make_node(checkpoint=checkpoint)

    def broken(_observation: Observation, _committed: object = None) -> ActionChunk:
        raise RuntimeError("no memory left")

    node._predict = broken
    with pytest.raises(UserError, match="no memory left"):
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

    def predict(observation: Observation, _committed: object = None) -> ActionChunk:
        asked.append(observation.instruction)
        started.set()
        assert go_on.wait(60)
        actions = np.zeros((ROBOT.control.horizon, len(ROBOT.channels)))
        return ActionChunk(actions, ROBOT.channels, observation.stamp_ns, ROBOT.period_s)

    def observe() -> None:
        now_ns = node.get_clock().now().nanoseconds
        for view in ROBOT.views:
            node._buffer.add_image(view, now_ns, noisy_picture)
        node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), now_ns)

    def observe_until(condition: Callable[[], object]) -> None:
        """Fresh observations all the time: how late a busy machine looks at them must not matter."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            observe()
            time.sleep(0.01)

    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    node._predict = predict
    node._chunk_publisher.publish = published.append
    node.trigger_activate()
    observe_until(started.is_set)
    node._on_instruction(String(data="pick up the green cube"))
    go_on.set()
    observe_until(lambda: published)
    assert asked[:2] == ["pick up the red cube", "pick up the green cube"]
    assert node._counts["discarded"] == 1
    assert len(published) == node._counts["inferences"] or len(published) == node._counts["inferences"] + 1


def test_withdrawing_the_instruction_forgets_what_was_seen(make_node: Callable, checkpoint: Path) -> None:
    node = make_node(checkpoint=checkpoint, instruction="go")
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    now_ns = node.get_clock().now().nanoseconds
    for view in ROBOT.views:
        node._buffer.add_image(view, now_ns, noisy_picture)
    node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), now_ns)
    assert isinstance(node._buffer.observe(now_ns, "go"), Observation)
    node._on_instruction(String(data=""))
    assert "no image received" in node._buffer.observe(now_ns, "go")


def noisy_picture() -> np.ndarray:
    """As a camera sends them: of the robot's shape, not black, never twice the same."""
    return np.random.default_rng().integers(1, 256, (6, 8, 3), np.uint8)


def sees(node: PolicyNode, stamp_ns: int) -> None:
    """One set of pictures and a state."""
    for view in ROBOT.views:
        node._buffer.add_image(view, stamp_ns, noisy_picture)
    node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), stamp_ns)


def until(condition: Callable[[], object], meanwhile: Callable[[], None]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        meanwhile()
        time.sleep(0.01)


def test_a_strategy_that_conditions_is_told_the_plan_of_this_instruction_only(
    make_node: Callable, checkpoint: Path
) -> None:
    node = make_node(checkpoint=checkpoint, instruction="go", strategy="guided", execute_steps=0)
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    asked: list[tuple[Observation, Committed | None]] = []

    def predict(observation: Observation, committed: Committed | None = None) -> ActionChunk:
        asked.append((observation, committed))
        return ActionChunk(np.zeros((16, 14)), ROBOT.channels, observation.stamp_ns, ROBOT.period_s)

    def robot() -> None:
        """A plan that rises by one each period, and a look at it."""
        now_ns = node.get_clock().now().nanoseconds
        rows = np.tile(np.arange(17.0)[:, None], (1, 14))
        node._on_plan(plan_to_message(PlanRest(now_ns, rows), ROBOT.channels, ROBOT.period_s))
        sees(node, now_ns)

    node._predict = predict
    node.trigger_activate()
    until(lambda: len(asked) >= 3, robot)
    assert asked[0][1] is None  # nothing of ours is being played yet
    committed = asked[-1][1]
    assert committed is not None and committed.use == "guided" and committed.frozen >= 1
    np.testing.assert_allclose(np.diff(committed.actions_hc[:, 0]), 1.0)

    node._on_instruction(String(data="go elsewhere"))
    told_ns, seen = node.get_clock().now().nanoseconds, len(asked)
    until(lambda: any(o.instruction == "go elsewhere" for o, _ in asked[seen:]), robot)
    first, committed = next((o, c) for o, c in asked if o.instruction == "go elsewhere")
    assert committed is None  # what is still being played was for something else
    assert first.stamp_ns >= node._not_before_ns > 0 and told_ns >= node._not_before_ns


def test_looks_are_as_far_apart_as_the_controller_can_bear(make_node: Callable, checkpoint: Path) -> None:
    """Asked for ten seconds, but without a chunk for half a second the watchdog holds the robot."""
    node = make_node(checkpoint=checkpoint, instruction="go", execute_steps=100)
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    node._latency["inference"] = LatencyWindow(warm_up=0)
    looks: list[float] = []

    def predict(observation: Observation, _committed: Committed | None = None) -> ActionChunk:
        looks.append(time.monotonic())
        return ActionChunk(np.zeros((16, 14)), ROBOT.channels, observation.stamp_ns, ROBOT.period_s)

    node._predict = predict
    node.trigger_activate()
    until(lambda: len(looks) >= 4, lambda: sees(node, node.get_clock().now().nanoseconds))
    assert 0.15 < np.median(np.diff(looks)) < 2.0


@pytest.mark.parametrize(("key", "value"), [("strategy", "teleport"), ("execute_steps", -2)])
def test_a_wrong_parameter_is_named(make_node: Callable, checkpoint: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        make_node(checkpoint=checkpoint, **{key: value}).start()
