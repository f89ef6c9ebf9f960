"""Where the files that ship beside the code live: in the source checkout, a colcon install or a pip install."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from qwen_vla_core.errors import UserError

PACKAGE = "qwen_vla_ros"
DEFAULT_CHECKPOINT = "generalist"  # drives ALOHA, WidowX and the mobile base
KINDS = ("embodiments", "config", "checkpoints", "launch", "training")
_MARKER = Path("embodiments") / "embodiment.schema.json"  # site-packages holds a `launch` of ROS 2, but never this


def _share_dirs() -> Iterator[Path]:
    package_dir = Path(__file__).resolve().parent
    yield package_dir.parent  # source checkout, also through `colcon build --symlink-install` and `pip install -e`
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix:
            yield Path(prefix) / "share" / PACKAGE
    prefixes = [Path(sys.prefix), Path(sysconfig.get_path("data"))]
    if len(package_dir.parents) > 3:
        prefixes.append(package_dir.parents[3])  # <prefix>/lib/pythonX.Y/site-packages/qwen_vla_core, e.g. `pip --user`
    for prefix_dir in prefixes:
        yield prefix_dir / "share" / PACKAGE


def resource_dir(kind: str) -> Path:
    """Directory of the shipped files of one kind.

    Args:
        kind: one of ``KINDS``.

    Raises:
        ValueError: ``kind`` is not one of them.
        UserError: the package was installed without its data files.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown resource kind {kind!r}; one of {KINDS}")
    for share in _share_dirs():
        if (share / _MARKER).is_file() and (share / kind).is_dir():
            return share / kind
    raise UserError(
        f"the shipped '{kind}' files are not installed; fix: reinstall {PACKAGE}, or source install/setup.bash"
    )
