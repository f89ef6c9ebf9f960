"""Pictures of simulated demonstrations with dense answers: which cells hold what. They teach a vision tower to see.

Batches are a pure function of seed and step, drawn over the datasets of several worlds; pictures are decoded when asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.frame_cache import FrameCache, Size, jitter
from qwen_vla_core.data.stored_scenes import StoredScenes
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.grounding import Grid

_CACHE_BYTES = 128_000_000  # of decoded frames that are kept


@dataclass(frozen=True)
class CellBatch:
    """N pictures with their dense answers, C classes (see ``sim.scenes.CLASSES``).

    Attributes:
        images_nhwc: (N, height, width, 3) uint8.
        occupied: (N, cells, C) float32.
        inside: (N, cells, C, 2) float32.
        applies: (N, C) bool: what can occur in the picture's world; nothing is said about the rest.
    """

    images_nhwc: np.ndarray
    occupied: np.ndarray
    inside: np.ndarray
    applies: np.ndarray


class SceneCells:
    """Draws batches from the demonstrations of several worlds."""

    def __init__(
        self,
        datasets: Sequence[ActionDataset],
        frames: int,
        seed: int = 0,
        strength: float = 1.0,
        size: Size | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            datasets: of demonstrations; a frame comes from each in inverse proportion to its views, so that all give
                about as many pictures. Their pictures must have one size.
            frames: per batch, over all ranks; each comes with all its views.
            seed: of draws and jitter.
            strength: of the photometric jitter; 0 is none.
            size: (width, height) that pictures are brought to; None leaves them as stored.
            rank: of this training process among ``world``; it gets every ``world``-th frame.
            world: number of training processes.

        Raises:
            UserError: no dataset, one without scenes or pictures, or fewer frames than ranks.
        """
        if not datasets:
            raise UserError("vision: no demonstrations to learn from; name some, recorded with `qwen-vla sim demos`")
        if not 0 <= rank < world <= frames:
            raise UserError(f"vision: rank {rank} of {world} with {frames} frames per batch; every rank needs a frame")
        self.scenes = [StoredScenes(data) for data in datasets]
        empty = [scenes.data.name for scenes in self.scenes if not len(scenes)]
        if empty:
            raise UserError(f"vision: {empty[0]} holds no episodes; leave it out")
        self.frames, self.seed, self.strength, self.rank, self.world = frames, seed, strength, rank, world
        self._pictures = FrameCache(_CACHE_BYTES, size)
        self._until = np.cumsum([1 / len(data.contract.views) for data in datasets])

    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures, read from the first frame."""
        height, width = self._picture(0, 0, self.scenes[0].data.views[0], 0).shape[:2]
        return int(height), int(width)

    def draws(self, step: int) -> list[tuple[int, int, int]]:
        """This rank's frames of a batch: dataset, number of the frame in it, seed of its jitter."""
        rng = np.random.default_rng([self.seed, step])
        chosen = np.searchsorted(self._until, rng.random(self.frames) * self._until[-1], side="right")
        uniform, seeds = rng.random(self.frames), rng.integers(2**63, size=self.frames)
        every = [
            (int(number), min(int(u * len(self.scenes[number])), len(self.scenes[number]) - 1), int(seed))
            for number, u, seed in zip(chosen, uniform, seeds, strict=True)
        ]
        return every[self.rank :: self.world]

    def batch(self, step: int, grid: Grid) -> CellBatch:
        """Every view of this rank's frames, and which cells of them hold what.

        Args:
            step: of training.
            grid: the cells, one for each token of a picture.

        Raises:
            UserError: damaged data, or pictures of several sizes.
        """
        pictures: list[np.ndarray] = []
        occupied, inside, applies = [], [], []
        for number, index, seed in self.draws(step):
            scenes, rng = self.scenes[number], np.random.default_rng(seed)
            episode, t = scenes.frame(index)
            scene = scenes.scene(episode, t)
            for view in scenes.data.contract.views:
                picture = self._picture(number, episode, view, t)
                if pictures and picture.shape != pictures[0].shape:
                    height, width = picture.shape[:2]
                    raise UserError(
                        f"vision: {scenes.data.name} has pictures of {width}×{height}, others of "
                        f"{pictures[0].shape[1]}×{pictures[0].shape[0]}; give one size (`loader.size`)"
                    )
                pictures.append(jitter(picture[None], rng, self.strength)[0] if self.strength else picture)
                there, where = scene.cells(view, grid)
                occupied.append(there)
                inside.append(where)
                applies.append(scene.applies)
        return CellBatch(np.stack(pictures), np.stack(occupied), np.stack(inside), np.stack(applies))

    def _picture(self, number: int, episode: int, view: str, t: int) -> np.ndarray:
        return self._pictures.frames(number, self.scenes[number].data, episode, view, [t])[0]
