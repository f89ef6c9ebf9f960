"""Looking at the pictures of one episode: are they there, do they show anything, do they change with the robot?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.errors import UserError

_SMALL = 32  # side of the grey picture that is judged: noise averages out, a moving arm does not
_SIGNATURE = (4, 16)  # pictures of an episode's signature, and their side
_BLOCK = 64  # pictures decoded at once: memory stays small, a decoder need not seek for each


@dataclass(frozen=True)
class ViewFacts:
    """One view of one episode.

    Attributes:
        view: its name.
        looked: pictures that were looked at.
        error: the reader's complaint, or empty.
        blank: rows whose picture is one even grey, at most 100.
        blank_total: how many there are.
        black: whether the blank ones are black.
        frozen: runs (first row, row after the last) of a picture that stays while the robot moves.
        signature: hexadecimal grey levels of pictures spread over the episode, to find duplicates.
    """

    view: str
    looked: int
    error: str = ""
    blank: list[int] = field(default_factory=list)
    blank_total: int = 0
    black: bool = False
    frozen: list[tuple[int, int]] = field(default_factory=list)
    signature: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ViewFacts:
        """Reads what ``to_json`` wrote."""
        return cls(**{**value, "frozen": [(int(a), int(b)) for a, b in value["frozen"]]})


def look(
    dataset: ActionDataset, episode: int, view: str, travelled: np.ndarray, limits: Thresholds, most: int
) -> ViewFacts:
    """Looks at a view of an episode.

    Args:
        dataset: where the pictures are.
        episode: its number.
        view: its name.
        travelled: (T,) how far the robot has moved up to each row, in full scales.
        limits: when a picture counts as blank or frozen.
        most: pictures to look at, spread evenly; 0 is all.
    """
    length = len(travelled)
    steps = np.arange(length) if not 0 < most < length else np.unique(np.linspace(0, length - 1, most).round())
    steps = steps.astype(np.int64)
    small = np.empty((len(steps), _SMALL, _SMALL), np.float32)
    for first in range(0, len(steps), _BLOCK):
        wanted = steps[first : first + _BLOCK].tolist()
        try:
            frames = dataset.frames(episode, view, wanted)
        except UserError as error:
            return ViewFacts(view, first, error=str(error))
        if len(frames) != len(wanted):
            return ViewFacts(view, first, error=f"{len(frames)} of {len(wanted)} pictures from row {wanted[0]} on")
        for i, frame in enumerate(frames):
            grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
            small[first + i] = cv2.resize(grey.astype(np.float32), (_SMALL, _SMALL), interpolation=cv2.INTER_AREA)
    contrast = small.max(axis=(1, 2)) - small.min(axis=(1, 2))
    blank = contrast < limits.blank_contrast
    return ViewFacts(
        view=view,
        looked=len(steps),
        blank=steps[blank][:100].tolist(),
        blank_total=int(blank.sum()),
        black=bool(blank.any() and small[blank].mean() < 32),
        frozen=_frozen(small, blank, steps, travelled, limits),
        signature=_signature(small),
    )


def _frozen(
    small: np.ndarray, blank: np.ndarray, steps: np.ndarray, travelled: np.ndarray, limits: Thresholds
) -> list[tuple[int, int]]:
    """Runs of one unchanged picture over which the robot moves more than the threshold. Blank ones are told apart."""
    runs = []
    anchor = 0
    for i in range(1, len(small) + 1):
        # Against the first picture of the run, not the one before: slow motion adds up, an encoder's noise does not.
        if i < len(small) and np.abs(small[i] - small[anchor]).max() < limits.frozen_change:
            continue
        if not blank[anchor] and travelled[steps[i - 1]] - travelled[steps[anchor]] > limits.frozen_travel:
            runs.append((int(steps[anchor]), int(steps[i - 1]) + 1))
        anchor = i
    return runs


def _signature(small: np.ndarray) -> str:
    count, side = _SIGNATURE
    chosen = small[np.linspace(0, len(small) - 1, count).round().astype(int)]
    blocks = chosen.reshape(count, side, _SMALL // side, side, _SMALL // side).mean(axis=(2, 4))
    return blocks.round().astype(np.uint8).tobytes().hex()
