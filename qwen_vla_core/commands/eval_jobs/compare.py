"""``qwen-vla eval compare A B``: two results on the same trials."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_vla_core.evaluation.compare import Comparison, compare
from qwen_vla_core.evaluation.results import read_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="result of `eval run --output`, the one to compare with")
    parser.add_argument("b", type=Path, metavar="B", help="result of another checkpoint on the same trials")
    parser.add_argument("--metrics", action="store_true", help="also the differences of every metric")
    parser.add_argument("--json", action="store_true", help="machine-readable, with the metrics")


def run(args: argparse.Namespace) -> int:
    """Compares and prints."""
    a, b = read_result(args.a), read_result(args.b)
    lines = compare(a, b)
    if args.json:
        print(json.dumps({"a": str(args.a), "b": str(args.b), "axes": [line.to_dict() for line in lines]}, indent=2))
        return 0
    pairs = lines[-1].a.trials
    print(f"A: {a.name}\nB: {b.name}\n{pairs} pairs; {len(a.rows) - pairs} trials are only in A, ", end="")
    print(f"{len(b.rows) - pairs} only in B")
    if a.early_stop or b.early_stop:
        print("One of them was stopped by its outcomes: the pairs are those that both ran, and p may be too small.")
    print(f"\n{'axis':<16} {'A':>9} {'B':>9} {'B − A':>7}  {'95 % interval':<16} {'A only':>6} {'B only':>6}   p")
    for line in lines:
        print(_text(line))
        if args.metrics:
            for name, (difference, interval) in line.metrics.items():
                span = "" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"
                print(f"{'':<16}   {name}: {difference:+.3f} {span}")
    print("\np: McNemar's exact test, two-sided", end="")
    print(" (in brackets corrected after Holm for the number of axes)" if len(lines) > 1 else "")
    for line in lines:
        name = line.axis or "all"
        print(f"{name}: {line.a.trials} pairs show a difference of {line.detectable:.0%} four times in five")
    return 0


def _text(line: Comparison) -> str:
    interval = "no pair differs" if line.interval is None else f"{line.interval[0]:+.1%} to {line.interval[1]:+.1%}"
    p = f"{line.p:.3g}" + ("" if line.axis is None or line.p == line.p_holm else f" ({line.p_holm:.3g})")
    return (
        f"{line.axis or 'all':<16} {line.a.successes:>4}/{line.a.trials:<4} {line.b.successes:>4}/{line.b.trials:<4} "
        f"{line.difference:>+7.1%}  {interval:<16} {line.only_a:>6} {line.only_b:>6}   {p}"
    )
