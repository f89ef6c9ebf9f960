"""Parts of a running graph break; the robot holds, the reason is published, nothing recorded is lost."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from graph_support import Graph, Watcher, running
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_ros.messages import chunk_to_message
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATE_QOS

pytest.importorskip("mujoco", reason="the simulator is not installed")
ROBOT = load_embodiment("aloha")
TOLERANCE_MS = 300  # the controller's thread may be late by this much on a busy test machine
TIMEOUT_S = 60.0  # how long until a wait has failed, on any machine; never how long something should take


@pytest.fixture
def graph(watcher: Watcher, checkpoint: Path, tmp_path: Path) -> Iterator[Graph]:
    """A graph in the middle of an endless episode."""
    with running(
        tmp_path, checkpoint=str(checkpoint), instruction="pick up the red cube", episode_timeout_s=600.0
    ) as started:
        watcher.wait_for(lambda: watcher.status.get("controller", {}).get("mode") == "running", 90, "motion")
        yield started


def mute(watcher: Watcher, views: str) -> None:
    """Silences simulated cameras."""
    value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=views)
    request = SetParameters.Request(parameters=[Parameter(name="mute_views", value=value)])
    response = watcher.call(SetParameters, "/sim_node/set_parameters", request)
    assert response.results[0].successful


def test_policy_killed_arms_hold_within_the_watchdog(watcher: Watcher, graph: Graph) -> None:
    states = watcher.listen(JointState, "/follower_left/joint_states", STATE_QOS)
    chunks = watcher.listen(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    watcher.wait_for(lambda: chunks and states, TIMEOUT_S, "chunks")
    watcher.wait_for(lambda: watcher.status["controller"]["mode"] == "running", TIMEOUT_S, "motion")
    graph.processes["policy_node"].kill()
    # The last chunk's age as the controller knew it when it stopped: how late this process hears of it is no matter.
    said = watcher.wait_for(
        lambda: re.search(r"watchdog: no chunk for (\d+) ms", watcher.status["controller"]["message"]),
        TIMEOUT_S,
        "the controller to report the watchdog",
    )
    assert 0 <= int(said[1]) - ROBOT.safety.watchdog_ms < TOLERANCE_MS

    def moved(since: int) -> float:
        return float(np.ptp([msg.position for _, msg in states[since:]], axis=0).max())

    heard = len(states)  # the arms come to rest, and stay there
    watcher.wait_for(lambda: len(states) > heard + 25 and moved(-25) < 0.01, TIMEOUT_S, "the arms to come to rest")
    heard = len(states)
    watcher.wait_for(lambda: len(states) > heard + 25, TIMEOUT_S, "joint states")
    assert moved(heard) < 0.01
    assert graph.processes["controller_node"].poll() is None


def test_a_silent_camera_makes_the_robot_hold_with_the_reason_and_it_recovers(watcher: Watcher, graph: Graph) -> None:
    mute(watcher, "cam_left_wrist")
    reason = "holding: camera 'cam_left_wrist' is stale"
    watcher.wait_for(lambda: reason in watcher.status["policy"]["message"], TIMEOUT_S, "the policy's reason")
    watcher.wait_for(lambda: watcher.status["controller"]["mode"] == "holding", TIMEOUT_S, "the controller to hold")
    watcher.wait_for(lambda: watcher.status["policy"]["state"] == "fault", TIMEOUT_S, "the fault")
    assert "cam_left_wrist" in watcher.status["policy"]["message"]
    mute(watcher, "")
    watcher.wait_for(lambda: watcher.status["controller"]["mode"] == "running", TIMEOUT_S, "motion after recovery")


def test_a_nan_chunk_is_refused_and_counted_while_the_robot_goes_on(watcher: Watcher, graph: Graph) -> None:
    publisher = watcher.node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    watcher.wait_for(lambda: publisher.get_subscription_count() > 0, TIMEOUT_S, "the controller to listen")
    actions = np.zeros((ROBOT.control.horizon, len(ROBOT.channels)))
    actions[3, 2] = np.nan
    sent = 0.0

    def counted() -> bool:
        """Sends until it is counted: the policy's next chunk may overtake one in a queue of one."""
        nonlocal sent
        if time.monotonic() > sent + 1.0:
            sent = time.monotonic()
            now_ns = watcher.node.get_clock().now().nanoseconds
            publisher.publish(chunk_to_message(ActionChunk(actions, ROBOT.channels, now_ns, ROBOT.period_s)))
        return int(watcher.status["controller"].get("rejected.non_finite", 0)) > 0

    watcher.wait_for(counted, TIMEOUT_S, "the rejection")
    before = int(watcher.status["controller"]["chunks_accepted"])
    watcher.wait_for(
        lambda: int(watcher.status["controller"]["chunks_accepted"]) > before, TIMEOUT_S, "good chunks after it"
    )


def test_an_interrupted_recorder_leaves_a_readable_bag(watcher: Watcher, graph: Graph, tmp_path: Path) -> None:
    from rosbags.highlevel import AnyReader

    watcher.wait_for(
        lambda: int(watcher.status.get("recorder", {}).get("messages", 0)) > 100, TIMEOUT_S, "recorded messages"
    )
    graph.processes["recorder_node"].send_signal(signal.SIGINT)
    assert graph.end("recorder_node", signal.SIGINT) == 0  # a second Ctrl-C changes nothing
    path = tmp_path / "run" / "episode_000"
    assert json.loads((path / "episode.json").read_text())["outcome"] == "aborted"
    with AnyReader([path]) as reader:
        assert sum(1 for _ in reader.messages()) == reader.message_count > 100
