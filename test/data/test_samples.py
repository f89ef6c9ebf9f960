"""A mixed batch, sorted for the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.data.samples import ActionSample, TextSample, policy_inputs
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.policy import Stats
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.model.processor import Sample as Conversation


def action(embodiment: str, steps: int, channels: int, frames: int = 1, seed: int = 0) -> ActionSample:
    rng = np.random.default_rng(seed)
    return ActionSample(
        images={"ego": rng.integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)},
        state=rng.normal(size=channels).astype(np.float32),
        instruction=f"task {seed}",
        actions_hc=rng.normal(size=(steps, channels)).astype(np.float32),
        step_mask_h=np.arange(steps) < steps - 1,
        embodiment=embodiment,
        family="manipulation",
        dataset="d",
        episode=1,
        t=2,
        seed=seed,
    )


def test_a_mixed_batch_is_sorted_by_robot_and_keeps_its_places() -> None:
    text = TextSample({}, (("q1", "a1"), ("q2", "a2")), "captions", "d", 0)
    samples = [action("a", 4, 2), text, action("b", 3, 5, seed=1), action("a", 6, 2, frames=3, seed=2)]
    inputs = policy_inputs(samples)
    assert [(robot.embodiment, robot.rows) for robot in inputs.robots] == [("a", (0, 3)), ("b", (2,))]
    assert inputs.text_rows == (1,)
    assert inputs.conversations == (({}, "q1", (("", "a1"), ("q2", "a2"))),)
    first = inputs.robots[0]
    assert first.actions_bhc.shape == (2, 6, 2)
    np.testing.assert_array_equal(first.actions_bhc[0, :4], samples[0].actions_hc)
    assert first.step_mask_bh.tolist() == [[True] * 3 + [False] * 3, [True] * 5 + [False]]
    assert first.observations[0].images["ego"].shape == (8, 8, 3)
    assert first.observations[1].images["ego"].shape == (3, 8, 8, 3)
    assert first.observations[1].instruction == "task 2"


@pytest.mark.parametrize("frames", [1, 2])
def test_the_policy_learns_from_what_comes_out(frames: int) -> None:
    robot = load_embodiment("aloha")
    c = len(robot.channels)
    quantiles = (Quantiles((-1.0,) * c, (1.0,) * c, names) for names in (robot.channels, robot.state_channels))
    policy = build_tiny([robot], {robot.name: Stats(*quantiles)})
    rng = np.random.default_rng(0)
    samples = [action(robot.name, 16, c, seed=seed) for seed in range(2)]
    for sample in samples:
        images = {v: rng.integers(0, 256, (frames, 96, 128, 3), dtype=np.uint8) for v in robot.views}
        object.__setattr__(sample, "images", images)
    inputs = policy_inputs([*samples, TextSample({}, (("How many?", "two"),), "captions", "d", 0)])
    (one,) = inputs.robots
    batch = policy.collate(one.observations, one.embodiment, one.actions_bhc, one.step_mask_bh)
    assert batch["step_mask"].sum() == 2 * 15
    if frames == 2:
        assert len(batch["image_grid_thw"]) == 2 * 2 * len(robot.views)
    losses = policy.loss(batch, generator=torch.Generator().manual_seed(0))
    text = policy.text_loss(policy.processor.collate([Conversation(*one) for one in inputs.conversations]))
    assert torch.isfinite(losses["action"]) and torch.isfinite(text)
