"""Tiny policies and batches of random pictures, for tests that need real networks and no data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import build_tiny


def tiny_policy(robot: Embodiment, **options: Any) -> QwenVLA:
    """``build_tiny`` with made-up statistics."""

    def spread(names: Any) -> Quantiles:
        return Quantiles((-1.0,) * len(names), (1.5,) * len(names), tuple(names))

    return build_tiny([robot], {robot.name: Stats(spread(robot.channels), spread(robot.state_channels))}, **options)


def awaken(policy: QwenVLA) -> QwenVLA:
    """A fresh decoder answers zero, which would hide every effect: gives all its weights some noise."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def tiny_batch(
    policy: QwenVLA, robot: Embodiment, words: tuple[str, ...] = ("red", "green"), seed: int = 0
) -> dict[str, torch.Tensor]:
    """One observation per word with 16 actions and an answer; of one length if the words are."""
    rng = np.random.default_rng(seed)
    observations = [
        Observation(
            {view: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for view in robot.views},
            rng.uniform(-1, 1, len(robot.state_channels)),
            f"pick up the {word} cube",
            0,
        )
        for word in words
    ]
    actions = rng.uniform(-1, 1, (len(words), 16, len(robot.channels)))
    return policy.collate(observations, robot.name, actions, turns=[(("", "left arm"),)] * len(words))
