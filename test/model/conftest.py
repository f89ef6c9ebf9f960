"""A tiny policy whose decoder answers something: fresh AdaLN gates are zero and would hide every effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import build_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def aloha() -> Embodiment:
    return load_embodiment(Path(__file__).parents[2] / "embodiments" / "aloha.yaml")


@pytest.fixture(scope="session")
def stats(aloha: Embodiment) -> Stats:
    def spread(names: tuple[str, ...]) -> Quantiles:
        return Quantiles((-1.0,) * len(names), (1.5,) * len(names), tuple(names))

    return Stats(spread(aloha.channels), spread(aloha.state_channels))


@pytest.fixture(scope="session")
def make_policy(aloha: Embodiment, stats: Stats) -> Callable[..., QwenVLA]:
    def make(awake: bool = True, **options: str) -> QwenVLA:
        policy = build_tiny([aloha], {aloha.name: stats}, **options)  # type: ignore[arg-type]
        if awake:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in policy.decoder.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return policy.eval()

    return make


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., QwenVLA]) -> QwenVLA:
    """Shared; tests must not change it."""
    return make_policy()


@pytest.fixture
def observe(aloha: Embodiment) -> Callable[..., Observation]:
    def make(seed: int = 0, instruction: str = "pick up the red cube") -> Observation:
        rng = np.random.default_rng(seed)
        images = {view: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for view in aloha.views}
        return Observation(images, rng.uniform(-1, 1, len(aloha.state_channels)), instruction, stamp_ns=7)

    return make
