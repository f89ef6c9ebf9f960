"""A policy node that asks a server: no model in the node, and the robot survives the server's loss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rclpy
from graph_support import Watcher, running
from rclpy.lifecycle import TransitionCallbackReturn
from std_msgs.msg import String

from qwen_vla_core.errors import UserError
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.policy_node import PolicyNode

sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))

from serving_support import METADATA, ROBOT, FakeEngine, eventually, fake_server, serving, without

TIMEOUT_S = 90.0


@pytest.fixture
def make_node() -> Iterator[Callable[..., PolicyNode]]:
    """Creates a PolicyNode that asks a server; closes it and ROS at the end."""
    nodes: list[PolicyNode] = []

    def make(**parameters: object) -> PolicyNode:
        arguments = ["--ros-args"]
        for key, value in {"embodiment": "aloha", "instruction": "go", **parameters}.items():
            arguments += ["-p", f"{key}:={json.dumps(value)}"]
        rclpy.init(args=arguments)
        nodes.append(PolicyNode())
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
        node.destroy_node()
    rclpy.try_shutdown()


def see(node: PolicyNode) -> None:
    """A complete observation of now."""
    now_ns = node.get_clock().now().nanoseconds
    for view in ROBOT.views:
        node._buffer.add_image(view, now_ns, lambda: np.random.default_rng().integers(1, 256, (6, 8, 3), np.uint8))
    node._buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.25), now_ns)


def seeing(node: PolicyNode, condition: Callable[[], object]) -> Callable[[], object]:
    """The condition, with fresh observations all the time."""

    def check() -> object:
        see(node)
        return condition()

    return check


def test_the_node_publishes_the_servers_chunks_and_loads_no_model(make_node: Callable) -> None:
    engine = FakeEngine()
    with serving(engine) as server:
        node = make_node(server=server.url, flow_steps=2)
        published: list = []
        node._chunk_publisher.publish = published.append
        node.start()
        eventually(seeing(node, lambda: published), "a chunk")
        assert list(published[0].joint_names) == list(ROBOT.channels)
        assert {value for point in published[0].points for value in point.positions} == {0.25}
        assert engine.steps_seen[0] == 2 and node._state()[1] == "running"
        assert node._checkpoint_id() == "fake 0123456789ab"
        assert len(node._latency["transport"]) + node._latency["transport"]._to_ignore > 0
        # A new instruction ends the wait for the old one's chunk at once.
        engine.gate.clear()
        engine.entered.clear()
        eventually(seeing(node, engine.entered.is_set), "an inference")
        node._on_instruction(String(data="something else"))
        eventually(lambda: node._counts["discarded"] == 1, "the old question to be dropped")
        engine.gate.set()
        count = len(published)
        eventually(seeing(node, lambda: len(published) > count), "a chunk for the new one")
        assert engine.calls[-1][0].observation.instruction == "something else"
        for transition in ("deactivate", "cleanup", "configure", "activate"):
            assert getattr(node, f"trigger_{transition}")() == TransitionCallbackReturn.SUCCESS, transition
    program = (
        "import sys, rclpy\nfrom qwen_vla_ros.policy_node import PolicyNode\n"
        "rclpy.init(args=['--ros-args', '-p', 'embodiment:=aloha', '-p', 'server:=ws://127.0.0.1:9'])\n"
        "node = PolicyNode()\nnode.start()\nnode.close()\n"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_what_does_not_fit_is_refused_when_the_node_is_configured(make_node: Callable) -> None:
    with serving(metadata=without(METADATA, **{"control.horizon": 15})) as server:
        node = make_node(server=server.url)
        with pytest.raises(UserError, match=r"control\.horizon is 16, but 15 in the checkpoint"):
            node.start()


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"server": "http://gpu"}, "server 'http://gpu' is no address"),
        ({"server": "ws://127.0.0.1:9", "embodiment": ""}, "parameter 'embodiment'"),
        ({"server": "ws://127.0.0.1:9", "server_token_file": "/nowhere"}, "token file /nowhere"),
        ({"server": "ws://127.0.0.1:9", "server_pictures": "png"}, "server_pictures 'png'"),
    ],
)
def test_mistakes_are_one_line(parameters: dict[str, object], told: str, make_node: Callable) -> None:
    node = make_node(**parameters)
    with pytest.raises(UserError, match=told) as caught:
        node.start()
    assert "\n" not in str(caught.value)


def test_the_starters_pass_the_server_on(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    graph = build_graph("aloha", server="wss://gpu:8000", server_token_file=str(token))
    by_name = {spec.name: spec.parameters for spec in graph}
    policy = by_name["policy_node"]
    assert policy["server"] == "wss://gpu:8000" and policy["server_token_file"] == str(token)
    assert "checkpoint" not in policy and by_name["recorder_node"]["checkpoint"] == "wss://gpu:8000"
    assert "server" not in {spec.name: spec.parameters for spec in build_graph("aloha")}["policy_node"]
    for arguments, told in (
        ({"server": "gpu:8000"}, "server 'gpu:8000'"),
        ({"server_token_file": str(token)}, "needs a server"),
        ({"server": "ws://gpu:8000", "server_ca_file": "/nowhere"}, "server_ca_file '/nowhere'"),
    ):
        with pytest.raises(UserError, match=told):
            build_graph("aloha", **arguments)


def test_a_lost_server_makes_the_robot_hold_and_it_goes_on_when_the_server_is_back(
    watcher: Watcher, tmp_path: Path
) -> None:
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    server = fake_server(tmp_path / "server.log")
    try:
        url = server.wait_ready()
        with running(
            tmp_path, server=url, instruction="pick up the red cube", episode_timeout_s=600.0, record=False
        ) as graph:

            def mode() -> str:
                return watcher.status.get("controller", {}).get("mode", "")

            def policy(key: str) -> str:
                return watcher.status.get("policy", {}).get(key, "")

            watcher.wait_for(lambda: mode() == "running", TIMEOUT_S, "motion")
            assert "libtorch" not in Path(f"/proc/{graph.processes['policy_node'].pid}/maps").read_text()
            server.close()  # SIGKILL
            reason = f"holding: server {url} is away: "
            watcher.wait_for(lambda: reason in policy("message"), TIMEOUT_S, "the policy's reason")

            def held() -> bool:  # on a busy machine a late state may be its first reason
                return mode() == "holding" and "watchdog" in watcher.status["controller"]["message"]

            watcher.wait_for(held, TIMEOUT_S, "the controller to hold for want of chunks")
            server = fake_server(tmp_path / "server.log", int(url.rsplit(":", 1)[1]))
            server.wait_ready()
            watcher.wait_for(lambda: policy("state") == "running", TIMEOUT_S, "chunks after it")
            watcher.wait_for(lambda: mode() == "running", TIMEOUT_S, "motion after recovery")
            watcher.wait_for(lambda: policy("transport_p50_ms"), TIMEOUT_S, "the latencies")
            assert all(process.poll() is None for process in graph.processes.values())
    finally:
        server.close()
