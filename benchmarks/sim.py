"""Control steps per second of a simulated robot, with all its cameras rendered as often as its policy looks.

python benchmarks/sim.py [--world aloha] [--steps 500] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from qwen_vla_core.sim.registry import make_expert, make_world

Script = list[tuple[int, list[np.ndarray]]]  # seed, commands of its episode


def rehearse(world: Any, name: str, steps: int) -> Script:
    """The expert's commands for as many episodes as ``steps`` take: real motion, contacts and all."""
    script: Script = []
    while sum(len(commands) for _, commands in script) < steps:
        seed, commands = len(script), []
        world.reset(seed)
        expert = make_expert(name, world)
        while not world.ended() and world.time_s < world.limit_s:
            for command in world.play(expert.action()):
                world.step(command)
                commands.append(command)
        script.append((seed, commands))
    return script


def measure(world: Any, script: Script, size: tuple[int, int] | None, render_every: int) -> float:
    """Control steps per second; ``size`` (width, height) of all views each ``render_every``, None: physics alone."""
    world.reset(0)
    if size:
        for view in world.views:
            world.render(view, *size)  # the first picture builds the GL context
    seconds, steps = 0.0, 0
    for seed, commands in script:
        world.reset(seed)
        began = time.perf_counter()
        for step, command in enumerate(commands):
            world.step(command)
            if size and step % render_every == 0:
                for view in world.views:
                    world.render(view, *size)
        seconds += time.perf_counter() - began
        steps += len(commands)
    return steps / seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="aloha")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    world = make_world(args.world)
    sizes: dict[str, tuple[int, int] | None] = {
        "physics alone": None,
        "128x128": (128, 128),
        "256x192": (256, 192),
        "640x480": (640, 480),
    }
    script, render_every = rehearse(world, args.world, args.steps), round(world.decision_s * world.control_hz)
    rows = {name: measure(world, script, size, render_every) for name, size in sizes.items()}
    views = len(world.views)
    world.close()
    if args.json:
        print(
            json.dumps(
                {"world": args.world, "views": views, "render_every": render_every, "steps_per_second": rows}, indent=2
            )
        )
        return
    print(f"{args.world}: control steps/s, {views} views rendered each {render_every}th step")
    for name, rate in rows.items():
        print(f"  {name:<14} {rate:8.0f}")


if __name__ == "__main__":
    main()
