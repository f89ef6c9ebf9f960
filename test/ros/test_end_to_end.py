"""The whole graph as real processes: simulator, policy, controller, recorder. Everything a user relies on, once."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from graph_support import Watcher, running
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.checkpoint import read_config
from qwen_vla_ros.messages import chunk_from_message
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATE_QOS
from qwen_vla_ros.recorder_node import recorded_topics

pytest.importorskip("mujoco", reason="the simulator is not installed")
pytest.importorskip("rosbags")
ROBOT = load_embodiment("aloha")
INSTRUCTION = "pick up the red cube"


def test_a_chunk_arrives_joints_move_and_the_bag_holds_every_topic(
    watcher: Watcher, checkpoint: Path, tmp_path: Path
) -> None:
    states = watcher.listen(JointState, "/follower_left/joint_states", STATE_QOS)
    chunks = watcher.listen(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    with running(
        tmp_path, checkpoint=str(checkpoint), instruction=INSTRUCTION, episodes=1, episode_timeout_s=3.0, seed=5
    ) as graph:
        watcher.wait_for(lambda: chunks and states, 60, "a chunk and a state")
        before = np.array(states[-1][1].position)
        watcher.wait_for(lambda: np.abs(np.array(states[-1][1].position) - before).max() > 0.05, 20, "joints to move")
        assert graph.processes["sim_node"].wait(timeout=60) == 0
        for name in ("policy_node", "recorder_node", "controller_node"):
            assert graph.end(name, signal.SIGINT) == 0, graph.log()

    chunk = chunk_from_message(chunks[-1][1])
    assert chunk.channels == ROBOT.channels
    assert chunk.actions_hc.shape == (ROBOT.control.horizon, len(ROBOT.channels))
    stamps = [chunk_from_message(msg).stamp_ns for _, msg in chunks]
    assert stamps == sorted(set(stamps))

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failure"] + summary["success"] == 1
    assert summary["episodes"][0]["seed"] == 5 and summary["episodes"][0]["instruction"] == INSTRUCTION
    check_bag(tmp_path / "run" / "episode_000", summary["episodes"][0]["outcome"], checkpoint)
    assert not list((tmp_path / "run").glob(".partial*"))


def check_bag(path: Path, outcome: str, checkpoint: Path) -> None:
    """Opens the bag with rosbags: every topic has messages, the metadata says what happened."""
    from rosbags.highlevel import AnyReader

    about = json.loads((path / "episode.json").read_text())
    assert about["outcome"] == outcome and about["instruction"] == INSTRUCTION
    assert about["embodiment_hash"] == ROBOT.hash and about["embodiment_yaml"] == ROBOT.source_text
    assert about["embodiment_policy_hash"] == ROBOT.policy_hash
    assert about["checkpoint_id"] == f"{checkpoint.name} {read_config(checkpoint)['weights_id'][:12]}"
    wanted = {topic if topic.startswith("/") else f"/{topic}" for topic in recorded_topics(ROBOT, simulated=True)}
    with AnyReader([path]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        assert {topic for topic in wanted if counts.get(topic, 0) == 0} == set(), counts
        connections = [c for c in reader.connections if c.topic == "/qwen_vla/chunk"]
        for connection, _, data in reader.messages(connections):
            again = deserialize_message(bytes(data), JointTrajectory)  # rclpy reads what was written
            assert len(reader.deserialize(data, connection.msgtype).points) == len(again.points) == 16
