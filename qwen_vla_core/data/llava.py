"""A corpus of conversations about pictures, read line by line without loading it (``TextDataset``).

A folder written by ``qwen-vla data convert`` holds ``samples.jsonl``, ``images/`` and ``meta/qwen_vla.json``; a bare
LLaVA file of somebody else opens just as well. The lines are those of ``llava_format.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.boxes import RELATIVE, Coordinates, re_express
from qwen_vla_core.data.contract import CONTRACT_FILE, TEXT_FAMILIES
from qwen_vla_core.data.llava_format import Record, parse_record
from qwen_vla_core.data.pictures import PictureError, load_picture, load_size
from qwen_vla_core.data.samples import TextSample
from qwen_vla_core.errors import UserError

SAMPLES_FILE = "samples.jsonl"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class LlavaDataset:
    """A corpus of conversations; implements ``TextDataset``.

    Attributes:
        path: a folder with ``samples.jsonl``, or a bare ``.jsonl`` file.
        name: of the dataset; empty = the folder's or file's.
        family: of the mixture; empty = what the folder says, ``general_vl`` for a bare file.
        coordinates: in which boxes and points shall be; None = as they are on disk.
        images: picture folder; None = the folder itself.
    """

    path: Path
    name: str = ""
    family: str = ""
    coordinates: Coordinates | None = None
    images: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | Path,
        name: str = "",
        family: str = "",
        coordinates: Coordinates | None = None,
        images: str | Path | None = None,
    ) -> LlavaDataset:
        """Opens a folder or a file; reads the sidecar and finds the lines.

        Raises:
            UserError: there is no such dataset, it is empty, or it is an unfinished conversion.
        """
        path = Path(path)
        folder, file = (path, path / SAMPLES_FILE) if path.is_dir() else (path.parent, path)
        about: dict[str, Any] = {}
        if path.is_dir() and (path / CONTRACT_FILE).is_file():
            try:
                about = json.loads((path / CONTRACT_FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path / CONTRACT_FILE}: damaged ({error}); convert the corpus again") from None
        if not file.is_file():
            unfinished = path.is_dir() and (path / "parts").is_dir()
            hint = "an unfinished conversion: run the same `qwen-vla data convert` again" if unfinished else "not there"
            raise UserError(f"{file}: {hint}")
        family = family or str(about.get("family", "general_vl"))
        if family not in TEXT_FAMILIES:
            raise UserError(f"{path}: family {family!r} holds no conversations; use one of {', '.join(TEXT_FAMILIES)}")
        dataset = cls(
            file, name or (folder.name if path.is_dir() else file.stem), family, coordinates,
            folder if images is None else Path(images), about,
        )  # fmt: skip
        if not len(dataset):
            raise UserError(f"{file}: holds no line")
        return dataset

    @cached_property
    def _starts(self) -> np.ndarray:
        """(lines + 1,) byte offsets of the lines' beginnings and of the end."""
        ends, offset, last = [], 0, b"\n"
        try:
            with self.path.open("rb") as file:
                while block := file.read(_BLOCK):
                    ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + offset + 1)
                    offset, last = offset + len(block), block[-1:]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        starts = np.concatenate([np.zeros(1, np.int64), *ends])
        return starts if last == b"\n" else np.append(starts, offset)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def raw(self, index: int) -> Any:
        """The JSON of a line.

        Raises:
            UserError: it is no JSON; names the line.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start).decode("utf-8-sig"))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}:{index + 1}: not UTF-8; write the line again") from None
        except ValueError as error:
            raise UserError(f"{self.path}:{index + 1}: not JSON ({error}); write the line again") from None

    def record(self, index: int) -> Record:
        """A checked line, without its pictures.

        Raises:
            UserError: the line breaks the format; names file, line and what is wrong.
        """
        value = self.raw(index)
        try:
            return parse_record(value)
        except ValueError as error:
            raise UserError(f"{self.path}:{index + 1}: {error}") from None

    def sample(self, index: int) -> TextSample:
        """The conversation of a line with its pictures decoded.

        Raises:
            UserError: as ``record``; or a picture is missing or damaged, or frames of one view differ in size.
        """
        record = self.record(index)
        pictures: dict[str, list[np.ndarray]] = {}
        for name, view in zip(record.images, record.views, strict=True):
            try:
                pictures.setdefault(view, []).append(load_picture(self.root / name))
            except PictureError as error:
                raise UserError(f"{self.path}:{index + 1}: {error}") from None
        for view, frames in pictures.items():
            if len({frame.shape for frame in frames}) > 1:
                shapes = ", ".join(f"{frame.shape[1]}×{frame.shape[0]}" for frame in frames)
                raise UserError(f"{self.path}:{index + 1}: frames of view {view!r} differ in size: {shapes}")
        turns = record.turns
        if self.coordinates is not None and self.coordinates != self.stored:
            sizes = {view: (frames[0].shape[1], frames[0].shape[0]) for view, frames in pictures.items()}
            stored, wanted = self.stored, self.coordinates
            try:
                turns = tuple(
                    (re_express(q, sizes, stored, wanted), re_express(a, sizes, stored, wanted)) for q, a in turns
                )
            except ValueError as error:
                raise UserError(f"{self.path}:{index + 1}: {error}") from None
        return TextSample(
            {view: np.stack(frames) for view, frames in pictures.items()}, turns, self.family, self.name, index
        )

    @property
    def root(self) -> Path:
        """Where ``image`` begins."""
        return self.images or self.path.parent

    @cached_property
    def stored(self) -> Coordinates:
        """The convention of the text on disk; Qwen3's for a bare file, which is what such files hold today [O]."""
        return coordinates_of(self.about.get("coordinates") or {"convention": RELATIVE})

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views whose boundary tokens the texts use, as the sidecar lists them."""
        return tuple(map(str, self.about.get("views", ())))

    def validate(self, pictures: str = "exists") -> Iterator[tuple[int, str]]:
        """(line number, what is wrong) of every bad line; one pass, without stopping.

        Args:
            pictures: ``exists`` looks for the files, ``header`` also reads their sizes, ``decode`` every pixel.
        """
        for index in range(len(self)):
            try:
                record = self.record(index)
                for name in record.images:
                    if pictures == "decode":
                        load_picture(self.root / name)
                    elif pictures == "header":
                        load_size(self.root / name)
                    elif not (self.root / name).is_file():
                        raise PictureError(f"picture {self.root / name} is missing")
            except (UserError, PictureError) as error:
                yield index + 1, str(error).removeprefix(f"{self.path}:{index + 1}: ")

    def content_hash(self) -> str:
        """SHA-256 of the lines; pictures are named in them and not read."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def coordinates_of(described: Mapping[str, Any]) -> Coordinates:
    """What a sidecar says: ``{"convention", "image"}``, the latter with the keys of ``preprocessor_config.json``."""
    limits, resize = described.get("image"), None
    if limits:
        from qwen_vla_core.model.processor import ImageConfig

        resize = ImageConfig.from_dict(limits).target_size
    return Coordinates(str(described.get("convention")), resize)
