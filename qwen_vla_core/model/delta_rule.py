"""Qwen3.5's linear layers, a short convolution and the gated delta rule, for training on a GPU: few, large kernels.

transformers' own fallback solves a triangular system per chunk and head, which a GPU does slowly, and the library that
is faster (flash-linear-attention) refuses its backward pass on Hopper GPUs with Triton 3.4 to 3.7.0. Here the rule is
kernels of our own (``delta_kernels.py``), equal to transformers' function to rounding (tested).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def use_kernels() -> None:
    """Lets transformers' Qwen3.5 train on ``delta_op``; what needs a state or does not fit keeps its own functions."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    try:
        from qwen_vla_core.model.delta_op import causal_convolution, fits, gated_delta
    except ImportError:
        logger.warning("Triton is not installed: linear layers train on transformers' own functions, many times slower")
        return
    own, own_convolution = (
        getattr(function, "replaced", function)
        for function in (modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn)
    )

    def choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        stateless = options.get("initial_state") is None and not options.get("output_final_state")
        if not (stateless and options.get("use_qk_l2norm_in_kernel") and fits(query, key, value)):
            return own(query, key, value, **options)
        return gated_delta(query, key, value, options["g"], options["beta"]), None

    def convolve(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **_: Any
    ) -> torch.Tensor:
        if bias is not None or activation not in ("silu", "swish"):
            return torch.as_tensor(own_convolution(x, weight, bias, activation=activation))
        return causal_convolution(x.transpose(1, 2), weight).transpose(1, 2)

    choose.replaced, convolve.replaced = own, own_convolution  # type: ignore[attr-defined]
    modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn = choose, convolve
