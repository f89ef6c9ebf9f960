"""What a step consists of does not depend on who makes it: ranks, micro-batches, one pass or a pass per robot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_support import mixture, stage_recipe

from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.samples import ActionSample
from qwen_vla_core.model.flow import FlowConfig
from qwen_vla_core.model.policy import QwenVLA, loss_counts
from qwen_vla_core.training import stage
from qwen_vla_core.training.distributed import Ranks
from qwen_vla_core.training.feed import FeedOptions, StepBatch, draw_flow, forward_arguments


def sums(policy: QwenVLA, *batches: StepBatch) -> tuple[dict[str, float], dict[str, int]]:
    total: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        for part in batch.parts:
            inputs, options = forward_arguments(part)
            with torch.no_grad():
                for key, value in policy(inputs, **options).items():
                    total[key] = total.get(key, 0.0) + float(value)
            for key, count in loss_counts(inputs).items():
                counts[key] = counts.get(key, 0) + count
    return total, counts


def test_the_losses_of_a_step_are_the_same_however_it_is_cut(folder: Path, tmp_path: Path) -> None:
    recipe = stage_recipe(tmp_path, mixture(folder, asks=("requests", "where"), batch_size=8))
    with stage.opened(recipe, tmp_path / "run", Ranks(), progress=False) as opened:
        opened.policy.eval()
        expected, counts = sums(opened.policy, next(opened.feed(together=True).steps(3, 1)))
        assert counts["action"] == 6 and counts["text"] > 0
        apart, same = sums(opened.policy, next(opened.feed(together=False).steps(3, 1)))
        assert apart == pytest.approx(expected, rel=1e-4) and same == counts
        cut = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, accumulate=2))
        found, same = sums(opened.policy, next(dataclasses.replace(opened, recipe=cut).feed(True).steps(3, 1)))
        assert found == pytest.approx(expected, rel=1e-4) and same == counts
        ranks = []
        for rank in range(2):
            loader = MixtureLoader(opened.mixture, rank=rank, world=2)
            loader._maker.options = opened.loader._maker.options
            ranks.append(next(dataclasses.replace(opened, loader=loader).feed(True).steps(3, 1)))
        found, same = sums(opened.policy, *ranks)
        assert found == pytest.approx(expected, rel=1e-4) and same == counts


def sample(seed: int, steps: int = 6) -> ActionSample:
    actions = np.zeros((steps, 3), np.float32)
    return ActionSample({}, np.zeros(2), "go", actions, np.ones(steps, bool), "r", "t2a", "d", 0, 0, seed)


def test_noise_belongs_to_the_sample() -> None:
    options = FeedOptions(FlowConfig(), draws=2, prefix=3)
    both = draw_flow([sample(1), sample(2, steps=4)], (6, 8), options)
    alone = draw_flow([sample(2, steps=4)], (4, 8), options)
    torch.testing.assert_close(both["noise"][2:, :4], alone["noise"])
    assert torch.equal(both["noise"][2:, 4:], torch.zeros(2, 2, 8))
    assert torch.equal(both["tau"][2:], alone["tau"]) and torch.equal(both["prefix"][2:], alone["prefix"])
    assert not torch.equal(both["noise"][0], both["noise"][1])


def test_prefixes_are_given_and_leave_something_to_predict() -> None:
    options = FeedOptions(FlowConfig(), draws=200, prefix=5)
    lengths = draw_flow([sample(0, steps=4)], (4, 8), options)["prefix"]
    assert set(lengths.tolist()) == {0, 1, 2, 3}
    assert "prefix" not in draw_flow([sample(0)], (6, 8), FeedOptions(FlowConfig()))
