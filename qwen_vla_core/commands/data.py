"""``qwen-vla data JOB``: one module per job under ``qwen_vla_core.commands.data_jobs``."""

from __future__ import annotations

import argparse
import importlib

# job → one-line help; the module of the same name has `add_arguments(parser)` and `run(args) -> int`
JOBS: dict[str, str] = {
    "convert": "turn a corpus into a LeRobot dataset (or one LeRobot version into the other)",
    "stats": "quantiles of every channel in one streaming pass, cached by content",
    "doctor": "find what is wrong with a dataset, with severities, fixes and a page of plots",
    "clean": "write a cleaned copy: every dropped episode is listed with its reason, the source stays",
    "mixture": "what a mixture recipe really draws",
    "t2a": "synthetic text-to-action trajectories for stage I",
    "hands": "fit the eigengrasps of hand data",
    "caption": "fine-grained captions of videos in two passes of a Qwen VL",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every job."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, summary in JOBS.items():
        job = jobs.add_parser(name, help=summary, description=summary)
        module = importlib.import_module(f"qwen_vla_core.commands.data_jobs.{name}")
        module.add_arguments(job)
        job.set_defaults(run_job=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen job."""
    return int(args.run_job(args))
