#!/usr/bin/env python3
"""Continuity strategies under delay: success, jerk, jumps between chunks and idle time, in simulated time.

    python benchmarks/runtime.py                                     small: 10 episodes a cell
    python benchmarks/runtime.py --world widowx_belt --checkpoint runs/belt/checkpoint --episodes 50 --workers 2

Protocol: closed loop through the robot's own control law (limits, watchdog, plan clock). Simulated time goes on while
the policy "thinks": a chunk reaches the controller ``delay`` after its observation, however long this machine takes to
compute it, so the figures do not depend on the machine. The same seeds in every cell; the first is 200000, which no
training and no other evaluation uses. Measures:

  success     with its 95 % Wilson interval
  jerk        mean and maximum over time and joints of an episode, averaged over episodes: third differences of the
              commanded positions at the controller's rate (rad/s³; m/s³ for end effectors and bases)
  jump        largest difference over the joints between the new and the old plan at the moment of a switch, averaged
              over switches and episodes
  idle        share of an episode by which the plan stood still or was slowed down, waiting for the first chunk included

Results are kept in --out after every episode; a run that was stopped goes on there. --plot draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Settings, execute_steps_of, run_in_worker, spawned
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.files import atomic_write_text
from qwen_vla_core.runtime.continuity import STRATEGIES

DELAYS_MS = (0, 40, 100, 200, 400)
MEASURES = ("jerk_mean", "jerk_max", "jump_mean", "jump_max", "idle")
FIRST_SEED = 200_000
BLOCK = 10  # seeds of every cell before any cell goes on: a stopped run is a table with fewer seeds


def cells(args: argparse.Namespace) -> dict[str, Settings]:
    """Name of a cell → whose episodes."""
    embodiment, _, task = args.world.rpartition("_")
    if not embodiment:
        raise UserError(f"--world {args.world}: name robot and task, e.g. aloha_pick or widowx_belt")
    if args.execute_steps is None:
        args.execute_steps = execute_steps_of(embodiment)
    table = {}
    for strategy in args.strategies:
        checkpoint = args.checkpoint
        if strategy == "trained_prefix" and args.prefix_checkpoint:
            checkpoint = args.prefix_checkpoint
        for delay in args.delays:
            table[f"{strategy} {delay:g}"] = Settings(
                embodiment=embodiment,
                checkpoint=checkpoint,
                task=task,
                execute_steps=args.execute_steps,
                latency_ms=delay,
                strategy=strategy,
                device="cpu",
            )
    return table


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the kept episodes belong to; others are not mixed with them."""
    from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint

    named = {"checkpoint": args.checkpoint, "prefix_checkpoint": args.prefix_checkpoint}
    weights = {
        key: None if name is None else read_config(resolve_checkpoint(name))["weights_id"][:12]
        for key, name in named.items()
    }
    return {"world": args.world, "execute_steps": args.execute_steps, "first_seed": FIRST_SEED, "weights": weights}


def read_kept(path: Path, belongs_to: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Cell → seed → [success, seconds, *MEASURES] of an earlier run; {} without one."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    if stored["of"] != belongs_to:
        raise UserError(f"--out {path}: holds results of {stored['of']}, not of {belongs_to}; give another file")
    episodes: dict[str, dict[str, list[float]]] = stored["episodes"]
    return episodes


def write_kept(path: Path, belongs_to: dict[str, Any], episodes: dict[str, dict[str, list[float]]]) -> None:
    """One line per cell: small, and readable in a diff."""
    lines = [f"  {json.dumps(name)}: {json.dumps(rows, separators=(',', ':'))}" for name, rows in episodes.items()]
    head = f'{{"of": {json.dumps(belongs_to)},\n"columns": {json.dumps(["success", "seconds", *MEASURES])},\n'
    atomic_write_text(path, head + '"episodes": {\n' + ",\n".join(lines) + "\n}}\n")


def summary(rows: dict[str, list[float]]) -> dict[str, Any]:
    """One cell of the table."""
    values = np.array(list(rows.values()))
    rate = Rate(int(values[:, 0].sum()), len(values))
    means = {name: float(values[:, 2 + index].mean()) for index, name in enumerate(MEASURES)}
    return {"success": rate.to_dict(), "seconds": float(values[:, 1].mean()), **means}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what is missing and returns the table."""
    table, belongs_to = cells(args), identity(args)
    episodes = read_kept(args.out, belongs_to)
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    missing = [
        (name, seed)
        for first in range(0, args.episodes, BLOCK)
        for name in table
        for seed in seeds[first : first + BLOCK]
        if str(seed) not in episodes.get(name, {})
    ]
    with spawned(args.workers) as pool, tqdm(total=len(missing), desc="episodes", disable=args.json) as bar:
        jobs: dict[Future[dict[str, Any]], tuple[str, int]] = {
            pool.submit(run_in_worker, table[name], seed): (name, seed) for name, seed in missing
        }
        for job in as_completed(jobs):
            name, seed = jobs.pop(job)
            row = job.result()
            measured = [float(f"{row['metrics'][key]:.4g}") for key in MEASURES]
            cell = episodes.setdefault(name, {})
            cell[str(seed)] = [int(row["success"]), round(row["seconds"], 2), *measured]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_kept(args.out, belongs_to, episodes)
            bar.set_postfix_str(name)
            bar.update()
    wanted = {str(seed) for seed in seeds}
    kept = {name: {s: row for s, row in episodes[name].items() if s in wanted} for name in table}
    return {"of": belongs_to, "cells": {name: summary(rows) for name, rows in kept.items()}}


PANELS: dict[str, Callable[[dict[str, Any]], str]] = {
    "success": lambda cell: str(Rate(cell["success"]["successes"], cell["success"]["trials"])),
    "jerk, mean / max": lambda cell: f"{cell['jerk_mean']:.0f} / {cell['jerk_max']:.0f}",
    "jump, mean / max": lambda cell: f"{cell['jump_mean']:.3f} / {cell['jump_max']:.3f}",
    "idle": lambda cell: f"{cell['idle']:.1%}",
}


def markdown(report: dict[str, Any], delays: Sequence[float]) -> str:
    """The tables of docs/runtime.md: one per measure, a row per strategy, a column per delay."""
    lines = []
    for title, text in PANELS.items():
        lines += [
            f"| {title} | " + " | ".join(f"{delay:g} ms" for delay in delays) + " |",
            "|---" * (len(delays) + 1) + "|",
        ]
        for strategy in STRATEGIES:
            found = [report["cells"].get(f"{strategy} {delay:g}") for delay in delays]
            if any(found):
                row = " | ".join("–" if cell is None else text(cell) for cell in found)
                lines.append(f"| `{strategy}` | {row} |")
        lines.append("")
    return "\n".join(lines)


def plot(report: dict[str, Any], delays: Sequence[float], path: Path) -> None:
    """Success, mean jerk, jump and idle time over delay, a line per strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("success", lambda cell: cell["success"]["rate"], "success rate"),
        ("jerk_mean", lambda cell: cell["jerk_mean"], "mean jerk"),
        ("jump_mean", lambda cell: cell["jump_mean"], "jump at a switch"),
        ("idle", lambda cell: cell["idle"], "idle share"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained")
    for axis, (_, value, label) in zip(axes, panels, strict=True):
        for strategy in STRATEGIES:
            points = [(d, report["cells"].get(f"{strategy} {d:g}")) for d in delays]
            known = [(d, value(cell)) for d, cell in points if cell is not None]
            if known:
                axis.plot(*zip(*known, strict=True), marker="o", markersize=3, label=strategy)
        axis.set_xlabel("delay (ms)")
        axis.set_title(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    trials = max(cell["success"]["trials"] for cell in report["cells"].values())
    figure.suptitle(f"{report['of']['world']}, {trials} episodes a point")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="aloha_pick", help="embodiment_task (default: aloha_pick)")
    parser.add_argument("--checkpoint", default="generalist", help="shipped name or folder (default: generalist)")
    parser.add_argument("--prefix-checkpoint", help="for trained_prefix: one trained with loss.prefix")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="NAME")
    parser.add_argument("--delays", nargs="+", type=float, default=list(DELAYS_MS), help="ms (0 40 100 200 400)")
    parser.add_argument("--episodes", type=int, default=10, help="seeds per cell (default: 10)")
    parser.add_argument("--execute-steps", type=int, help="actions between two looks (default: the YAML's)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--out", type=Path, help="results (default: runs/runtime/WORLD.json)")
    parser.add_argument("--plot", type=Path, help="draw the table into this PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    args.out = args.out or Path("runs/runtime") / f"{args.world}.json"
    try:
        report = run(args)
    except UserError as error:
        parser.error(str(error))
    if args.plot:
        plot(report, args.delays, args.plot)
    print(json.dumps(report, indent=2) if args.json else markdown(report, args.delays))
    return 0


if __name__ == "__main__":
    sys.exit(main())
