"""Job."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""


def run(args: argparse.Namespace) -> int:
    """Runs."""
    return 0
