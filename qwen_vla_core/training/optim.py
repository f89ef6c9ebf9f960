"""What is trained how fast: parameter groups by part, AdamW or Muon, and the schedule of the rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def parameter_groups(named: Iterator[tuple[str, nn.Parameter]], spec: OptimSpec) -> list[dict[str, Any]]:
    """The optimizer's groups: per part, matrices with weight decay and the rest without.

    Args:
        named: parameters; frozen ones are left out. Those of a throw-away head may be named ``head.…``: they learn at
            the highest of the rates.
        spec: rates of the parts, weight decay of matrices, and whose they are.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``part``, ``peak`` and ``muon``.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            part = "head" if name.startswith("head.") else part_of(name)
            muon = spec.matrices == "muon" and parameter.ndim == 2 and _in_block(name)
            groups.setdefault((part, parameter.ndim > 1, muon), []).append(parameter)
    rates = vars(spec.rates)
    rates = {**rates, "head": max(rates.values())}
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "peak": rates[part],
            "weight_decay": spec.weight_decay if matrix else 0.0,
            "part": part,
            "muon": muon,
        }
        for (part, matrix, muon), parameters in groups.items()
    ]


def _in_block(name: str) -> bool:
    """Whether a matrix lies between inputs and outputs, where Muon is meant to be used: not embeddings or ends."""
    return ".blocks." in name or ".layers." in name or "merger" in name


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups that ask for it, AdamW on the others, as one optimizer.

    Muon (Jordan et al. 2024) makes the update of a matrix orthogonal; its size is matched to that of AdamW's, so that
    both learn at the same rates. Torch's own two optimizers do the work on shared groups and state.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        """
        Args:
            groups: of ``parameter_groups``.
            betas: of AdamW.
        """
        muon = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if muon:
            self._parts.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, betas=betas, foreach=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        assert closure is None, "not supported"
        for part in self._parts:
            part.step()


def build_optimizer(groups: list[dict[str, Any]], spec: OptimSpec) -> torch.optim.Optimizer:
    """AdamW over the groups, or Muon and AdamW where matrices are Muon's."""
    if spec.matrices == "muon":
        return MuonAdamW(groups, spec.betas)
    # Fused keeps no temporary copies: with foreach's a 5 B model would not fit where its moments do.
    cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=spec.betas, foreach=not cuda, fused=cuda)


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
