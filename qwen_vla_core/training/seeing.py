"""The vision stage: a random tower learns what lies in the cell of each of its tokens, through a throw-away head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qwen_vla_core.data.scene_cells import SceneCells
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.feed import StepBatch
from qwen_vla_core.training.flops import FlopModel, Work
from qwen_vla_core.training.optim import freeze
from qwen_vla_core.training.parallel import replicated
from qwen_vla_core.training.stage import Stage
from qwen_vla_core.training.vision_probe import VisionProbe, cell_counts, cell_tensors, token_grid


class SeeingTask:
    """Dense questions to the vision tower; satisfies ``engine.Task``. The batch size of the mixture counts frames."""

    def __init__(self, stage: Stage) -> None:
        """Freezes everything but the tower."""
        recipe, ranks = stage.recipe, stage.ranks
        freeze(stage.policy, vars(recipe.optim.rates))
        for name, parameter in stage.policy.backbone.visual.named_parameters():
            if "deepstack" in name:  # these speak to the language model's first layers, which nobody asks here
                parameter.requires_grad_(False)
        self._flops = FlopModel.of(stage.policy)
        spec = recipe.loader
        datasets = list({source.path: source.actions for source in stage.mixture.sources}.values())
        self._cells = SceneCells(
            datasets, stage.mixture.recipe.batch_size, recipe.seed, spec.jitter, spec.size, ranks.rank, ranks.world
        )
        self._grid = token_grid(stage.policy, *self._cells.picture_size())
        self._processor = stage.policy.processor
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            tower = _Tower(stage.policy)
        self.learner: nn.Module = tower.to(ranks.device)
        self.module: nn.Module = replicated(tower) if ranks.world > 1 else tower
        self.weights = {"cells": 1.0, "place": 1.0}

    def steps(self, first: int, count: int) -> Iterator[StepBatch]:
        """Batches of pictures with their cells."""
        for step in range(first, first + count):
            part = cell_tensors(self._processor, self._cells.batch(step, self._grid))
            tokens = part["occupied"].shape[0] * part["occupied"].shape[1]
            yield StepBatch(step, (part,), len(part["occupied"]), tokens)

    def counts(self, part: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Answers in a micro-batch."""
        return cell_counts(part)

    def work(self, part: Mapping[str, torch.Tensor]) -> Work:
        """Pictures alone."""
        frames = tuple(int(height * width) for _, height, width in part["image_grid_thw"].tolist())
        return Work((), frames, answers=0, contexts=(), states=0, horizons=())

    def flops(self, part: Mapping[str, torch.Tensor]) -> float:
        """Model FLOPs of a micro-batch, forward and backward; the head's are left out."""
        return float(self._flops.vision(self.work(part)))


class _Tower(nn.Module):
    """Vision tower and head, under the names that ``optim.part_of`` knows."""

    def __init__(self, policy: QwenVLA) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"visual": policy.backbone.visual})
        self.head = VisionProbe(policy)
        self._policy = (policy,)  # in a tuple: it is no part of this module

    def forward(self, part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.head.sums(self._policy[0], part)
