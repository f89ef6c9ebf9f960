"""``qwen-vla serve`` with a real model: the same chunks as in this process, and a clean end."""

from __future__ import annotations

import dataclasses
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from serving_support import TIMEOUT_S, ServerProcess, get, real_server

from qwen_vla_core.cli import main
from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.serving.client import RemoteEngine

START_S = 120.0


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    started = real_server(tmp_path_factory.mktemp("serve") / "log", Path(DEFAULT_CHECKPOINT), "--port", "0")
    yield started
    started.close()


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    torch.set_num_threads(1)
    return LocalEngine(load_checkpoint(resolve_checkpoint(DEFAULT_CHECKPOINT)))


@pytest.fixture(scope="module")
def url(process: ServerProcess, local: LocalEngine) -> str:
    return process.wait_ready()


def ask(local: LocalEngine, robot: str, seed: int) -> Request:
    """Large pictures, as a camera gives them, and the sampler's noise."""
    spec = local.policy.embodiment(robot)
    rng = np.random.default_rng(seed)
    images = {c.view: rng.integers(0, 256, (c.size[1], c.size[0], 3), dtype=np.uint8) for c in spec.cameras}
    state = rng.uniform(-0.1, 0.1, len(spec.state_channels))
    noise = rng.normal(size=(spec.control.horizon, local.policy.config.decoder.channels)).astype(np.float32)
    return Request(Observation(images, state, "pick up the red cube", 7), robot, noise_hk=noise)


@pytest.mark.parametrize("robot", ["aloha", "widowx"])
@pytest.mark.parametrize("pictures", ["raw", "auto"])
def test_the_servers_chunk_is_the_local_one_bit_for_bit(
    url: str, local: LocalEngine, robot: str, pictures: str
) -> None:
    request = ask(local, robot, 1)
    with RemoteEngine(url, local.policy.embodiment(robot), pictures=pictures, timeout_s=TIMEOUT_S) as remote:
        metadata = remote.wait_ready(TIMEOUT_S)
        (there,), (here,) = remote.predict([request]), local.predict([request])
        assert np.array_equal(there.chunk.actions_hc, here.chunk.actions_hc)
        assert dataclasses.replace(there.chunk, actions_hc=here.chunk.actions_hc) == here.chunk
        assert metadata.flow_steps == local.policy.config.flow.steps and metadata.robots[robot].stats_hash
        assert metadata.reduction is not None  # or ``auto`` would be ``raw``, and this test nothing
        reduced = metadata.reduction.target(480, 640)
        pixels = len(request.observation.images) * (reduced[0] * reduced[1] if pictures == "auto" else 640 * 480) * 3
        assert pixels < remote.statistics.bytes_sent < pixels + 20_000
        remote.steps = local.steps = 1
        (there,), (here,) = remote.predict([request]), local.predict([request])
        local.steps = None
        assert np.array_equal(there.chunk.actions_hc, here.chunk.actions_hc)


def test_two_requests_in_one_batch_equal_the_local_batch_and_jpeg_is_only_near(url: str, local: LocalEngine) -> None:
    robot = local.policy.embodiment("aloha")
    requests = [ask(local, "aloha", 2), ask(local, "aloha", 3)]
    wanted = [prediction.chunk.actions_hc for prediction in local.predict(requests)]
    with RemoteEngine(url, robot, timeout_s=TIMEOUT_S) as remote, ThreadPoolExecutor() as pool:
        remote.wait_ready(TIMEOUT_S)
        for prediction, actions in zip(remote.predict(requests), wanted, strict=True):
            assert np.array_equal(prediction.chunk.actions_hc, actions)
        apart = [pool.submit(remote.predict, [request]) for request in requests]  # batched or not
        for future, actions in zip(apart, wanted, strict=True):
            assert np.allclose(future.result(TIMEOUT_S)[0].chunk.actions_hc, actions, atol=1e-4)
    with RemoteEngine(url, robot, timeout_s=TIMEOUT_S, pictures="jpeg", jpeg_quality=95) as lossy:
        lossy.wait_ready(TIMEOUT_S)
        actions = lossy.predict(requests[:1])[0].chunk.actions_hc
        assert not np.array_equal(actions, wanted[0]) and np.abs(actions - wanted[0]).max() < 0.5


def test_sigterm_drains_and_exits_cleanly(url: str, process: ServerProcess, local: LocalEngine) -> None:
    assert get(url + "/healthz")[1]["status"] == "ok"
    with RemoteEngine(url, local.policy.embodiment("aloha"), name="last", timeout_s=TIMEOUT_S) as remote:
        remote.wait_ready(TIMEOUT_S)
        remote.predict([ask(local, "aloha", 4)])
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(TIMEOUT_S) == 0
    log = process.log.read_text()
    assert "(last at 127.0.0.1:" in log and "1 requests, 1 answered" in log and "p50/p95 ms: queue" in log
    assert "draining: 1 clients" in log and "Traceback" not in log, log


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "give a token"),
        (["--host", "0.0.0.0", "--token", "short"], "at least 16"),
        (["--token-file", "/nowhere/token"], "token file /nowhere/token cannot be read"),
        (["--tls-cert", "cert.pem"], "belong together"),
        (["--port", "70000"], "--port 70000"),
        (["--max-batch", "0"], "--max-batch 0: from 1 to 256"),
        (["--checkpoint", "nothing-like-it"], "shipped checkpoints"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN_VLA_TOKEN", raising=False)
    assert main(["serve", *flags]) == 2
    assert told in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import asyncio

    from serving_support import METADATA, FakeEngine

    from qwen_vla_core.errors import UserError
    from qwen_vla_core.serving.server import PolicyServer, ServerConfig

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = PolicyServer(FakeEngine(), METADATA, ServerConfig(port=taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"cannot serve on --host 127\.0\.0\.1 --port"):
            asyncio.run(server.run())
