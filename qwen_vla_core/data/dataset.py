"""What every action dataset looks like to the loader, the statistics and the doctor, wherever its bytes lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen_vla_core.data.contract import DataContract


@dataclass(frozen=True)
class EpisodeRows:
    """The numbers of one episode, without its pictures; T steps.

    Attributes:
        state: (T, c_s) float32 in channel units.
        action: (T, c) float32 in channel units; ``action[t]`` is what followed the observation at ``t``.
        timestamp: (T,) float64 seconds from the episode's start, as recorded.
        task: (T,) int64, index into the dataset's ``tasks``: an instruction may change inside an episode.
        perturbed: (T,) bool, True where something other than ``action`` was executed (a push in a demonstration):
            what follows is no answer to what was seen before.
        extra: further columns by their feature name, (T, …) arrays or lists of T strings.
    """

    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    task: np.ndarray
    perturbed: np.ndarray
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)

    def chunk(self, t: int, horizon: int, hold_at_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The label of step ``t``: the next ``horizon`` actions, and which of them mean anything.

        Steps beyond the end, after a perturbation, and after the instruction changed are invalid; their values repeat
        the last valid action only so that the numbers stay in range, and the mask keeps them out of every loss.

        Args:
            t: step.
            horizon: H.
            hold_at_end: steps beyond the end mean "hold the last target" and are valid, for recordings that end with
                the robot at rest where it shall stay.

        Returns:
            actions (horizon, c) float32, valid (horizon,) bool. ``valid[0]`` is always True.
        """
        steps = np.arange(t, t + horizon)
        inside = np.minimum(steps, len(self) - 1)
        valid = ((steps < len(self)) | hold_at_end) & (self.task[inside] == self.task[t])
        valid[1:] &= ~np.logical_or.accumulate(self.perturbed[inside[:-1]])
        last = int(np.flatnonzero(np.logical_and.accumulate(valid))[-1])
        valid[last + 1 :] = False
        return self.action[np.minimum(inside, t + last)], valid


class ActionDataset(Protocol):
    """Episodes of one embodiment. Opened cheaply; episodes and frames are read when asked for."""

    name: str
    family: str
    contract: DataContract
    fps: float
    tasks: Sequence[str]
    lengths: np.ndarray  # (episodes,) int64
    views: Sequence[str]  # views that have pictures here; a subset of the contract's

    def rows(self, episode: int) -> EpisodeRows:
        """The numbers of an episode.

        Raises:
            UserError: the file is missing, cut short or of other dimensions; names file and row.
        """
        ...

    def frames(self, episode: int, view: str, steps: Sequence[int]) -> np.ndarray:
        """(len(steps), height, width, 3) uint8 RGB, in the order asked for."""
        ...

    def content_hash(self) -> str:
        """Identifies the dataset's content (files, sizes, times or sums): the key of cached statistics."""
        ...
