"""Qwen3.5's linear layers, a short convolution and the gated delta rule, for training on a GPU: few, large kernels.

transformers' own fallback solves a triangular system per chunk and head, which a GPU does slowly, and the library that
is faster (flash-linear-attention) refuses its backward pass on Hopper GPUs with Triton 3.4 to 3.7.0. Here the rule is
four kernels of our own (``delta_kernels.py``), equal to transformers' function to rounding (tested).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as functional

logger = logging.getLogger(__name__)


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """Depthwise convolution over tokens that looks back only, tap by tap: one kernel where it is compiled.

    Args:
        x: (B, C, L); transformers hands over a view of (B, L, C), and so is the result.
        weight: (C, taps), the last one for the token itself.
        bias: (C,) or None.
        activation: ``silu``, ``swish`` or None.

    Returns:
        (B, C, L).
    """
    length, taps = x.shape[-1], weight.shape[1]
    padded = functional.pad(x.transpose(1, 2), (0, 0, taps - 1, 0))
    total = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        total = total + padded[:, tap : tap + length] * weight[:, tap]
    if bias is not None:
        total = total + bias
    total = functional.silu(total) if activation in ("silu", "swish") else total
    return total.to(x.dtype).transpose(1, 2)


def use_kernels() -> None:
    """Lets transformers' Qwen3.5 train on the functions above; what needs a state keeps its own function."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    try:
        from qwen_vla_core.model.delta_op import fits, gated_delta
    except ImportError:
        logger.warning("Triton is not installed: linear layers train on transformers' own functions, many times slower")
        return
    own = modeling.torch_chunk_gated_delta_rule
    own = getattr(own, "with_state", own)

    def choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        stateless = options.get("initial_state") is None and not options.get("output_final_state")
        if not (stateless and options.get("use_qk_l2norm_in_kernel") and fits(query, key, value)):
            return own(query, key, value, **options)
        return gated_delta(query, key, value, options["g"], options["beta"]), None

    choose.with_state = own  # type: ignore[attr-defined]
    modeling.torch_chunk_gated_delta_rule = choose
    modeling.causal_conv1d_fn = causal_convolution
