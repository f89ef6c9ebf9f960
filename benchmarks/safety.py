#!/usr/bin/env python3
"""What one step of the controller's filter costs, part by part.

    python benchmarks/safety.py [--embodiment aloha] [--steps 3000] [--json]

Protocol: the same moving target is filtered in turn by the robot as shipped, without its workspace boxes, and without
boxes and jerk limits; one step of each after the other, so that whatever else the machine does hits all three alike.
``blocked`` is the shipped robot with targets beyond its boxes and limits: the dearest case, where steps are shortened.
``kinematics`` is one evaluation of points and Jacobians of all boxes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.runtime.safety import SafetyLimiter


def without(robot: Embodiment, *, jerk: bool) -> Embodiment:
    """The robot without boxes, and without jerk limits if ``jerk`` is False."""
    groups = tuple(
        dataclasses.replace(g, limits=dataclasses.replace(g.limits, jerk=g.limits.jerk if jerk else ()))
        for g in robot.actions
    )
    return dataclasses.replace(robot, actions=groups, safety=dataclasses.replace(robot.safety, workspace=()))


def measure(name: str, steps: int) -> dict[str, float]:
    """Median microseconds per step."""
    robot = load_embodiment(name)
    dt = 1.0 / robot.control.controller_rate_hz
    limiters = {
        "shipped": SafetyLimiter(robot),
        "without boxes": SafetyLimiter(without(robot, jerk=True)),
        "without boxes and jerk": SafetyLimiter(without(robot, jerk=False)),
        "blocked": SafetyLimiter(robot),
    }
    start = np.array(
        [
            x
            for g in robot.actions
            for x in (g.start or [0.5 * (a + b) for a, b in zip(g.limits.lower, g.limits.upper, strict=True)])
        ]
    )
    reach = 0.1 * np.minimum(limiters["shipped"].velocity_c, 1.0)
    far = limiters["shipped"].upper_c
    calls: dict[str, Callable[[np.ndarray], object]] = {
        key: (lambda target, limiter=limiter: limiter.step(target, target, dt)) for key, limiter in limiters.items()
    }
    calls["blocked"] = lambda _target, limiter=limiters["blocked"]: limiter.step(far, limiter.position_c, dt)
    if limiters["shipped"].fence is not None:
        calls["kinematics"] = limiters["shipped"].fence.points
    for limiter in limiters.values():
        limiter.reset(start)
    spent: dict[str, list[float]] = {key: [] for key in calls}
    for step in range(1, steps + 1):
        ease = min(step * dt, 1.0) ** 2
        target = start + ease * reach * np.sin(2.0 * step * dt + np.arange(len(start)))
        for key, call in calls.items():
            begin = time.perf_counter()
            call(target)
            spent[key].append(time.perf_counter() - begin)
    return {key: 1e6 * float(np.median(values)) for key, values in spent.items()}


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="aloha", help="shipped name or YAML path (default: aloha)")
    parser.add_argument("--steps", type=int, default=3000, help="steps per variant (default: 3000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = measure(args.embodiment, args.steps)
    if args.json:
        print(json.dumps({"embodiment": args.embodiment, "us_per_step": result}))
        return 0
    print(f"{args.embodiment}, median of {args.steps} steps")
    for key, value in result.items():
        print(f"{key:24s}{value:8.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
