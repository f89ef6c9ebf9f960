"""The recorder on a real robot: instructions begin episodes, verdicts end them, a full disk is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from graph_support import Graph, Watcher
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import find_rollouts, read_about
from qwen_vla_ros.bag import EpisodeBag
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.node_utils import (
    COMMAND_QOS,
    EPISODE_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    NOTE_TOPIC,
    OUTCOME_TOPIC,
)
from qwen_vla_ros.recorder_node import RELIABLE_QOS

pytest.importorskip("rosbags")
# The shipped robot with command types that every ROS 2 has.
ROBOT_YAML = (
    Path(__file__)
    .parents[2]
    .joinpath("embodiments", "aloha.yaml")
    .read_text()
    .replace("kind: interbotix_group", "kind: forward_command")
    .replace("kind: interbotix_single", "kind: forward_command")
)
INSTRUCTION = "pick up the red cube"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Graph]]:
    """Starts a recorder for a real robot that writes to ``tmp_path/run``."""
    yaml = tmp_path / "robot.yaml"
    yaml.write_text(ROBOT_YAML)
    graphs: list[Graph] = []

    def begin(**parameters: int | str) -> Graph:
        specs = build_graph(str(yaml), sim=False, run_dir=str(tmp_path / "run"))
        spec = next(spec for spec in specs if spec.name == "recorder_node")
        graphs.append(Graph([replace(spec, parameters={**spec.parameters, **parameters})], tmp_path))
        return graphs[-1]

    yield begin
    for graph in graphs:
        graph.close()


def state(watcher: Watcher) -> str:
    return watcher.status.get("recorder", {}).get("state", "")


def test_instructions_begin_and_verdicts_end_episodes_and_may_be_said_afterwards(
    watcher: Watcher, start: Callable[..., Graph], tmp_path: Path
) -> None:
    start(min_free_mb=0)
    instruction = watcher.node.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
    states = watcher.node.create_publisher(JointState, "/follower_left/joint_states", COMMAND_QOS)
    watcher.wait_for(lambda: states.get_subscription_count() > 0, 30, "the recorder")
    assert not watcher.call(Trigger, "qwen_vla/episode_success", Trigger.Request()).success

    note = watcher.node.create_publisher(String, NOTE_TOPIC, RELIABLE_QOS)
    outcomes = watcher.node.create_publisher(String, OUTCOME_TOPIC, RELIABLE_QOS)
    for publisher in (note, outcomes):
        watcher.wait_for(lambda publisher=publisher: publisher.get_subscription_count() > 0, 30, "the recorder")

    def record(text: str) -> None:
        instruction.publish(String(data=text))
        watcher.wait_for(lambda: state(watcher) == "recording", 30, "a bag to open")
        before = int(watcher.status["recorder"]["messages"])

        def heard() -> bool:
            states.publish(JointState(name=["waist"], position=[0.5]))
            return int(watcher.status["recorder"]["messages"]) > before + 5

        watcher.wait_for(heard, 30, "recorded joint states")

    def waiting() -> None:
        watcher.wait_for(lambda: state(watcher) == "waiting", 30, "the bag to close")

    for outcome in ("success", "aborted"):
        record(INSTRUCTION)
        assert watcher.call(Trigger, f"qwen_vla/episode_{outcome}", Trigger.Request()).success
        waiting()
    record(INSTRUCTION)
    note.publish(String(data="slipped once"))
    outcomes.publish(String(data="no verdict"))
    outcomes.publish(String(data=json.dumps({"outcome": "partial", "reason": "late", "note": "but it moved"})))
    waiting()
    record("open the drawer")
    record(INSTRUCTION)  # another one ends the episode before it
    outcomes.publish(String(data="failure"))
    waiting()
    note.publish(String(data="the lamp was off"))  # afterwards: to the episode that was closed last
    outcomes.publish(String(data=json.dumps({"outcome": "success"})))
    watcher.wait_for(lambda: watcher.status["recorder"]["last_outcome"] == "success", 30, "the label to change")

    found = find_rollouts(tmp_path / "run")
    assert [(r.outcome, r.reason, r.note, r.judged_by) for r in found] == [
        ("success", "", "", "operator"),
        ("aborted", "", "", "operator"),
        ("partial", "late", "slipped once\nbut it moved", "operator"),
        ("aborted", "the next episode began", "", "recorder"),
        ("success", "", "the lamp was off", "operator"),
    ]
    assert [r.instruction for r in found] == [INSTRUCTION] * 3 + ["open the drawer", INSTRUCTION]
    assert all(r.seconds is not None and r.seconds > 0 for r in found)
    with BagFile(found[-1].folder) as bag:
        counts = {name: topic.count for name, topic in bag.topics.items()}
        told = [bag.decode(t, data).data for t, _, data in bag.messages(["/qwen_vla/instruction"])]
        assert told == [INSTRUCTION]  # not the one before it
        # What the policy may have chosen its first observation from had arrived before the instruction.
        first_ns = next(time_ns for _, time_ns, _ in bag.messages(["/follower_left/joint_states"]))
        assert first_ns < read_about(found[-1].folder)["started_ns"]
    assert counts["/follower_left/joint_states"] > 5


def test_the_instruction_the_policy_starts_with_begins_an_episode_and_nonsense_events_kill_nothing(
    watcher: Watcher, start: Callable[..., Graph], tmp_path: Path
) -> None:
    graph = start(min_free_mb=0, instruction=INSTRUCTION)
    events = watcher.node.create_publisher(String, EPISODE_TOPIC, LATCHED_QOS)
    watcher.wait_for(lambda: state(watcher) == "recording", 60, "a bag to open")
    watcher.wait_for(lambda: events.get_subscription_count() > 0, 30, "the recorder")
    events.publish(String(data="no JSON"))
    watcher.wait_for(lambda: "no episode event: 'no JSON'" in graph.log(), 30, "the warning")
    assert graph.end("recorder_node") == 0
    about = json.loads((tmp_path / "run" / "episode_000" / "episode.json").read_text())
    assert (about["outcome"], about["instruction"]) == ("aborted", INSTRUCTION)


def test_a_long_task_of_several_instructions_is_one_episode_where_asked(
    watcher: Watcher, start: Callable[..., Graph], tmp_path: Path
) -> None:
    start(min_free_mb=0, instruction_splits=False, instruction=INSTRUCTION)
    instruction = watcher.node.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
    watcher.wait_for(lambda: state(watcher) == "recording", 60, "a bag to open")
    before = int(watcher.status["recorder"]["messages"])
    instruction.publish(String(data="put it down"))
    watcher.wait_for(lambda: int(watcher.status["recorder"]["messages"]) > before, 30, "the instruction")
    assert watcher.call(Trigger, "qwen_vla/episode_partial", Trigger.Request()).success
    (rollout,) = find_rollouts(tmp_path / "run")
    assert [text for _, text in read_about(rollout.folder)["instructions"]] == [INSTRUCTION, "put it down"]
    assert rollout.outcome == "partial"


def test_a_full_disk_is_refused_before_it_happens(
    watcher: Watcher, start: Callable[..., Graph], tmp_path: Path
) -> None:
    start(min_free_mb=2_000_000_000)
    instruction = watcher.node.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
    instruction.publish(String(data=INSTRUCTION))
    message = watcher.wait_for(
        lambda: "not recording: disk" in watcher.status.get("recorder", {}).get("message", "") and watcher.status,
        30,
        "it",
    )["recorder"]["message"]
    assert "min_free_mb" in message
    assert not list((tmp_path / "run").glob("**/*.mcap"))


def test_a_bag_that_was_not_closed_never_looks_complete(tmp_path: Path) -> None:
    path = tmp_path / "episode_000"
    bag = EpisodeBag(path, {"/qwen_vla/instruction": String}, {"instruction": INSTRUCTION})
    assert not path.exists()
    assert json.loads((tmp_path / ".partial" / "episode_000" / "episode.json").read_text())["outcome"] == "unfinished"
    assert bag.close({"outcome": "success"}) == path
    assert not (tmp_path / ".partial").exists()
    assert (path / "episode_000.mcap").is_file() and "success" in (path / "metadata.yaml").read_text()


def test_types_outside_ros_are_taught_from_their_installed_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "share" / "lab_msgs" / "msg"
    folder.mkdir(parents=True)
    index = tmp_path / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "lab_msgs").touch()
    (folder / "Grip.msg").write_text("# force\nstd_msgs/Header header\nFinger[2] fingers\nfloat32[] cmd\n")
    (folder / "Finger.msg").write_text("string name  # which\nuint8 LEFT=0\n")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    grip = type("Grip", (), {"__module__": "lab_msgs.msg._grip"})
    EpisodeBag(tmp_path / "known", {"/grip": grip}, {}).close({})
    unknown = type("Gone", (), {"__module__": "lab_msgs.msg._gone"})
    with pytest.raises(UserError, match="cannot record lab_msgs/msg/Gone"):
        EpisodeBag(tmp_path / "unknown", {"/gone": unknown}, {})


def test_a_recorder_that_cannot_write_says_so(start: Callable[..., Graph], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    graph = start()
    try:
        assert graph.processes["recorder_node"].wait(timeout=30) == 2
    except subprocess.TimeoutExpired:
        pytest.fail(graph.log())
    assert "parameter 'run_dir'" in graph.log()
