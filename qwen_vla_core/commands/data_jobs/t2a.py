"""``qwen-vla data t2a``: the synthetic text-to-action corpus of stage I, one dataset per robot."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError

PLOTTED = 6  # trajectories per robot and template in the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("--out", type=Path, required=True, help="folder; each robot's dataset is OUT/<robot>")
    parser.add_argument("--count", type=int, default=5000, help="trajectories, all robots together (default: 5000)")
    parser.add_argument("--robots", nargs="+", default=[], metavar="NAME", help="kinematic models (default: all)")
    parser.add_argument(
        "--templates", nargs="+", default=[], metavar="NAME", help="reach pick place push pour wipe (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores); same result with any"
    )
    parser.add_argument("--ray", action="store_true", help="work as a Ray Data job")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="also draw some paths of the fingers (.png, .svg)")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Generates, reads back, reports."""
    from tqdm import tqdm

    from qwen_vla_core.data.t2a.corpus import parse_templates
    from qwen_vla_core.data.t2a.generate import Clock, generate
    from qwen_vla_core.data.t2a.robots import ARMS, find_arm

    for name in ("count", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {args.plot}: must end in .png or .svg")
    robots = [find_arm(name).name for name in args.robots] or list(ARMS)
    if len(set(robots)) < len(robots):
        raise UserError(f"--robots {' '.join(robots)}: a robot is named twice; name it once")
    templates = parse_templates(args.templates)
    clock = Clock()
    with tqdm(total=args.count, unit="trajectory", disable=args.json) as bar:
        reports = generate(
            args.out,
            args.count,
            robots,
            templates,
            args.seed,
            workers=args.workers,
            ray=args.ray,
            progress=bar.update,
        )
    wall, cpu = clock.read()
    new = sum(report.episodes - report.before for report in reports.values())
    result: dict[str, Any] = {
        "out": str(args.out),
        "seed": args.seed,
        "new": new,
        "seconds": wall,
        "per_minute": 60 * new / wall,
        # Ray's workers are not children of this process, so their time is not known here.
        "cpu_ms_per_trajectory": 1000 * cpu / new if new and not args.ray else None,
        "robots": {robot: report.to_json() for robot, report in reports.items()},
    }
    if args.plot is not None:
        _plot(args.out, list(reports), args.plot)
        result["plot"] = str(args.plot)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    bad = sum(line["read_back"] - line["read_back_passed"] for line in result["robots"].values())
    return 1 if bad else 0


def _print(result: dict[str, Any]) -> None:
    print(f"{'robot':<12} {'episodes':>8} {'new':>6} {'mean s':>7} {'redrawn':>8} {'checks':>7} {'read back':>10}")
    for robot, line in result["robots"].items():
        seconds = line["steps"] / 50 / line["episodes"]
        redrawn, passed = (
            "-" if line[key] is None else f"{line[key]:.1%}" for key in ("redrawn_share", "check_passed_share")
        )
        back = f"{line['read_back_passed']}/{line['read_back']}"
        print(f"{robot:<12} {line['episodes']:>8} {line['new']:>6} {seconds:>7.1f} {redrawn:>8} {passed:>7} {back:>10}")
    for title, key in (("redrawn", "redrawn"), ("dropped by a check", "check_failed")):
        reasons: dict[str, int] = {}
        for line in result["robots"].values():
            for reason, number in line[key].items():
                reasons[reason] = reasons.get(reason, 0) + number
        most = sorted(reasons.items(), key=lambda item: -item[1])
        if most:
            rest = f", {len(most) - 5} more reasons (--json)" if len(most) > 5 else ""
            print(f"{title}: " + ", ".join(f"{number} × {reason}" for reason, number in most[:5]) + rest)
    speed = f"{result['per_minute']:,.0f} a minute"
    if result["cpu_ms_per_trajectory"] is not None:
        speed += f", {result['cpu_ms_per_trajectory']:.1f} ms of processor time each"
    print(f"{result['out']}: {result['new']} new trajectories in {result['seconds']:.1f} s ({speed})")
    if "plot" in result:
        print(f"{result['plot']}: paths of the fingers")


def _plot(out: Path, robots: list[str], picture: Path) -> None:
    """Draws the first trajectories of each template, read back from the datasets."""
    import numpy as np

    from qwen_vla_core.data.lerobot import LeRobotDataset
    from qwen_vla_core.data.t2a.plot import plot_paths

    paths: dict[str, dict[str, list[np.ndarray]]] = {}
    for robot in robots:
        dataset, by = LeRobotDataset(out / robot), paths.setdefault(robot, {})
        for i, info in enumerate(dataset.infos):
            drawn = by.setdefault(str(info["template"]), [])
            if len(drawn) < PLOTTED:
                rows = dataset.rows(i)
                drawn.append(np.concatenate([rows.state[:1], rows.action]))
    plot_paths(paths, picture)
