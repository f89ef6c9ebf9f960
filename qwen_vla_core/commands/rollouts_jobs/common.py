"""Flags and helpers of several jobs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES, UNFINISHED, Rollout

STATES = (*OUTCOMES, UNFINISHED)
NAME_HELP = "its folder, RUN/episode_003, RUN/3, a run with one episode, or `last`"


def add_root(parser: argparse.ArgumentParser) -> None:
    """``--rollouts``."""
    parser.add_argument("--rollouts", default="rollouts", metavar="DIR", help="folder of recorded runs")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """``--outcome``, ``--instruction`` and ``--embodiment``."""
    text = f"only these: {', '.join(STATES)}; comma separated"
    parser.add_argument("--outcome", default="", metavar="WORD[,WORD]", help=text)
    parser.add_argument(
        "--instruction", default="", metavar="TEXT", help="only those whose instruction holds this text"
    )
    parser.add_argument("--embodiment", default="", metavar="NAME", help="only those of this robot")


def filtered(rollouts: Sequence[Rollout], args: argparse.Namespace) -> list[Rollout]:
    """What the filters leave.

    Raises:
        UserError: an outcome that does not exist.
    """
    outcomes = [word.strip() for word in args.outcome.split(",") if word.strip()]
    for word in outcomes:
        if word not in STATES:
            raise UserError(f"--outcome {word}: use {', '.join(STATES)}")
    wanted = args.instruction.casefold()
    return [
        rollout
        for rollout in rollouts
        if (not outcomes or rollout.outcome in outcomes)
        and wanted in rollout.instruction.casefold()
        and args.embodiment in ("", rollout.embodiment)
    ]


def ros_module(name: str, what: str) -> Any:
    """A module of the room that needs ROS's messages.

    Raises:
        UserError: they are not installed.
    """
    if importlib.util.find_spec("rclpy") is None or importlib.util.find_spec("sensor_msgs") is None:
        raise UserError(
            f"{what} needs ROS 2 (rclpy and its messages): source /opt/ros/$ROS_DISTRO/setup.bash, "
            "or pip install 'qwen_vla_ros[ros-wheels]'"
        )
    return importlib.import_module(f"qwen_vla_ros.rollouts.{name}")


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows in columns, the first one underlined; columns in ``right`` are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * min(max(map(len, lines)), 118), *lines[1:]])


def megabytes(size: int) -> str:
    """12.3 MB."""
    return f"{size / 1e6:.1f} MB"
