"""``qwen-vla train``: run a stage of training, draw the curves of runs."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

# job → (module with `add_arguments(parser)` and `run(args) -> int`, one-line help)
JOBS: dict[str, tuple[str, str]] = {
    "run": ("qwen_vla_core.commands.train_jobs.stage", "run or resume the stage that a recipe describes"),
    "plot": ("qwen_vla_core.commands.train_jobs.plot", "curves of one or several runs in one picture"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Jobs of ``qwen-vla train``."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, (module_name, summary) in JOBS.items():
        module: ModuleType = importlib.import_module(module_name)
        sub = jobs.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(job_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen job."""
    return int(args.job_run(args))
