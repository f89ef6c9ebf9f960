"""The frames of simulated demonstrations with the snapshots of their scenes, numbered through all episodes."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.frame_cache import ByteCache
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demonstration import SCENE
from qwen_vla_core.sim.scenes import Scene, read_scene

_CACHE_BYTES = 64_000_000  # of snapshots that are kept


class StoredScenes:
    """Snapshots of one dataset, read when asked for.

    Attributes:
        data: the demonstrations.
    """

    def __init__(self, data: ActionDataset) -> None:
        """
        Args:
            data: recorded in simulation.

        Raises:
            UserError: it has no scenes, or lacks the pictures of a view.
        """
        check_views(data, data.name)
        check_scenes(data)
        self.data = data
        self._rows: ByteCache[EpisodeRows] = ByteCache(_CACHE_BYTES)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.data.lengths)

    def frame(self, index: int) -> tuple[int, int]:
        """Episode and step of a frame's number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return episode, index - int(self._ends[episode]) + int(self.data.lengths[episode])

    def scene(self, episode: int, t: int) -> Scene:
        """The snapshot of a frame.

        Raises:
            UserError: the file or the snapshot is damaged; names episode and step.
        """
        try:
            return read_scene(self._read(episode).extra[SCENE][t])
        except UserError as error:
            raise UserError(f"{self.data.name}: episode {episode}, step {t}: {error}") from None

    def instruction(self, episode: int, t: int) -> str:
        """What was asked for at a frame."""
        return self.data.tasks[int(self._read(episode).task[t])]

    def _read(self, episode: int) -> EpisodeRows:
        return self._rows.through(episode, lambda: self.data.rows(episode), _text_bytes)


def check_scenes(data: ActionDataset) -> None:
    """Refuses data without snapshots of the scene.

    Raises:
        UserError: says how to record them.
    """
    if len(data.lengths) and SCENE not in data.rows(0).extra:
        raise UserError(
            f"{data.name}: has no feature '{SCENE}', which questions are asked about; record with `qwen-vla sim demos`"
        )


def check_views(data: ActionDataset, name: str) -> None:
    """Refuses data that lack pictures which their contract names.

    Raises:
        UserError: names the view.
    """
    missing = [view for view in data.contract.views if view not in data.views]
    if missing:
        raise UserError(
            f"{name} has no pictures of view '{missing[0]}', which its contract names; record it, or give the dataset "
            "a contract without it"
        )


def _text_bytes(rows: EpisodeRows) -> int:
    """What an episode's snapshots take in memory; the rest hardly counts."""
    return sum(map(len, rows.extra[SCENE]))
