#!/usr/bin/env python3
"""What one step of the built-in inverse kinematics costs, and what it adds to a tick of the controller.

    python benchmarks/inverse_kinematics.py [--embodiment widowx_joints] [--steps 2000] [--json]

Protocol: the hand follows a circle of 5 cm (``tracking``), the same circle where the wrist's axes are almost in line
(``near a singularity``), and a pose a metre out of reach (``out of reach``); the three in turn, one step of each after
the other. ``tick`` is a whole tick of the control law while it plays displacements through joints; ``tick by twists``
the same of ``widowx``, which has no joints to solve for. Median and 99th percentile of microseconds of CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from qwen_vla_core.embodiment import load_robot
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.mock_robot import MockRobot
from qwen_vla_core.runtime.targets import HandSolver

CIRCLE_M, PERIOD_STEPS = 0.05, 200


def ticker(name: str) -> Callable[[], float]:
    """Seconds of CPU of one tick of a robot that is told to swing its hand to and fro."""
    robot = load_robot(name)
    loop, mock = ControlLoop(robot), MockRobot(robot)
    tick_ns = round(1e9 / robot.control.controller_rate_hz)
    rows = np.zeros((robot.control.horizon, len(robot.channels)))
    rows[:, -1] = 1.0
    now = [1_000_000_000_000]
    loop.start(now[0])

    def tick() -> float:
        now[0] += tick_ns
        count = (now[0] // tick_ns) % PERIOD_STEPS
        loop.update_state(mock.values, now[0])
        if count % 10 == 0:
            rows[:, :3] = 0.02 * np.sin(2 * np.pi * count / PERIOD_STEPS + np.arange(3))
            loop.feed(ActionChunk(rows, robot.channels, now[0] - tick_ns, robot.period_s), now[0])
        begin = time.process_time()
        output = loop.tick(now[0])
        spent = time.process_time() - begin
        for group in loop.commanded.actions:
            if group.name in output.commands:
                mock.command(group.name, group.command.map.to_channel(output.commands[group.name].values))
        mock.step(tick_ns * 1e-9)
        return spent

    return tick


def measure(name: str, steps: int) -> dict[str, dict[str, float]]:
    """Microseconds per step: case → median, p99."""
    robot = load_robot(name)
    index = next(i for i, group in enumerate(robot.actions) if group.command.ik is not None)
    spec = robot.actions[index].command.ik
    assert spec is not None
    dt = 1.0 / robot.control.controller_rate_hz
    home = np.array(spec.start or np.zeros(len(spec.channels)))
    straight = home.copy()
    straight[-2] = 0.05
    cases = {"tracking": (home, 0.0), "near a singularity": (straight, 0.0), "out of reach": (home, 1.0)}
    calls: dict[str, Callable[[], float]] = {}
    for case, (start, away) in cases.items():
        hand = HandSolver(robot, index)
        hand.ik.reset(hand.to_chain(start))
        position, rotation = hand.pose(start)
        count = [0]

        def step(
            hand: HandSolver = hand,
            position: np.ndarray = position,
            rotation: np.ndarray = rotation,
            away: float = away,
            count: list[int] = count,
        ) -> float:
            count[0] += 1
            angle = 2 * np.pi * count[0] / PERIOD_STEPS
            goal = position + np.array([away, CIRCLE_M * np.sin(angle), CIRCLE_M * (np.cos(angle) - 1.0)])
            begin = time.process_time()
            hand.ik.follow(goal, rotation, dt)
            return time.process_time() - begin

        calls[case] = step
    calls["tick"] = ticker(name)
    calls["tick by twists"] = ticker("widowx")
    spent: dict[str, list[float]] = {case: [] for case in calls}
    for _ in range(steps):
        for case, call in calls.items():
            spent[case].append(call())
    return {
        case: {"median": 1e6 * float(np.median(values)), "p99": 1e6 * float(np.percentile(values, 99))}
        for case, values in spent.items()
    }


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="widowx_joints", help="shipped name or YAML path with an ik command")
    parser.add_argument("--steps", type=int, default=2000, help="steps per case (default: 2000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = measure(args.embodiment, args.steps)
    if args.json:
        print(json.dumps({"embodiment": args.embodiment, "steps": args.steps, "microseconds": rows}, indent=2))
        return 0
    for case, row in rows.items():
        print(f"{case:<20} median {row['median']:7.0f} µs   p99 {row['p99']:7.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
