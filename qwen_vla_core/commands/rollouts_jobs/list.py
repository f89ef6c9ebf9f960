"""``qwen-vla rollouts list``: recorded episodes as a table."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from qwen_vla_core.commands.rollouts_jobs.common import add_filters, megabytes, table
from qwen_vla_core.commands.rollouts_jobs.common import filtered as keep
from qwen_vla_core.rollouts.index import Rollout, find_rollouts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("root", nargs="?", default="rollouts", metavar="DIR", help="folder of runs, or one run")
    add_filters(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 also when it is empty."""
    found = keep(find_rollouts(args.root), args)
    if args.json:
        print(json.dumps([rollout.to_json() for rollout in found], indent=2, ensure_ascii=False))
        return 0
    if not found:
        print(f"no rollouts below {args.root}")
        return 0
    head = ("rollout", "outcome", "seconds", "size", "lost", "seed", "checkpoint", "instruction", "why")
    print(table([head, *map(_row, found)], right=frozenset({2, 3, 4, 5})))
    counts = Counter(_state(rollout) for rollout in found)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(f"{len(found)} episode{'s' * (len(found) != 1)}: {told}")
    return 0


def _state(rollout: Rollout) -> str:
    if rollout.recording:
        return "recording"
    return f"{rollout.outcome}*" if rollout.partial and rollout.outcome != "unfinished" else rollout.outcome


def _row(rollout: Rollout) -> tuple[str, ...]:
    said = "; ".join(filter(None, [rollout.problem, rollout.reason, rollout.note.replace("\n", " / ")]))
    return (
        rollout.name,
        _state(rollout),
        "" if rollout.seconds is None else f"{rollout.seconds:.1f}",
        megabytes(rollout.size),
        str(sum(rollout.lost.values())) if not rollout.partial else "",
        "" if rollout.seed is None else str(rollout.seed),
        rollout.checkpoint_id or rollout.checkpoint,
        _short(rollout.instruction, 40),
        _short(said, 50),
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
