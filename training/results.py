#!/usr/bin/env python3
"""Markdown tables from the JSON files that `qwen-vla eval run` and `qwen-vla eval open-loop` wrote.

python training/results.py checkpoints/generalist.results              # one checkpoint: a line per file
python training/results.py runs/ablations/results --across             # several: a line per folder, a column per file
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.report import summarise
from qwen_vla_core.evaluation.results import is_result, read_result

OPEN_LOOP = "open_loop"  # how names of results of `qwen-vla eval open-loop` begin
RATES = {
    "success": "success",
    "other_object_success": "asked for another object: success",
    "wrong_object": "another object chosen",
    "named_of_chosen": "of all chosen objects: the named one",
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of the result → report, in the order of names; a suite has one for each axis."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json*")):
        if path.name.startswith(OPEN_LOOP):
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        if not is_result(path):
            continue
        result = read_result(path)
        for axis in result.axes:
            name = path.stem if len(result.axes) == 1 else f"{path.stem} {axis}"
            found[name] = summarise(result.of(axis), result.header["settings"])
    return found


def rate(report: dict[str, Any], key: str) -> str:
    """``84/100 = 84% [76%, 90%]``."""
    return str(Rate(report[key]["successes"], report[key]["trials"]))


def cell(report: dict[str, Any]) -> str:
    """What one result says in a table: a success rate, or an error in open loop."""
    if "errors" not in report:
        return rate(report, "success")
    error = report["errors"]["policy"]
    low, high = error["interval_95"]
    return f"{error['chunk']:.4f} [{low:.4f}, {high:.4f}]"


def one(folder: Path) -> list[str]:
    """A line per result and rate; means of what else the world measures."""
    lines = ["| result | rate, 95 % Wilson interval |", "|---|---|"]
    for name, report in read(folder).items():
        if "errors" in report:
            lines.append(f"| {name}: mean absolute error | {cell(report)} |")
            continue
        lines += [f"| {name}: {label} | {rate(report, key)} |" for key, label in RATES.items() if key in report]
        if report["metrics"]:
            means = ", ".join(f"{key} {value:.2f}" for key, value in report["metrics"].items())
            lines.append(f"| {name}: means | {means} |")
    return lines


def across(folder: Path) -> list[str]:
    """A line per folder, a column per result: success, or the error in open loop."""
    found = {path.name: read(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    columns = list(dict.fromkeys(name for reports in found.values() for name in reports))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run, reports in found.items():
        cells = [cell(reports[name]) if name in reports else "" for name in columns]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Prints the table of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of result files, or with --across of such folders")
    parser.add_argument("--across", action="store_true", help="compare the folders in it")
    args = parser.parse_args()
    lines = (across if args.across else one)(args.folder) if args.folder.is_dir() else []
    if len(lines) < 3:
        print(f"{args.folder}: holds no results of `qwen-vla eval`", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
