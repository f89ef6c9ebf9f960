"""Real processes of the graph under test, and a node that watches them. Waits are on conditions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_ros.bringup import NodeSpec, build_graph, command_line, process_environment
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATE_QOS, STATUS_QOS, STATUS_TOPIC

DEMO_INSTRUCTION = "pick up the red cube"


class Watcher:
    """A ROS node that keeps what it hears and spins while it waits."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("watcher", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        self.status: dict[str, dict[str, str]] = {}
        self.node.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)

    def _on_status(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            self.status[status.name] = {"message": status.message, **{pair.key: pair.value for pair in status.values}}

    def listen(self, message_type: type, topic: str, qos: Any) -> list[tuple[float, Any]]:
        """Keeps (monotonic arrival time, message) of a topic; the list grows while spinning."""
        heard = self.heard[topic]
        self.node.create_subscription(message_type, topic, lambda msg: heard.append((time.monotonic(), msg)), qos)
        return heard

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Spins until ``condition()`` is true and returns its value; fails with ``what`` after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"timed out after {timeout_s} s waiting for {what}; status: {self.status}")
            self.executor.spin_once(timeout_sec=0.05)
        return value

    def call(self, service_type: type, name: str, request: Any, timeout_s: float = 20.0) -> Any:
        """Calls a service and returns its response."""
        client = self.node.create_client(service_type, name)
        self.wait_for(client.service_is_ready, timeout_s, f"service {name}")
        future = client.call_async(request)
        self.wait_for(future.done, timeout_s, f"answer of {name}")
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


class Graph:
    """Started processes by node name, with their logs in files."""

    def __init__(self, specs: Sequence[NodeSpec], log_dir: Path) -> None:
        self.logs = {spec.name: log_dir / f"{spec.name}.log" for spec in specs}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for spec in specs:
            with self.logs[spec.name].open("wb") as log:
                self.processes[spec.name] = subprocess.Popen(
                    command_line(spec),
                    env=process_environment(spec),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def end(self, name: str, number: int = signal.SIGINT, timeout_s: float = 15.0) -> int:
        """Signals one node and waits for its exit code."""
        process = self.processes[name]
        if process.poll() is None:
            process.send_signal(number)
        return process.wait(timeout=timeout_s)

    def log(self) -> str:
        return "\n".join(f"--- {name}\n{path.read_text()[-3000:]}" for name, path in self.logs.items())

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                continue
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(tmp_path: Path, without: Sequence[str] = (), **arguments: Any) -> Iterator[Graph]:
    """The simulated graph of ``build_graph(**arguments)``, stopped at the end; logs are printed on failure."""
    specs = [
        spec for spec in build_graph(sim=True, run_dir=str(tmp_path / "run"), **arguments) if spec.name not in without
    ]
    graph = Graph(specs, tmp_path)
    try:
        yield graph
    except BaseException:
        print(graph.log())
        raise
    finally:
        graph.close()


def random_checkpoint(folder: Path) -> Path:
    """An untrained ``tiny`` checkpoint for the shipped ALOHA: it moves, and that is all these tests need."""
    import torch

    from qwen_vla_core.actions.normalize import Quantiles
    from qwen_vla_core.model.checkpoint import save_checkpoint
    from qwen_vla_core.model.policy import Stats
    from qwen_vla_core.model.presets import build_tiny

    torch.set_num_threads(1)
    robot = load_embodiment("aloha")
    start_c = np.array([value for group in robot.actions for value in group.start])
    rng = np.random.default_rng(0)
    samples = start_c + rng.uniform(-0.3, 0.3, (256, len(start_c)))
    stats = Stats(Quantiles.fit(samples, robot.channels), Quantiles.fit(samples, robot.state_channels))
    save_checkpoint(build_tiny([robot], {robot.name: stats}, seed=0), folder)
    return folder


@dataclass(frozen=True)
class Demo:
    """One recorded episode of the simulated robot: its run folder, and the chunks that were heard meanwhile."""

    run: Path
    chunks: list[Any]

    def count(self, topic: str) -> int:
        """Messages of a topic in the bag."""
        from qwen_vla_core.rollouts.bag import BagFile

        with BagFile(self.run / "episode_000") as bag:
            return bag.topics[f"/{topic}"].count


@pytest.fixture(scope="session")
def demo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The whole graph runs once: chunks come, joints move, every node ends cleanly."""
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    folder = tmp_path_factory.mktemp("demo")
    watcher = Watcher()
    states = watcher.listen(JointState, "/follower_left/joint_states", STATE_QOS)
    chunks = watcher.listen(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    given = {"instruction": DEMO_INSTRUCTION, "episodes": 1, "episode_timeout_s": 3.0, "seed": 5}
    try:
        with running(folder, checkpoint=str(checkpoint), **given) as graph:
            watcher.wait_for(lambda: chunks and states, 60, "a chunk and a state")
            before = np.array(states[-1][1].position)
            moved = lambda: np.abs(np.array(states[-1][1].position) - before).max() > 0.05  # noqa: E731
            watcher.wait_for(moved, 20, "joints to move")
            assert graph.processes["sim_node"].wait(timeout=60) == 0
            for name in ("policy_node", "recorder_node", "controller_node"):
                assert graph.end(name, signal.SIGINT) == 0, graph.log()
    finally:
        watcher.close()
    return Demo(folder / "run", [msg for _, msg in chunks])


@pytest.fixture(scope="session", autouse=True)
def ros_domain() -> Iterator[int]:
    """A ROS_DOMAIN_ID nobody else on this machine uses, for this process and all it starts."""
    domain_coordinator = pytest.importorskip("domain_coordinator")
    before = os.environ.get("ROS_DOMAIN_ID")
    with domain_coordinator.domain_id() as chosen:
        os.environ["ROS_DOMAIN_ID"] = str(chosen)
        yield chosen
    if before is None:
        del os.environ["ROS_DOMAIN_ID"]
    else:
        os.environ["ROS_DOMAIN_ID"] = before


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    """A node that keeps what it hears."""
    node = Watcher()
    yield node
    node.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny checkpoint of the shipped ALOHA."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random-tiny")
