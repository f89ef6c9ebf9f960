"""``qwen-vla eval``: closed-loop success of a checkpoint in its embodiment's simulated world."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Evaluator, Settings, film_episodes, run_seeds
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.report import summarise
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla eval``."""
    parser.add_argument("--embodiment", default="aloha", help="shipped name or YAML file (default: aloha)")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or checkpoint folder")
    parser.add_argument("--episodes", type=int, default=50, help="number of seeds (default: 50)")
    parser.add_argument("--seed", type=int, default=100_000, help="first seed; training demonstrations start at 0")
    parser.add_argument("--task", help="one of the world's tasks, or all (default: the world's first)")
    parser.add_argument("--execute-steps", type=int, default=5, help="actions executed of each chunk (default: 5)")
    parser.add_argument("--flow-steps", type=int, default=None, help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--timeout", type=float, help="simulated seconds per episode (default: the world's)")
    parser.add_argument(
        "--latency-ms",
        type=float,
        help="let simulated time go on: chunks reach the robot's control law this late (default: the world waits)",
    )
    parser.add_argument(
        "--strategy",
        default=DEFAULT_STRATEGY,
        help=f"with --latency-ms: {', '.join(STRATEGIES)} (default: {DEFAULT_STRATEGY})",
    )
    parser.add_argument("--blend-ms", type=float, help="with --latency-ms: fade between chunks (the strategy's)")
    parser.add_argument(
        "--told",
        metavar="EMBODIMENT",
        help="speak of another of the checkpoint's robots in the prompt (a wrong prompt)",
    )
    parser.add_argument("--language", action="store_true", help="also ask for another object in the same scene")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, CUDA where there is one"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--gif", type=Path, help="film the first episodes (see --gif-episodes) into this GIF")
    parser.add_argument("--gif-episodes", type=int, default=3, help="episodes in the film (default: 3)")
    parser.add_argument("--output", type=Path, help="write the results as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the episodes and prints rates with 95 % Wilson intervals."""
    _check(args)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    seeds = list(range(args.seed, args.seed + args.episodes))
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(seeds), desc="episodes", disable=args.json) as bar:
        for row in run_seeds(settings, seeds, args.workers):
            rows.append(row)
            bar.set_postfix_str(str(Rate(sum(r["success"] for r in rows), len(rows))))
            bar.update()
    report = summarise(rows, vars(settings))
    if args.gif:
        film_episodes(Evaluator(settings), seeds[: args.gif_episodes], args.gif)
    if args.output:
        atomic_write_json(args.output, report)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Every mistake that can be seen before the first episode: inside a worker it would be a traceback."""
    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint
    from qwen_vla_core.sim.registry import world_class

    for key, least in (("episodes", 1), ("seed", 0), ("execute_steps", 1), ("flow_steps", 1), ("workers", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key.replace('_', '-')} {value}: give at least {least}")
    for key in ("latency_ms", "blend_ms"):
        if getattr(args, key) is not None and not getattr(args, key) >= 0:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key):g}: give 0 or more milliseconds")
    if args.strategy not in STRATEGIES:
        raise UserError(f"--strategy {args.strategy}: use one of {', '.join(STRATEGIES)}")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout:g}: give more than 0 seconds")
    if args.gif and args.gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: must end in .gif")
    robot = load_embodiment(args.embodiment)
    if robot.simulation is None:
        raise UserError(f"--embodiment {robot.name}: its YAML names no `simulation.world` to evaluate in")
    if args.task not in (None, "all", *(known := world_class(robot.simulation.world).task_names)):
        raise UserError(f"--task {args.task}: use one of {', '.join(known)}, all")
    drives = read_config(resolve_checkpoint(args.checkpoint))["embodiments"]
    if args.told is not None and args.told not in drives:
        raise UserError(f"--told {args.told}: this checkpoint drives {', '.join(drives)}")
    if len(drives) > 1 and robot.name not in drives:
        raise UserError(f"--embodiment {robot.name}: this checkpoint drives {', '.join(drives)}")


def print_report(report: dict[str, Any]) -> None:
    """The same rates, for people."""
    names = {
        "success": "success",
        "wrong_object": "another object chosen",
        "other_object_success": "asked for another object: success",
        "both_instructions": "both instructions followed in one scene",
        "named_of_chosen": "of all chosen objects: the named one",
    }
    for key, label in names.items():
        if key in report:
            print(f"{label:<42} {Rate(report[key]['successes'], report[key]['trials'])}")
    if report["mean_seconds_to_success"] is not None:
        print(f"{'simulated seconds to success, mean':<42} {report['mean_seconds_to_success']:.1f}")
    for name, value in report["metrics"].items():
        print(f"{name + ', mean':<42} {value:.3f}")
