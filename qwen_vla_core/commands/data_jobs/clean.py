"""``qwen-vla data clean SRC OUT``: a cleaned copy and the list of what was left out; the source stays as it is."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from qwen_vla_core.commands.data_jobs.examining import (
    add_picture_argument,
    add_threshold_arguments,
    add_view_argument,
    add_work_arguments,
    open_both,
    pictures,
    thresholds_of,
)
from qwen_vla_core.errors import UserError

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.description = (parser.description or "") + ". An interrupted run goes on when it is given again."
    parser.add_argument("src", metavar="SRC", help="LeRobot dataset: a folder or a hub name")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the cleaned copy")
    parser.add_argument("--embodiment", help="name or YAML of the robot whose limits and actions count")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    parser.add_argument(
        "--pseudo-actions",
        action="store_true",
        help="make the actions from the states (datasets without actions always get them)",
    )
    add_view_argument(parser)
    add_picture_argument(parser)
    add_work_arguments(parser)
    add_threshold_arguments(parser, cleaning=True)


def run(args: argparse.Namespace) -> int:
    """Examines, judges, writes the copy with its report."""
    from qwen_vla_core.data.cleaning import cleaned_contract, examine_resumably, judge, report
    from qwen_vla_core.data.cleaning_write import write_cleaned

    if args.out.resolve() == Path(args.src).resolve():
        raise UserError(f"{args.out}: OUT is SRC; the source stays as it is, so name another folder")
    thresholds = thresholds_of(args)
    dataset, robot = open_both(args.src, args.embodiment, args.view)
    make_actions = args.pseudo_actions or not dataset.contract.action
    contract = cleaned_contract(dataset.contract, robot, make_actions)
    notes = args.out.parent / f".{args.out.name}.examined.jsonl"
    case = examine_resumably(
        dataset, robot, thresholds, pictures(args.frames), notes, args.workers, args.ray, progress=not args.json
    )
    drops = judge(case)
    found = report(case, drops, src=args.src, out=None if args.dry_run else str(args.out), pseudo_actions=make_actions)
    if not args.dry_run:
        write_cleaned(case, drops, args.out, contract, make_actions, found, args.workers, not args.json)
        notes.unlink(missing_ok=True)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found, args.dry_run)
    return 0


def _print(found: dict[str, Any], dry: bool) -> None:
    from qwen_vla_core.data.cleaning import REASONS, REPORT

    verb = "would keep" if dry else "kept"
    print(f"{found['src']}: {verb} {found['kept']} of {found['episodes']} episodes, "
          f"{found['steps'] - found['steps_dropped']} of {found['steps']} steps")  # fmt: skip
    counts = Counter(found["by_reason"])
    for reason, meaning in REASONS.items():
        if counts[reason]:
            print(f"{counts[reason]:>7} × {reason:<17} {meaning}")
    for drop in found["dropped"][:SHOWN]:
        print(f"        episode {drop['episode']}: {drop['reason']}: {drop['detail']}")
    if len(found["dropped"]) > SHOWN:
        print(f"        … and {len(found['dropped']) - SHOWN} more")
    if not dry:
        print(f"all of them: {Path(found['out']) / REPORT}")
