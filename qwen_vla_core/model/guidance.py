"""Sampling a chunk that continues actions which are already committed: real-time chunking, two ways.

* **Guided** (Black et al. 2025, arXiv 2506.07339): at every Euler step the estimate of the final chunk is pulled
  towards the committed actions, strongly where they will be executed anyway and less the further they reach. Works with
  any flow-matching policy. As published the pull goes back through the decoder's Jacobian (ΠGDM, Pokle et al. 2023);
  without it, the pull acts on the estimate directly, at the cost of an ordinary step.
* **Clamped** (arXiv 2512.05964): the frozen actions are given as they are, with flow time 0, and the rest is denoised
  around them; for a decoder that was trained that way (``loss.prefix``).

Flow times follow the house's convention: τ = 1 is noise, τ = 0 is data, so t in those papers is 1 − τ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MAX_GUIDANCE = 5.0  # β: where the pull is clipped, as published (with five Euler steps)


def soft_mask(horizon: int, frozen: int, overlap: int) -> torch.Tensor:
    """(H,) weights of the committed actions: 1 while frozen, then decaying exponentially, 0 from the overlap's end on.

    Args:
        horizon: H.
        frozen: actions that will be executed before the chunk arrives; at most ``overlap``.
        overlap: actions that are committed.

    Raises:
        ValueError: not 0 <= frozen <= overlap <= H.
    """
    if not 0 <= frozen <= overlap <= horizon:
        raise ValueError(f"soft mask needs 0 <= frozen {frozen} <= overlap {overlap} <= horizon {horizon}")
    weights = torch.zeros(horizon)
    weights[:frozen] = 1.0
    for index in range(frozen, overlap):
        left = (overlap - index) / (overlap - frozen + 1)
        weights[index] = left * math.expm1(left) / math.expm1(1.0)
    return weights


def guidance_weight(tau: float, most: float = MAX_GUIDANCE) -> float:
    """Strength of the pull at a flow time: ``min(β, τ / ((1 − τ) r²))`` with ``r² = τ² / (τ² + (1 − τ)²)``."""
    if tau <= 0.0 or tau >= 1.0:
        return most
    spread = tau * tau / (tau * tau + (1.0 - tau) ** 2)
    return min(most, tau / ((1.0 - tau) * spread))


def integrate_guided(
    velocity: Velocity,
    noise_bhk: torch.Tensor,
    steps: int,
    target_bhk: torch.Tensor,
    weight_bhk: torch.Tensor,
    *,
    jacobian: bool,
    most: float = MAX_GUIDANCE,
) -> torch.Tensor:
    """``flow.integrate`` with every step pulled towards a target.

    Args:
        velocity: (noisy (B, H, K), tau (B, 1)) → predicted ``noise − data`` (B, H, K).
        noise_bhk: the starting point.
        steps: Euler steps, ≥ 1.
        target_bhk: (B, H, K) normalised committed actions, finite everywhere.
        weight_bhk: (B, H, K) weights, 0 where nothing is committed and in padded channels.
        jacobian: pull through the decoder (a backward pass per step) instead of on the estimate itself.
        most: β, the largest strength of the pull; with fewer steps than that it is clipped at their number, because one
            step would otherwise carry the estimate beyond the target.

    Returns:
        (B, H, K); where every weight of a row is zero, as ``flow.integrate`` gives it.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    current, most = noise_bhk, min(most, float(steps))
    for index in range(steps):
        tau = 1.0 - index / steps
        times = current.new_full((current.shape[0], 1), tau)
        with torch.enable_grad() if jacobian else torch.no_grad():
            here = current.detach().requires_grad_(jacobian)
            flow = velocity(here, times)
            clean = here - tau * flow
            error = (weight_bhk * (target_bhk - clean)).detach()
            pull = torch.autograd.grad(clean, here, error)[0] if jacobian else error
        current = current - flow.detach() / steps + guidance_weight(tau, most) / steps * pull
    return current.detach()


def integrate_clamped(
    velocity: Velocity, noise_bhk: torch.Tensor, steps: int, target_bhk: torch.Tensor, frozen_bh: torch.Tensor
) -> torch.Tensor:
    """``flow.integrate`` around actions that are given.

    Args:
        velocity: (noisy (B, H, K), tau (B, H)) → predicted ``noise − data`` (B, H, K).
        noise_bhk: the starting point.
        steps: Euler steps, ≥ 1.
        target_bhk: (B, H, K) normalised committed actions.
        frozen_bh: (B, H) bool, True = given: flow time 0, exactly the target in the result.

    Returns:
        (B, H, K).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    given = frozen_bh[..., None]
    current = torch.where(given, target_bhk, noise_bhk)
    for index in range(steps):
        times = torch.where(frozen_bh, 0.0, 1.0 - index / steps).to(current)
        current = torch.where(given, target_bhk, current - velocity(current, times) / steps)
    return current
