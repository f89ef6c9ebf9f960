"""``qwen-vla rollouts JOB``: one module per job under ``qwen_vla_core.commands.rollouts_jobs``."""

from __future__ import annotations

import argparse
import importlib

# job → one-line help; the module of the same name has `add_arguments(parser)` and `run(args) -> int`
JOBS: dict[str, str] = {
    "list": "recorded episodes as a table",
    "show": "what happened in one: rates, latencies, interventions, timeline",
    "label": "judge an episode after it was recorded",
    "repair": "make whole what a killed recorder left",
    "replay": "feed the recording through the real policy node and compare what it sees, bit by bit",
    "export": "LeRobot datasets to train on, films, Rerun recordings",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every job."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, summary in JOBS.items():
        job = jobs.add_parser(name, help=summary, description=summary)
        module = importlib.import_module(f"qwen_vla_core.commands.rollouts_jobs.{name}")
        module.add_arguments(job)
        job.set_defaults(run_job=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen job."""
    return int(args.run_job(args))
