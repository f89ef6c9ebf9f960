"""``qwen-vla rollouts label NAME``: judge an episode after it was recorded."""

from __future__ import annotations

import argparse
import json

from qwen_vla_core.commands.rollouts_jobs.common import NAME_HELP, add_root
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES, find_rollout, label


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("name", metavar="ROLLOUT", help=NAME_HELP)
    add_root(parser)
    parser.add_argument("--outcome", choices=OUTCOMES, help="how it went")
    parser.add_argument("--reason", help="why, in a few words that can be counted")
    parser.add_argument("--note", help="whatever is worth noting; takes the place of an earlier note")
    parser.add_argument("--by", default="person", help="who judges (default: person)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Changes episode.json and prints the new row."""
    if args.outcome is None and args.reason is None and args.note is None:
        raise UserError("nothing to change: give --outcome, --reason or --note")
    rollout = label(find_rollout(args.name, args.rollouts), args.outcome, args.note, args.reason, args.by)
    if args.json:
        print(json.dumps(rollout.to_json(), indent=2, ensure_ascii=False))
    else:
        said = "; ".join(filter(None, [rollout.reason, rollout.note]))
        print(f"{rollout.name}: {rollout.outcome}" + (f" ({said})" if said else ""))
    return 0
