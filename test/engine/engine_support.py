"""Tiny policies of three robots whose decoders answer something, and requests to them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.interfaces import Observation, Request
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import build_tiny

torch.set_num_threads(1)
FOLDER = Path(__file__).parents[2] / "embodiments"
ROBOTS = tuple(load_embodiment(FOLDER / f"{name}.yaml") for name in ("aloha", "widowx", "mobile_base"))


def _spread(names: tuple[str, ...]) -> Quantiles:
    return Quantiles((-1.0,) * len(names), (1.5,) * len(names), tuple(names))


@functools.cache
def make_policy(**options: str) -> QwenVLA:
    """Shared between tests: an engine leaves a policy's answers as they are."""
    stats = {robot.name: Stats(_spread(robot.channels), _spread(robot.state_channels)) for robot in ROBOTS}
    policy = build_tiny(ROBOTS, stats, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def make_request(
    policy: QwenVLA,
    robot: str,
    seed: int = 0,
    instruction: str = "pick up the red cube",
    size: tuple[int, int] = (96, 128),
) -> Request:
    """A request of a robot with random pictures, state and noise."""
    rng, known = np.random.default_rng(seed), policy.embodiment(robot)
    images = {view: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for view in known.views}
    noise = rng.standard_normal((known.control.horizon, policy.config.decoder.channels)).astype(np.float32)
    observation = Observation(images, rng.uniform(-1, 1, len(known.state_channels)), instruction, stamp_ns=7)
    return Request(observation, robot, None, noise)


def eager(policy: QwenVLA, request: Request, steps: int | None = None) -> np.ndarray:
    """The eager path's answer."""
    noise = torch.as_tensor(request.noise_hk)[None]
    return policy.predict(request.observation, request.embodiment, steps, noise).actions_hc
