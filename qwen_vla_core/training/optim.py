"""What is trained how fast: parameter groups by part, AdamW, and the schedule of the rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.stage_recipe import OptimSpec

PARTS = ("vision", "language", "decoder")


def part_of(name: str) -> str:
    """The part of the policy that a parameter, by its name in ``QwenVLA.named_parameters``, belongs to."""
    if name.startswith("decoder."):
        return "decoder"
    return "vision" if ".visual." in name else "language"


def freeze(policy: QwenVLA, rates: Mapping[str, float]) -> None:
    """Parts without a rate get no gradients; adapters that were added to a part follow it."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(rates[part_of(name)] > 0.0 and parameter.requires_grad)


def parameter_groups(
    named: Iterator[tuple[str, nn.Parameter]], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, object]]:
    """AdamW's groups: per part, matrices with weight decay and the rest without.

    Args:
        named: parameters; frozen ones are left out. Those of a throw-away head may be named ``head.…``: they learn at
            the highest of the rates.
        rates: part → peak learning rate.
        weight_decay: of matrices.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``part`` and ``peak``.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            part = "head" if name.startswith("head.") else part_of(name)
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    rates = {**rates, "head": max(rates.values())}
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "peak": rates[part],
            "weight_decay": weight_decay if matrix else 0.0,
            "part": part,
        }
        for (part, matrix), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, object]], spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW over the groups."""
    return torch.optim.AdamW(groups, betas=spec.betas, foreach=True)


def scale_at(step: int, steps: int, spec: OptimSpec) -> float:
    """Share of the peak rates at a step: linear warm-up, a plateau, then the fall to the floor."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    if spec.shape == "constant":
        return warm
    begin = steps * (1.0 - spec.fall)
    done = min(max((step - begin) / max(steps - begin, 1e-9), 0.0), 1.0)
    left = 1.0 - done if spec.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return warm * (spec.floor + (1.0 - spec.floor) * left)


def set_rates(optimizer: torch.optim.Optimizer, scale: float) -> dict[str, float]:
    """Applies ``scale_at`` to every group; returns the rate of each part."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
        rates[group["part"]] = group["lr"]
    return rates
