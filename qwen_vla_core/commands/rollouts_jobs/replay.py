"""``qwen-vla rollouts replay NAME``: the recording through the real policy node; 0 when all inputs are identical."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tqdm import tqdm

from qwen_vla_core.commands.rollouts_jobs.common import NAME_HELP, add_root, ros_module
from qwen_vla_core.rollouts.index import find_rollout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.description = (parser.description or "") + ". Exit code: 0 when every input is identical, 1 otherwise."
    parser.add_argument("name", metavar="ROLLOUT", help=NAME_HELP)
    add_root(parser)
    parser.add_argument("--checkpoint", default="", help="name or folder (default: the recorded name)")
    parser.add_argument("--inputs-only", action="store_true", help="load no model and compare no chunks")
    parser.add_argument("--strict", action="store_true", help="exit 1 also when a comparable chunk is not identical")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Replays and compares."""
    rollout = find_rollout(args.name, args.rollouts)
    module = ros_module("replay", "rollouts replay")
    with tqdm(desc=rollout.name, unit="chunk", disable=args.json) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = module.replay(
            rollout, checkpoint=args.checkpoint, inputs_only=args.inputs_only, progress=progress
        ).to_json()
    if args.json:
        print(json.dumps({"name": rollout.name, **result}, indent=2))
    else:
        _print(result)
    good = result["inputs_identical"] == result["chunks"]
    if args.strict:
        good = good and result["outputs_identical"] == result["outputs_compared"]
    return 0 if good else 1


def _print(result: dict[str, Any]) -> None:
    print(f"inputs: {result['inputs_identical']} of {result['chunks']} bit-identical")
    if result["outputs_compared"]:
        more = ""
        if result["output_max_difference"]:
            more = f", largest difference {result['output_max_difference']:.3g}"
        print(f"chunks: {result['outputs_identical']} of {result['outputs_compared']} bit-identical{more}")
    else:
        print(f"chunks: not compared ({result['outputs_not_compared_because']})")
    if result["messages_missing"] and result["different"]:
        print(f"{result['messages_missing']} messages that the live node held are not in the bag")
    if result["chunks_without_record"]:
        print(f"{result['chunks_without_record']} recorded chunks have no record of what they were computed from")
    for row in result["different"][:10]:
        why = row["held"] or (", ".join(row["parts"]) + " differ")
        print(f"  {row['seconds']:7.2f} s: {why}" + (f" ({row['missing']} messages missing)" if row["missing"] else ""))
