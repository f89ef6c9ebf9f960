"""Tensors of all ranks on the disk, in safetensors and JSON: no pickle, a checksum for every piece, any resharding.

``torch.distributed.checkpoint`` plans: which slice of which tensor a rank holds, and which stored pieces a rank needs,
also on another number of ranks. Its ``save`` and ``load`` are not used: they exchange those plans between ranks as
pickled objects, and ``HuggingFaceStorageWriter``, which does write safetensors, neither syncs nor checks what it wrote
[O]. Every rank plans for itself here, so ranks exchange nothing at all.

A rank writes ``rank_00001.00000.safetensors``, …00001… of at most about ``FILE_BYTES`` each, and ``rank_00001.json``,
which says for each piece: tensor, its shape, dtype, where the piece lies in it, its file and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes

FILE_BYTES = 2**30  # bounds the memory that a rank needs to write


@dataclass(frozen=True)
class Piece:
    """One stored slice of one tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        dtype: torch's name, such as ``float32``.
        offsets: of the slice, per dimension.
        sizes: of the slice, per dimension.
        file: name of the safetensors file, in which it is called ``name``.
        sha256: of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    sha256: str


def write_pieces(folder: Path, tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> None:
    """Writes this rank's share of ``tensors`` and its list of pieces, synced to the disk.

    Slices of a ``DTensor`` are written by the rank that holds them; tensors that every rank holds are dealt out.

    Args:
        folder: exists; common to all ranks.
        tensors: the same names on all ranks.
        rank: this rank.
        world: number of ranks.

    Raises:
        OSError: the disk is full, or another fault of it.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(_share(tensors, rank, world)), is_coordinator=True)
    pieces: list[Piece] = []
    waiting: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if waiting:
            atomic_write_bytes(folder / _file_name(rank, files), save(waiting))
            files += 1
            waiting.clear()

    size = 0
    for item in planner.create_local_plan().items:
        data = item.tensor_data
        assert data is not None
        if 0 in data.chunk.sizes:
            continue  # fewer rows than ranks: nothing of it is here
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        content = tensor.detach().cpu().contiguous()
        if waiting and size + content.nbytes > FILE_BYTES:
            flush()
            size = 0
        size += content.nbytes
        waiting[item.index.fqn] = content
        pieces.append(
            Piece(
                item.index.fqn,
                tuple(data.size),
                _dtype_name(content.dtype),
                tuple(data.chunk.offsets),
                tuple(data.chunk.sizes),
                _file_name(rank, files),
                _digest(content),
            )
        )
    flush()
    listing = json.dumps([asdict(piece) for piece in pieces])
    atomic_write_bytes(folder / list_name(rank), listing.encode())


def list_name(rank: int) -> str:
    """File name of a rank's list of pieces."""
    return f"rank_{rank:05d}.json"


def parse_pieces(text: bytes) -> list[Piece]:
    """The inverse of what ``write_pieces`` lists; ValueError, KeyError or TypeError where it is damaged."""
    return [
        Piece(**{**entry, **{key: tuple(map(int, entry[key])) for key in ("shape", "offsets", "sizes")}})
        for entry in json.loads(text)
    ]


@torch.no_grad()
def read_pieces(folder: Path, pieces: list[Piece], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills ``tensors`` in place, each rank its own slices, from pieces of any number of ranks.

    Args:
        folder: where the files lie.
        pieces: of all ranks that wrote.
        tensors: whole or ``DTensor``; all named in ``pieces``, with equal shapes (checked by the caller).

    Raises:
        UserError: a piece is missing or damaged.
    """
    metadata, found = _metadata(pieces)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    wanted: dict[str, list[tuple[Any, Piece]]] = {}
    for item in planner.create_local_plan().items:
        piece = found[item.storage_index]
        if 0 not in item.lengths:
            wanted.setdefault(piece.file, []).append((item, piece))
    for file_name, items in sorted(wanted.items()):
        path = folder / file_name
        try:
            with safe_open(path, "pt") as file:
                for item, piece in items:
                    content = file.get_tensor(piece.name)
                    shape, kind = tuple(content.shape), _dtype_name(content.dtype)
                    if (shape, kind, _digest(content)) != (piece.sizes, piece.dtype, piece.sha256):
                        raise UserError(f"{path}: damaged ({piece.name} does not match its checksum)")
                    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        content = content.narrow(dim, offset, length)
                    planner.resolve_tensor(item).copy_(content)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from error


def _share(tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> list[tuple[str, torch.Tensor]]:
    """What this rank writes: its slices, and a fair part of what all hold; every rank deals alike."""
    mine = [entry for entry in tensors.items() if isinstance(entry[1], DTensor)]
    whole = [entry for entry in tensors.items() if not isinstance(entry[1], DTensor)]
    loads = [0] * world
    for name, tensor in sorted(whole, key=lambda entry: (-entry[1].nbytes, entry[0])):
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            mine.append((name, tensor))
    return mine


def _metadata(pieces: list[Piece]) -> tuple[Metadata, dict[MetadataIndex, Piece]]:
    """The pieces as ``torch.distributed.checkpoint`` describes a checkpoint."""
    tensors: dict[str, Any] = {}
    found = {}
    for piece in pieces:
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        if piece.name not in tensors:
            properties = TensorProperties(dtype=getattr(torch, piece.dtype))
            tensors[piece.name] = TensorStorageMetadata(properties, torch.Size(piece.shape), [])
        tensors[piece.name].chunks.append(chunk)
        found[MetadataIndex(piece.name, chunk.offsets)] = piece
    return Metadata(tensors), found


def _file_name(rank: int, number: int) -> str:
    return f"rank_{rank:05d}.{number:05d}.safetensors"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
