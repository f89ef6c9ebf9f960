"""``qwen-vla eval JOB``: one module per job under ``qwen_vla_core.commands.eval_jobs``."""

from __future__ import annotations

import argparse
import importlib

# job → one-line help; the module of the same name has `add_arguments(parser)` and `run(args) -> int`
JOBS: dict[str, str] = {
    "run": "closed-loop episodes of a checkpoint: a suite, or a robot's own world; goes on where it stopped",
    "open-loop": "predicted chunks beside recorded ones, beside staying and repeating",
    "compare": "two results on the same trials: what differs, how sure that is, what so many trials can see",
    "report": "one self-contained HTML page of results, or of a folder of recorded rollouts",
    "results": "the page of stored results beside the paper's published numbers",
    "suites": "the suites there are, what each measures, and what is missing to run it",
    "sheet": "a picture of a suite: some scenes of every axis",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every job."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, summary in JOBS.items():
        job = jobs.add_parser(name, help=summary, description=summary)
        module = importlib.import_module(f"qwen_vla_core.commands.eval_jobs.{name.replace('-', '_')}")
        module.add_arguments(job)
        job.set_defaults(run_job=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen job."""
    return int(args.run_job(args))
