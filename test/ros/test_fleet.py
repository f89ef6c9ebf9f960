"""Several robots from one policy process: one copy of the weights, and a stuck robot holds up nobody."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from graph_support import Graph, Watcher
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, load_embodiment, parse_embodiment
from qwen_vla_core.embodiment.namespaced import namespaced
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk, Observation, Prediction, Request
from qwen_vla_core.serving.batching import MicroBatcher
from qwen_vla_ros.bringup import build_fleet, build_graph, name_robots
from qwen_vla_ros.engines import Seat
from qwen_vla_ros.fleet import Fleet, Member, parse_members
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATUS_QOS, STATUS_TOPIC


@pytest.fixture(scope="module")
def checkpoint_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny checkpoint of ALOHA and WidowX."""
    from qwen_vla_core.model.checkpoint import save_checkpoint
    from qwen_vla_core.model.policy import Stats
    from qwen_vla_core.model.presets import build_tiny

    folder = tmp_path_factory.mktemp("checkpoint")
    rng, robots = np.random.default_rng(0), [load_embodiment(small(name, folder)) for name in ("aloha", "widowx")]

    def stats(robot: Embodiment) -> Stats:
        low = np.array([x for g in robot.actions for x in (g.start or g.limits.lower)])
        actions = low + rng.uniform(0.0, 0.05, (64, len(low)))
        states = rng.uniform(-0.5, 0.5, (64, len(robot.state_channels)))
        return Stats(Quantiles.fit(actions, robot.channels), Quantiles.fit(states, robot.state_channels))

    path = folder / "random-two"
    save_checkpoint(build_tiny(robots, {robot.name: stats(robot) for robot in robots}, seed=0), path)
    return path


def small(name: str, folder: Path) -> Path:
    """The shipped robot with pictures that cost nothing, and long chunks and patience for a busy machine."""
    path = folder / f"{name}.yaml"
    text = load_embodiment(name).source_text.replace("size: [640, 480]", "size: [64, 48]")
    text = re.sub(r"(watchdog_ms|max_age_ms|max_skew_ms): [0-9.]+", r"\1: 3000", text)
    path.write_text(re.sub(r"horizon: [0-9]+", "horizon: 60", text))
    return path


def test_members_are_named_and_told_apart() -> None:
    assert parse_members(["left=aloha", "lab/right = widowx", " third ", ""]) == [
        Member("left", "aloha"),
        Member("lab/right", "widowx"),
        Member("third"),
    ]
    for wrong in (["left", "left=aloha"], ["2nd=aloha"], ["=aloha"], ["a b"]):
        with pytest.raises(UserError, match="parameter 'robots'"):
            parse_members(wrong)
    assert name_robots(["aloha", "widowx"]) == {"aloha": "aloha", "widowx": "widowx"}
    assert name_robots(["left=aloha", "right=aloha"]) == {"left": "aloha", "right": "aloha"}
    with pytest.raises(UserError, match="left=aloha right=aloha"):
        name_robots(["aloha", "aloha"])


def test_a_fleet_is_one_policy_and_everything_else_per_robot() -> None:
    specs = build_fleet({"left": "aloha", "right": "widowx"}, mock=True, record=False, namespace="lab")
    labels = [spec.label for spec in specs]
    assert labels == [
        "lab/left/controller_node",
        "lab/left/mock_node",
        "lab/right/controller_node",
        "lab/right/mock_node",
        "lab/policy_node",
    ]
    assert all(spec.parameters["namespaced_topics"] is True for spec in specs[:-1])
    policy = specs[-1].parameters
    assert [text.split("=")[0] for text in policy["robots"]] == ["left", "right"] and "embodiment" not in policy
    with pytest.raises(UserError, match="several simulators"):
        build_fleet({"a": "aloha", "b": "widowx"}, use_sim_time=True)
    folders = [spec.parameters.get("run_dir") for spec in build_fleet({"a": "aloha", "b": "aloha"}, run_dir="/r")]
    assert {folder for folder in folders if folder} == {"/r/a", "/r/b"}


def test_topics_move_into_the_namespace_and_nothing_else_changes() -> None:
    text = load_embodiment("mobile_base").source_text
    robot = parse_embodiment(text.replace("  # obstacle_stop:", "  obstacle_stop:" + SCAN))
    moved = namespaced(robot)
    assert (moved.cameras[0].topic, moved.state[0].topic) == ("camera/image_raw", "odom")
    assert moved.actions[0].command.topic == "cmd_vel" and moved.safety.obstacle_stop is not None
    assert moved.safety.obstacle_stop.topic == "scan"
    assert moved.hash == robot.hash and moved.policy_hash == robot.policy_hash
    twice = parse_embodiment(text.replace("topic: /camera/image_raw", "topic: cmd_vel"))
    with pytest.raises(UserError, match="'/cmd_vel' and 'cmd_vel'"):
        namespaced(twice)


SCAN = """
    topic: /scan
    footprint: {front: 0.2, rear: 0.2, side: 0.2}
    stop_distance: 0.15
    slow_distance: 0.7
  #"""


class Slow:
    """An engine whose answers take as long as the test wants; robot 'bad' cannot be answered."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self.go_on = threading.Event()
        self.asked: list[list[str]] = []

    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        names = [request.embodiment for request in requests]
        self.asked.append(names)
        assert self.go_on.wait(30)
        if "bad" in names:
            raise ValueError("bad cannot be answered")
        return [Prediction(ActionChunk(np.zeros((2, 1)), (name,), 0, 0.1)) for name in names]


def test_requests_that_wait_together_are_answered_together_and_a_bad_one_alone_fails() -> None:
    engine = Slow()
    batcher = MicroBatcher(engine)
    answers: dict[str, object] = {}

    def ask(name: str) -> None:
        try:
            (answers[name],) = Seat(batcher).predict([Request(Observation({}, np.zeros(1), "go"), name)])
        except ValueError as error:
            answers[name] = str(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "left", "right", "bad")]
    try:
        threads[0].start()
        wait(lambda: engine.asked)  # the others come while the first is being answered
        for thread in threads[1:]:
            thread.start()
        wait(lambda: batcher.waiting == 3)
        engine.go_on.set()
        for thread in threads:
            thread.join(30)
    finally:
        engine.go_on.set()
        batcher.close()
    assert engine.asked[0] == ["first"] and sorted(engine.asked[1]) == ["bad", "left", "right"]
    assert answers["bad"] == "bad cannot be answered"
    for name in ("first", "left", "right"):
        answer = answers[name]
        assert isinstance(answer, Prediction) and answer.chunk.channels == (name,) and answer.seconds["queue"] >= 0


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def latest(heard: list[tuple[float, DiagnosticArray]], name: str) -> dict[str, str]:
    """The newest status of a node."""
    for _, msg in reversed(heard):
        for status in msg.status:
            if status.name == name:
                return {pair.key: pair.value for pair in status.values}
    return {}


def test_two_robots_run_a_stuck_one_holds_up_nobody_and_becomes_another_without_loading_again(
    checkpoint_of_two: Path, tmp_path: Path, watcher: Watcher
) -> None:
    aloha, widowx = small("aloha", tmp_path), small("widowx", tmp_path)
    specs = build_fleet(
        {"left": str(aloha), "right": str(widowx)},
        mock=True,
        record=False,
        checkpoint=str(checkpoint_of_two),
        instruction="go",
    )
    told = {name: watcher.listen(DiagnosticArray, f"/{name}/{STATUS_TOPIC}", STATUS_QOS) for name in ("left", "right")}
    chunks = {
        name: watcher.listen(JointTrajectory, f"/{name}/{CHUNK_TOPIC}", COMMAND_QOS) for name in ("left", "right")
    }

    def is_at(name: str, node: str, key: str, value: str) -> bool:
        return latest(told[name], node).get(key) == value

    def change(node: str, transition: int) -> None:
        request = ChangeState.Request(transition=Transition(id=transition))
        assert watcher.call(ChangeState, f"{node}/change_state", request).success

    def become(node: str, robot: Path) -> tuple[bool, str]:
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=str(robot))
        request = SetParameters.Request(parameters=[Parameter(name="embodiment", value=value)])
        (result,) = watcher.call(SetParameters, f"{node}/set_parameters", request).results
        return result.successful, result.reason

    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    # Graph keeps processes by name: two of them, so that both robots' nodes have theirs.
    graphs = [Graph(specs[:2], folders[0]), Graph(specs[2:], folders[1])]
    another: Graph | None = None
    try:
        for name in told:
            watcher.wait_for(lambda n=name: is_at(n, "controller", "mode", "running"), 150, f"{name} to move")
        assert latest(told["left"], "policy")["embodiment"] == "aloha"
        assert latest(told["right"], "policy")["embodiment"] == "widowx"
        assert [len(chunks[name][-1][1].joint_names) for name in ("left", "right")] == [14, 7]

        graphs[0].processes["mock_node"].send_signal(signal.SIGSTOP)  # the left robot's cameras and joints are gone
        watcher.wait_for(lambda: is_at("left", "controller", "mode", "holding"), 30, "the left robot to hold")
        watcher.wait_for(lambda: latest(told["left"], "policy").get("state") in ("holding", "fault"), 30, "its policy")
        before = len(chunks["right"])
        watcher.wait_for(lambda: len(chunks["right"]) > before + 5, 30, "the right robot to go on")
        watcher.wait_for(lambda: is_at("right", "controller", "mode", "running"), 30, "the right robot to move")

        # The left one is replaced by a WidowX: no process of the policy or the controller begins anew.
        assert become("/left/policy_node", widowx) == (False, "active: deactivate first, then set another embodiment")
        graphs[0].processes["mock_node"].kill()
        another = Graph([s for s in build_fleet({"left": str(widowx)}, mock=True) if s.name == "mock_node"], tmp_path)
        for node in ("/left/controller_node", "/left/policy_node"):
            change(node, Transition.TRANSITION_DEACTIVATE)
            refused = become(node, tmp_path / "none.yaml")
            assert not refused[0] and "none.yaml" in refused[1]
            assert become(node, widowx) == (True, "")
            change(node, Transition.TRANSITION_ACTIVATE)
        watcher.wait_for(lambda: is_at("left", "controller", "embodiment", "widowx"), 30, "the left robot to change")
        watcher.wait_for(lambda: is_at("left", "controller", "mode", "running"), 60, "the left robot to move again")
        watcher.wait_for(lambda: len(chunks["left"][-1][1].joint_names) == 7, 30, "its chunks")
        watcher.wait_for(lambda: is_at("right", "controller", "mode", "running"), 30, "the right robot to move")
        log = graphs[1].logs["policy_node"].read_text()
        assert "1 model in memory" in log and log.count("warm-up") == 3
        assert graphs[1].end("policy_node") == 0
    except BaseException:
        print(*(graph.log() for graph in (*graphs, another) if graph is not None))
        raise
    finally:
        for graph in (*graphs, another):
            if graph is not None:
                for process in graph.processes.values():
                    if process.poll() is None:
                        process.send_signal(signal.SIGCONT)
                graph.close()


def test_a_robot_that_the_checkpoint_does_not_know_is_named(checkpoint: Path) -> None:
    rclpy.init(args=["--ros-args", "-p", f"checkpoint:={checkpoint}", "-p", "autostart:=true"])
    try:
        with pytest.raises(UserError, match=r"^right: policy_node cannot start: parameter 'embodiment'"):
            Fleet([Member("left", "aloha"), Member("right", "widowx")])
    finally:
        rclpy.try_shutdown()


def test_one_robot_is_started_as_ever() -> None:
    policy = next(spec for spec in build_graph("aloha", mock=True) if spec.name == "policy_node")
    assert policy.parameters["embodiment"].endswith("aloha.yaml") and "robots" not in policy.parameters
