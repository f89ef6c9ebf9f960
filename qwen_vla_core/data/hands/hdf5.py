"""HDF5 files of recordings: every failure says which file and which dataset."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The open file.

    Raises:
        UserError: it cannot be read or is cut short, also when that shows while it is being read.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise UserError("HDF5 files need h5py; pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable HDF5 file ({_short(error)}); copy it again") from None


def array(file: Any, path: Path, name: str, shape: tuple[int | None, ...], required: bool = True) -> np.ndarray | None:
    """A dataset of numbers as float64.

    Args:
        file: open file.
        path: of it, for errors.
        name: of the dataset.
        shape: expected; None fits any size.
        required: a missing one is an error; else None is returned.

    Raises:
        UserError: it is missing, damaged, of another shape or no numbers.
    """
    if name not in file:
        if required:
            raise UserError(f"{path}: has no dataset '{name}'")
        return None
    try:
        values = np.asarray(file[name][...], np.float64)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: dataset '{name}' is damaged ({_short(error)}); copy it again") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: dataset '{name}' holds no numbers") from None
    if len(values.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(values.shape, shape, strict=True)
    ):
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise UserError(f"{path}: dataset '{name}' has shape {values.shape}, expected ({wanted})")
    return values


def text(value: Any) -> str:
    """An attribute or scalar dataset as text: bytes, arrays of one element and missing values too."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else b"".join(np.asarray(value).astype("S").ravel())
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return "" if value is None else str(value).strip("\0 \n\t")


def rigid(transforms: np.ndarray) -> np.ndarray:
    """(T,) bool: (T, 4, 4) that are finite, right-handed rotations with a translation."""
    finite = np.isfinite(transforms).all(axis=(1, 2))
    turn = np.where(finite[:, None, None], transforms, np.eye(4))[:, :3, :3]
    error = np.abs(turn @ np.swapaxes(turn, 1, 2) - np.eye(3)).max(axis=(1, 2))
    return np.asarray(finite & (error < 1e-3) & (np.linalg.det(turn) > 0))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
