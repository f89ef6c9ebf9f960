#!/usr/bin/env python3
"""Observation → chunk through the engine, beside its own eager path and the roofline of this machine.

    python benchmarks/engine.py                      what this machine has: CUDA with the paper-size model, else the CPU
    python benchmarks/engine.py --device cpu         the shipped checkpoint on one CPU thread
    python benchmarks/engine.py --json [FILE]        JSON to standard output, or to FILE beside the table

The protocol, every definition included, is docs/engine.md; ``engine_cuda.py`` and ``engine_cpu.py`` hold the two parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA where there is one"
    )
    parser.add_argument(
        "--checkpoint", default="generalist", help="CPU: shipped name, folder, or tiny (default: generalist)"
    )
    parser.add_argument("--embodiment", default="aloha", help="CPU: one of the checkpoint's robots (default: aloha)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls per figure (default: 30)")
    parser.add_argument("--compile", action="store_true", help="CPU: also with torch.compile (minutes)")
    parser.add_argument("--profile", action="store_true", help="CUDA: also the time of each kernel")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to FILE")
    args = parser.parse_args()
    quiet = args.json == "-"

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    report: dict[str, Any]
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        import engine_cuda

        report = engine_cuda.measure(args.repeats, args.profile, say)
    else:
        import engine_cpu

        report = engine_cpu.measure(args.checkpoint, args.embodiment, args.repeats, args.compile, say)
    if quiet:
        print(json.dumps(report, indent=2))
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
