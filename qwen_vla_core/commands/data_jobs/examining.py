"""What stats, doctor and clean share: arguments, opening a dataset beside its robot."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vla_core.errors import UserError

if TYPE_CHECKING:
    from qwen_vla_core.data.doctor.config import Thresholds
    from qwen_vla_core.data.lerobot import LeRobotDataset
    from qwen_vla_core.embodiment.spec import Embodiment


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--workers``, ``--ray`` and ``--json``."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--ray", action="store_true", help="work as a Ray Data job (RAY_ADDRESS names a cluster)")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def add_threshold_arguments(parser: argparse.ArgumentParser, cleaning: bool) -> None:
    """Adds a flag for every threshold (those of cleaning alone only where wanted), and ``--thresholds FILE``."""
    from dataclasses import fields

    from qwen_vla_core.data.doctor.config import Thresholds

    group = parser.add_argument_group("thresholds", "what counts as wrong; flags win over the file")
    group.add_argument("--thresholds", type=Path, metavar="FILE", help="YAML with any of the thresholds below")
    for each in fields(Thresholds):
        if each.metadata["doc"].startswith("Cleaning:") and not cleaning:
            continue
        flag, text = f"--{each.name.replace('_', '-')}", f"{each.metadata['doc']} (default: {each.default})"
        text = text.replace("%", "%%")
        if isinstance(each.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = type(each.default)
            group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)


def thresholds_of(args: argparse.Namespace) -> Thresholds:
    """The thresholds that the arguments of ``add_threshold_arguments`` ask for."""
    from dataclasses import fields

    from qwen_vla_core.data.doctor.config import Thresholds, load_thresholds

    given = {each.name: getattr(args, each.name, None) for each in fields(Thresholds)}
    return load_thresholds(args.thresholds, given)


def add_picture_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--frames``."""
    parser.add_argument(
        "--frames",
        type=int,
        default=None,
        metavar="N",
        help="pictures to look at per episode and view, spread evenly; 0 looks at none (default: all)",
    )


def pictures(frames: int | None) -> int | None:
    """``--frames`` → what an examination takes: 0 is all, None none.

    Raises:
        UserError: a negative number.
    """
    if frames is None:
        return 0
    if frames < 0:
        raise UserError(f"--frames {frames}: cannot be negative")
    return frames or None


def add_view_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--view``."""
    parser.add_argument(
        "--view",
        action="append",
        default=[],
        metavar="VIEW=FEATURE",
        help="feature that holds a view's pictures, where it is not observation.images.VIEW; may be repeated",
    )


def open_both(name: str, embodiment: str | None, view: Sequence[str] = ()) -> tuple[LeRobotDataset, Embodiment | None]:
    """A dataset and the robot whose limits count.

    The dataset keeps the contract it was written with, if it has one: comparing it with the robot's is the point. One
    that was recorded without actions gets a contract without actions.

    Args:
        name: folder or hub name.
        embodiment: name or YAML.
        view: ``VIEW=FEATURE`` each.

    Raises:
        UserError: either cannot be opened, or a view is not written like that.
    """
    from dataclasses import replace

    from qwen_vla_core.data.contract import CONTRACT_FILE, DataContract
    from qwen_vla_core.data.lerobot import LeRobotDataset, find_dataset
    from qwen_vla_core.data.lerobot.layout import ACTION, read_info
    from qwen_vla_core.embodiment import load_embodiment

    views = {}
    for text in view:
        key, found, feature = text.partition("=")
        if not (key and found and feature):
            raise UserError(f"--view {text}: write VIEW=FEATURE, e.g. ego=observation.images.top")
        views[key] = feature
    robot = load_embodiment(embodiment) if embodiment else None
    folder = find_dataset(name)
    contract = None
    if robot is not None and not (folder / CONTRACT_FILE).is_file():
        contract = DataContract.of(robot)
        if ACTION not in read_info(folder)["features"]:
            contract = replace(contract, action=())
    return LeRobotDataset(folder, contract, views=views), robot
