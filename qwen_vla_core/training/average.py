"""The moving average of a policy's weights: what is exported and evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qwen_vla_core.training.distributed import local


class Average:
    """Exponential moving average of a module's trained parameters; under FSDP2 every rank keeps its own slices.

    Build it after ``parallelise``. Frozen parameters are their own average and cost nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """
        Args:
            module: what is trained.
            decay: of the average once it has warmed up.
        """
        self.decay = decay
        self.tensors = {
            name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """One step; the decay grows with ``step`` so that early weights are forgotten quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(module.named_parameters())
        averaged = [local(value) for value in self.tensors.values()]
        torch._foreach_lerp_(averaged, [local(current[name]).detach() for name in self.tensors], 1.0 - decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Gives the module the averaged weights inside a ``with`` block; no second copy is made."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        current = dict(module.named_parameters())
        for name, value in self.tensors.items():
            averaged, trained = local(value), local(current[name])
            kept = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(kept)
        # Gathered copies of the other weights must not outlive the swap.
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
