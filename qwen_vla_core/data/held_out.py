"""Part of a dataset's episodes: what is learned from, and what is left out to be asked about afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.errors import UserError


@dataclass(frozen=True)
class Episodes:
    """Consecutive episodes of a dataset, numbered from 0; implements ``ActionDataset``."""

    dataset: ActionDataset
    first: int
    count: int

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def family(self) -> str:
        return self.dataset.family

    @property
    def contract(self) -> DataContract:
        return self.dataset.contract

    @property
    def fps(self) -> float:
        return self.dataset.fps

    @property
    def tasks(self) -> Sequence[str]:
        return self.dataset.tasks

    @property
    def views(self) -> Sequence[str]:
        return self.dataset.views

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.dataset.lengths[self.first : self.first + self.count])

    def rows(self, episode: int) -> EpisodeRows:
        """As ``ActionDataset.rows``."""
        return self.dataset.rows(self.first + episode)

    def frames(self, episode: int, view: str, steps: Sequence[int]) -> np.ndarray:
        """As ``ActionDataset.frames``."""
        return self.dataset.frames(self.first + episode, view, steps)

    def content_hash(self) -> str:
        """That of the whole, and which part of it."""
        return f"{self.dataset.content_hash()} {self.first}+{self.count}"


def split(dataset: ActionDataset, last: int) -> tuple[ActionDataset, Episodes]:
    """What is learned from, and the ``last`` episodes, which are not.

    Raises:
        UserError: nothing would be left to learn from.
    """
    count = len(dataset.lengths) - last
    if count < 1:
        raise UserError(
            f"{dataset.name}: leave_out: {last} of {len(dataset.lengths)} episodes leaves none to learn from; lower it"
        )
    return (Episodes(dataset, 0, count) if last else dataset), Episodes(dataset, count, last)
