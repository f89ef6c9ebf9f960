"""Least recently used values up to a number of bytes: decoded frames and rows of episodes, one cache per worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import cv2
import numpy as np

from qwen_vla_core.data.dataset import ActionDataset

V = TypeVar("V")
Size = tuple[int, int]  # width, height


class ByteCache(Generic[V]):
    """A dictionary that forgets what was not asked for longest."""

    def __init__(self, limit_bytes: int) -> None:
        """
        Args:
            limit_bytes: of all values together; a value larger than this is not kept at all.
        """
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """The value, now the most recently used one; None if it is not there."""
        found = self._values.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keeps ``value``, which takes ``size`` bytes, and forgets as much as that needs."""
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
        if size > self.limit_bytes:
            return
        self._values[key] = (value, size)
        self.bytes += size
        while self.bytes > self.limit_bytes:
            self.bytes -= self._values.popitem(last=False)[1][1]

    def through(self, key: Hashable, make: Callable[[], V], size_of: Callable[[V], int]) -> V:
        """The value, made if it is not there."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found, size_of(found))
        return found


class FrameCache:
    """Frames of action datasets, decoded once and brought to one size."""

    def __init__(self, limit_bytes: int, size: Size | None = None) -> None:
        """
        Args:
            limit_bytes: of all frames together; 0 keeps nothing.
            size: (width, height) that frames are brought to by area averaging; None leaves them as they are.
        """
        self.size = size
        self._frames: ByteCache[np.ndarray] = ByteCache(limit_bytes)

    @property
    def cache(self) -> ByteCache[np.ndarray]:
        """What is kept, with its hits and misses."""
        return self._frames

    def frames(
        self, source: Hashable, dataset: ActionDataset, episode: int, view: str, steps: Sequence[int]
    ) -> np.ndarray:
        """(len(steps), height, width, 3) uint8; only the frames that are not here are decoded, in one call.

        The result may share memory with the cache and is not to be written to.

        Args:
            source: which dataset this is, unique and hashable.
            dataset: where frames come from.
            episode: its number.
            view: of the contract.
            steps: of the episode, in any order, perhaps repeated.

        Raises:
            UserError: from the dataset.
        """
        found: dict[int, np.ndarray] = {}
        missing: list[int] = []
        for step in dict.fromkeys(steps):
            frame = self._frames.get((source, episode, view, step))
            if frame is None:
                missing.append(step)
            else:
                found[step] = frame
        if missing:
            decoded = dataset.frames(episode, view, missing)
            for step, frame in zip(missing, decoded, strict=True):
                found[step] = self._keep((source, episode, view, step), frame)
        return found[steps[0]][None] if len(steps) == 1 else np.stack([found[step] for step in steps])

    def _keep(self, key: Hashable, frame: np.ndarray) -> np.ndarray:
        if self.size is not None and self.size != (frame.shape[1], frame.shape[0]):
            # By area as the processor does it: a frame reduced here, there, or before it was stored is the same one.
            frame = cv2.resize(frame, self.size, interpolation=cv2.INTER_AREA)
        elif self._frames.limit_bytes and frame.base is not None:
            frame = frame.copy()  # a view would keep all the frames alive that were decoded with it
        self._frames.put(key, frame, frame.nbytes)
        return frame


def jitter(frames: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Brightness, contrast and a colour cast, the same for all n frames; geometry stays, because actions depend on it.

    Args:
        frames: (n, height, width, 3) uint8; not changed.
        rng: decides by how much.
        strength: 1 changes contrast by up to 15 %, each colour by 5 %, brightness by 15 of 255; 0 nothing.
    """
    gain = (1 + strength * rng.uniform(-0.15, 0.15)) * (1 + strength * rng.uniform(-0.05, 0.05, 3))
    lift = strength * rng.uniform(-15.0, 15.0)
    levels = (np.arange(256.0)[:, None] - 128.0) * gain + 128.0 + lift
    table = np.clip(levels, 0, 255).astype(np.uint8)[None]  # (1, 256, 3)
    count, height, width, _ = frames.shape
    result = cv2.LUT(frames.reshape(count * height, width, 3), table)
    return np.asarray(result).reshape(frames.shape)
