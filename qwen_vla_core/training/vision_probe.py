"""A throw-away head that teaches a random vision tower to see.

A published backbone arrives with a pretrained vision tower; a tiny random one does not, and learning to see through
next-token losses alone takes it thousands of steps. Asked densely, what lies in the cell of each token and where in it,
it answers almost perfectly after a few hundred. Only the tower is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as functional
from torch import nn

from qwen_vla_core.data.scene_cells import CellBatch
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.processor import Processor
from qwen_vla_core.sim.grounding import Grid
from qwen_vla_core.sim.scenes import CLASSES

RARITY = 10.0  # how much more a cell that holds something counts: most hold nothing


class VisionProbe(nn.Module):
    """One linear layer on each picture token: per class of any world, a logit and a place inside the cell."""

    def __init__(self, policy: QwenVLA) -> None:
        super().__init__()
        self.head = nn.Linear(policy.backbone.hidden_size, 3 * len(CLASSES))

    def forward(self, policy: QwenVLA, batch: CellBatch) -> dict[str, torch.Tensor]:
        """Mean losses ``cells`` (what is there) and ``place`` (where in the cell, squared error in cell sizes)."""
        part = cell_tensors(policy.processor, batch)
        sums, counts = self.sums(policy, part), cell_counts(part)
        return {name: value / max(counts[name], 1) for name, value in sums.items()}

    def sums(self, policy: QwenVLA, part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same losses as sums, to be divided by ``cell_counts`` of all ranks and micro-batches together.

        Args:
            policy: whose tower learns.
            part: from ``cell_tensors``, pictures and answers on the tower's device.
        """
        pixels = part["pixel_values"]
        tokens = policy.backbone.visual(pixels, part["image_grid_thw"].to(pixels.device)).pooler_output
        occupied = part["occupied"]
        answers = self.head(tokens).float().reshape(*occupied.shape, 3)
        rare = torch.tensor(RARITY, device=occupied.device)
        errors = functional.binary_cross_entropy_with_logits(
            answers[..., 0], occupied, pos_weight=rare, reduction="none"
        )
        distance = (answers[..., 1:] - part["inside"]).square().sum(-1)
        return {"cells": (errors * part["applies"][:, None]).sum(), "place": (distance * occupied).sum()}


def cell_tensors(processor: Processor, batch: CellBatch) -> dict[str, torch.Tensor]:
    """A batch as the probe takes it: patches, their grid, and the answers."""
    patches, grid = processor.patchify(torch.from_numpy(batch.images_nhwc))
    return {
        "pixel_values": patches.flatten(0, 1),
        "image_grid_thw": torch.tensor([(1, *grid)] * len(batch.images_nhwc)),
        "occupied": torch.from_numpy(batch.occupied),
        "inside": torch.from_numpy(batch.inside),
        "applies": torch.from_numpy(batch.applies),
    }


def cell_counts(part: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How many answers each of the losses sums up: cells × classes that apply, and things that are there."""
    cells = part["occupied"].shape[1]
    return {"cells": cells * int(part["applies"].sum()), "place": int(part["occupied"].sum())}


def token_grid(policy: QwenVLA, height: int, width: int) -> Grid:
    """Cells that the picture tokens of a (height, width) picture stand for."""
    image = policy.processor.image
    tall, wide = image.target_size(height, width)
    side = image.patch_size * image.merge_size
    return Grid(tall // side, wide // side)
