"""Flow matching with the published sign convention: τ = 1 is noise, τ = 0 is data [P].

``Y_τ = (1 − τ) Y0 + τ Y1`` with Y0 the data and Y1 the noise; the network learns ``Y1 − Y0``; inference integrates from
1 to 0. τ has one value per action token, (B, H), because real-time chunking keeps a prefix at τ = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from qwen_vla_core.errors import UserError


@dataclass(frozen=True)
class FlowConfig:
    """How τ is drawn in training and how many Euler steps inference takes.

    Attributes:
        tau: ``sigmoid_normal`` = sigmoid(N(0, 1)), published for T2A [P]; ``beta`` = 0.999·Beta(alpha, beta) + 0.001
            for CPT and SFT [P], parameters from peers [X].
        alpha: first Beta parameter.
        beta: second Beta parameter.
        toward: which end Beta(1.5, 1) favours; the paper contradicts itself, peers favour ``noise`` [X].
        steps: Euler steps at inference, 10 by default, 4 fast [X].
    """

    tau: Literal["sigmoid_normal", "beta"] = "beta"
    alpha: float = 1.5
    beta: float = 1.0
    toward: Literal["noise", "data"] = "noise"
    steps: int = 10

    def __post_init__(self) -> None:
        if self.tau not in ("sigmoid_normal", "beta"):
            raise UserError(f"flow.tau is {self.tau!r}: use 'sigmoid_normal' or 'beta'")
        if self.toward not in ("noise", "data"):
            raise UserError(f"flow.toward is {self.toward!r}: use 'noise' or 'data'")
        if self.steps < 1:
            raise UserError(f"flow.steps is {self.steps}: use at least 1")


def sample_tau(
    batch: int, config: FlowConfig, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(batch,) float32 flow times in (0, 1]; ``[:, None]`` gives all tokens of a chunk the same one."""
    if config.tau == "sigmoid_normal":
        return torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    shape = torch.tensor([config.alpha, config.beta], device=device).expand(batch, 2).contiguous()
    # Beta(a, b) = Ga/(Ga+Gb); torch.distributions takes no generator, this primitive does.
    gamma = torch._standard_gamma(shape, generator=generator)
    draw = gamma[:, 0] / gamma.sum(-1)
    if config.toward == "data":
        draw = 1.0 - draw
    return 0.999 * draw + 0.001


def interpolate(data_bhk: torch.Tensor, noise_bhk: torch.Tensor, tau_bh: torch.Tensor) -> torch.Tensor:
    """``(1 − τ) data + τ noise``, (B, H, K)."""
    tau = tau_bh[..., None]
    return (1.0 - tau) * data_bhk + tau * noise_bhk


def velocity_target(data_bhk: torch.Tensor, noise_bhk: torch.Tensor) -> torch.Tensor:
    """What the decoder predicts: ``noise − data`` (B, H, K)."""
    return noise_bhk - data_bhk


def sample_mse(
    prediction_bhk: torch.Tensor, target_bhk: torch.Tensor, channel_mask_bk: torch.Tensor, step_mask_bh: torch.Tensor
) -> torch.Tensor:
    """Squared error of each sample, averaged over valid steps per channel, then over valid channels [P].

    Args:
        prediction_bhk: (B, H, K).
        target_bhk: (B, H, K).
        channel_mask_bk: (B, K) bool, True = real channel.
        step_mask_bh: (B, H) bool, True = real step. A sample without a valid step has error zero.

    Returns:
        (B,) float32.
    """
    error = (prediction_bhk.float() - target_bhk.float()).square()
    steps, channels = step_mask_bh.to(error), channel_mask_bk.to(error)
    # where, not only multiplication: a NaN in padding must not survive as NaN·0.
    valid = step_mask_bh[:, :, None] & channel_mask_bk[:, None, :]
    per_channel = torch.where(valid, error, 0.0).sum(1) / steps.sum(1, keepdim=True).clamp(min=1.0)
    return per_channel.sum(1) / channels.sum(1).clamp(min=1.0)


def masked_mse(
    prediction_bhk: torch.Tensor, target_bhk: torch.Tensor, channel_mask_bk: torch.Tensor, step_mask_bh: torch.Tensor
) -> torch.Tensor:
    """Mean of ``sample_mse`` over the samples that have a valid step and a valid channel; scalar, float32."""
    errors = sample_mse(prediction_bhk, target_bhk, channel_mask_bk, step_mask_bh)
    counted = (step_mask_bh.any(1) & channel_mask_bk.any(1)).to(errors)
    return (errors * counted).sum() / counted.sum().clamp(min=1.0)


def integrate(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise_bhk: torch.Tensor, steps: int
) -> torch.Tensor:
    """Euler from τ = 1 (noise) to τ = 0 (data).

    Args:
        velocity: (noisy (B, H, K), tau (B, 1)) → predicted ``noise − data`` (B, H, K).
        noise_bhk: the starting point; explicit, because parity tests and reinforcement learning need it.
        steps: number of equal steps, ≥ 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    current = noise_bhk
    for index in range(steps):
        tau = current.new_full((current.shape[0], 1), 1.0 - index / steps)
        current = current - velocity(current, tau) / steps
    return current
