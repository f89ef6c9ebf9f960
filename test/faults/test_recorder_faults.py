"""The disk fills up, writes fail, the recorder dies: what stands in its final place is complete, the rest says so."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_bench import Bench, robot_yaml
from fault_support import Fault, Ledger
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from std_msgs.msg import String

from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import read_rollout
from qwen_vla_core.rollouts.repair import repair
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.node_utils import EPISODE_TOPIC, LATCHED_QOS

pytest.importorskip("rosbags", reason="the recorder's library is not installed")
SOON_MS = 3000  # the recorder looks at the disk and reports once a second
ENOUGH = 50  # messages: what was recorded is there
LOST_S = 5.0  # what a killed recorder may lose: a second, and what a loaded machine delays
STOP_MS = 10_000  # a supervisor waits this long before it uses force


class RecorderBench(Bench):
    """A recorder whose cameras and drivers work; episodes begin and end when told to."""

    run_dir: Path
    events: Any

    def tell(self, event: str, **about: object) -> float:
        self.events.publish(String(data=json.dumps({"event": event, "index": 0, "seed": 0, **about})))
        return time.time()

    def recording(self, more: int = 100) -> None:
        """Waits until a bag is open and so many more messages are in it."""
        self.wait(
            lambda: self.said().get("state") == "recording" and self.said().get("message") == "recording", "a bag"
        )
        before = self.count("messages", "recorder")
        self.wait(lambda: self.count("messages", "recorder") > before + more, "messages")

    def said(self) -> dict[str, str]:
        statuses = self.statuses.get("recorder")
        return {**statuses[-1].values, "message": statuses[-1].message} if statuses else {}

    def healthy(self) -> None:
        """A new episode is being recorded."""
        self.revive()
        self.wait(lambda: self.events.get_subscription_count() > 0 and self.said(), "the recorder")
        self.tell("started")
        self.recording()

    def unsafe(self) -> list[str]:
        """Nothing commands a robot here."""
        return []

    def bags(self) -> list[Path]:
        """Folders that claim to be complete."""
        return sorted(self.run_dir.glob("episode_[0-9]*"))

    def set_min_free_mb(self, value: int) -> None:
        number = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
        request = SetParameters.Request(parameters=[Parameter(name="min_free_mb", value=number)])
        assert self.call("recorder_node/set_parameters", SetParameters, request).results[0].successful

    def limit_files(self, size: int) -> None:
        """No file of the recorder may grow beyond ``size`` bytes: its next write fails, as on a full disk."""
        resource.prlimit(
            self.graph.processes["recorder_node"].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
        )


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A recorder of a simulated robot."""
    folder = tmp_path_factory.mktemp("recorder")
    graph = build_graph(str(robot_yaml(folder)), run_dir=str(folder / "run"))
    spec = next(spec for spec in graph if spec.name == "recorder_node")
    spec = replace(spec, parameters={**spec.parameters, "min_free_mb": 0})
    made = make_bench([spec], kind=RecorderBench, cameras=True)
    made.run_dir = folder / "run"
    made.events = made.node.create_publisher(String, EPISODE_TOPIC, LATCHED_QOS)
    return made


def outcome(bag: Path) -> dict[str, Any]:
    return json.loads((bag / "episode.json").read_text())


def read_whole(bag: Path) -> int:
    """Reads every message of a bag; returns how many."""
    from rosbags.highlevel import AnyReader

    with AnyReader([bag]) as reader:
        number = sum(1 for _ in reader.messages())
        assert number == reader.message_count == outcome(bag)["messages"]
    return number


def disk_fills_up(b: RecorderBench) -> float:
    before = len(b.bags())
    free_mb = shutil.disk_usage(b.run_dir).free // 1_000_000
    now_s = time.time()
    b.set_min_free_mb(int(free_mb) + 100_000)
    try:
        status = b.told("recorder", "not recording: disk", now_s)
        closed = b.wait(lambda: len(b.bags()) > before and b.bags()[-1], "the bag to be closed")
        assert read_whole(closed) > ENOUGH
        assert outcome(closed)["outcome"] == "aborted" and "min_free_mb" in outcome(closed)["reason"]
        b.tell("started")
        b.told("recorder", "not recording: disk", time.time() + 1.0)
        assert len(b.bags()) == before + 1 and b.said()["state"] == "waiting"
    finally:
        b.set_min_free_mb(0)
    return (status.at_s - now_s) * 1e3


def write_fails(b: RecorderBench) -> float:
    before = len(b.bags())
    now_s = time.time()
    b.limit_files(1 << 20)
    try:
        status = b.told("recorder", "failed", now_s)
    finally:
        b.limit_files(resource.RLIM_INFINITY)
    assert "not recording: recording of" in status.message and "File too large" in status.message
    assert b.graph.processes["recorder_node"].poll() is None
    assert len(b.bags()) == before, "a bag that is not complete stands in its final place"
    partial = sorted((b.run_dir / ".partial").glob("episode_*"))[-1]
    assert outcome(partial)["outcome"] == "aborted" and "File too large" in outcome(partial)["reason"]
    b.tell("started")
    b.recording()
    b.tell("finished", outcome="success")
    b.wait(lambda: len(b.bags()) > before, "the next bag")
    assert read_whole(b.bags()[-1]) > ENOUGH and outcome(b.bags()[-1])["outcome"] == "success"
    return (status.at_s - now_s) * 1e3


def folder_vanishes(b: RecorderBench) -> float:
    now_s = time.time()
    shutil.rmtree(b.run_dir)
    b.tell("finished", outcome="success")
    status = b.told("recorder", "failed", now_s)
    b.tell("started")
    b.recording()
    b.tell("finished", outcome="success")
    b.wait(b.bags, "the next bag")
    assert read_whole(b.bags()[-1]) > ENOUGH
    return (status.at_s - now_s) * 1e3


def nonsense_event(b: RecorderBench) -> float:
    before = len(b.bags())
    for text in ("no JSON", "[1, 2]", '{"event": "landed"}', ""):
        b.events.publish(String(data=text))
    b.recording()
    b.tell("finished", outcome="success")
    b.wait(lambda: len(b.bags()) > before, "the bag")
    assert read_whole(b.bags()[-1]) > ENOUGH
    return float(len(b.bags()) - before - 1)


def frozen(b: RecorderBench) -> float:
    """The recorder stands still while its episode ends and a whole short one passes; returns wrong outcomes."""
    before = len(b.bags())
    b.signal("recorder_node", signal.SIGSTOP)
    b.heard_of()  # what goes on fills its queues
    first = {"index": 0, "outcome": "success", "seconds": 1.5}
    second = {"index": 1, "outcome": "failure", "seconds": 0.5}
    b.tell("finished", **first)
    b.tell("started", index=1, earlier=[first])
    b.tell("finished", **second)
    b.tell("started", index=2, earlier=[first, second])
    b.heard_of()
    b.signal("recorder_node", signal.SIGCONT)
    b.wait(lambda: len(b.bags()) > before, "the bag")
    b.recording()  # the third
    said = outcome(b.bags()[before])
    return float((said["outcome"], said["seconds"], said["judged_by"]) != ("success", 1.5, "simulator"))


def ended(number: int, times: int = 1) -> Callable[[RecorderBench], float]:
    """Signals the recorder while it records, then starts another one for the same folder."""

    def provoke(b: RecorderBench) -> float:
        before = len(b.bags())
        now_s = time.time()
        for _ in range(times):
            b.signal("recorder_node", number)
        code = b.graph.processes["recorder_node"].wait(timeout=60)
        took_ms = (time.time() - now_s) * 1e3
        after = b.bags()
        if number == signal.SIGKILL:
            assert len(after) == before
            left = read_rollout(sorted((b.run_dir / ".partial").glob("episode_*"))[-1])
            assert left.outcome == "unfinished" and not left.recording
            with BagFile(left.folder) as bag:
                assert bag.count > ENOUGH and now_s - bag.end_ns * 1e-9 < LOST_S
        else:
            assert code == 0
            assert len(after) == before + 1 and read_whole(after[-1]) > ENOUGH
            assert outcome(after[-1])["outcome"] == "aborted"
        b.start("recorder_node")
        b.recording()  # the episode that is announced as running
        b.tell("finished", outcome="success")
        b.wait(lambda: len(b.bags()) > len(after), "the next bag")
        numbers = [int(path.name.removeprefix("episode_")) for path in b.bags()]
        assert numbers == sorted(set(numbers)) and read_whole(b.bags()[-1]) > ENOUGH
        if number == signal.SIGKILL:
            assert read_whole(repair(left).folder) > ENOUGH
        return took_ms

    return provoke


FAULTS = [
    Fault(
        "disk full while recording",
        "less than min_free_mb is left",
        "bag closed whole, reason in it and in the status; no new one until there is room",
        SOON_MS,
        "ms",
        disk_fills_up,
    ),
    Fault(
        "write fails while recording",
        "the file system refuses to let a file grow",
        "error published, nothing looks complete, the next episode is recorded",
        SOON_MS,
        "ms",
        write_fails,
    ),
    Fault(
        "run folder deleted",
        "somebody removes it while a bag is open",
        "error published, the next episode is recorded",
        SOON_MS,
        "ms",
        folder_vanishes,
    ),
    Fault(
        "nonsense on qwen_vla/episode",
        "no JSON, no object, unknown event, nothing",
        "the bag stays open: bags closed early",
        0,
        "bags",
        nonsense_event,
    ),
    Fault(
        "recorder frozen",
        "SIGSTOP while an episode ends and another passes, then SIGCONT",
        "the bag says what the simulator said, heard or not: wrong outcomes",
        0,
        "outcomes",
        frozen,
    ),
    Fault(
        "recorder SIGTERM",
        "while recording",
        "bag closed whole as aborted, exit code 0; a new one records the rest",
        STOP_MS,
        "ms",
        ended(signal.SIGTERM),
    ),
    Fault(
        "recorder Ctrl-C twice",
        "SIGINT two times while recording",
        "bag closed whole as aborted, exit code 0",
        STOP_MS,
        "ms",
        ended(signal.SIGINT, times=2),
    ),
    Fault(
        "recorder SIGKILL",
        "while recording",
        "the bag stays in .partial as unfinished, readable and repairable; a new one records the rest",
        STOP_MS,
        "ms",
        ended(signal.SIGKILL),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: RecorderBench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
