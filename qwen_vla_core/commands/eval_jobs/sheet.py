"""``qwen-vla eval sheet``: some scenes of every axis of a suite in one picture, with what is asked in them."""

from __future__ import annotations

import argparse
import textwrap
from io import BytesIO
from pathlib import Path

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites import SUITES, make_suite

TILE = (280, 210)  # width, height of a picture
LINE = 18  # height of a line of text
WRAP = 40  # characters that fit under a picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument("--scenes", type=int, default=4, help="per axis and task (default: 4)")
    parser.add_argument("--seed", type=int, default=100_000, help="first seed (default: 100000)")
    parser.add_argument("--task", help="only this task (default: all)")
    parser.add_argument("--view", help="which view (default: the world's first)")
    parser.add_argument("--out", type=Path, required=True, help=".png")


def run(args: argparse.Namespace) -> int:
    """Writes the picture."""
    import cv2
    import numpy as np
    from PIL import Image

    from qwen_vla_core.files import atomic_write_bytes
    from qwen_vla_core.sim.demos import shrink

    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    if args.scenes < 1 or args.seed < 0:
        raise UserError("--scenes: at least 1, and --seed: at least 0")
    suite = make_suite(args.suite)
    missing = suite.missing()
    if missing:
        raise UserError(f"--suite {suite.name}: install {missing}")

    if args.task is not None and args.task not in suite.tasks:
        raise UserError(f"--task {args.task}: use one of {', '.join(suite.tasks)}")

    def text(words: str, width: int, size: float, grey: int) -> np.ndarray:
        line = np.full((LINE, width, 3), 255, np.uint8)
        cv2.putText(line, words, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, size, (grey,) * 3, 1, cv2.LINE_AA)
        return line

    bands = []
    world, key = None, ""
    trials = [trial for trial in suite.trials(args.scenes, args.seed) if args.task in (None, trial.task)]
    for axis in suite.axes:
        for task in suite.tasks:
            tiles = []
            for trial in (t for t in trials if (t.axis, t.task) == (axis, task)):
                if world is None or key != trial.world_key:
                    if world is not None:
                        world.close()
                    world, key = suite.make_world(trial), trial.world_key
                world.reset(trial.seed, trial.instruction)
                view = args.view or world.views[0]
                picture = shrink(world.render(view, 2 * TILE[0], 2 * TILE[1]), TILE)
                words = textwrap.wrap(world.instruction, WRAP)[:2]
                lines = [text(line, TILE[0], 0.4, 0) for line in (*words, "", "")[:2]]
                tiles.append(np.vstack([picture, *lines]))
            if tiles:
                band = np.hstack(tiles)
                bands += [text(f"{axis} / {task}: {suite.axes[axis]}"[:160], band.shape[1], 0.42, 60), band]
    if world is not None:
        world.close()
    buffer = BytesIO()
    Image.fromarray(np.vstack(bands)).save(buffer, "PNG", optimize=True)
    atomic_write_bytes(args.out, buffer.getvalue())
    print(f"{args.out}: {len(trials)} scenes of {len(suite.axes)} axes")
    return 0
