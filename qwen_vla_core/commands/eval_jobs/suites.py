"""``qwen-vla eval suites``: what can be run, what it measures, and what is missing."""

from __future__ import annotations

import argparse
import json

from qwen_vla_core.evaluation.suites import SUITES, make_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("names", nargs="*", metavar="SUITE", help="only these, in full (default: all, one line each)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    suites = [make_suite(name) for name in args.names or SUITES]
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "name": suite.name,
                        "title": suite.title,
                        "embodiment": suite.embodiment,
                        "axes": dict(suite.axes),
                        "tasks": list(suite.tasks),
                        "metrics": list(suite.metrics),
                        "protocol": suite.protocol.to_dict(),
                        "missing": suite.missing(),
                    }
                    for suite in suites
                ],
                indent=2,
            )
        )
        return 0
    for suite in suites:
        missing = suite.missing()
        print(f"{suite.name:<16} {suite.title}")
        print(f"{'':<16} {'ready' if missing is None else 'install: ' + missing}")
        if not args.names:
            continue
        print(f"{'':<16} robot: {suite.embodiment}; tasks: {', '.join(suite.tasks)}")
        for axis, text in suite.axes.items():
            print(f"{'':<16}   {axis}: {text}")
        protocol = suite.protocol
        print(f"{'':<16} protocol [{protocol.tag}]: {protocol.source}")
        horizons = ", ".join(f"{name} {steps}" for name, steps in protocol.horizon_steps.items())
        count = protocol.trials_per_task or "all"
        print(f"{'':<16}   {count} trials per task; steps: {horizons} at {protocol.control_hz:g} Hz")
        print(f"{'':<16}   seeds: {protocol.seeds}")
        print(f"{'':<16}   success: {protocol.success}")
        for text in (*protocol.preprocessing, *(f"differs: {text}" for text in protocol.deviations)):
            print(f"{'':<16}   {text}")
    return 0
