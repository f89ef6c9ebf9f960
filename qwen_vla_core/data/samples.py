"""What the loader hands out: one action window or one conversation, as plain NumPy; and how the policy takes them.

Every family of the mixture ends in one of two forms, so that a batch may hold both [P: every minibatch mixes families].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ActionSample:
    """One observation and the actions that followed it; c channels, H steps.

    Attributes:
        images: view → (n, height, width, 3) uint8 RGB, oldest frame first and the current one last, views in model
            order; empty for data without pictures.
        state: (c_s,) float32 in channel units at the current frame.
        instruction: what was asked at the current frame.
        actions_hc: (H, c) float32 in channel units and in the convention that the prompt names: relative conventions
            are relative to the chunk's first frame. Only for T2A does H differ from the contract's: it is the whole
            sequence [P].
        step_mask_h: (H,) bool; False where the episode, the instruction or an unperturbed course has ended.
        embodiment: name of the robot whose contract (prompt, views, channels, horizon) this is.
        family: of the mixture.
        dataset: name of the dataset.
        episode: its number in the dataset.
        t: the current frame's number in the episode.
        seed: of everything random about this sample (jitter here, noise later): the same wherever it is drawn.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str
    actions_hc: np.ndarray
    step_mask_h: np.ndarray
    embodiment: str
    family: str
    dataset: str
    episode: int
    t: int
    seed: int


@dataclass(frozen=True)
class TextSample:
    """One conversation about pictures.

    Attributes:
        images: view → (n, height, width, 3) uint8 RGB, n frames of that view in time order, views in the order of the
            conversation; empty for text alone.
        turns: (question, answer) pairs, at least one, without picture markers.
        family: of the mixture.
        dataset: name of the dataset.
        index: its number in the dataset.
    """

    images: Mapping[str, np.ndarray]
    turns: Turns
    family: str
    dataset: str
    index: int


Sample = ActionSample | TextSample


class TextDataset(Protocol):
    """Conversations of one corpus. Opened cheaply; pictures are read when asked for; safe to open in every worker."""

    name: str
    family: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> TextSample:
        """The conversation of one line.

        Raises:
            UserError: the line or a picture is missing or damaged; names file and row.
        """
        ...

    def content_hash(self) -> str:
        """Identifies the dataset's content (files, sizes, times or sums)."""
        ...


@dataclass(frozen=True)
class SampleBatch:
    """One minibatch, in the order in which it was drawn.

    Attributes:
        step: number of the batch since the beginning of training; with recipe and seed it decides all the rest.
        samples: of all families.
    """

    step: int
    samples: Sequence[Sample]
