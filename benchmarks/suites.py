"""One whole episode of a suite with a small policy of random weights: does the chain hold, and how fast is it?

    python benchmarks/suites.py --suite libero --picture libero.png --json libero.json

The policy knows nothing; what is measured is the simulator, its adapter and the way through the model: seconds to make
a world, to reset it, per control step and per inference. Versions of what was installed are kept with the numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.embodiment.spec import DELTA_KINDS
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import run_episode
from qwen_vla_core.evaluation.suites import SUITES, make_suite
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.interfaces import ActionChunk, Observation

DISTRIBUTIONS = (
    "hf-libero", "robosuite", "praxis-robosuite", "praxis-robocasa-gr1", "mani-skill", "sapien", "habitat-lab",
    "mujoco", "numpy", "torch",
)  # fmt: skip


class Timed:
    """A policy that counts its seconds."""

    def __init__(self, policy: Any, robot: str) -> None:
        self.policy, self.robot, self.seconds = policy, robot, 0.0

    def predict(self, observation: Observation) -> ActionChunk:
        """Of the policy."""
        began = time.perf_counter()
        chunk: ActionChunk = self.policy.predict(observation, self.robot)
        self.seconds += time.perf_counter() - began
        return chunk


def tiny_checkpoint(robot: Embodiment, folder: Path) -> Any:
    """A random policy, saved and loaded again: its actions lie in the middle half of the robot's limits, its
    displacements in the middle twentieth, so that the hand stays in sight.
    """
    import torch

    from qwen_vla_core.model.checkpoint import load_checkpoint, save_checkpoint
    from qwen_vla_core.model.policy import Stats
    from qwen_vla_core.model.presets import build_tiny

    lower = np.concatenate([group.limits.lower for group in robot.actions])
    upper = np.concatenate([group.limits.upper for group in robot.actions])
    share = np.array([0.05 if group.kind in DELTA_KINDS else 0.5 for group in robot.actions for _ in group.channels])
    quarter = np.clip(share * (upper - lower) / 2, None, 1.0)  # a base has no limits worth the name
    middle = np.clip((upper + lower) / 2, -1.0, 1.0)
    actions = Quantiles(tuple(middle - quarter), tuple(middle + quarter), robot.channels)
    count = len(robot.state_channels)
    states = Quantiles((-1.0,) * count, (1.0,) * count, robot.state_channels)
    policy = build_tiny([robot], {robot.name: Stats(actions, states)})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():  # a fresh decoder answers zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(policy, folder)
    return load_checkpoint(folder, torch.device("cpu"), torch.float32)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the episode.

    Raises:
        UserError: the suite's simulator is not installed, or it has no such trial.
    """
    suite = make_suite(args.suite)
    missing = suite.missing()
    if missing:
        raise UserError(f"--suite {suite.name}: install {missing}")
    chosen = [t for t in suite.trials(1, args.seed) if args.axis in (None, t.axis) and args.task in (None, t.task)]
    if not chosen:
        raise UserError(f"--axis {args.axis} --task {args.task}: suite {suite.name} has no such trial")
    trial = chosen[0]
    policy = Timed(tiny_checkpoint(load_embodiment(suite.embodiment), folder), suite.embodiment)
    began = time.perf_counter()
    world = suite.make_world(trial)
    made = time.perf_counter()
    world.reset(trial.seed, trial.instruction)
    reset = time.perf_counter()
    frames: list[np.ndarray] = []

    def keep(world: Any) -> None:
        size = world.render_size
        frames.append(np.hstack([world.render(view, *size) for view in world.film_views]))

    result = run_episode(
        world, policy, seed=trial.seed, timeout_s=min(args.seconds or world.limit_s, world.limit_s), on_step=keep
    )
    ended = time.perf_counter()
    if args.picture:
        import cv2

        strip = [frames[i] for i in np.linspace(0, len(frames) - 1, min(4, len(frames))).astype(int)]
        cv2.imwrite(str(args.picture), np.vstack([np.hstack(strip[:2]), np.hstack(strip[2:])])[..., ::-1])
    world.close()
    steps = len(frames)
    return {
        "suite": suite.name,
        "trial": trial.to_dict(),
        "result": result.to_dict(),
        "horizon_s": world.limit_s,
        "control_steps": steps,
        "seconds": {
            "make_world": made - began,
            "first_reset": reset - made,
            "second_reset_and_episode": ended - reset,
            "per_inference": policy.seconds / max(1, result.inferences),
        },
        "different_frames": len({frame.tobytes() for frame in frames}),
        "note": args.note,
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name))},
        "python": platform.python_version(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Prints, and writes with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument("--axis", help="default: the first")
    parser.add_argument("--task", help="default: the first")
    parser.add_argument("--seed", type=int, default=0, help="trial (default: 0)")
    parser.add_argument("--seconds", type=float, help="simulated seconds (default: the published horizon)")
    parser.add_argument("--checkpoint", type=Path, help="keep the random checkpoint in this folder")
    parser.add_argument("--picture", type=Path, help="four moments of the episode as one picture")
    parser.add_argument("--note", default="", help="what a reader has to know, e.g. that assets are stand-ins")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = measure(args, args.checkpoint or Path(scratch) / "checkpoint")
    except UserError as error:
        print(error)
        return 2
    if args.json:
        atomic_write_json(args.json, report)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
