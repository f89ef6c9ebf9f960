"""A server that is away, slow or killed: the client says so at once, and is back when it is."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_support import ROBOT, TIMEOUT_S, FakeEngine, eventually, fake_server, get, request, serving
from websockets.sync.server import ServerConnection, serve

from qwen_vla_core.errors import UserError
from qwen_vla_core.serving.client import RemoteEngine
from qwen_vla_core.serving.protocol import pack
from qwen_vla_core.serving.trouble import ServerAway, ServerRefused, Superseded


@pytest.mark.parametrize("url", ["", "host:8000", "http://host:8000", "ws://", "ws://host:port", "ws://[::1"])
def test_an_impossible_address_is_named(url: str) -> None:
    with pytest.raises(UserError, match="is no address like ws://host:8000"):
        RemoteEngine(url, ROBOT)


def test_impossible_options_are_named() -> None:
    with pytest.raises(UserError, match="server_pictures 'png' is none of auto, raw"):
        RemoteEngine("ws://127.0.0.1:1", ROBOT, pictures="png")
    with pytest.raises(UserError, match="time-out"):
        RemoteEngine("ws://127.0.0.1:1", ROBOT, timeout_s=0)


def test_killed_and_restarted_the_server_is_found_again(tmp_path: Path) -> None:
    server = fake_server(tmp_path / "log")
    url = server.wait_ready()
    with RemoteEngine(url, ROBOT, timeout_s=TIMEOUT_S) as client, ThreadPoolExecutor() as pool:
        client.wait_ready(TIMEOUT_S)
        assert client.predict([request(1.0)])[0].chunk.actions_hc[0, 0] == 1.0
        server.process.send_signal(signal.SIGSTOP)  # so that a request is under way when it dies
        waiting = pool.submit(client.predict, [request(2.0)])
        eventually(lambda: client._pending, "a request under way")
        server.close()
        with pytest.raises(ServerAway, match="is away: the connection broke"):
            waiting.result(TIMEOUT_S)
        eventually(lambda: "connection refused" in client.trouble, "the next attempt")
        with pytest.raises(ServerAway, match="is away: connection refused"):
            client.predict([request(3.0)])
        again = fake_server(tmp_path / "log", int(url.rsplit(":", 1)[1]))
        again.wait_ready()
        client.wait_ready(TIMEOUT_S)
        assert client.predict([request(4.0)])[0].chunk.actions_hc[0, 0] == 4.0
        assert client.statistics.connections == 2 and client.trouble == ""
        again.close()


def test_a_slow_answer_is_given_up_withdrawn_and_never_taken_for_the_next() -> None:
    engine = FakeEngine()
    with serving(engine) as server, RemoteEngine(server.url, ROBOT, timeout_s=0.3) as client:
        client.wait_ready(TIMEOUT_S)
        engine.gate.clear()
        for value in (1.0, 2.0):  # the first is being computed, the second waits
            with pytest.raises(ServerAway, match=r"no answer within 0\.3 s"):
                client.predict([request(value)])
        eventually(lambda: get(server.url + "/metrics")[1]["totals"]["superseded"] == 1, "the withdrawal")
        engine.gate.set()
        eventually(lambda: client.statistics.late == 2, "the late answers")
        client._timeout_s = TIMEOUT_S
        assert client.predict([request(3.0)])[0].chunk.actions_hc[0, 0] == 3.0
        assert [call[0].observation.state[0] for call in engine.calls] == [1.0, 3.0]
        assert client.statistics.timeouts == 2 and client.statistics.connections == 1


def test_a_new_epoch_ends_the_wait_at_once_and_older_answers_are_dropped() -> None:
    engine = FakeEngine()
    with (
        serving(engine) as server,
        RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as client,
        ThreadPoolExecutor() as pool,
    ):
        client.wait_ready(TIMEOUT_S)
        engine.gate.clear()
        waiting = pool.submit(client.predict, [request(1.0)])
        assert engine.entered.wait(TIMEOUT_S)
        assert client.new_epoch() == 1
        with pytest.raises(Superseded):
            waiting.result(TIMEOUT_S)
        engine.gate.set()
        assert client.predict([request(2.0)])[0].chunk.actions_hc[0, 0] == 2.0
        eventually(lambda: client.statistics.late == 1, "the older answer")


def test_closing_ends_a_wait_and_later_calls_say_so() -> None:
    engine = FakeEngine()
    with serving(engine) as server, ThreadPoolExecutor() as pool:
        client = RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S)
        client.wait_ready(TIMEOUT_S)
        engine.gate.clear()
        waiting = pool.submit(client.predict, [request(1.0)])
        assert engine.entered.wait(TIMEOUT_S)
        client.close()
        with pytest.raises(ServerAway, match="was closed"):
            waiting.result(TIMEOUT_S)
        with pytest.raises(ServerAway, match="was closed"):
            client.predict([request(2.0)])
        client.new_epoch()
        client.close()


@pytest.mark.parametrize(
    ("greeting", "error", "told"),
    [
        (pack({"type": "metadata", "protocol": 99}), ServerRefused, "protocol version 99"),
        (pack({"type": "metadata", "protocol": 1}), ServerAway, "'embodiments' is missing"),
        (pack({"robot": "crane"}), ServerAway, "not this kind of server"),
        (b"\xc1", ServerAway, "not a valid msgpack"),
        ("hello", ServerAway, "text frame"),
    ],
)
def test_another_kind_of_server_is_told_apart(greeting: bytes | str, error: type[ServerAway], told: str) -> None:
    def greet(websocket: ServerConnection) -> None:
        websocket.send(greeting)
        websocket.recv(TIMEOUT_S)

    with serve(greet, "127.0.0.1", 0) as server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever)
        port = server.socket.getsockname()[1]
        with RemoteEngine(f"ws://127.0.0.1:{port}", ROBOT) as client:
            eventually(lambda: client._attempts, "an attempt")
            with pytest.raises(error, match=told):
                client.predict([request()])
        server.shutdown()
