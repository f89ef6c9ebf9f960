"""A policy server in a thread or a process, and an engine whose answers say which question they belong to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.interfaces import ActionChunk, Observation, Prediction, Request
from qwen_vla_core.serving.metadata import RobotMetadata, ServerMetadata
from qwen_vla_core.serving.server import PolicyServer, ServerConfig

ROOT = Path(__file__).parents[2]
ROBOT = load_embodiment("aloha")
WIDOWX = load_embodiment("widowx")
TIMEOUT_S = 30.0  # how long until a wait has failed, on any machine
METADATA = ServerMetadata("fake", "0123456789abcdef", {r.name: RobotMetadata.of(r) for r in (ROBOT, WIDOWX)}, 4, 64)


class FakeEngine:
    """Answers with actions that hold the state's first value; ``gate`` closed makes it wait."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self.calls: list[list[Request]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.steps_seen: list[int | None] = []

    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        self.calls.append(list(requests))
        self.steps_seen.append(self.steps)
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        if any(request.observation.instruction == "fail" for request in requests):
            raise RuntimeError("no memory left")
        return [self._answer(request) for request in requests]

    @staticmethod
    def _answer(request: Request) -> Prediction:
        robot = ROBOT if request.embodiment == ROBOT.name else WIDOWX
        actions = np.full((robot.control.horizon, len(robot.channels)), request.observation.state[0])
        chunk = ActionChunk(actions, robot.channels, request.observation.stamp_ns, robot.period_s)
        return Prediction(chunk, {"preprocess": 0.001, "backbone": 0.002, "denoise": 0.003})


def observation(value: float = 0.0, robot: Embodiment = ROBOT, instruction: str = "pick up the cube") -> Observation:
    """Pictures of noise; ``value`` comes back in the fake engine's actions."""
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (12, 16, 3), dtype=np.uint8) for view in robot.views}
    return Observation(images, np.full(len(robot.state_channels), value), instruction, stamp_ns=7)


def request(value: float = 0.0, robot: Embodiment = ROBOT, **changes: Any) -> Request:
    """One question of a robot."""
    return Request(observation(value, robot), robot.name, **changes)


@contextlib.contextmanager
def serving(
    engine: Any = None, metadata: ServerMetadata = METADATA, before: Callable[[], None] = lambda: None, **config: Any
) -> Iterator[PolicyServer]:
    """A server on a free loopback port, in a thread of this process; drained at the end after ``before()``."""
    server = PolicyServer(engine or FakeEngine(), metadata, ServerConfig(**{"port": 0, **config}))
    up = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.run(up.set)), daemon=True)
    thread.start()
    assert up.wait(TIMEOUT_S), "the server does not come up"
    try:
        yield server
    finally:
        before()
        if isinstance(engine, FakeEngine):
            engine.gate.set()
        server.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server does not end"


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Waits until ``condition()`` is true and returns its value."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.005)
    return value


def get(url: str, token: str = "") -> tuple[int, dict[str, Any]]:
    """(status, JSON) of a plain request to a server's address."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = urllib.request.Request(url.replace("ws://", "http://", 1), headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class ServerProcess:
    """A server in a process of its own, to be killed; ``url`` is known once it serves."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *command, "--json"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def wait_ready(self) -> str:
        """Blocks until it serves; returns its address."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended: {self.log.read_text()[-3000:]}"
        return str(json.loads(line)["url"])

    def close(self) -> None:
        """Kills it, whatever it does."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


def fake_server(log: Path, port: int = 0) -> ServerProcess:
    """This file as a process: a server without a model."""
    return ServerProcess([__file__, "--port", str(port)], log)


def real_server(log: Path, checkpoint: Path, *flags: str) -> ServerProcess:
    """``qwen-vla serve``."""
    return ServerProcess(["-m", "qwen_vla_core.cli", "serve", "--checkpoint", str(checkpoint), *flags], log)


def without(metadata: ServerMetadata, **changes: Any) -> ServerMetadata:
    """Metadata of a checkpoint that learned something else about the first robot."""
    robot = metadata.robots[ROBOT.name]
    contract = {**robot.contract, **changes}
    other = dataclasses.replace(robot, policy_hash="other", contract=contract)
    return dataclasses.replace(metadata, robots={**metadata.robots, ROBOT.name: other})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    lonely = PolicyServer(FakeEngine(), METADATA, ServerConfig(port=parser.parse_args().port))
    asyncio.run(lonely.run(lambda: print(json.dumps({"url": lonely.url}), flush=True)))
