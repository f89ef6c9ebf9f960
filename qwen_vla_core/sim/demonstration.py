"""One demonstration in memory, and the LeRobot dataset it comes from or goes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.errors import UserError

SCENE = "scene"  # text feature: a snapshot of the scene per step (JSON; ``SceneState.from_dict`` restores one)
EXTRAS = {"perturbed": "bool", SCENE: "string"}


@dataclass(frozen=True)
class Demonstration:
    """One demonstration at the policy's rate; T steps.

    Attributes:
        images: view → (T, height, width, 3) uint8 RGB.
        rows: state, action (the canonical target for one period after each step, as the expert meant it), and where
            something else was executed; ``extra["scene"]`` holds T snapshots as JSON text.
        instruction: what was asked.
        seed: of the world.
        success: whether the world said the task was done.
        info: task, target colour and whatever else the recorder noted (JSON).
    """

    images: Mapping[str, np.ndarray]
    rows: EpisodeRows
    instruction: str
    seed: int
    success: bool
    info: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def scene(self, t: int) -> dict[str, Any]:
        """The snapshot of step ``t``."""
        snapshot: dict[str, Any] = json.loads(self.rows.extra[SCENE][t])
        return snapshot

    @property
    def noted(self) -> dict[str, Any]:
        """What a dataset keeps beside the episode."""
        return {"seed": self.seed, "success": self.success, **self.info}


def read_demonstration(dataset: LeRobotDataset, episode: int) -> Demonstration:
    """One episode of a dataset, all pictures decoded.

    Raises:
        UserError: a file is damaged, or the dataset was not recorded in simulation.
    """
    rows = dataset.rows(episode)
    if SCENE not in rows.extra:
        raise UserError(
            f"{dataset.path}: has no feature '{SCENE}', which grounding questions are asked about; "
            f"record with `qwen-vla sim demos`"
        )
    noted = dict(dataset.infos[episode])
    seed, success = int(noted.pop("seed", episode)), bool(noted.pop("success", True))
    images = {view: dataset.frames(episode, view, range(len(rows))) for view in dataset.views}
    return Demonstration(images, rows, dataset.tasks[int(rows.task[0])], seed, success, noted)
