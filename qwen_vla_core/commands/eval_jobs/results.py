"""``qwen-vla eval results``: the page of stored results beside the paper's, and its plot."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.results_page import compare, page, read_published, stored_results
from qwen_vla_core.files import atomic_write_text
from qwen_vla_core.resources import resource_dir

PICTURE = "images/results.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("--out", type=Path, help="page to write (default: print it)")
    parser.add_argument("--results", type=Path, help="folder with <checkpoint>.results (default: the shipped ones)")
    parser.add_argument("--benchmarks", type=Path, help="folder with benchmark results (default: beside the former)")
    parser.add_argument("--no-picture", action="store_true", help=f"leave {PICTURE} beside the page as it is")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if --out is not what it would be")


def run(args: argparse.Namespace) -> int:
    """Writes, prints or checks the page."""
    if args.check and args.out is None:
        raise UserError("--check: name the page with --out")
    checkpoints = args.results or resource_dir("checkpoints")
    if not checkpoints.is_dir():
        raise UserError(f"--results {checkpoints}: no such folder")
    benchmarks = args.benchmarks or checkpoints.parent / "benchmarks" / "results"
    text = page(checkpoints, benchmarks, PICTURE)
    if args.out is None:
        print(text)
        return 0
    if args.check:
        same = args.out.is_file() and args.out.read_text(encoding="utf-8") == text
        print(f"{args.out}: {'up to date' if same else f'is not what `qwen-vla eval results --out {args.out}` makes'}")
        return 0 if same else 1
    atomic_write_text(args.out, text)
    if not args.no_picture:
        from qwen_vla_core.evaluation.results_plot import plot

        plot(compare(read_published(), stored_results(checkpoints)), args.out.parent / PICTURE)
    print(f"wrote {args.out}")
    return 0
