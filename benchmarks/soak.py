#!/usr/bin/env python3
"""Soak: the whole simulated graph for as long as you like, episode after episode, watched from outside.

    python benchmarks/soak.py [--minutes 30] [--json] [--out rollouts/soak]

ALOHA with three cameras, policy, controller at its own rate and recorder run as real processes. Beside them runs a bare
loop at the controller's rate: what it misses is the machine's own. Every closed bag is checked (messages in its index
against what was recorded, numbers its publishers gave against gaps) and deleted, so that disk use stays bounded.
Results: FOLDER/soak.json and FOLDER/soak.png; exit status 1 where something was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen_vla_core.embodiment import load_embodiment  # noqa: E402
from qwen_vla_core.errors import UserError  # noqa: E402
from qwen_vla_core.files import atomic_write_bytes, atomic_write_json  # noqa: E402
from qwen_vla_core.resources import DEFAULT_CHECKPOINT  # noqa: E402
from qwen_vla_ros.bringup import build_graph, command_line, process_environment  # noqa: E402

SAMPLE_S = 2.0
START_TIMEOUT_S = 180.0
WARM_UP_SHARE, WARM_UP_S = 0.2, 300.0  # memory before this says nothing: caches, windows and pools fill up
FLAT_MB_PER_MIN = 1.0
JUDGED_S = 300.0  # a slope over less than this is noise, and no verdict
SPREAD = 2  # topics that are published together may differ by so many messages at the two ends of a bag

# The controller's own pacing with nothing in it; a deadline is missed when a tick comes more than a period late.
BARE_LOOP = """
import json, signal, sys, time
period, missed, worst, go = float(sys.argv[1]), 0, 0.0, True
def stop(*_):
    global go
    go = False
signal.signal(signal.SIGTERM, stop)
due = time.monotonic()
begin, ticks = due, 0
while go:
    due += period
    delay = due - time.monotonic()
    if delay > 0:
        time.sleep(delay)
    elif delay < -period:
        missed += 1
        due = time.monotonic()
    ticks += 1
    worst = max(worst, time.monotonic() - due)
print(json.dumps({"ticks": ticks, "missed": missed, "worst_late_ms": worst * 1e3}))
"""


class Statuses:
    """The newest status of every node, heard by a ROS node that listens to nothing else."""

    def __init__(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor

        from qwen_vla_ros.node_utils import STATUS_QOS, STATUS_TOPIC

        rclpy.init()
        self._node = rclpy.create_node("soak")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self.latest: dict[str, dict[str, str]] = {}
        self.worst_period_ms = 0.0
        self._node.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)

    def _on_status(self, msg: Any) -> None:
        for status in msg.status:
            self.latest[status.name] = {"message": status.message, **{v.key: v.value for v in status.values}}

    def spin(self, seconds: float) -> None:
        """Listens for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def count(self, name: str, key: str) -> int:
        """A counter of a node's newest status; 0 before there is one."""
        return int(self.latest.get(name, {}).get(key, 0))

    def close(self) -> None:
        """Leaves the graph."""
        import rclpy

        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()


class Bags:
    """Checks every bag that was closed, counts what is in it, and deletes it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.recorded: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.peak_mb = 0.0

    def look(self) -> None:
        """Takes what is there now."""
        files = [path for path in self.run_dir.rglob("*") if path.is_file()] if self.run_dir.is_dir() else []
        with suppress(FileNotFoundError):  # a bag moves to its final place while it is looked at
            self.peak_mb = max(self.peak_mb, sum(path.stat().st_size for path in files) / 1e6)
        for bag in sorted(self.run_dir.glob("episode_[0-9]*")):
            self._check(bag)
            shutil.rmtree(bag)

    def _check(self, bag: Path) -> None:
        from rosbags.highlevel import AnyReader

        about = json.loads((bag / "episode.json").read_text())
        with AnyReader([bag]) as reader:
            counts = {connection.topic: connection.msgcount for connection in reader.connections}
        if sum(counts.values()) != about["messages"]:
            self.problems.append(
                f"{bag.name}: {sum(counts.values())} messages in the index, {about['messages']} recorded"
            )
        for group in self._together():
            numbers = [counts.get(topic, 0) for topic in group]
            if max(numbers) - min(numbers) > SPREAD:
                apart = dict(zip(group, numbers, strict=True))
                self.problems.append(f"{bag.name}: published together, recorded apart: {apart}")
        self.recorded.update(counts)
        self.lost.update(about["lost"])
        self.outcomes[about["outcome"]] += 1

    @staticmethod
    def _together() -> list[list[str]]:
        """Topics of which the simulator or the controller publishes one message each per round or tick."""
        robot = load_embodiment("aloha")
        states = sorted({group.topic for group in robot.state})
        return [[c.topic for c in robot.cameras], states, [g.command.topic for g in robot.actions]]


def slope_mb_per_min(times_s: np.ndarray, rss_mb: np.ndarray) -> float:
    """Least-squares slope."""
    return float(np.polyfit(times_s / 60.0, rss_mb, 1)[0]) if len(times_s) > 2 else math.nan


def soak(minutes: float, checkpoint: str, seed: int) -> dict[str, Any]:
    """Runs the graph; returns all figures and the sampled series."""
    import psutil

    robot = load_embodiment("aloha")
    rate_hz = robot.control.controller_rate_hz
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        bags = Bags(Path(folder) / "run")
        specs = build_graph("aloha", checkpoint=checkpoint, seed=seed, run_dir=str(bags.run_dir), log_level="warn")
        logs = open(Path(folder) / "log.txt", "wb")  # noqa: SIM115
        running: dict[str, Any] = {}
        statuses = Statuses()
        bare = None
        interrupted = False
        try:
            for spec in specs:
                running[spec.name] = subprocess.Popen(
                    command_line(spec),
                    env=process_environment(spec),
                    stdout=logs,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            deadline = time.monotonic() + START_TIMEOUT_S
            while statuses.latest.get("controller", {}).get("mode") != "running":
                if time.monotonic() > deadline or any(p.poll() is not None for p in running.values()):
                    raise UserError(f"the graph did not start: {Path(logs.name).read_text()[-2000:]}")
                statuses.spin(0.2)
            watched = {name: psutil.Process(process.pid) for name, process in running.items()}
            bare = subprocess.Popen(
                [sys.executable, "-c", BARE_LOOP, str(1.0 / rate_hz)], stdout=subprocess.PIPE, text=True
            )
            begin = time.monotonic()
            cpu_before = {name: _cpu_s(process) for name, process in watched.items()}
            missed_before = statuses.count("controller", "overruns")
            rows: list[dict[str, Any]] = []
            dead: list[str] = []
            try:
                while time.monotonic() < begin + 60.0 * minutes and not dead:
                    statuses.spin(SAMPLE_S)
                    bags.look()
                    dead = [name for name, process in running.items() if process.poll() is not None]
                    if dead:
                        break
                    rows.append(
                        {
                            "s": time.monotonic() - begin,
                            "rss_mb": {name: process.memory_info().rss / 1e6 for name, process in watched.items()},
                            "missed": statuses.count("controller", "overruns") - missed_before,
                            "period_max_ms": float(statuses.latest["controller"].get("period_ms.max", 0.0)),
                            "period_p99_ms": float(statuses.latest["controller"].get("period_ms.p99", 0.0)),
                        }
                    )
            except KeyboardInterrupt:
                interrupted = True
            seconds = time.monotonic() - begin
            cpu = {name: _cpu_s(process) - cpu_before[name] for name, process in watched.items() if name not in dead}
            bare.terminate()
            bare_figures = json.loads(bare.communicate(timeout=10)[0])
            codes = _end(running, specs)
            bags.look()
            tail = Path(logs.name).read_text(errors="replace")[-2000:] if dead or any(codes.values()) else ""
        finally:
            statuses.close()
            logs.close()
            for process in [*running.values(), *([bare] if bare is not None else [])]:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    return _result(seconds, rate_hz, rows, bare_figures, cpu, bags, dead, codes, tail, interrupted)


def _end(running: dict[str, Any], specs: Any) -> dict[str, int]:
    """Ctrl-C to one node after the other, the controller last; exit codes."""
    codes = {}
    for spec in sorted(specs, key=lambda spec: spec.stop_order):
        process = running[spec.name]
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            codes[spec.name] = process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            codes[spec.name] = -9
    return codes


def _cpu_s(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _result(
    seconds: float,
    rate_hz: float,
    rows: list[dict[str, Any]],
    bare: dict[str, float],
    cpu: dict[str, float],
    bags: Bags,
    dead: list[str],
    codes: dict[str, int],
    tail: str,
    interrupted: bool,
) -> dict[str, Any]:
    times_s = np.array([row["s"] for row in rows])
    warm = times_s >= min(WARM_UP_S, WARM_UP_SHARE * seconds)
    judged = seconds - min(WARM_UP_S, WARM_UP_SHARE * seconds) >= JUDGED_S
    memory = {}
    for name in rows[0]["rss_mb"] if rows else ():
        rss_mb = np.array([row["rss_mb"][name] for row in rows])
        slope = slope_mb_per_min(times_s[warm], rss_mb[warm])
        memory[name] = {
            "first_mb": rss_mb[warm][0],
            "last_mb": rss_mb[-1],
            "peak_mb": rss_mb.max(),
            "mb_per_min": slope,
            "flat": bool(slope < FLAT_MB_PER_MIN) if judged else None,
        }
    missed = rows[-1]["missed"] if rows else 0
    beyond = missed - int(bare["missed"])
    controller = {
        "rate_hz": rate_hz,
        "ticks_due": round(seconds * rate_hz),
        "missed": missed,
        "missed_by_bare_loop": int(bare["missed"]),
        "missed_beyond_the_machines_own": beyond,
        # Two counts of rare events differ by chance; twice the deviation of their difference is no difference.
        "noise": 2.0 * math.sqrt(missed + bare["missed"]),
        "period_p99_ms": float(np.median([row["period_p99_ms"] for row in rows])) if rows else math.nan,
        "period_max_ms": max((row["period_max_ms"] for row in rows), default=math.nan),
        "bare_worst_late_ms": bare["worst_late_ms"],
    }
    topics = {
        topic: {"published": number + bags.lost[topic], "recorded": number}
        for topic, number in sorted(bags.recorded.items())
    }
    ok = {
        "all_nodes_lived": not dead,
        "exit_codes_0": not any(codes.values()),
        "no_deadline_missed_beyond_the_machines_own": beyond <= controller["noise"],
        "memory_flat": all(row["flat"] is not False for row in memory.values()),
        "no_recorded_message_lost": not bags.lost.total() and not bags.problems,
        "whole_time": not interrupted and not dead,
    }
    return {
        "minutes": seconds / 60.0,
        "machine": {"cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "episodes": dict(bags.outcomes),
        "controller": controller,
        "memory": memory,
        "memory_judged": judged,
        "cpu_percent": {name: 100.0 * used / seconds for name, used in cpu.items()},
        "topics": topics,
        "lost": bags.lost.total(),
        "bag_problems": bags.problems,
        "peak_disk_mb": bags.peak_mb,
        "died": dead,
        "exit_codes": codes,
        "log": tail,
        "ok": ok,
        "series": rows,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory of every node and missed deadlines over time."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [row["s"] / 60.0 for row in result["series"]]
    figure, (memory, missed) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1))
    for name, row in result["memory"].items():
        label = f"{name} ({row['mb_per_min']:+.2f} MB/min)"
        memory.plot(minutes, [sample["rss_mb"][name] for sample in result["series"]], label=label)
    memory.set_ylabel("resident memory, MB")
    memory.set_ylim(bottom=0)
    memory.legend(loc="best", fontsize="small")
    missed.plot(minutes, [sample["missed"] for sample in result["series"]], label="controller")
    total = result["controller"]["missed_by_bare_loop"]
    missed.axhline(total, linestyle=":", color="black", label=f"bare loop beside it, in all: {total}")
    missed.set_ylabel("deadlines missed")
    missed.set_xlabel("minutes")
    missed.legend(loc="upper left", fontsize="small")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    atomic_write_bytes(path, buffer.getvalue())


def show(result: dict[str, Any]) -> None:
    """The table."""
    c = result["controller"]
    print(f"{result['minutes']:.1f} minutes, episodes {result['episodes']}, peak disk {result['peak_disk_mb']:.0f} MB")
    print(f"deadlines of {c['ticks_due']} missed: controller {c['missed']}, bare loop {c['missed_by_bare_loop']}")
    print(f"period p99 {c['period_p99_ms']:.1f} ms, max {c['period_max_ms']:.1f} ms")
    print(f"{'process':<18}{'CPU %':>8}{'first MB':>10}{'last MB':>10}{'MB/min':>9}")
    for name, row in result["memory"].items():
        cpu = result["cpu_percent"].get(name, math.nan)
        print(f"{name:<18}{cpu:>8.1f}{row['first_mb']:>10.1f}{row['last_mb']:>10.1f}{row['mb_per_min']:>9.2f}")
    print(f"{'topic':<48}{'published':>10}{'recorded':>10}")
    for topic, row in result["topics"].items():
        print(f"{topic:<48}{row['published']:>10}{row['recorded']:>10}")
    for problem in (*result["bag_problems"], *(f"{name} died" for name in result["died"]), result["log"]):
        if problem:
            print(problem)
    if not result["memory_judged"]:
        print("too short for a verdict on memory")
    print(", ".join(f"{name}: {'yes' if good else 'NO'}" for name, good in result["ok"].items()))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run after start-up (default: 30)")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or folder of the policy")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--out", type=Path, default=Path("rollouts/soak"), metavar="FOLDER", help="where results go")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from domain_coordinator import domain_id

    with domain_id() as domain:
        os.environ["ROS_DOMAIN_ID"] = str(domain)
        result = soak(args.minutes, args.checkpoint, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(args.out / "soak.json", result)
    plot(result, args.out / "soak.png")
    if args.json:
        print(json.dumps({key: value for key, value in result.items() if key != "series"}, indent=2))
    else:
        show(result)
    return 0 if all(result["ok"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
