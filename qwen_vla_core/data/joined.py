"""Several datasets of one robot as one, for statistics: only their rows, no pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows


class JoinedRows:
    """The episodes of several datasets with one contract, one after the other; what ``dataset_statistics`` reads."""

    def __init__(self, name: str, datasets: Sequence[ActionDataset]) -> None:
        """
        Args:
            name: for messages.
            datasets: at least one; all with the same contract.
        """
        if any(dataset.contract != datasets[0].contract for dataset in datasets):
            raise ValueError(f"{name}: the datasets have different contracts")
        self.name, self.family = name, datasets[0].family
        self.contract: DataContract = datasets[0].contract
        self.lengths = np.concatenate([np.asarray(dataset.lengths) for dataset in datasets])
        self._datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset.lengths) for dataset in datasets])

    def rows(self, episode: int) -> EpisodeRows:
        """The numbers of one episode."""
        which = int(np.searchsorted(self._ends, episode, side="right"))
        return self._datasets[which].rows(episode - (int(self._ends[which - 1]) if which else 0))

    def content_hash(self) -> str:
        """Of all contents, in order."""
        return hashlib.sha256("".join(dataset.content_hash() for dataset in self._datasets).encode()).hexdigest()
