"""``qwen-vla eval``: closed-loop success of a checkpoint in its embodiment's simulated world."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import EpisodeResult, run_episode
from qwen_vla_core.evaluation.metrics import Rate, mean_metrics
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.files import atomic_write_json

FRAME_S = 0.1  # of a film


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla eval``."""
    parser.add_argument("--embodiment", default="aloha", help="shipped name or YAML file (default: aloha)")
    parser.add_argument("--checkpoint", default="aloha-tiny", help="shipped name or checkpoint folder")
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
    parser.add_argument("--replan-hz", type=float, default=5.0, help="with --latency-ms: looks per second (default: 5)")
    parser.add_argument("--blend-ms", type=float, default=200.0, help="with --latency-ms: fade between chunks (200)")
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
    settings = {
        key: getattr(args, key)
        for key in (
            *("embodiment", "checkpoint", "task", "execute_steps", "flow_steps", "timeout", "language", "device"),
            *("latency_ms", "replan_hz", "blend_ms"),
        )
    }
    seeds = list(range(args.seed, args.seed + args.episodes))
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(seeds), desc="episodes", disable=args.json) as bar:
        for row in run_seeds(settings, seeds, args.workers):
            rows.append(row)
            bar.set_postfix_str(str(Rate(sum(r["success"] for r in rows), len(rows))))
            bar.update()
    report = summarise(rows, settings)
    if args.gif:
        film(settings, seeds[: args.gif_episodes], args.gif)
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
    if not args.replan_hz > 0:
        raise UserError(f"--replan-hz {args.replan_hz:g}: give more than 0")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout:g}: give more than 0 seconds")
    if args.gif and args.gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: must end in .gif")
    robot = load_embodiment(args.embodiment)
    if robot.simulation is None:
        raise UserError(f"--embodiment {robot.name}: its YAML names no `simulation.world` to evaluate in")
    if args.task not in (None, "all", *(known := world_class(robot.simulation.world).task_names)):
        raise UserError(f"--task {args.task}: use one of {', '.join(known)}, all")
    read_config(resolve_checkpoint(args.checkpoint))


def run_seeds(settings: dict[str, Any], seeds: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Yields one row per seed, in order, from this process or from ``workers`` spawned ones."""
    if workers <= 1:
        yield from map(_Evaluator(settings), seeds)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the children: two threads each on two cores are slower than one
    context = get_context("spawn")  # a forked GL context does not work
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(settings,)) as pool:
        yield from pool.map(_run_one, seeds)


def film(settings: dict[str, Any], seeds: list[int], path: Path) -> None:
    """Runs some seeds once more with the camera on: all views, ten frames per simulated second."""
    from qwen_vla_core.sim.pictures import save, tile

    frames: list[Any] = []

    def on_step(world: Any) -> None:
        if round(world.time_s * world.control_hz) % round(FRAME_S * world.control_hz) == 0:
            frames.append(tile(world))

    evaluator = _Evaluator({**settings, "language": False})
    for seed in seeds:
        evaluator(seed, on_step)
        frames += [tile(evaluator.world)] * 5  # half a second on the result
    save(path, frames, FRAME_S)


def summarise(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Rates over ``rows``: success, a wrong object chosen, and language following where it was asked for."""
    count = len(rows)
    report: dict[str, Any] = {
        "settings": settings,
        "success": Rate(sum(row["success"] for row in rows), count).to_dict(),
        "wrong_object": Rate(sum(row["chosen"] not in (None, row["target"]) for row in rows), count).to_dict(),
        "mean_seconds_to_success": _mean([row["seconds"] for row in rows if row["success"]]),
        "metrics": mean_metrics([row["metrics"] for row in rows]),
        "episodes": rows,
    }
    others = [row["other"] for row in rows if row.get("other")]
    if others:
        chosen = [row for row in (*rows, *others) if row["chosen"] is not None]
        report["other_object_success"] = Rate(sum(row["success"] for row in others), len(others)).to_dict()
        if chosen:  # a share of nothing is no number
            named = sum(row["chosen"] == row["target"] for row in chosen)
            report["named_of_chosen"] = Rate(named, len(chosen)).to_dict()
        both = sum(row["success"] and row["other"]["success"] for row in rows if row.get("other"))
        report["both_instructions"] = Rate(both, len(others)).to_dict()
    return report


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


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


class _Evaluator:
    """One world and one policy, reused over seeds."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from qwen_vla_core.embodiment import load_embodiment
        from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
        from qwen_vla_core.model.device import choose_device
        from qwen_vla_core.sim.registry import make_world, world_class

        torch.set_num_threads(1)
        self.settings = settings
        embodiment = self.embodiment = load_embodiment(settings["embodiment"])
        assert embodiment.simulation is not None  # `_check` has seen to it
        known = world_class(embodiment.simulation.world).task_names
        tasks = known if settings["task"] == "all" else (settings["task"] or known[0],)
        self.world = make_world(embodiment.simulation.world, tasks=tasks)
        device, dtype = choose_device(settings["device"])
        self.policy = load_checkpoint(resolve_checkpoint(settings["checkpoint"]), device, dtype)
        self.generator = torch.Generator(device)

    def __call__(self, seed: int, on_step: Callable[[Any], None] | None = None) -> dict[str, Any]:
        result = self._episode(seed, None, on_step)
        row = self._row(result)
        if self.settings["language"]:
            other = self.world.other_instruction()
            if other is not None:
                row["other"] = self._row(self._episode(seed, other))
        return row

    def _episode(
        self, seed: int, instruction: str | None, on_step: Callable[[Any], None] | None = None
    ) -> EpisodeResult:
        self.generator.manual_seed(seed)
        settings = self.settings
        sampler = _Sampler(self.policy, settings["flow_steps"], self.generator)
        common: dict[str, Any] = {
            "seed": seed,
            "instruction": instruction,
            "timeout_s": self.world.limit_s if settings["timeout"] is None else settings["timeout"],
            "on_step": on_step,
        }
        if settings["latency_ms"] is None:
            return run_episode(self.world, sampler, execute_steps=settings["execute_steps"], **common)
        timing = Timing(settings["latency_ms"] / 1000, 1 / settings["replan_hz"], settings["blend_ms"] / 1000)
        return run_episode_in_time(self.world, sampler, self.embodiment, timing=timing, **common)

    def _row(self, result: EpisodeResult) -> dict[str, Any]:
        return {**result.to_dict(), "target": self.world.target}


class _Sampler:
    """A policy with its number of Euler steps and its noise source fixed."""

    def __init__(self, policy: Any, steps: int | None, generator: Any) -> None:
        self.policy, self.steps, self.generator = policy, steps, generator

    def predict(self, observation: Any) -> Any:
        return self.policy.predict(observation, steps=self.steps, generator=self.generator)


_evaluator: _Evaluator | None = None


def _start(settings: dict[str, Any]) -> None:
    global _evaluator
    _evaluator = _Evaluator(settings)


def _run_one(seed: int) -> dict[str, Any]:
    assert _evaluator is not None
    return _evaluator(seed)
