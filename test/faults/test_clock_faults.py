"""A simulated clock that jumps, stops or never starts: no step is longer than two periods, nothing old is played."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fault_bench import ROBOT, Bench, robot_yaml
from fault_support import Fault, Ledger

from qwen_vla_ros.bringup import build_graph

SECOND = 1_000_000_000
PERIOD_S = 1.0 / ROBOT.control.controller_rate_hz
RECOVERY_MS = 3000
STEP_LIMIT = 2 * PERIOD_S * ROBOT.actions[0].limits.velocity[0]


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A controller on a simulated clock, not yet started."""
    yaml = robot_yaml(tmp_path_factory.mktemp("robot"))
    spec = next(spec for spec in build_graph(str(yaml), use_sim_time=True) if spec.name == "controller_node")
    spec = replace(spec, parameters={**spec.parameters, "start_on_activate": True})
    started = make_bench([spec], clock=True, starts=False)
    started.start("controller_node")
    return started


def once(jump_ns: int) -> Callable[[int], int]:
    """A clock that jumps at its next tick and then goes on as before."""
    jumps = [jump_ns]
    return lambda elapsed_ns: elapsed_ns + (jumps.pop() if jumps else 0)


def jump(b: Bench, jump_ns: int) -> tuple[float, float]:
    """Jumps; returns when, and when the robot moved again for good (system clock)."""
    now_s = time.time()
    b.clock_step = once(jump_ns)
    held = b.wait(
        lambda: next((s for s in b.statuses["controller"] if s.heard_s > now_s and "holding" in s.message), None),
        "the controller to hold",
    )
    return now_s, b.told("controller", "running", held.heard_s).heard_s


def back(b: Bench) -> float:
    jumps = b.count("count.clock_jumps")
    jumped_s, again_s = jump(b, -5 * SECOND)
    b.counted("count.clock_jumps", jumps)
    return (again_s - jumped_s) * 1e3


def forward(b: Bench) -> float:
    """New states and a new chunk may come before the next tick looks: then there is nothing to hold for."""
    now_s, old = time.time(), b.clock_ns
    b.clock_step = once(10 * SECOND)
    b.wait(lambda: b.clock_ns > old + 10 * SECOND, "the jump")
    b.goes_on(now_s, chunks=2)
    return (time.time() - now_s) * 1e3


def largest_step(b: Bench) -> float:
    return float(np.abs(np.diff(b.command("left_waist"))).max())


def small_steps_back(b: Bench) -> float:
    """50 ms back, five times: below what counts as a restart, so the plan goes on."""
    jumps = b.count("count.clock_jumps")
    for _ in range(5):
        b.clock_step = once(-SECOND // 20)
        seen = b.ticks_since(0)
        b.wait(lambda seen=seen: b.ticks_since(0) > seen + 15, "commands")
    b.goes_on(time.time(), chunks=1)
    assert b.count("count.clock_jumps") == jumps
    return largest_step(b)


def forward_step(b: Bench) -> float:
    """150 ms ahead, five times: shorter than any age limit, so the plan goes on, and catches up under the limits."""
    for _ in range(5):
        b.clock_step = once(3 * SECOND // 20)
        seen = b.ticks_since(0)
        b.wait(lambda seen=seen: b.ticks_since(0) > seen + 25, "commands")
    return largest_step(b)


def paused(b: Bench) -> float:
    b.clock_step = lambda _elapsed_ns: 0
    stopped_ns = b.clock_ns
    seen = b.ticks_since(0)
    b.wait(lambda: b.ticks_since(0) > seen + 40, "commands while the clock stands")
    assert b.clock_ns == stopped_ns or b.clock_ns - stopped_ns < SECOND // 20
    last = b.command("left_waist")[-20:]
    b.clock_step = lambda elapsed_ns: elapsed_ns
    b.goes_on(time.time(), chunks=1)
    return float(np.ptp(last))


FAULTS = [
    Fault(
        "clock back 5 s",
        "/clock jumps back: a restarted simulation",
        "plan and state are void; holds, then goes on",
        RECOVERY_MS,
        "ms",
        back,
    ),
    Fault(
        "clock forward 10 s",
        "/clock jumps ahead",
        "everything is old at once: nothing unsafe, and it goes on",
        RECOVERY_MS,
        "ms",
        forward,
    ),
    Fault(
        "clock back 50 ms",
        "/clock steps back five times",
        "goes on; largest step of a joint",
        STEP_LIMIT,
        "rad",
        small_steps_back,
    ),
    Fault(
        "clock forward 150 ms",
        "/clock steps ahead five times",
        "never a step of more than two periods",
        STEP_LIMIT,
        "rad",
        forward_step,
    ),
    Fault("clock paused", "/clock stands still", "commands stand still with it", 0.0, "rad", paused),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: Bench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
