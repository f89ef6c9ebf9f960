"""Pictures of a recording as its corpus stores them: encoded bytes, a folder of files, or a video; read lazily.

A ``Frames`` is a small description that travels between processes; the pixels come when it is iterated. All pictures
of a view get one size: fitted inside it without distortion, black where the aspect differs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

from qwen_vla_core.errors import UserError

Size = tuple[int, int]  # width, height
_SEEK_BEYOND = 300  # frames; up to there decoding from the start is cheaper than a key frame search


class Frames(Protocol):
    """T pictures of one view."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]:
        """(height, width, 3) uint8 RGB each."""
        ...


def stored_size(size: Size, height: int) -> Size:
    """Size of stored pictures for ``--height``: aspect kept, both sides even (video encoders need that).

    Raises:
        UserError: the height is negative.
    """
    if height < 0:
        raise UserError(f"--height {height}: must be 0 or more")
    width, high = size
    scale = 1.0 if height == 0 else height / high
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(high * scale / 2))


def fit(picture: np.ndarray, size: Size) -> np.ndarray:
    """(h, w, 3) → (height, width, 3): scaled to fit, centred on black."""
    width, height = size
    high, wide = picture.shape[:2]
    if (wide, high) == size:
        return picture
    scale = min(width / wide, height / high)
    new = max(1, min(width, round(wide * scale))), max(1, min(height, round(high * scale)))
    scaled = cv2.resize(picture, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if new == size:
        return np.asarray(scaled)
    result = np.zeros((height, width, 3), np.uint8)
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    result[top : top + new[1], left : left + new[0]] = scaled
    return result


def decode(data: bytes, where: str) -> np.ndarray:
    """A JPEG or PNG → (h, w, 3) uint8 RGB.

    Raises:
        UserError: it is damaged or cut short; names ``where``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: damaged picture ({' '.join(str(error).split())})") from None


def picture_size(data: bytes, where: str) -> Size:
    """(width, height) from the header of a JPEG or PNG.

    Raises:
        UserError: as in ``decode``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: damaged picture ({' '.join(str(error).split())})") from None


@dataclass(frozen=True)
class EncodedFrames:
    """Pictures as JPEG or PNG bytes.

    Attributes:
        pictures: one per step.
        size: (width, height) to store.
        where: file and record, for errors.
    """

    pictures: tuple[bytes, ...]
    size: Size
    where: str

    @property
    def nbytes(self) -> int:
        return len(self) * self.size[0] * self.size[1] * 3

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step, data in enumerate(self.pictures):
            yield fit(decode(data, f"{self.where}, step {step}"), self.size)


@dataclass(frozen=True)
class FileFrames:
    """Picture files.

    Attributes:
        paths: one per step; the same file may serve several steps.
        size: (width, height) to store.
    """

    paths: tuple[str, ...]
    size: Size

    @property
    def nbytes(self) -> int:
        return len(self) * self.size[0] * self.size[1] * 3

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        last, picture = "", np.zeros((0, 0, 3), np.uint8)
        for path in self.paths:
            if path != last:
                last, picture = path, fit(decode(_bytes(Path(path)), path), self.size)
            yield picture


@dataclass(frozen=True)
class VideoFrames:
    """Pictures of a video of constant frame rate.

    Attributes:
        path: of the video.
        indices: increasing frame numbers, from 0.
        size: (width, height) to store.
    """

    path: str
    indices: tuple[int, ...]
    size: Size

    @property
    def nbytes(self) -> int:
        return len(self) * self.size[0] * self.size[1] * 3

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        import av

        wanted = iter(self.indices)
        target = next(wanted, None)
        try:
            with av.open(self.path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                rate, base = _rate(stream, self.path), float(stream.time_base)
                start = (stream.start_time or 0) * base
                if target is not None and target > _SEEK_BEYOND:
                    container.seek(int((start + (target - 1) / rate) / base), stream=stream)
                for frame in container.decode(stream):
                    if target is None:
                        return
                    number = round((float(frame.time) - start) * rate)
                    if number > target:
                        raise UserError(f"{self.path}: frame {target} is missing; copy the file again")
                    if number == target:
                        yield fit(frame.to_ndarray(format="rgb24"), self.size)
                        target = next(wanted, None)
        except (av.FFmpegError, IndexError, OSError) as error:
            raise UserError(f"{self.path}: damaged video ({' '.join(str(error).split())}); copy it again") from None
        if target is not None:
            raise UserError(f"{self.path}: ends before frame {target}; it is cut short")


@dataclass(frozen=True)
class VideoFacts:
    """What a video's header says.

    Attributes:
        size: (width, height).
        fps: frames per second.
        frames: their number; 0 where the header does not say.
    """

    size: Size
    fps: float
    frames: int


def video_facts(path: Path) -> VideoFacts:
    """Size, rate and length of a video.

    Raises:
        UserError: it is missing, no video, or cut short.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return VideoFacts((stream.width, stream.height), _rate(stream, str(path)), int(stream.frames))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({' '.join(str(error).split())})") from None


def first_size(pictures: Sequence[bytes], where: str) -> Size:
    """Size of the first picture.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not pictures:
        raise UserError(f"{where}: holds no pictures")
    return picture_size(pictures[0], where)


def _rate(stream: Any, path: str) -> float:
    rate = stream.average_rate or stream.base_rate
    if not rate:
        raise UserError(f"{path}: names no frame rate")
    return float(rate)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
