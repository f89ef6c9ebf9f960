#!/usr/bin/env python3
"""What a policy server costs over the model in the same process, and how many chunks several clients get from one.

    python benchmarks/serving.py [--checkpoint generalist] [--embodiment aloha] [--repeats 40] [--seconds 4] [--json]

Protocol: ``qwen-vla serve`` as a process of its own on loopback, one thread per model; every view of the embodiment as
a 640×480 picture. *Overhead*: this process asks its own engine and the server in turns, once per way of sending
pictures, so that all suffer the same load; medians, and the median ratio to the local engine in the same turn. "robot
CPU" is this process's CPU time per chunk, what a robot's computer has to pay. *Throughput*: 1, 2 and 4 clients ask as
fast as they get answers; "server CPU" is the server's time per chunk, which other load on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import psutil
import torch

from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
from qwen_vla_core.serving.client import RemoteEngine

SIZE = (640, 480)
MODES = ("raw", "reduced", "jpeg")
CLIENTS = (1, 2, 4)
TIMEOUT_S = 60.0


@contextmanager
def server(checkpoint: str, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """``qwen-vla serve`` on a free port; yields its address and process."""
    command = [sys.executable, "-m", "qwen_vla_core.cli", "serve", "--checkpoint", checkpoint, "--port", "0", "--json"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def make_request(policy: Any, embodiment: str) -> Request:
    """One observation with smooth pictures, as cameras give them, and fixed noise."""
    robot = policy.embodiment(embodiment)
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), SIZE, interpolation=cv2.INTER_CUBIC)
    grain = np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255).astype(np.uint8)
    seen = Observation(dict.fromkeys(robot.views, grain), np.zeros(len(robot.state_channels)), "pick up the red cube")
    noise = rng.normal(size=(robot.control.horizon, policy.config.decoder.channels)).astype(np.float32)
    return Request(seen, embodiment, noise_hk=noise)


def overhead(url: str, engine: LocalEngine, request: Request, repeats: int) -> dict[str, Any]:
    """Medians per way of asking, in turns."""
    robot = engine.policy.embodiment(request.embodiment)
    remotes = {mode: RemoteEngine(url, robot, pictures=mode, timeout_s=TIMEOUT_S) for mode in MODES}
    for remote in remotes.values():
        remote.wait_ready(TIMEOUT_S)
    ways: dict[str, Callable[[], Any]] = {"local": lambda: engine.predict([request])}
    ways |= {mode: lambda remote=remote: remote.predict([request]) for mode, remote in remotes.items()}
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, np.ndarray] = {}
    for index in range(repeats + 3):
        for way, ask in ways.items():
            began, used = time.perf_counter(), time.process_time()
            (prediction,) = ask()
            if index >= 3:
                wall[way].append(1e3 * (time.perf_counter() - began))
                cpu[way].append(1e3 * (time.process_time() - used))
            answers[way] = prediction.chunk.actions_hc
    report: dict[str, Any] = {}
    for way in ways:
        report[way] = {
            "ms": statistics.median(wall[way]),
            "ratio_to_local": statistics.median(b / a for a, b in zip(wall["local"], wall[way], strict=True)),
            "robot_cpu_ms": statistics.median(cpu[way]),
            "largest_difference": float(np.abs(answers[way] - answers["local"]).max()),
        }
        if way in remotes:
            remote = remotes[way]
            report[way]["kilobytes"] = remote.statistics.bytes_sent / remote.statistics.answered / 1e3
            remote.close()
    return report


def throughput(
    url: str, process: psutil.Process, engine: LocalEngine, request: Request, seconds: float
) -> dict[str, Any]:
    """Chunks per second of 1, 2 and 4 clients, and of the local engine just before each."""
    robot = engine.policy.embodiment(request.embodiment)
    report: dict[str, Any] = {}
    for count in CLIENTS:
        local = rate([lambda: engine.predict([request])], seconds / 2)
        remotes = [RemoteEngine(url, robot, timeout_s=TIMEOUT_S) for _ in range(count)]
        for remote in remotes:
            remote.wait_ready(TIMEOUT_S)
        before, used_s = batches(url), cpu_s(process)
        remote_rate = rate([lambda remote=remote: remote.predict([request]) for remote in remotes], seconds)
        used_s = cpu_s(process) - used_s
        sizes = {size: number - before.get(size, 0) for size, number in batches(url).items()}
        calls = max(1, sum(sizes.values()))
        chunks = max(1, sum(int(size) * number for size, number in sizes.items()))
        report[str(count)] = {
            "chunks_per_s": remote_rate,
            "local_chunks_per_s": local,
            "ratio_to_local": remote_rate / local,
            "mean_batch": chunks / calls,
            "server_cpu_ms": 1e3 * used_s / chunks,
        }
        for remote in remotes:
            remote.close()
    return report


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def rate(calls: list[Callable[[], Any]], seconds: float) -> float:
    """Calls per second, each repeated in a thread of its own."""
    counts = [0] * len(calls)
    end = time.monotonic() + seconds

    def work(index: int) -> None:
        while time.monotonic() < end:
            calls[index]()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - began)


def batches(url: str) -> dict[str, int]:
    """Batch size → how often, so far."""
    with urllib.request.urlopen(url.replace("ws", "http", 1) + "/metrics", timeout=TIMEOUT_S) as answer:
        return dict(json.loads(answer.read())["batches"])


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="generalist", help="shipped name or folder (default: generalist)")
    parser.add_argument("--embodiment", default="aloha", help="one of the checkpoint's robots (default: aloha)")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls per way (default: 40)")
    parser.add_argument("--seconds", type=float, default=4.0, help="per number of clients (default: 4)")
    parser.add_argument("--max-wait-ms", default="0", help="the server's (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = LocalEngine(load_checkpoint(resolve_checkpoint(args.checkpoint)))
    request = make_request(engine.policy, args.embodiment)
    with server(args.checkpoint, "--max-wait-ms", args.max_wait_ms) as (url, process):
        report = {
            "checkpoint": args.checkpoint,
            "embodiment": args.embodiment,
            "max_wait_ms": float(args.max_wait_ms),
            "overhead": overhead(url, engine, request, args.repeats),
            "throughput": throughput(url, process, engine, request, args.seconds),
        }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{'':<10}{'ms':>8}{'ratio':>8}{'robot CPU ms':>14}{'kB sent':>10}{'difference':>14}")
    for way, row in report["overhead"].items():
        sent = f"{row['kilobytes']:10.0f}" if "kilobytes" in row else " " * 10
        print(
            f"{way:<10}{row['ms']:8.2f}{row['ratio_to_local']:8.2f}{row['robot_cpu_ms']:14.2f}{sent}"
            f"{row['largest_difference']:14.2g}"
        )
    print(f"\n{'clients':<10}{'chunks/s':>10}{'local':>8}{'ratio':>8}{'mean batch':>12}{'server CPU ms':>15}")
    for count, row in report["throughput"].items():
        print(
            f"{count:<10}{row['chunks_per_s']:10.1f}{row['local_chunks_per_s']:8.1f}{row['ratio_to_local']:8.2f}"
            f"{row['mean_batch']:12.2f}{row['server_cpu_ms']:15.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
