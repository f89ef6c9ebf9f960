"""``qwen-vla rollouts repair``: make whole what a killed recorder left."""

from __future__ import annotations

import argparse

from qwen_vla_core.commands.rollouts_jobs.common import NAME_HELP, add_root
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import find_rollout, find_rollouts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("names", nargs="*", metavar="ROLLOUT", help=f"{NAME_HELP}; without: all that need it")
    add_root(parser)


def run(args: argparse.Namespace) -> int:
    """Repairs; 1 where one could not be."""
    from qwen_vla_core.rollouts.repair import repair

    found = [find_rollout(name, args.rollouts) for name in args.names]
    if not args.names:
        found = [r for r in find_rollouts(args.rollouts) if r.partial and not r.recording]
    failed = 0
    for rollout in found:
        try:
            made = repair(rollout)
        except UserError as error:
            if args.names:
                raise
            print(f"{rollout.name}: not repaired: {error}")
            failed += 1
        else:
            print(f"{made.name}: {made.messages} messages in {made.bag}")
    if not found:
        print(f"nothing to repair below {args.rollouts}")
    return 1 if failed else 0
