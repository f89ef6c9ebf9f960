"""``qwen-vla eval open-loop``: predicted chunks beside recorded ones, on data the checkpoint has not learned from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import DEFAULT_CHECKPOINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("data", metavar="DATA", help="LeRobot dataset of episodes that were not trained on")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or folder (default: generalist)")
    parser.add_argument("--embodiment", help="the checkpoint's robot (default: that of its contract)")
    parser.add_argument("--frames", type=int, default=200, help="questions, spread over the episodes (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of frames and noise (default: 0)")
    parser.add_argument("--flow-steps", type=int, help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--hold-at-end", action="store_true", help="after its end an episode stays where it ended")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--output", type=Path, help="write the result with every frame as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Asks, compares, prints."""
    from tqdm import tqdm

    from qwen_vla_core.data.lerobot import open_dataset
    from qwen_vla_core.evaluation.open_loop import compare
    from qwen_vla_core.files import atomic_write_json
    from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
    from qwen_vla_core.model.device import choose_device

    for key in ("frames", "flow_steps"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise UserError(f"--{key.replace('_', '-')} {value}: give at least 1")
    device, dtype = choose_device(args.device)
    root = resolve_checkpoint(args.checkpoint)
    policy = load_checkpoint(root, device, dtype)
    dataset = open_dataset(args.data, embodiment=args.embodiment)
    name = args.embodiment or _robot_of(policy, dataset)
    with tqdm(total=min(args.frames, int(sum(dataset.lengths))), desc="frames", disable=args.json or None) as bar:
        report = compare(
            policy,
            name,
            dataset,
            args.frames,
            seed=args.seed,
            steps=args.flow_steps,
            hold_at_end=args.hold_at_end,
            on_frame=lambda done: bar.update(done - bar.n),
        )
    report = {"checkpoint": str(args.checkpoint), **report}
    if args.output:
        atomic_write_json(args.output, report)
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0


def _robot_of(policy: Any, dataset: Any) -> str:
    """The one robot of the checkpoint whose channels the data have.

    Raises:
        UserError: there is none, or more than one.
    """
    fitting = [
        name
        for name in policy.embodiments
        if tuple(policy.embodiment(name).channels) == dataset.contract.action_channels
    ]
    if len(fitting) != 1:
        raise UserError(
            f"--embodiment: say which of {', '.join(policy.embodiments)} these data are of; "
            f"their action channels are {', '.join(dataset.contract.action_channels)}"
        )
    return fitting[0]


def describe(report: dict[str, Any]) -> str:
    """The errors as a table: the policy, staying, repeating."""
    names = {"policy": "policy", "stay": "stay where it is", "repeat": "repeat the last action"}
    lines = [
        f"{report['embodiment']}, {report['dataset']}: {len(report['frames'])} frames; mean absolute error, range 2"
    ]
    lines.append(f"{'':<24}{'chunk':>9}  {'95 % interval':<18}{'first action':>13}")
    for key, row in report["errors"].items():
        low, high = row["interval_95"]
        lines.append(
            f"{names[key]:<24}{row['chunk']:>9.4f}  {f'[{low:.4f}, {high:.4f}]':<18}{row['first_action']:>13.4f}"
        )
    mine = report["errors"]["policy"]["chunk"]
    lines += [f"{mine / row['chunk']:.2f} × {names[key]}" for key, row in report["errors"].items() if key != "policy"]
    return "\n".join(lines)
