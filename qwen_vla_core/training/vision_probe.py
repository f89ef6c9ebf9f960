"""A throw-away head that teaches a random vision tower to see.

A published backbone arrives with a pretrained vision tower; a tiny random one does not, and learning to see through
next-token losses alone takes it thousands of steps. Asked densely, which cube lies in the cell of each token and where
in it, it answers almost perfectly after a few hundred. Only the tower is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.sim.grounding import Grid
from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.training.demonstrations import CellBatch

RARITY = 10.0  # a cell is empty about ten times for each time it is not


class VisionProbe(nn.Module):
    """One linear layer on each picture token: per colour, a logit and a place inside the cell."""

    def __init__(self, policy: QwenVLA) -> None:
        super().__init__()
        self.head = nn.Linear(policy.backbone.hidden_size, 3 * len(COLOURS))

    def forward(self, policy: QwenVLA, batch: CellBatch) -> dict[str, torch.Tensor]:
        """Losses ``cells`` (which cube) and ``place`` (where in the cell, squared error in cell sizes)."""
        patches, grid = policy.processor.patchify(torch.from_numpy(batch.images_nhwc))
        grids = torch.tensor([(1, *grid)] * len(batch.images_nhwc))
        tokens = policy.backbone.visual(patches.flatten(0, 1), grids).pooler_output
        occupied, inside = torch.from_numpy(batch.occupied), torch.from_numpy(batch.inside)
        answers = self.head(tokens).float().reshape(*occupied.shape, 3)
        cells = functional.binary_cross_entropy_with_logits(answers[..., 0], occupied, pos_weight=torch.tensor(RARITY))
        distance = (answers[..., 1:] - inside).square().sum(-1)
        return {"cells": cells, "place": (distance * occupied).sum() / occupied.sum().clamp(min=1.0)}


def token_grid(policy: QwenVLA, height: int, width: int) -> Grid:
    """Cells that the picture tokens of a (height, width) picture stand for."""
    image = policy.processor.image
    tall, wide = image.target_size(height, width)
    side = image.patch_size * image.merge_size
    return Grid(tall // side, wide // side)
