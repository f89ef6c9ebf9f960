"""Qwen3.5's linear layers, a short convolution and the gated delta rule, for training on a GPU: few, large kernels.

transformers' own fallback solves a triangular system per chunk and head, which a GPU does slowly, and the library that
is faster (flash-linear-attention) refuses its backward pass on Hopper GPUs with Triton 3.4 to 3.7.0. Here the systems
are inverted block by block with matrix products, and the gradient of an inverse is two products. Equal to transformers'
function to rounding (tested).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional

_ARGUMENTS = ("query", "key", "value", "g", "beta", "use_qk_l2norm_in_kernel")
CHUNK = 64  # tokens that are one triangular system


class UnitLowerInverse(torch.autograd.Function):
    """Inverse of ``I + N`` with N strictly lower triangular, (…, n, n), n a power of two.

    The inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]], from blocks of one to the whole: as stable as
    substitution, unlike sums of powers of N, which cancel where keys are alike.
    """

    @staticmethod
    def forward(ctx: Any, strictly_lower: torch.Tensor) -> torch.Tensor:
        """Only the part below the diagonal is read."""
        size = strictly_lower.shape[-1]
        inverse = torch.eye(size, dtype=strictly_lower.dtype, device=strictly_lower.device).expand_as(strictly_lower)
        block = 1
        while block < size:
            count = size // (2 * block)
            pairs = inverse.unflatten(-2, (count, 2 * block)).unflatten(-1, (count, 2 * block))
            diagonal = pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (…, count, 2 block, 2 block)
            below = strictly_lower.unflatten(-2, (count, 2 * block)).unflatten(-1, (count, 2 * block))
            below = below.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., block:, :block]
            first, second = diagonal[..., :block, :block], diagonal[..., block:, block:]
            joint = -(second @ below @ first)
            rows = torch.cat(
                (torch.cat((first, torch.zeros_like(joint)), -1), torch.cat((joint, second), -1)), -2
            )  # fmt: skip
            inverse = torch.diag_embed(rows.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-4, -3).flatten(-2, -1)
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """−T ᵀ g Tᵀ, below the diagonal."""
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ gradients[0] @ turned).tril(-1)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule over whole sequences from an empty state; arguments are named as transformers names them.

    Args:
        query: (B, L, key heads, d).
        key: (B, L, key heads, d).
        value: (B, L, heads, e); each key head serves heads / key heads of them.
        g: (B, L, heads) logarithm of the decay, ≤ 0.
        beta: (B, L, heads), how much of a token's correction is written.
        use_qk_l2norm_in_kernel: whether queries and keys are normalised here.

    Returns:
        (B, L, heads, e) in the dtype of ``query``, and None: the last state is not kept.
    """
    dtype, length = query.dtype, query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        shared = value.shape[2] // key.shape[2]
        query, key = (x.float() for x in (query, key))
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        query = query * query.shape[-1] ** -0.5
        query, key = (x.repeat_interleave(shared, 2) if shared > 1 else x for x in (query, key))
        missing = -length % CHUNK
        q, k, v, decay, write = (
            functional.pad(x.float().transpose(1, 2), (0, 0, 0, missing)).unflatten(2, (-1, CHUNK))
            for x in (query, key, value, g[..., None], beta[..., None])
        )
        total = decay.cumsum(3)  # (B, heads, chunks, CHUNK, 1)
        upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
        between = (total - total.transpose(-1, -2)).masked_fill(upper, float("-inf")).exp()
        weighted = k * write
        inverse = UnitLowerInverse.apply(((weighted @ k.transpose(-1, -2)) * between).tril(-1))
        fresh = inverse @ (v * write)
        read = inverse @ (weighted * total.exp())
        inside = (q @ k.transpose(-1, -2)) * between
        asked = q * total.exp()
        last = total[..., -1:, :]
        kept = (k * (last - total).exp()).transpose(-1, -2)
        fall = last.exp()
        state: torch.Tensor | None = None
        outputs = []
        for chunk in range(q.shape[2]):
            written = fresh[:, :, chunk]
            if state is not None:
                written = written - read[:, :, chunk] @ state
            out = inside[:, :, chunk] @ written
            if state is not None:
                out = out + asked[:, :, chunk] @ state
            outputs.append(out)
            update = kept[:, :, chunk] @ written
            state = update if state is None else state * fall[:, :, chunk] + update
        return torch.cat(outputs, 2)[:, :, :length].transpose(1, 2).to(dtype), None


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """Depthwise convolution over tokens that looks back only, tap by tap: one kernel where it is compiled.

    Args:
        x: (B, C, L).
        weight: (C, taps), the last one for the token itself.
        bias: (C,) or None.
        activation: ``silu``, ``swish`` or None.

    Returns:
        (B, C, L).
    """
    length, taps = x.shape[-1], weight.shape[1]
    padded = functional.pad(x, (taps - 1, 0))
    total = padded[..., :length] * weight[:, :1]
    for tap in range(1, taps):
        total = total + padded[..., tap : tap + length] * weight[:, tap : tap + 1]
    if bias is not None:
        total = total + bias[:, None]
    total = functional.silu(total) if activation in ("silu", "swish") else total
    return total.to(x.dtype)


def use_matrix_products(compiled: bool = False) -> None:
    """Lets transformers' Qwen3.5 train with the functions above; what needs a state keeps its own function.

    Args:
        compiled: through torch.compile, which makes few kernels of their many small steps.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    own = modeling.torch_chunk_gated_delta_rule
    own = getattr(own, "with_state", own)
    rule: Any = torch.compile(chunk_gated_delta_rule, dynamic=False) if compiled else chunk_gated_delta_rule

    def choose(*arguments: torch.Tensor, **options: Any) -> Any:
        if options.get("initial_state") is not None or options.get("output_final_state"):
            return own(*arguments, **options)
        return rule(*arguments, **{name: value for name, value in options.items() if name in _ARGUMENTS})

    choose.with_state = own  # type: ignore[attr-defined]
    modeling.torch_chunk_gated_delta_rule = choose
    modeling.causal_conv1d_fn = torch.compile(causal_convolution, dynamic=False) if compiled else causal_convolution
