"""The whole graph as real processes: simulator, policy, controller, recorder. Everything a user relies on, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graph_support import DEMO_INSTRUCTION, Demo
from rclpy.serialization import deserialize_message
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.checkpoint import read_config
from qwen_vla_ros.messages import chunk_from_message
from qwen_vla_ros.node_utils import HUMAN_TOPIC, NOTE_TOPIC, OUTCOME_TOPIC
from qwen_vla_ros.recorder_node import recorded_topics

pytest.importorskip("mujoco", reason="the simulator is not installed")
pytest.importorskip("rosbags")
ROBOT = load_embodiment("aloha")


def test_a_chunk_arrives_joints_move_and_the_bag_holds_every_topic(demo: Demo, checkpoint: Path) -> None:
    chunk = chunk_from_message(demo.chunks[-1])
    assert chunk.channels == ROBOT.channels
    assert chunk.actions_hc.shape == (ROBOT.control.horizon, len(ROBOT.channels))
    stamps = [chunk_from_message(msg).stamp_ns for msg in demo.chunks]
    assert stamps == sorted(set(stamps))

    summary = json.loads((demo.run / "summary.json").read_text())
    assert summary["failure"] + summary["success"] == 1
    assert summary["episodes"][0]["seed"] == 5 and summary["episodes"][0]["instruction"] == DEMO_INSTRUCTION
    check_bag(demo.run / "episode_000", summary["episodes"][0]["outcome"], checkpoint)
    assert not list(demo.run.glob(".partial*"))


def check_bag(path: Path, outcome: str, checkpoint: Path) -> None:
    """Opens the bag with rosbags: every topic has messages, the metadata says what happened."""
    from rosbags.highlevel import AnyReader

    about = json.loads((path / "episode.json").read_text())
    assert about["outcome"] == outcome and about["instruction"] == DEMO_INSTRUCTION
    assert about["embodiment_hash"] == ROBOT.hash and about["embodiment_yaml"] == ROBOT.source_text
    assert about["embodiment_policy_hash"] == ROBOT.policy_hash
    assert about["checkpoint_id"] == f"{checkpoint.name} {read_config(checkpoint)['weights_id'][:12]}"
    recorded = set(recorded_topics(ROBOT, simulated=True)) - {NOTE_TOPIC, OUTCOME_TOPIC, HUMAN_TOPIC}  # nobody speaks
    wanted = {topic if topic.startswith("/") else f"/{topic}" for topic in recorded}
    with AnyReader([path]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        assert {topic for topic in wanted if counts.get(topic, 0) == 0} == set(), counts
        connections = [c for c in reader.connections if c.topic == "/qwen_vla/chunk"]
        for connection, _, data in reader.messages(connections):
            again = deserialize_message(bytes(data), JointTrajectory)  # rclpy reads what was written
            assert len(reader.deserialize(data, connection.msgtype).points) == len(again.points) == 16
