"""Flow-SDE: a chunk sampled with ONE random denoising step made stochastic, so that it has a log-probability [P].

Euler integration from noise is deterministic: it has no density that a policy gradient could use. At one step, drawn at
random per chunk, the ordinary differential equation is replaced by the stochastic one with the same marginals,

    σ = a √(t / (1 − t))                      t: flow time before the step, 1 = noise; δ: 1 / steps
    x0 = x − v t,  x1 = x + v (1 − t)         the data and the noise that the velocity v points at
    mean = x0 (1 − (t − δ)) + x1 (t − δ − σ² δ / 2t),   std = σ √δ                                            [X]

At the first step 1 − t is zero; there the next time's is used, which is δ [X]. All other steps stay Euler's. What comes
before the stochastic step is where that decision was taken, what comes after is the world's: the log-probability of a
chunk is the normal density of this one step. It is computed in float32, over executed steps × real channels [P].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy (B, H, K), tau (B, 1)) → (B, H, K)


@dataclass(frozen=True)
class SdeConfig:
    """How chunks are sampled for reinforcement learning.

    Attributes:
        steps: Euler steps, ≥ 1.
        noise_level: a; 0 is the ordinary Euler integration, which has no log-probability. 0.5 [X].
        reduction: ``mean`` averages the log-probability over its elements [X], ``sum`` is the density of the whole
            chunk. With ``mean`` the ratio of new to old probability is the geometric mean per element, so that the
            clip range means the same for a base with 3 channels and for two arms with 14; with ``sum`` and some 70
            elements nearly every ratio leaves 1 ± 0.2 after a few steps.
    """

    steps: int
    noise_level: float = 0.5
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.noise_level < 0.0:
            raise ValueError(f"steps {self.steps} must be at least 1, noise level {self.noise_level} at least 0")


@dataclass(frozen=True)
class Transition:
    """The one stochastic step of each chunk: all that is needed to ask later how likely it was.

    Attributes:
        index: (B,) long, which of the steps; 0 starts at τ = 1.
        before: (B, H, K) float32 noisy chunk that the step started from.
        after: (B, H, K) float32 where it went.
    """

    index: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True)
class Draw:
    """Sampled chunks.

    Attributes:
        chunk: (B, H, K) normalised; padded channels are zero.
        transition: the stochastic step.
        mean: (B, H, K) of its normal density.
        std: (B,) of its normal density.
        log_prob: (B,) float32; zeros without noise.
    """

    chunk: torch.Tensor
    transition: Transition
    mean: torch.Tensor
    std: torch.Tensor
    log_prob: torch.Tensor


def counted_elements(channel_mask_bk: torch.Tensor, horizon: int, executed: int) -> torch.Tensor:
    """(B, H, K) bool: executed steps × real channels. What is never executed cannot have earned a reward."""
    if not 1 <= executed <= horizon:
        raise ValueError(f"{executed} executed steps of {horizon}")
    step_h = torch.arange(horizon, device=channel_mask_bk.device) < executed
    return step_h[None, :, None] & channel_mask_bk[:, None, :]


def sde_step(
    noisy_bhk: torch.Tensor, velocity_bhk: torch.Tensor, index_b: torch.Tensor, config: SdeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H, K) and standard deviation (B,) of the stochastic step, float32.

    Args:
        noisy_bhk: where the step starts.
        velocity_bhk: the field there, ``noise − data``.
        index_b: (B,) long, which step.
        config: number of steps and noise level.
    """
    delta = 1.0 / config.steps
    passed = index_b.float() * delta  # 1 − t
    t = 1.0 - passed
    sigma = config.noise_level * (t / passed.clamp(min=delta)).sqrt()  # the first step borrows the next one's 1 − t
    x, v = noisy_bhk.float(), velocity_bhk.float()
    column = (slice(None), None, None)
    data, noise = x - v * t[column], x + v * passed[column]
    drift = t - delta - sigma.square() * delta / (2.0 * t)
    return data * (1.0 - (t - delta))[column] + noise * drift[column], sigma * math.sqrt(delta)


def normal_log_prob(
    value_bhk: torch.Tensor,
    mean_bhk: torch.Tensor,
    std_b: torch.Tensor,
    counted_bhk: torch.Tensor,
    reduction: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    """(B,) float32 log-density over the counted elements; see ``SdeConfig.reduction``."""
    std = std_b.float()[:, None, None]
    distance = (value_bhk.float() - mean_bhk.float()) / std
    elements = -0.5 * distance.square() - std.log() - 0.5 * math.log(2.0 * math.pi)
    total = torch.where(counted_bhk, elements, 0.0).flatten(1).sum(1)
    return total if reduction == "sum" else total / counted_bhk.flatten(1).sum(1).clamp(min=1)


def sample_chunk(
    velocity: Velocity,
    noise_bhk: torch.Tensor,
    fresh_bhk: torch.Tensor,
    index_b: torch.Tensor,
    counted_bhk: torch.Tensor,
    config: SdeConfig,
) -> Draw:
    """Integrates from noise to a chunk with one stochastic step per row.

    Args:
        velocity: the field; zero in padded channels.
        noise_bhk: (B, H, K) starting noise, zero in padded channels.
        fresh_bhk: (B, H, K) standard normal noise of the stochastic step, zero in padded channels. All real elements
            are disturbed, also of steps that are not executed: the velocity reads the chunk as a whole.
        index_b: (B,) long, which step is stochastic.
        counted_bhk: (B, H, K) bool, see ``counted_elements``.
        config: steps, noise level, reduction.
    """
    current = noise_bhk.float()
    before, after, mean = current, current, current
    std = current.new_zeros(len(current))
    for index in range(config.steps):
        tau = current.new_full((len(current), 1), 1.0 - index / config.steps)
        field = velocity(current, tau)
        following = current - field.float() / config.steps
        chosen_b = index_b == index
        if bool(chosen_b.any()):
            chosen = chosen_b[:, None, None]
            step_mean, step_std = sde_step(current, field, torch.full_like(index_b, index), config)
            disturbed = step_mean + step_std[:, None, None] * fresh_bhk.float()
            before = torch.where(chosen, current, before)
            after = torch.where(chosen, disturbed, after)
            mean, std = torch.where(chosen, step_mean, mean), torch.where(chosen_b, step_std, std)
            following = torch.where(chosen, disturbed, following)
        current = following
    if config.noise_level > 0.0:
        likely = normal_log_prob(after, mean, std, counted_bhk, config.reduction)
    else:
        likely = torch.zeros_like(std)
    return Draw(current, Transition(index_b, before, after), mean, std, likely)


def log_prob(velocity: Velocity, transition: Transition, counted_bhk: torch.Tensor, config: SdeConfig) -> torch.Tensor:
    """(B,) float32 log-probability of stored steps under a field that may have changed since; differentiable.

    One evaluation of the field per chunk, however many steps it was sampled with.
    """
    tau = 1.0 - transition.index.float()[:, None] / config.steps
    mean, std = sde_step(transition.before, velocity(transition.before, tau), transition.index, config)
    return normal_log_prob(transition.after, mean, std, counted_bhk, config.reduction)
