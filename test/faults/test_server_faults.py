"""The policy server of a moving robot dies, freezes and comes back; the robot holds, then goes on by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_bench import INSTRUCTION, TIMEOUT_S, TOLERANCE_MS, WATCHDOG_MS, Bench, robot_yaml
from fault_support import Fault, Ledger

from qwen_vla_ros.bringup import build_graph

pytest.importorskip("mujoco", reason="the simulator is not installed")
HOLD_MS = WATCHDOG_MS + 2 * TOLERANCE_MS
BACK_MS = 60_000  # Python, torch and a model have to load


class ServedBench(Bench):
    """A simulated robot whose policy node asks a server."""

    server: subprocess.Popen[bytes]
    serve: Callable[[], subprocess.Popen[bytes]]

    def revive(self) -> None:
        if self.server.poll() is not None:
            self.server = self.serve()
        super().revive()


@pytest.fixture(scope="module")
def bench(
    make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory, checkpoint: Path
) -> Iterator[ServedBench]:
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "qwen_vla_core.cli", "serve", "--checkpoint", str(checkpoint)]
        with (folder / "server.log").open("ab") as log:
            return subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)

    specs = build_graph(
        str(robot_yaml(folder)),
        server=f"ws://127.0.0.1:{port}",
        instruction=INSTRUCTION,
        episode_timeout_s=3600.0,
        run_dir=str(folder / "rollouts"),
    )
    made = make_bench(specs, kind=ServedBench, drivers=False)
    made.serve, made.server = serve, serve()
    yield made
    made.server.kill()
    made.server.wait()


def held_ms(b: ServedBench, since_s: float) -> float:
    held = b.told("controller", "watchdog", since_s)
    b.rested_s(held.at_s)
    return (held.at_s - since_s) * 1e3


def server_killed(b: ServedBench) -> float:
    now_s = time.time()
    b.server.kill()
    b.server.wait(timeout=TIMEOUT_S)
    took_ms = held_ms(b, now_s)
    b.told("policy", "is away", now_s)
    again_s = time.time()
    b.server = b.serve()
    b.told("controller", "running", again_s)
    return took_ms


def server_frozen(b: ServedBench) -> float:
    now_s = time.time()
    os.kill(b.server.pid, signal.SIGSTOP)
    try:
        took_ms = held_ms(b, now_s)
        b.told("policy", "server", now_s)
    finally:
        os.kill(b.server.pid, signal.SIGCONT)
    b.told("controller", "running", time.time())
    return took_ms


def server_restarted(b: ServedBench) -> float:
    """Ended in order, as for an update; what matters is that nobody has to touch the robot."""
    now_s = time.time()
    b.server.send_signal(signal.SIGTERM)
    assert b.server.wait(timeout=TIMEOUT_S) == 0
    held_ms(b, now_s)
    again_s = time.time()
    b.server = b.serve()
    b.told("controller", "running", again_s)
    return (time.time() - again_s) * 1e3


FAULTS = [
    Fault(
        "policy server SIGKILL",
        "in motion, then started again",
        "arms hold, the policy says that the server is away; goes on by itself",
        HOLD_MS,
        "ms",
        server_killed,
    ),
    Fault(
        "policy server frozen",
        "SIGSTOP, later SIGCONT",
        "arms hold, the policy names the server; goes on by itself",
        HOLD_MS,
        "ms",
        server_frozen,
    ),
    Fault(
        "policy server restarted",
        "SIGTERM, then started again",
        "exit code 0; arms hold; running again without a hand",
        BACK_MS,
        "ms",
        server_restarted,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: ServedBench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
