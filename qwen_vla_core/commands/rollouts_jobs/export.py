"""``qwen-vla rollouts export``: to a LeRobot dataset, films, Rerun recordings."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.commands.rollouts_jobs.common import NAME_HELP, add_filters, add_root, filtered, ros_module
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import Rollout, find_rollout, find_rollouts

TARGETS = ("lerobot", "mp4", "rerun")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("names", nargs="*", metavar="ROLLOUT", help=f"{NAME_HELP}; without: all that the filters leave")
    add_root(parser)
    add_filters(parser)
    parser.add_argument("--to", choices=TARGETS, required=True, help="what to write")
    parser.add_argument(
        "--output", type=Path, required=True, help="dataset's folder; file, or folder for several files"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    data = parser.add_argument_group("lerobot")
    text = "steps to keep: all, those that a human, or that the policy commanded (default: all)"
    data.add_argument("--steps", choices=("all", "human", "policy"), default="all", help=text)
    data.add_argument("--size", metavar="WxH", help="size of stored pictures (default: as recorded)")
    data.add_argument("--family", default="", help="of the training mixture (default: by the robot)")
    data.add_argument(
        "--shortest", type=int, default=5, metavar="N", help="leave out fewer steps in a row (default: 5)"
    )
    data.add_argument("--resume", action="store_true", help="add to a dataset that is there already")
    films = parser.add_argument_group("mp4")
    films.add_argument("--fps", type=float, default=10.0, help="pictures per second (default: 10)")
    films.add_argument("--height", type=int, default=240, help="of every view (default: 240)")
    films.add_argument("--speed", type=float, default=1.0, help="times faster than real time (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Exports; prints what came of it."""
    if args.names:
        found = filtered([find_rollout(name, args.rollouts) for name in args.names], args)
    else:
        found = [r for r in filtered(find_rollouts(args.rollouts), args) if not r.recording]
    if not found:
        raise UserError("nothing to export: no rollout was found, or the filters leave none")
    return _lerobot(found, args) if args.to == "lerobot" else _files(found, args)


def _lerobot(found: Sequence[Rollout], args: argparse.Namespace) -> int:
    made = ros_module("lerobot", "rollouts export").export(
        found,
        args.output,
        keep=args.steps,
        size=_size(args.size),
        family=args.family,
        resume=args.resume,
        shortest=args.shortest,
    )
    if args.json:
        print(json.dumps({"path": str(args.output), **vars(made)}, indent=2, ensure_ascii=False))
        return 0
    outcomes = ", ".join(f"{count} {word}" for word, count in made.outcomes.items()) or "none"
    print(f"{args.output}: {made.episodes} episodes ({outcomes}), {made.steps} steps, {made.human_steps} by a person")
    for reason, count in made.left_out.items():
        print(f"  left out: {count} steps: {reason}")
    for name, reason in made.skipped.items():
        print(f"  nothing of {name}: {reason}")
    return 0


def _files(found: Sequence[Rollout], args: argparse.Namespace) -> int:
    suffix = {"mp4": ".mp4", "rerun": ".rrd"}[args.to]
    if len(found) > 1 and args.output.suffix == suffix:
        raise UserError(f"--output {args.output}: {len(found)} rollouts need a folder, not one file")
    module = ros_module({"mp4": "film", "rerun": "rerun_export"}[args.to], "rollouts export")
    rows: list[dict[str, Any]] = []
    for rollout in found:
        single = args.output.suffix == suffix
        path = args.output if single else args.output / f"{rollout.name.replace('/', '_')}{suffix}"
        try:
            if args.to == "mp4":
                count = module.film(rollout, path, fps=args.fps, height=args.height, speed=args.speed)
                rows.append({"name": rollout.name, "path": str(path), "frames": count})
            else:
                rows.append({"name": rollout.name, "path": str(path), "entries": module.export(rollout, path)})
        except UserError as error:
            if len(found) == 1:
                raise
            rows.append({"name": rollout.name, "path": None, "problem": str(error)})
        if not args.json:
            last = rows[-1]
            print(f"{last['name']}: {last['path'] or last['problem']}")
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    return 1 if any(row["path"] is None for row in rows) else 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    matched = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not matched or int(matched[1]) % 2 or int(matched[2]) % 2 or not int(matched[1]) or not int(matched[2]):
        raise UserError(f"--size {text}: give WIDTHxHEIGHT, both even, such as 256x192")
    return int(matched[1]), int(matched[2])
