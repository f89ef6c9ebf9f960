"""The server over real sockets: who gets in, what a bad client costs the others, and how it ends."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_support import (
    METADATA,
    ROBOT,
    TIMEOUT_S,
    WIDOWX,
    FakeEngine,
    eventually,
    get,
    observation,
    request,
    serving,
    without,
)
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Request
from qwen_vla_core.serving.access import authorised, check_binding, read_token, server_tls
from qwen_vla_core.serving.client import RemoteEngine
from qwen_vla_core.serving.metadata import hello_message
from qwen_vla_core.serving.protocol import pack, unpack
from qwen_vla_core.serving.requests import encode_request
from qwen_vla_core.serving.server import PolicyServer, ServerConfig
from qwen_vla_core.serving.trouble import ServerAway, ServerRefused, Superseded

TOKEN = "correct-horse-battery-staple"
OPENED = contextlib.ExitStack()
HELLO = hello_message({ROBOT.name: ROBOT}, "raw")


def plain(url: str, **options: Any) -> ClientConnection:
    """A bare websocket, to misbehave with; closed after the test."""
    return OPENED.enter_context(connect(url, compression=None, max_size=None, proxy=None, **options))


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    OPENED.close()


def question(number: int, value: float = 0.0, epoch: int = 0) -> bytes:
    """A request as bytes."""
    entry = encode_request(request(value), METADATA)
    return pack({"type": "predict", "id": number, "epoch": epoch, "steps": None, "requests": [entry]})


def greeted(url: str, **options: Any) -> ClientConnection:
    """A bare websocket after the handshake."""
    websocket = plain(url, **options)
    assert unpack(websocket.recv(TIMEOUT_S))["type"] == "metadata"
    websocket.send(pack(HELLO))
    assert unpack(websocket.recv(TIMEOUT_S))["type"] == "welcome"
    return websocket


def first(engine: RemoteEngine, value: float, **changes: Any) -> float:
    """The number that comes back for this one."""
    (prediction,) = engine.predict([request(value, **changes)])
    return float(prediction.chunk.actions_hc[0, 0])


def test_two_clients_share_one_inference_and_are_counted_apart() -> None:
    engine = FakeEngine()
    with (
        serving(engine) as server,
        RemoteEngine(server.url, ROBOT, name="left", timeout_s=TIMEOUT_S) as left,
        RemoteEngine(server.url, WIDOWX, name="right", timeout_s=TIMEOUT_S) as right,
        ThreadPoolExecutor() as pool,
    ):
        for client in (left, right):
            client.wait_ready(TIMEOUT_S)
        engine.gate.clear()
        busy = pool.submit(first, left, 9.0)
        assert engine.entered.wait(TIMEOUT_S)
        left.new_epoch()  # its robot was told something else: nobody waits for the first answer
        with pytest.raises(Superseded):
            busy.result(TIMEOUT_S)
        both = [pool.submit(first, left, 1.0), pool.submit(first, right, 2.0, robot=WIDOWX)]
        eventually(lambda: get(server.url + "/healthz")[1]["waiting"] == 2, "both to wait")
        engine.gate.set()
        assert [future.result(TIMEOUT_S) for future in both] == [1.0, 2.0]
        assert [len(call) for call in engine.calls] == [1, 2]
        status, metrics = get(server.url + "/metrics")
        assert status == 200 and metrics["batches"] == {"1": 1, "2": 1} and metrics["checkpoint"] == "fake 0123456789ab"
        of = {entry["name"]: entry for entry in metrics["per_client"]}
        assert (of["left"]["requests"], of["left"]["epoch"], of["left"]["embodiments"]) == (2, 1, ["aloha"])
        assert (of["right"]["requests"], of["right"]["answered"], of["right"]["epoch"]) == (1, 1, 0)
        assert of["right"]["largest_batch"] == 2 and of["right"]["bytes_in"] > 0
        assert 0 < of["right"]["queue_p50_ms"] <= of["right"]["queue_p95_ms"] <= of["right"]["total_p95_ms"]
        assert left.statistics.superseded == 1


def test_several_requests_of_one_client_are_split_at_the_servers_limit() -> None:
    engine = FakeEngine()
    with serving(engine, max_batch=2) as server, RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as client:
        client.wait_ready(TIMEOUT_S)
        client.steps = 3
        answers = client.predict([request(float(i)) for i in range(5)])
        assert [float(p.chunk.actions_hc[0, 0]) for p in answers] == [0, 1, 2, 3, 4]
        assert [len(call) for call in engine.calls] == [2, 2, 1] and engine.steps_seen == [3, 3, 3]
        assert {"queue", "transport", "backbone"} <= set(answers[0].seconds)
        assert client.predict([]) == []


# --- who gets in -----------------------------------------------------------------------------------------------------


def test_the_token_is_needed_where_there_is_one_and_health_is_for_everybody() -> None:
    with serving(token=TOKEN) as server:
        for wrong in ("", "wrong-horse-battery-staple", TOKEN + "x"):
            with RemoteEngine(server.url, ROBOT, token=wrong) as client:
                with pytest.raises(ServerRefused, match="refused the token"):
                    client.wait_ready(TIMEOUT_S)
                with pytest.raises(ServerAway, match="refused the token"):  # and goes on saying so
                    client.predict([request()])
        with RemoteEngine(server.url, ROBOT, token=TOKEN, timeout_s=TIMEOUT_S) as client:
            client.wait_ready(TIMEOUT_S)
            assert first(client, 1.0) == 1.0
        assert get(server.url + "/healthz")[0] == 200
        assert get(server.url + "/metrics")[0] == 401 and get(server.url + "/metrics", TOKEN)[0] == 200
        # openpi's clients call it an API key.
        plain(server.url, additional_headers={"Authorization": f"Api-Key {TOKEN}"}).close()
        twice = [("Authorization", f"Bearer {TOKEN}")] * 2
        with pytest.raises(InvalidStatus, match="401"):
            plain(server.url, additional_headers=twice)


def test_only_loopback_is_served_without_a_token() -> None:
    for host in ("0.0.0.0", "", "::", "192.0.2.1"):
        with pytest.raises(UserError, match="give a token"):
            PolicyServer(FakeEngine(), METADATA, ServerConfig(host=host))
        with pytest.raises(UserError, match="at least 16"):
            check_binding(host, "short")
        check_binding(host, TOKEN)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_binding(host, "")
    with pytest.raises(UserError, match=r"--host no\.such\.host"):
        check_binding("no.such.host.invalid", "")


def test_tokens_come_from_flag_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token(token_file=str(file)) == TOKEN == read_token(TOKEN)
    monkeypatch.setenv("QWEN_VLA_TOKEN", "from-the-environment")
    assert read_token() == "from-the-environment" and read_token(TOKEN) == TOKEN
    file.write_text("\n")
    for arguments, told in (
        (("", str(file)), "is empty"),
        (("", str(tmp_path / "none")), "cannot be read"),
        ((TOKEN, str(file)), "one of them"),
        (("two words", ""), "printable ASCII"),
        (("schlüssel", ""), "printable ASCII"),
    ):
        with pytest.raises(UserError, match=told):
            read_token(*arguments)
    assert authorised(f"bearer {TOKEN}", TOKEN) and not authorised(f"Basic {TOKEN}", TOKEN)
    assert not authorised("Bearer \udce9", TOKEN) and not authorised(TOKEN, TOKEN) and authorised(None, "")


def test_tls_with_a_self_made_certificate(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    made += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    with serving(tls=server_tls(str(cert), str(key))) as server:
        assert server.url.startswith("wss://127.0.0.1:")
        with RemoteEngine(server.url, ROBOT, ca_file=str(cert), timeout_s=TIMEOUT_S) as client:
            client.wait_ready(TIMEOUT_S)
            assert first(client, 1.0) == 1.0
        with RemoteEngine(server.url, ROBOT) as client, pytest.raises(ServerAway, match="certificate"):
            eventually(lambda: client._attempts, "an attempt")
            client.predict([request()])
        with pytest.raises((OSError, InvalidHandshake)):
            plain(server.url.replace("wss", "ws"))
    for arguments, told in ((("", str(key)), "belong together"), ((str(key), str(cert)), "--tls-cert")):
        with pytest.raises(UserError, match=told):
            server_tls(*arguments)
    with pytest.raises(UserError, match="is for wss"):
        RemoteEngine("ws://127.0.0.1:1", ROBOT, ca_file=str(cert))
    assert isinstance(server_tls(str(cert), str(key)), ssl.SSLContext)


def test_pages_in_browsers_and_wrong_paths_stay_outside() -> None:
    with serving() as server:
        with pytest.raises(InvalidStatus, match="403"):
            plain(server.url, origin="http://evil.example")  # type: ignore[arg-type]
        with pytest.raises(InvalidStatus, match="404"):
            plain(server.url + "/admin")
        assert get(server.url + "/nothing")[0] == 404


def test_one_client_too_many_is_told_and_gets_in_when_there_is_room() -> None:
    with serving(max_clients=1) as server:
        with RemoteEngine(server.url, ROBOT) as client:
            client.wait_ready(TIMEOUT_S)
            late = RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S)
            eventually(lambda: late._attempts, "an attempt")
            with pytest.raises(ServerAway, match="the server is full: 1 clients"):
                late.predict([request()])
        late.wait_ready(TIMEOUT_S)
        assert first(late, 1.0) == 1.0
        late.close()


# --- a robot that does not fit ---------------------------------------------------------------------------------------


def test_another_contract_is_refused_by_either_side_naming_the_field(tmp_path: Path) -> None:
    path = tmp_path / "edited.yaml"
    path.write_text(ROBOT.source_text.replace("horizon: 16", "horizon: 15"))
    told = "control.horizon is 15, but 16 in the checkpoint"
    with serving() as server:
        with RemoteEngine(server.url, load_embodiment(path)) as client:
            with pytest.raises(ServerRefused, match=told):
                client.wait_ready(TIMEOUT_S)
            with pytest.raises(ServerAway, match=told):
                client.predict([request()])
        websocket = plain(server.url)
        websocket.recv(TIMEOUT_S)
        websocket.send(pack(hello_message({ROBOT.name: load_embodiment(path)}, "raw")))
        error = unpack(websocket.recv(TIMEOUT_S))
        assert error["code"] == "contract" and told in error["message"]
        with pytest.raises(ConnectionClosed) as caught:
            websocket.recv(TIMEOUT_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008


def test_a_server_restarted_with_another_checkpoint_is_refused_and_the_right_one_taken_again() -> None:
    with serving() as server:
        client = RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S)
        client.wait_ready(TIMEOUT_S)
        port = server.port
    with serving(metadata=without(METADATA, **{"control.frequency_hz": 25.0}), port=port):
        eventually(lambda: "control.frequency_hz is" in client.trouble, "the refusal")
        assert client.checkpoint_id == "fake 0123456789ab"
    with serving(port=port):
        eventually(lambda: client.trouble == "", "the right server")
        assert first(client, 1.0) == 1.0 and client.statistics.connections == 2
    client.close()


# --- clients that misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "told", "code"),
    [
        ("hello", "text frame", 1007),
        (b"\xc1garbage", "not a valid msgpack", 1007),
        (pack([1, 2]), "a message is a map", 1007),
        (pack({"type": "predict", "id": 1}), "expected 'hello'", 1007),
        (pack({**HELLO, "protocol": 0}), "protocol version 0", 1008),
        (pack({**HELLO, "embodiments": {}}), "names no robot", 1007),
        (pack({"type": "hello", "protocol": 1}), "'embodiments' is missing", 1007),
    ],
)
def test_garbage_costs_its_sender_the_connection_and_nobody_else_anything(data: Any, told: str, code: int) -> None:
    with serving() as server, RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as good:
        good.wait_ready(TIMEOUT_S)
        websocket = plain(server.url)
        websocket.recv(TIMEOUT_S)
        websocket.send(data)
        error = unpack(websocket.recv(TIMEOUT_S))
        assert error["type"] == "error" and told in error["message"] and "\n" not in error["message"]
        with pytest.raises(ConnectionClosed) as caught:
            websocket.recv(TIMEOUT_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == code
        assert first(good, 1.0) == 1.0
        assert good.statistics.connections == 1


def test_garbage_after_the_handshake_ends_it_too_and_a_bad_request_does_not() -> None:
    with serving() as server:
        websocket = greeted(server.url)
        websocket.send(pack({"type": "predict", "id": 5, "epoch": 0, "steps": None, "requests": [{"embodiment": "x"}]}))
        error = unpack(websocket.recv(TIMEOUT_S))
        assert (error["id"], error["code"]) == (5, "request") and "'x' was not in this client's hello" in error[
            "message"
        ]
        for steps, requests in ((0, [1]), (None, []), (None, [1] * 9)):
            message = {"type": "predict", "id": 6, "epoch": 0, "steps": steps, "requests": requests}
            websocket.send(pack(message))
            assert unpack(websocket.recv(TIMEOUT_S))["code"] == "request"
        websocket.send(question(7, 2.0))
        assert unpack(websocket.recv(TIMEOUT_S))["predictions"][0]["actions_hc"][0, 0] == 2.0
        websocket.send(pack({"type": "dance"}))
        assert "unexpected message of type 'dance'" in unpack(websocket.recv(TIMEOUT_S))["message"]
        with pytest.raises(ConnectionClosed):
            websocket.recv(TIMEOUT_S)


def test_an_oversized_message_is_refused_before_it_is_sent_and_before_it_is_read() -> None:
    with serving(max_message_bytes=5000) as server, RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as client:
        client.wait_ready(TIMEOUT_S)
        rng = np.random.default_rng(0)
        images = {view: rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for view in ROBOT.views}
        seen = observation()
        large = Request(type(seen)(images, seen.state, "go"), ROBOT.name)
        with pytest.raises(UserError, match="bytes, its limit is 5000"):
            client.predict([large])
        websocket = greeted(server.url)
        websocket.send(bytes(6000))
        with pytest.raises(ConnectionClosed) as caught:
            websocket.recv(TIMEOUT_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        assert first(client, 1.0) == 1.0


def test_silent_and_half_sent_clients_do_not_keep_the_others_waiting() -> None:
    with serving() as server, RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as good:
        good.wait_ready(TIMEOUT_S)
        silent, half, deaf = plain(server.url), greeted(server.url), greeted(server.url, max_queue=1)
        half.socket.sendall(b"\x82\xff" + (2**20).to_bytes(8, "big") + b"mask" + bytes(1000))  # 1 kB of a megabyte
        for number in range(20):  # never reads what it asked for
            deaf.send(question(number))
        for value in range(5):
            assert first(good, float(value)) == value
        for websocket in (silent, half, deaf):
            websocket.socket.close()


def test_a_client_that_floods_is_refused_beyond_a_few_requests_and_a_new_epoch_clears_its_queue() -> None:
    engine = FakeEngine()
    with serving(engine) as server:
        engine.gate.clear()
        websocket = greeted(server.url)
        websocket.send(question(0))
        assert engine.entered.wait(TIMEOUT_S)  # so that the others have to queue
        for number in range(1, 6):
            websocket.send(question(number))
        codes = [unpack(websocket.recv(TIMEOUT_S)) for _ in range(2)]
        assert [(e["id"], e["code"]) for e in codes] == [(4, "flooded"), (5, "flooded")]
        websocket.send(question(6, 6.0, epoch=1))
        codes = [unpack(websocket.recv(TIMEOUT_S)) for _ in range(3)]
        assert {(e["id"], e["code"]) for e in codes} == {(1, "superseded"), (2, "superseded"), (3, "superseded")}
        websocket.send(question(7, epoch=0))
        assert unpack(websocket.recv(TIMEOUT_S))["code"] == "superseded"
        engine.gate.set()
        answers = [unpack(websocket.recv(TIMEOUT_S)) for _ in range(2)]
        assert {a["id"]: a["epoch"] for a in answers} == {0: 0, 6: 1}
        assert [[r.observation.state[0] for r in call] for call in engine.calls] == [[0.0], [6.0]]


def test_a_failing_engine_is_an_error_of_that_request_only() -> None:
    with serving() as server, RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S) as client:
        client.wait_ready(TIMEOUT_S)
        with pytest.raises(RuntimeError, match="inference failed: no memory left"):
            client.predict([Request(observation(instruction="fail"), ROBOT.name)])
        seen = observation()
        blind = type(seen)({}, seen.state, seen.instruction)
        with pytest.raises(UserError, match=f"view '{ROBOT.views[0]}' of embodiment aloha is missing"):
            client.predict([Request(blind, ROBOT.name)])
        with pytest.raises(UserError, match="'widowx' is none of aloha"):
            client.predict([request(robot=WIDOWX)])
        assert first(client, 1.0) == 1.0


# --- the end ---------------------------------------------------------------------------------------------------------


def test_draining_finishes_what_was_begun_and_takes_nothing_new() -> None:
    engine = FakeEngine()
    seen: dict[str, Any] = {}
    with ThreadPoolExecutor() as pool, serving(engine) as server:
        websocket = greeted(server.url)
        client = RemoteEngine(server.url, ROBOT, timeout_s=TIMEOUT_S)
        client.wait_ready(TIMEOUT_S)
        engine.gate.clear()
        in_flight = pool.submit(first, client, 5.0)
        assert engine.entered.wait(TIMEOUT_S)
        server.stop()
        seen["health"] = eventually(lambda: (r := get(server.url + "/healthz"))[0] == 503 and r, "draining")
        with pytest.raises(InvalidStatus, match="503"):
            plain(server.url)
        websocket.send(question(1))
        assert unpack(websocket.recv(TIMEOUT_S))["code"] == "draining"
        engine.gate.set()
        assert in_flight.result(TIMEOUT_S) == 5.0
        with pytest.raises(ConnectionClosed) as caught:
            websocket.recv(TIMEOUT_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
        eventually(lambda: "away" in client.trouble, "the client to notice")
        client.close()
    assert seen["health"][1]["status"] == "draining"


def test_a_hung_engine_does_not_keep_a_server_told_twice_from_ending() -> None:
    engine = FakeEngine()
    threads = threading.active_count()
    with serving(engine, before=lambda: server.stop(), drain_timeout_s=3600.0) as server:
        engine.gate.clear()
        websocket = greeted(server.url)
        websocket.send(question(1))
        assert engine.entered.wait(TIMEOUT_S)
    assert threading.active_count() <= threads + 2
