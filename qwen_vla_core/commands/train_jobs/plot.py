"""``qwen-vla train plot RUN…``: curves of one or several runs in one picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="--out folder of a run, a folder of such folders, or a log"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print what was drawn as JSON")


def run(args: argparse.Namespace) -> int:
    """Draws, then says what is in the picture."""
    from qwen_vla_core.training.curves import plot_runs
    from qwen_vla_core.training.run_log import read_runs

    plot_runs(args.runs, args.out)
    drawn = [
        {"run": log.run, "stage": log.stage, "rows": len(log.rows), "last_step": log.rows[-1]["step"]}
        for log in read_runs(args.runs)
    ]
    if args.json:
        print(json.dumps({"picture": str(args.out), "stages": drawn}, indent=2))
    else:
        for entry in drawn:
            print(f"{entry['run']} {entry['stage']}: {entry['rows']} rows, last step {entry['last_step']}")
        print(f"picture: {args.out}")
    return 0
