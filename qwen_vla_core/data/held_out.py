"""Part of a dataset's episodes: what is learned from, and what is left out to be asked about afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.errors import UserError


class Episodes:
    """Consecutive episodes of a dataset, numbered from 0; implements ``ActionDataset``."""

    def __init__(self, dataset: ActionDataset, first: int, count: int) -> None:
        """
        Args:
            dataset: the whole.
            first: its episode that is number 0 here.
            count: episodes.
        """
        self.dataset, self.first, self.count = dataset, first, count
        self.name, self.family, self.contract, self.fps = dataset.name, dataset.family, dataset.contract, dataset.fps
        self.tasks, self.views = dataset.tasks, dataset.views
        self.lengths = np.asarray(dataset.lengths[first : first + count])

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
    learned: ActionDataset = Episodes(dataset, 0, count) if last else dataset
    return learned, Episodes(dataset, count, last)
