#!/usr/bin/env python3
"""Runs every benchmark of this folder, one after the other, and prints their tables or one JSON document.

python benchmarks/run.py                 all
python benchmarks/run.py sim engine     some
python benchmarks/run.py --json          one JSON object: machine, then one entry per benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {
    "loader": "samples per CPU-second beside the plain way, and per second with two workers",
    "sim": "control steps per second of the ALOHA world with three cameras",
    "engine": "observation → chunk beside the eager path, its parts; on CUDA the paper-size model and the roofline",
    "serving": "what a policy server costs over the model in the same process; several clients at once",
    "runtime": "continuity strategies under delay: success, jerk, jumps, idle time (small: 10 episodes a cell)",
    "controller": "period jitter of the controller node beside a bare loop",
    "safety": "what one step of the controller's filter costs, part by part",
    "base": "waypoints followed as a twist, stops before a wall, what both cost per tick",
    "recorder": "recorder throughput, losses and CPU",
}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> int:
    """Runs the named benchmarks; a failing one is reported and makes the exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    results: dict[str, object] = {"machine": machine()}
    failed = False
    for name in args.names or BENCHMARKS:
        if not args.json:
            print(f"\n== {name}: {BENCHMARKS[name]}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *(["--json"] if args.json else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE if args.json else None, text=True, check=False)
        if done.returncode:
            failed = True
            results[name] = {"error": f"exit status {done.returncode}"}
        elif args.json:
            results[name] = json.loads(done.stdout)
    if args.json:
        print(json.dumps(results, indent=2))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
