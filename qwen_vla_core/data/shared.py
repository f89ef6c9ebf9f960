"""Samples from a worker to the trainer: one block of shared memory for all arrays of a batch, and a small message.

Pickling pictures through a pipe would copy every byte four times, in both processes.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.samples import Sample
from qwen_vla_core.errors import UserError

_FOLDER = Path("/dev/shm")  # where Linux shows shared memory as files
_ALIGN = 64


@dataclass(frozen=True)
class _Place:
    """An array inside the block."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PackedSamples:
    """A batch on its way.

    Attributes:
        block: name of the shared memory; empty if there are no arrays.
        samples: with a ``_Place`` instead of every array.
    """

    block: str
    samples: tuple[Any, ...]


def pack(samples: Sequence[Sample], prefix: str) -> PackedSamples:
    """Copies every array into new shared memory, which ``unpack`` or ``discard`` must take.

    Args:
        samples: of a batch.
        prefix: of the block's name; ``sweep`` finds by it what nobody took.

    Raises:
        UserError: there is not enough of it.
    """
    arrays: list[tuple[_Place, np.ndarray]] = []
    end = 0

    def place(array: np.ndarray) -> Any:
        nonlocal end
        found = _Place(end, array.shape, array.dtype.str)
        arrays.append((found, array))
        end += -(-array.nbytes // _ALIGN) * _ALIGN
        return found

    placed = tuple(_map_arrays(sample, place) for sample in samples)
    if not end:
        return PackedSamples("", placed)
    block = SharedMemory(f"{prefix}{secrets.token_hex(6)}", create=True, size=end)
    try:
        _reserve(block.name, end)
        for where, array in arrays:
            np.copyto(_view(block.buf, where), array)
    except BaseException:
        block.close()
        block.unlink()
        raise
    block.close()
    return PackedSamples(block.name, placed)


def unpack(packed: PackedSamples) -> list[Sample]:
    """The samples; their arrays are views of the block, which is freed with the last of them."""
    if not packed.block:
        return [_map_arrays(sample, lambda place: np.empty(place.shape, place.dtype)) for sample in packed.samples]
    block = SharedMemory(packed.block)
    try:
        handle = os.open(_FOLDER / block.name, os.O_RDWR)
        try:
            memory = mmap.mmap(handle, block.size)  # unlike SharedMemory.buf it may go whenever the arrays go
        finally:
            os.close(handle)
    finally:
        block.close()
        block.unlink()
    return [_map_arrays(sample, lambda place: _view(memory, place)) for sample in packed.samples]


def discard(packed: PackedSamples) -> None:
    """Frees a batch that nobody wants."""
    if packed.block:
        block = SharedMemory(packed.block)
        block.close()
        block.unlink()


def sweep(prefix: str) -> None:
    """Frees every block with this prefix: what a worker left that died between making and handing over."""
    for path in _FOLDER.glob(f"{prefix}*"):
        if path.stat().st_size:
            discard(PackedSamples(path.name, ()))
        else:  # killed between creating the block and giving it a size: nothing to map, and nobody was told of it
            path.unlink()


def _view(buffer: Any, place: _Place) -> np.ndarray:
    return np.ndarray(place.shape, place.dtype, buffer=buffer, offset=place.offset)


def _map_arrays(sample: Any, function: Any) -> Any:
    """The same sample with ``function`` applied to every array (or place of one)."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(sample):
        value = getattr(sample, field.name)
        if isinstance(value, np.ndarray | _Place):
            changed[field.name] = function(value)
        elif field.name == "images":
            changed[field.name] = {view: function(frames) for view, frames in value.items()}
    return dataclasses.replace(sample, **changed)


def _reserve(name: str, size: int) -> None:
    """Claims the memory now: a full /dev/shm would otherwise kill the process in the middle of a copy."""
    handle = os.open(_FOLDER / name, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        raise UserError(
            f"loader: no room for a batch of {size / 1e6:.0f} MB in {_FOLDER} ({error.strerror}); use fewer workers, a "
            "smaller prefetch or batch_size, or give a container more (docker --shm-size)"
        ) from None
    finally:
        os.close(handle)
