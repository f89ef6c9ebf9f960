"""Nodes of the whole simulated graph die, hang and come back; the robot holds, the rest goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_bench import (
    INSTRUCTION,
    PAUSE_MS,
    STATE_AGE_MS,
    TIMEOUT_S,
    TOLERANCE_MS,
    WATCHDOG_MS,
    Bench,
    robot_yaml,
)
from fault_support import Fault, Ledger
from graph_support import Graph
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.node_utils import EPISODE_TOPIC, LATCHED_QOS, STATE_QOS

pytest.importorskip("mujoco", reason="the simulator is not installed")
HOLD_MS = WATCHDOG_MS + 2 * TOLERANCE_MS  # and the chunk that was on its way when the policy ended
STALE_MS = STATE_AGE_MS + TOLERANCE_MS
RESTART_MS = 60_000  # Python, torch and a model have to load, beside whatever else this machine does
BRAKING_S = 0.3  # from the largest velocity to rest, and the limit of jerk around it
EXIT_MS = 10_000  # a supervisor waits this long before it uses force


class GraphBench(Bench):
    """Policy, controller, simulator and recorder in the middle of an endless episode."""

    arm: list[tuple[float, JointState]]
    events: list[dict[str, Any]]
    run_dir: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> GraphBench:
    folder = tmp_path_factory.mktemp("graph")
    specs = build_graph(
        str(robot_yaml(folder)),
        checkpoint=str(checkpoint),
        instruction=INSTRUCTION,
        run_dir=str(folder / "run"),
        episode_timeout_s=3600.0,
    )
    made = make_bench(specs, kind=GraphBench, drivers=False)
    made.arm, made.events, made.run_dir, made.checkpoint = [], [], folder / "run", checkpoint
    made.node.create_subscription(
        JointState, "/follower_left/joint_states", lambda msg: made.arm.append((time.time(), msg)), STATE_QOS
    )
    made.node.create_subscription(
        String, EPISODE_TOPIC, lambda msg: made.events.append(json.loads(msg.data)), LATCHED_QOS
    )
    return made


def watchdog_ms(b: GraphBench, since_s: float) -> tuple[float, float]:
    """Waits for the hold; returns the time from ``since_s`` to it in ms, and when its reason was heard."""
    held = b.told("controller", "holding: ", since_s)  # a simulator that waits for a dead process is silent itself
    why = b.told("controller", "watchdog: no chunk for", since_s)
    b.rested_s(held.at_s)
    return (held.at_s - since_s) * 1e3, why.heard_s


def policy_killed(b: GraphBench) -> float:
    took_ms, _ = watchdog_ms(b, b.kill("policy_node"))
    again_s = time.time()
    b.start("policy_node")
    b.told("controller", "running", again_s)
    return took_ms


def policy_restarted(b: GraphBench) -> float:
    """Ended in order and started again by a supervisor, within one episode."""
    now_s = b.signal("policy_node", signal.SIGTERM)
    assert b.graph.processes["policy_node"].wait(timeout=TIMEOUT_S) == 0
    held = b.told("controller", "watchdog: no chunk for", now_s)
    again_s = time.time()
    b.start("policy_node")
    b.told("controller", "running", max(held.heard_s, again_s))
    return (time.time() - again_s) * 1e3


def policy_frozen(b: GraphBench) -> float:
    took_ms, held_s = watchdog_ms(b, b.signal("policy_node", signal.SIGSTOP))
    b.signal("policy_node", signal.SIGCONT)
    b.told("controller", "running", held_s)
    return took_ms


def camera_muted(b: GraphBench) -> float:
    """One simulated camera; long enough for the policy's hold to become a fault."""
    now_s = time.time()
    mute(b, "cam_left_wrist")
    held = b.told("controller", "watchdog: no chunk for", now_s)
    b.told("policy", "fault: camera 'cam_left_wrist' is stale", now_s)
    mute(b, "")
    b.told("controller", "running", held.heard_s)
    return (held.at_s - now_s) * 1e3


def mute(b: GraphBench, views: str) -> None:
    assert b.set_text("sim_node", "mute_views", views).successful


def sim_reset(b: GraphBench) -> float:
    """The episode ends in the middle of a chunk: silence, another scene, and nothing of before plays in it."""
    epoch = b.count("epoch")
    now_s = time.time()
    assert b.call("qwen_vla/sim_reset").success
    idle = b.told("controller", "idle: stopped", now_s)
    again = b.told("controller", "running", idle.heard_s)
    assert b.count("epoch") > epoch
    between = [t for t in b.ticks["left_arm"] if idle.at_s + BRAKING_S < t.at_s < again.at_s and t.rate.any()]
    assert not between, "it moved between two episodes"
    started = b.events[-1]
    assert started["event"] == "started"
    assert [(told["index"], told["outcome"]) for told in started["earlier"]][-1] == (started["index"] - 1, "aborted")
    return (again.at_s - now_s) * 1e3


def sim_frozen(b: GraphBench) -> float:
    now_s = b.signal("sim_node", signal.SIGSTOP)
    held = b.told("controller", "stale state", now_s)
    b.rested_s(held.at_s)
    b.signal("sim_node", signal.SIGCONT)
    b.told("controller", "running", held.heard_s)
    return (held.at_s - now_s) * 1e3


def sim_killed(b: GraphBench) -> float:
    now_s = b.kill("sim_node")
    held = b.told("controller", "stale state", now_s)
    b.rested_s(held.at_s)
    before = len(b.events)
    b.start("sim_node")
    b.wait(lambda: any(event["event"] == "started" for event in b.events[before:]), "an episode")
    b.told("controller", "running", time.time())
    return (held.at_s - now_s) * 1e3


def recorder_killed(b: GraphBench) -> float:
    b.kill("recorder_node")
    b.goes_on(time.time())
    pause_ms = float(np.diff([t.at_s for t in list(b.ticks["left_arm"])]).max() * 1e3)
    b.start("recorder_node")
    b.told("recorder", "recording")  # the episode that is announced as running
    before = len(list(b.run_dir.glob("episode_*")))
    now_s = time.time()
    assert b.call("qwen_vla/sim_reset").success
    idle = b.told("controller", "idle: stopped", now_s)
    b.told("controller", "running", idle.heard_s)
    b.wait(lambda: len(list(b.run_dir.glob("episode_*"))) > before, "a bag after the restart")
    return pause_ms


def controller_killed(b: GraphBench) -> float:
    b.kill("controller_node")
    heard = len(b.arm)
    b.wait(lambda: len(b.arm) > heard + 25, "joint states")  # the position servos reach the last command
    heard = len(b.arm)
    b.wait(lambda: len(b.arm) > heard + 25, "joint states")
    moved = float(np.ptp([msg.position[:6] for _, msg in b.arm[heard:]], axis=0).max())
    b.start("controller_node")
    b.told("controller", "idle: not started")
    assert b.call("qwen_vla/sim_reset").success
    b.told("controller", "running")
    return moved


def checkpoint_damaged(b: GraphBench) -> float:
    """A second policy that cannot load ends with one line; the graph goes on."""
    folder = b.folder / "damaged"
    shutil.copytree(b.checkpoint, folder)
    for weights in folder.glob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size // 2)
    spec = b.specs["policy_node"]
    spec = replace(spec, name="second_policy", parameters={**spec.parameters, "checkpoint": str(folder)})
    now_s = time.time()
    second = Graph([spec], b.folder)
    try:
        assert second.processes["second_policy"].wait(timeout=TIMEOUT_S) == 2
    finally:
        second.close()
    took_ms = (time.time() - now_s) * 1e3
    assert "policy_node cannot start" in second.log() and "damaged" in second.log() and "Traceback" not in second.log()
    b.goes_on(now_s, chunks=2)
    return took_ms


def all_told_to_end(b: GraphBench) -> float:
    """In the order of the supervisor; the controller is last, so that it can hold while the rest ends."""
    worst_ms = 0.0
    for name in ("policy_node", "sim_node", "recorder_node", "controller_node"):
        now_s = b.signal(name, signal.SIGTERM)
        code = b.graph.processes[name].wait(timeout=TIMEOUT_S)
        assert code == 0, f"{name} ended with {code}"
        worst_ms = max(worst_ms, (time.time() - now_s) * 1e3)
    return worst_ms


FAULTS = [
    Fault(
        "policy frozen",
        "SIGSTOP, later SIGCONT",
        "arms hold, reason published; goes on by itself",
        HOLD_MS,
        "ms",
        policy_frozen,
    ),
    Fault(
        "policy SIGKILL",
        "in motion, then started again",
        "arms hold, reason published; goes on with the new one",
        HOLD_MS,
        "ms",
        policy_killed,
    ),
    Fault(
        "policy restarted",
        "SIGTERM, then started again",
        "exit code 0; the new one takes the episode over: running again",
        RESTART_MS,
        "ms",
        policy_restarted,
    ),
    Fault(
        "simulated camera muted",
        "one of three, for longer than fault_after_s",
        "arms hold, reason published, then a fault; goes on by itself",
        HOLD_MS + 1000,
        "ms",
        camera_muted,
    ),
    Fault(
        "simulation reset mid-chunk",
        "qwen_vla/sim_reset in motion",
        "silence, new scene, nothing old plays; running again",
        10_000,
        "ms",
        sim_reset,
    ),
    Fault(
        "robot frozen",
        "the simulator stands still",
        "brakes to rest, reason published; goes on by itself",
        STALE_MS,
        "ms",
        sim_frozen,
    ),
    Fault(
        "robot SIGKILL, restarted",
        "the simulator dies",
        "brakes to rest, reason published; goes on with the new one",
        STALE_MS,
        "ms",
        sim_killed,
    ),
    Fault(
        "recorder SIGKILL in the graph",
        "in motion, restarted",
        "commands go on: longest pause; the next episode is recorded",
        PAUSE_MS,
        "ms",
        recorder_killed,
    ),
    Fault(
        "controller SIGKILL in the graph",
        "in motion, restarted",
        "the arm stands still; moves again only after a start",
        0.01,
        "rad",
        controller_killed,
    ),
    Fault(
        "checkpoint damaged",
        "a policy is started with half a weights file",
        "one line, exit code 2; the graph goes on",
        RESTART_MS,
        "ms",
        checkpoint_damaged,
    ),
    Fault(
        "every node SIGTERM",
        "policy, simulator, recorder, controller",
        "exit code 0 each: slowest",
        EXIT_MS,
        "ms",
        all_told_to_end,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: GraphBench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
