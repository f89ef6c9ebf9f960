"""``qwen-vla up ROBOT``: starts the whole graph and supervises it, without ``ros2 launch``.

Every node is a process of its own session, so that Ctrl-C reaches only the supervisor, which then stops them in order:
the policy first, the controller last. A node that dies stops the rest the same way; only one that the robot does not
need (the dashboard) does not: it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES
from qwen_vla_ros.bringup import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    LOG_LEVELS,
    NodeSpec,
    build_fleet,
    build_graph,
    command_line,
    name_robots,
    next_run_dir,
    process_environment,
)

POLL_S = 0.1
GRACE_S = {signal.SIGINT: 10.0, signal.SIGTERM: 3.0, signal.SIGKILL: 2.0}
PR_SET_PDEATHSIG = 1
RESTARTS = 5  # of a node that the robot does not need, each after waiting twice as long
RESTART_AFTER_S = 1.0
WELL_AFTER_S = 60.0  # one that ran for so long begins to be counted anew
USER_MISTAKE = 2  # exit code: starting again would not help
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a supervised run ended: ``failed`` lists the nodes that died, with their exit codes."""

    reason: str
    failed: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla up``; the same names as the launch arguments."""
    flag = argparse.BooleanOptionalAction
    text = "shipped name or path of the robot's YAML; several, as NAME or NAMESPACE=NAME: one policy drives them all"
    parser.add_argument("robot", nargs="*", default=["aloha"], help=text)
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or folder of the policy")
    parser.add_argument("--server", default="", metavar="URL", help="ask a policy server, ws://host:port or wss://…")
    parser.add_argument("--server-token-file", default="", metavar="FILE", help="its token (or QWEN_VLA_TOKEN)")
    parser.add_argument("--server-ca-file", default="", metavar="FILE", help="certificate to trust for wss://")
    parser.add_argument("--instruction", default="", help="what to do; empty: the simulator chooses")
    text = f"how chunks follow each other: {', '.join(STRATEGIES)} (default: {DEFAULT_STRATEGY})"
    parser.add_argument("--strategy", default=DEFAULT_STRATEGY, metavar="NAME", help=text)
    parser.add_argument("--sim", action=flag, default=None, help="simulate the robot (default, unless --mock)")
    parser.add_argument("--mock", action="store_true", help="a kinematic mock of any robot instead, with test pictures")
    parser.add_argument("--policy", action=flag, default=True, help="start the policy; without it others send chunks")
    parser.add_argument("--record", action=flag, default=True, help="record one MCAP bag per episode")
    parser.add_argument("--rollouts", default="rollouts", metavar="DIR", help="folder of recorded runs")
    parser.add_argument("--episodes", type=int, default=0, metavar="N", help="end after N simulated episodes; 0: never")
    parser.add_argument("--task", default="", help="task the simulator draws from, or all (default: its first)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first simulated episode")
    parser.add_argument(
        "--episode-timeout", type=float, default=0.0, metavar="S", help="simulated seconds per episode; 0: the world's"
    )
    text = "serve the operator's web page (docs/dashboard.md); its address is printed"
    parser.add_argument("--dashboard", action=flag, default=True, help=text)
    text = "address of the page; any but a loopback one needs a token"
    parser.add_argument("--dashboard-host", default=DEFAULT_HOST, metavar="ADDRESS", help=text)
    text = "port of the page, or the next free one (default: %(default)s)"
    parser.add_argument("--dashboard-port", type=int, default=DEFAULT_PORT, metavar="PORT", help=text)
    parser.add_argument("--dashboard-token-file", default="", metavar="FILE", help="token that browsers must show")
    parser.add_argument("--dashboard-read-only", action="store_true", help="the page shows everything, presses nothing")
    parser.add_argument("--namespace", default="", help="ROS namespace of all nodes")
    parser.add_argument("--use-sim-time", action=flag, default=False, help="all nodes follow the simulator's /clock")
    parser.add_argument("--autostart", action=flag, default=True, help="configure and activate policy and controller")
    parser.add_argument("--params-file", default="", metavar="FILE", help="ROS parameter YAML with overrides")
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS)
    parser.add_argument("--isolated", action="store_true", help="use a free ROS_DOMAIN_ID (tests, shared machines)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, logs on stderr")


def run(args: argparse.Namespace) -> int:
    """Runs the graph until the episodes are over, Ctrl-C, or a node's death. Returns 0, 0 or 1."""
    if importlib.util.find_spec("rclpy") is None:
        raise UserError(
            "ROS 2 (rclpy) not found: source /opt/ros/$ROS_DISTRO/setup.bash, or pip install 'qwen_vla_ros[ros-wheels]'"
        )
    graph: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "server": args.server,
        "server_token_file": args.server_token_file,
        "server_ca_file": args.server_ca_file,
        "instruction": args.instruction,
        "strategy": args.strategy,
        "namespace": args.namespace,
        "sim": args.sim,
        "mock": args.mock,
        "policy": args.policy,
        "record": args.record,
        "use_sim_time": args.use_sim_time,
        "autostart": args.autostart,
        "params_file": args.params_file,
        "log_level": args.log_level,
        "episodes": args.episodes,
        "seed": args.seed,
        "task": args.task,
        "episode_timeout_s": args.episode_timeout,
        "dashboard": args.dashboard,
        "dashboard_host": args.dashboard_host,
        "dashboard_port": args.dashboard_port,
        "dashboard_token_file": args.dashboard_token_file,
        "dashboard_read_only": args.dashboard_read_only,
    }
    build = _builder(args.robot or ["aloha"])
    nodes = {spec.name for spec in build(**graph)}  # a user's mistake is told before a run folder exists
    run_dir = next_run_dir(args.rollouts) if nodes & {"sim_node", "recorder_node"} else None
    specs = build(**graph, run_dir=str(run_dir or ""))
    stream = sys.stderr if args.json else sys.stdout

    def echo(line: str) -> None:
        print(line, file=stream, flush=True)

    with free_domain() if args.isolated else contextlib.nullcontext():
        outcome = supervise(specs, echo)
    result = summarise(outcome, run_dir)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(summary_line(result))
    return 1 if outcome.failed else 0


def _builder(robots: Sequence[str]) -> Callable[..., list[NodeSpec]]:
    """What builds the graph: of one robot, or of several."""
    if len(robots) == 1 and ("=" not in robots[0] or Path(robots[0]).exists()):
        return partial(build_graph, robots[0])
    return partial(build_fleet, name_robots(robots))


@contextlib.contextmanager
def free_domain() -> Iterator[None]:
    """Sets ROS_DOMAIN_ID to one that no other user of the coordinator holds, for as long as the context lasts."""
    try:
        from domain_coordinator import domain_id
    except ImportError as error:
        raise UserError("--isolated needs ros-domain-coordinator: pip install it, or set ROS_DOMAIN_ID") from error
    before = os.environ.get("ROS_DOMAIN_ID")
    with domain_id() as chosen:
        os.environ["ROS_DOMAIN_ID"] = str(chosen)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("ROS_DOMAIN_ID", None)
            else:
                os.environ["ROS_DOMAIN_ID"] = before


class Child:
    """One node's process; its output is echoed line by line behind the node's name."""

    def __init__(self, spec: NodeSpec, echo: Echo) -> None:
        self.spec = spec
        self._restarts = 0
        self._revive_at: float | None = None  # monotonic; None: it runs, or is given up
        self._given_up = False
        self._start(echo)

    def _start(self, echo: Echo) -> None:
        self._started_at = time.monotonic()
        self.process = subprocess.Popen(
            command_line(self.spec),
            env=process_environment(self.spec),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self._reader = threading.Thread(target=self._echo_lines, args=(echo,), daemon=True)
        self._reader.start()

    def _echo_lines(self, echo: Echo) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            echo(f"[{self.spec.label}] {line.rstrip()}")

    def revive(self, code: int, echo: Echo) -> None:
        """Starts a dead node again after a while, some times; called again and again while it is dead."""
        now = time.monotonic()
        if self._given_up:
            return
        if self._revive_at is None:
            if now - self._started_at > WELL_AFTER_S:
                self._restarts = 0
            self._given_up = code == USER_MISTAKE or self._restarts == RESTARTS
            self._revive_at = now + RESTART_AFTER_S * 2**self._restarts
            what = "the others go on without it" if self._given_up else "the others go on, it is started again"
            echo(f"[up] {self.spec.name} ended ({_describe(code)}): {what}")
        elif now >= self._revive_at:
            self._restarts += 1
            self._revive_at = None
            self._start(echo)

    def stop(self, echo: Echo) -> int:
        """SIGINT, then SIGTERM, then SIGKILL, each with its time to react; returns the exit code."""
        for number, grace_s in GRACE_S.items():
            if self.process.poll() is not None:
                break
            if number is not signal.SIGINT:
                echo(f"[up] {self.spec.label} does not stop: {number.name}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=grace_s)
        self._reader.join(timeout=2.0)
        return self.process.wait()


def _die_with_parent() -> None:
    """A supervisor killed with SIGKILL must not leave a robot moving: the kernel interrupts its nodes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def supervise(specs: Sequence[NodeSpec], echo: Echo, stop: threading.Event | None = None) -> Outcome:
    """Runs ``specs`` until one ends, a signal arrives or ``stop`` is set; then stops the rest in order.

    Signals are only handled when called from the main thread.
    """
    stop = stop or threading.Event()
    children: list[Child] = []
    with _signals_set(stop):
        try:
            for spec in specs:
                children.append(Child(spec, echo))
            reason, failed = _watch(children, stop, echo)
        finally:
            for child in sorted(children, key=lambda child: child.spec.stop_order):
                child.stop(echo)
    return Outcome(reason, failed)


def _watch(children: Sequence[Child], stop: threading.Event, echo: Echo) -> tuple[str, dict[str, int]]:
    """Until a signal, a death, or the end of every node that may end the graph (one simulator per robot)."""
    while not stop.is_set():
        unfinished = sum(child.spec.ends_graph for child in children)
        for child in children:
            code = child.process.poll()
            if code is None:
                continue
            if child.spec.optional:
                child.revive(code, echo)
                continue
            if code == 0 and child.spec.ends_graph:
                unfinished -= 1
                continue
            echo(f"[up] {child.spec.label} died ({_describe(code)}): stopping the rest")
            return f"{child.spec.label} died", {child.spec.label: code}
        if unfinished == 0 and any(child.spec.ends_graph for child in children):
            return "finished", {}
        stop.wait(POLL_S)
    echo("[up] stopping")
    return "stopped", {}


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop``, however often they come, while the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(outcome: Outcome, run_dir: Path | None) -> dict[str, Any]:
    """What happened, for ``--json``; an empty run folder is removed."""
    result: dict[str, Any] = {"ended": outcome.reason, "failed_nodes": outcome.failed}
    if run_dir is None:
        return result
    folders = [path for path in sorted(run_dir.iterdir()) if (path / "summary.json").is_file()]
    if folders and not (run_dir / "summary.json").is_file():  # one per robot
        result["robots"] = {path.name: json.loads((path / "summary.json").read_text()) for path in folders}
        told = list(result["robots"].values())
        result |= {key: sum(one[key] for one in told) for key in ("success", "failure", "aborted")}
        result["episodes"] = [episode for one in told for episode in one["episodes"]]
    else:
        summary = run_dir / "summary.json"
        counts = {"success": 0, "failure": 0, "aborted": 0, "episodes": []}
        result.update(json.loads(summary.read_text()) if summary.is_file() else counts)
    for path in [*run_dir.iterdir(), run_dir]:
        with contextlib.suppress(OSError):
            path.rmdir()
    result["rollouts"] = str(run_dir) if run_dir.is_dir() else None
    return result


def summary_line(result: dict[str, Any]) -> str:
    """The same in one line."""
    parts = []
    if "episodes" in result:
        count = len(result["episodes"])
        aborted = f", {result['aborted']} aborted" if result["aborted"] else ""
        noun = "episode" if count == 1 else "episodes"
        parts.append(f"{count} {noun}: {result['success']} success, {result['failure']} failure{aborted}")
    if result.get("rollouts"):
        parts.append(f"rollouts in {result['rollouts']}")
    if result["failed_nodes"]:
        parts.append(f"ended because {result['ended']}")
    return "; ".join(parts) or result["ended"]
