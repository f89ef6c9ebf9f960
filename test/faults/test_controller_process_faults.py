"""The controller's own process: started before anybody else, frozen, told to end, killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fault_bench import ROBOT, TIMEOUT_S, TOLERANCE_MS, Bench, robot_yaml
from fault_support import Fault, Ledger

from qwen_vla_ros.bringup import build_graph

RECOVERY_MS = 5000
PERIOD_S = 1.0 / ROBOT.control.controller_rate_hz
BRAKING_MS = 1e3 * max(
    v / a for g in ROBOT.actions for v, a in zip(g.limits.velocity, g.limits.acceleration, strict=True)
)
STEP_LIMIT = 2 * PERIOD_S * ROBOT.actions[0].limits.velocity[0]


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A controller that is started while no driver is there."""
    yaml = robot_yaml(tmp_path_factory.mktemp("robot"))
    spec = next(spec for spec in build_graph(str(yaml)) if spec.name == "controller_node")
    spec = replace(spec, parameters={**spec.parameters, "start_on_activate": True})
    made = make_bench([spec], starts=False)
    made.start("controller_node")
    return made


def appears_late(b: Bench) -> float:
    """The controller comes up first and is fed chunks; the drivers are discovered long after."""
    b.kill("controller_node")
    topics = tuple(b.state_publishers)
    b.hang_up(*topics)
    begun_s = time.time()
    b.start("controller_node")
    b.told("controller", "no state yet", begun_s)
    seen = len(b.statuses["controller"])
    b.wait(lambda: len(b.statuses["controller"]) > seen + 2, "a second of waiting")
    assert not any(t.at_s > begun_s for ticks in b.ticks.values() for t in ticks), (
        "a command before anything is measured"
    )
    shown_s = b.show_up(*topics)
    return (b.told("controller", "running", shown_s).at_s - shown_s) * 1e3


def frozen(b: Bench) -> float:
    """The process stands still for a second, as on a machine that swaps; then every clock has moved on."""
    stopped_s = b.signal("controller_node", signal.SIGSTOP)
    seen = b.rounds
    b.wait(lambda: b.rounds > seen + 50, "a second")
    continued_s = b.signal("controller_node", signal.SIGCONT)
    b.told("controller", "running", continued_s)
    b.goes_on(continued_s)
    assert not any(stopped_s + 0.1 < t.at_s < continued_s for t in b.ticks["left_arm"])
    return float(np.abs(np.diff(b.command("left_waist"))).max())


def told_to_end(number: int, times: int) -> Callable[[Bench], float]:
    def provoke(b: Bench) -> float:
        now_s = time.time()
        for _ in range(times):
            b.signal("controller_node", number)
        assert b.graph.processes["controller_node"].wait(timeout=TIMEOUT_S) == 0
        b.told("controller", "idle: stopped", now_s)
        last = {name: ticks[-1] for name, ticks in b.ticks.items()}
        took_ms = (max(t.at_s for t in b.moving(0)) - now_s) * 1e3
        for group in ROBOT.actions:  # the last command of each group leaves it at a rate it can stop from in one period
            braking = np.array(group.limits.acceleration) * 2 * PERIOD_S
            assert (np.abs(last[group.name].rate) <= braking + 1e-9).all()
        b.start("controller_node")
        b.wait(lambda: b.running_since(now_s), "motion after the restart")
        return took_ms

    return provoke


def killed(b: Bench) -> float:
    """Nobody commands the robot until a new controller does, from where the robot is."""
    b.kill("controller_node")
    b.heard_of()  # the last command has arrived
    b.pose["left_waist"] -= 0.2  # meanwhile the arm sinks
    measured = dict(b.pose)
    b.heard_of()
    restarted_s = time.time()
    b.start("controller_node")
    b.wait(lambda: b.running_since(restarted_s), "motion after the restart")
    first = {name: next(t for t in ticks if t.at_s > restarted_s) for name, ticks in b.ticks.items()}
    return max(float(np.abs(first[g.name].position - [measured[c] for c in g.channels]).max()) for g in ROBOT.actions)


FAULTS = [
    Fault(
        "drivers discovered late",
        "the controller and chunks are there long before any joint state",
        "no command before every joint is measured; then it goes on",
        RECOVERY_MS,
        "ms",
        appears_late,
    ),
    Fault(
        "controller frozen 1 s",
        "SIGSTOP and SIGCONT in motion",
        "never a step of more than two periods",
        STEP_LIMIT,
        "rad",
        frozen,
    ),
    Fault(
        "controller SIGTERM",
        "in motion",
        "the last commands bring the robot to rest, exit code 0",
        BRAKING_MS + TOLERANCE_MS,
        "ms",
        told_to_end(signal.SIGTERM, 1),
    ),
    Fault(
        "controller Ctrl-C twice",
        "SIGINT two times in motion",
        "the last commands bring the robot to rest, exit code 0",
        BRAKING_MS + TOLERANCE_MS,
        "ms",
        told_to_end(signal.SIGINT, 2),
    ),
    Fault(
        "controller SIGKILL, restarted",
        "in motion; the arm sinks 0.2 rad meanwhile",
        "the first command is the measured pose",
        0.001,
        "rad",
        killed,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: Bench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
