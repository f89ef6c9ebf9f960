"""Datasets by name: a local folder, or ``owner/dataset`` on the Hugging Face hub.

The download itself is one call of ``huggingface_hub``; it needs a network and is not covered by the offline tests,
which replace that call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.video import Decoder
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")


def find_dataset(name: str | Path) -> Path:
    """The folder of a dataset. A local folder wins over a hub name that looks the same.

    Args:
        name: a folder, or ``owner/dataset``, or ``owner/dataset@revision``.

    Raises:
        UserError: neither is there, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    text = str(name)
    if not _HUB_NAME.fullmatch(text):
        raise UserError(f"{name}: no such folder, and not a hub name (owner/dataset); check the path")
    repository, _, revision = text.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such folder; for the hub, `pip install huggingface_hub`, or download it to a folder"
        ) from None
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision or None))
    except Exception as error:  # its many network and authorisation errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{name}: no such folder, and the hub did not give it ({type(error).__name__}: {reason}); "
            f"check name, network and `hf auth login`, or download it to a folder"
        ) from None


def open_dataset(
    name: str | Path,
    embodiment: str | Path | None = None,
    *,
    family: str | None = None,
    views: Mapping[str, str] | None = None,
    decoder: Decoder = "auto",
) -> LeRobotDataset:
    """Opens a dataset by folder or hub name.

    Args:
        name: see ``find_dataset``.
        embodiment: name or YAML of the robot, for datasets without ``meta/qwen_vla.json``; channels map by order.
        family: of the training mixture, for such datasets.
        views: view → feature, where pictures have other names.
        decoder: of videos.

    Raises:
        UserError: see ``find_dataset`` and ``LeRobotDataset``.
    """
    contract = DataContract.of(load_embodiment(str(embodiment))) if embodiment is not None else None
    return LeRobotDataset(find_dataset(name), contract, family=family, views=views, decoder=decoder)
