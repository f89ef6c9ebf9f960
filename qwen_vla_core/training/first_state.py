"""The resumable state of a training run: weights, averaged weights, optimizer moments, step. Safetensors only.

Batches and noise are drawn from generators seeded by (seed, stage, step), so a resumed run sees the samples that the
uninterrupted one would have seen, and no random state has to be stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes


class Average:
    """Exponential moving average of a module's parameters; what is saved and evaluated."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in module.named_parameters()}

    def update(self, module: nn.Module, step: int) -> None:
        """One step; the decay grows with ``step`` so that early weights are forgotten quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(module.named_parameters())
        with torch.no_grad():
            torch._foreach_lerp_(list(self.tensors.values()), [current[name] for name in self.tensors], 1.0 - decay)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Gives the module the averaged weights inside a ``with`` block."""
        trained = {name: value.data for name, value in module.named_parameters()}
        try:
            for name, value in module.named_parameters():
                value.data = self.tensors[name]
            yield
        finally:
            for name, value in module.named_parameters():
                value.data = trained[name]


def save_state(
    path: Path, module: nn.Module, average: Average, optimizer: torch.optim.AdamW, progress: dict[str, int | str]
) -> None:
    """Writes everything a resumed run needs, atomically."""
    names = {id(value): name for name, value in module.named_parameters()}
    tensors = {f"weight.{name}": value.detach() for name, value in module.named_parameters()}
    tensors |= {f"average.{name}": value for name, value in average.tensors.items()}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach()
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    atomic_write_bytes(path, save(tensors, {"progress": json.dumps(progress)}))


def read_progress(path: Path) -> dict[str, int | str] | None:
    """The ``progress`` a state was saved with; None when there is no state yet.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            progress: dict[str, int | str] = json.loads(file.metadata()["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged training state ({error}); delete it to start again") from None
    return progress


def restore_state(path: Path, module: nn.Module, average: Average, optimizer: torch.optim.AdamW) -> None:
    """Restores what ``save_state`` wrote into a freshly built module and optimizer of the same shape.

    Raises:
        UserError: the state belongs to another model.
    """
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        with torch.no_grad():
            for name, value in module.named_parameters():
                stored = f"weight.{name}"
                if stored not in keys or file.get_slice(stored).get_shape() != list(value.shape):
                    raise UserError(
                        f"{path}: holds no weights for {name} of this shape; "
                        "it belongs to another model: use another --out"
                    )
                value.copy_(file.get_tensor(f"weight.{name}"))
                average.tensors[name].copy_(file.get_tensor(f"average.{name}"))
                moments = {key: f"optimizer.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                if moments["step"] in keys:
                    optimizer.state[value] = {key: file.get_tensor(stored) for key, stored in moments.items()}
