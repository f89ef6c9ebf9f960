"""``qwen-vla data stats PATH…``: quantiles of every channel, from the cache or in one pass."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vla_core.commands.data_jobs.examining import add_work_arguments, open_both

if TYPE_CHECKING:
    from qwen_vla_core.data.statistics import Statistics

COLUMNS = ("min", "q01", "q10", "q50", "q90", "q99", "max", "mean", "std")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="LeRobot datasets: folders or hub names")
    parser.add_argument("--embodiment", help="name or YAML of the robot, for a dataset that carries no contract")
    parser.add_argument("--cache", type=Path, help="folder of earlier results (default: ~/.cache/qwen_vla/stats)")
    parser.add_argument("--no-cache", action="store_true", help="compute, and keep nothing")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Computes or looks up, then prints."""
    from qwen_vla_core.data.statistics import cache_key, dataset_statistics, default_cache

    cache = None if args.no_cache else args.cache or default_cache()
    reports = []
    for path in args.paths:
        dataset, _ = open_both(path, args.embodiment)
        cached = cache is not None and (cache / f"{cache_key(dataset)}.json").is_file()
        statistics = dataset_statistics(dataset, args.workers, not args.json, cache, args.ray)
        if args.json:
            reports.append({"path": path, "cached": cached, **statistics.to_json()})
        else:
            _print(path, statistics, cached)
    if args.json:
        print(json.dumps({"datasets": reports}, indent=2))
    return 0


def _print(path: str, statistics: Statistics, cached: bool) -> None:
    about = "from the cache" if cached else "computed"
    print(f"{path}: {statistics.episodes} episodes, {statistics.steps} steps; {about}")
    sides: dict[str, Any] = {"state": statistics.state, "action": statistics.action, "chunk": statistics.chunk}
    width = max([7, *(len(channel.name) for channels in sides.values() for channel in channels)])
    for side, channels in sides.items():
        if not channels:
            continue
        print(f"{side:<{width}} {'unit':<16}" + "".join(f"{name:>11}" for name in COLUMNS))
        for channel in channels:
            numbers = "".join(f"{getattr(channel, name):>11.4g}" for name in COLUMNS)
            print(f"{channel.name:<{width}} {channel.unit:<16}{numbers}")
