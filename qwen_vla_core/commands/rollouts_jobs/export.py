"""``qwen-vla rollouts export``: to LeRobot datasets, films and Rerun recordings."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""


def run(args: argparse.Namespace) -> int:
    """Exports."""
    return 0
