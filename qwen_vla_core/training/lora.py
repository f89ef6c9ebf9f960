"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the language model, by the library ``peft``.

The adapters are put into the backbone in place, so that the policy stays the policy; the vision tower and the
language model's own weights stand still, the action decoder trains in full. A checkpoint never holds adapters:
``merged`` and ``merge_lora`` add them to the weights, and what is saved is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.policy import QwenVLA

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_ADAPTER = "default"
_COMMON = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# model_type → linear layers that get an adapter: all of the text model [O], as QLoRA found needed (arXiv 2305.14314).
# Left out are Qwen3.5's in_proj_a and in_proj_b, whose few outputs are not wider than an adapter.
TARGETS: dict[str, tuple[str, ...]] = {
    "qwen3_vl": _COMMON,
    "qwen2_5_vl": _COMMON,
    "qwen3_5": (*_COMMON, "in_proj_qkv", "in_proj_z", "out_proj"),
}


def apply_lora(policy: QwenVLA, rank: int, alpha: float = 16.0, dropout: float = 0.0, seed: int = 0) -> int:
    """Puts adapters into the policy's language model and freezes the rest of the backbone.

    Call it on the built (or loaded) policy, before the optimizer, averages or sharding see its parameters. A group's
    rate then applies to what has ``requires_grad``: whoever unfreezes a whole group would train the weights as well.

    Args:
        policy: changed in place; its outputs do not change yet, because one half of each adapter starts at zero.
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on their input; it draws from torch's global generator.
        seed: of their weights.

    Returns:
        How many numbers train in the backbone.

    Raises:
        UserError: a value that makes no sense, adapters are there already, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise UserError("lora: adapters need the package peft: pip install 'qwen_vla_ros[train]'") from None
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UserError(f"lora: rank {rank} must be at least 1, alpha {alpha} above 0, dropout {dropout} in [0, 1)")
    if has_lora(policy):
        raise UserError("lora: this policy has adapters already; merge_lora first")
    names = "|".join(TARGETS[policy.backbone.config.model_type])
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"model\.language_model\.layers\..*\.({names})",
    )
    policy.backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy.backbone.model, adapter_name=_ADAPTER)
    return sum(p.numel() for p in policy.backbone.parameters() if p.requires_grad)


def has_lora(policy: QwenVLA) -> bool:
    """Whether ``apply_lora`` was called and ``merge_lora`` not yet."""
    return hasattr(policy.backbone.model, "peft_config")


def merge_lora(policy: QwenVLA) -> None:
    """Adds the adapters to the weights for good; the policy is then like one that never had any, and trains in full.

    Raises:
        UserError: the policy has no adapters.
    """
    _check(policy)
    with torch.no_grad():
        for parent, name, layer in _layers(policy):
            base: Any = layer.get_base_layer()
            base.weight.add_(layer.get_delta_weight(_ADAPTER).to(base.weight.dtype))
            setattr(parent, name, base)
    del policy.backbone.model.peft_config
    policy.backbone.requires_grad_(True)


@contextmanager
def merged(policy: QwenVLA) -> Iterator[None]:
    """The policy as it would be after ``merge_lora``, inside a ``with`` block: to save a checkpoint in mid-training.

    Afterwards every weight is what it was, to the last bit: weights are kept aside, because subtracting what was added
    would round. Takes memory for a second copy of the adapted weights.

    Raises:
        UserError: the policy has no adapters.
    """
    _check(policy)
    layers = list(_layers(policy))
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for parent, name, layer in layers:
                base: Any = layer.get_base_layer()
                kept.append((base.weight, base.weight.data))
                base.weight.data = base.weight.data + layer.get_delta_weight(_ADAPTER).to(base.weight.dtype)
                setattr(parent, name, base)
        yield
    finally:
        for weight, data in kept:
            weight.data = data
        for parent, name, layer in layers:
            setattr(parent, name, layer)


def _check(policy: QwenVLA) -> None:
    if not has_lora(policy):
        raise UserError("lora: this policy has no adapters to merge; apply_lora first")


def _layers(policy: QwenVLA) -> list[tuple[nn.Module, str, LoraLayer]]:
    """(parent, name in it, layer) of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    model: nn.Module = policy.backbone.model
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], layer) for path, layer in found]
