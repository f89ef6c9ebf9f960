"""Control steps per second of a simulated robot, with its cameras rendered each fifth step as a 10 Hz policy needs.

python benchmarks/sim.py [--world aloha] [--steps 500] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from qwen_vla_core.sim.registry import make_world

RENDER_EVERY = 5


def measure(world: Any, steps: int, size: tuple[int, int] | None) -> float:
    """Control steps per second; ``size`` (width, height) of all views each fifth step, None: physics alone."""
    world.reset(0)
    start = world.command()
    if size:
        for view in world.views:
            world.render(view, *size)  # the first picture builds the GL context
    began = time.perf_counter()
    for step in range(steps):
        # Both arms sway, so that contacts, shading and caches do real work.
        world.step(start + 0.2 * np.sin(2 * np.pi * step / 100) * np.array([1, 1, 1, 1, 1, 1, 0] * 2))
        if size and step % RENDER_EVERY == 0:
            for view in world.views:
                world.render(view, *size)
    return steps / (time.perf_counter() - began)


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
    rows = {name: measure(world, args.steps, size) for name, size in sizes.items()}
    views = len(world.views)
    world.close()
    if args.json:
        print(
            json.dumps(
                {"world": args.world, "views": views, "render_every": RENDER_EVERY, "steps_per_second": rows}, indent=2
            )
        )
        return
    print(f"{args.world}: control steps/s, {views} views rendered each {RENDER_EVERY}th step")
    for name, rate in rows.items():
        print(f"  {name:<14} {rate:8.0f}")


if __name__ == "__main__":
    main()
