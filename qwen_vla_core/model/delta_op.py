"""``delta_kernels.py`` as two differentiable operators that torch.compile leaves whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwen_vla_core.model import delta_kernels

CHUNK = 64  # tokens that are one triangular system
TOKENS, CHANNELS = 32, 64  # of a block of the convolution


@dataclass(frozen=True)
class Tuning:
    """How the kernels are cut: value dimensions per block, and warps. Chosen so that no register spills on sm_90."""

    prepare_warps: int = 4
    scan_block: int = 64
    scan_warps: int = 8
    back_block: int = 64
    back_warps: int = 4
    local_block: int = 64
    local_warps: int = 8


tuning = Tuning()


class _Call:
    """One call's inputs, sizes and what all its kernels read."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> None:
        query, key, self.value = (_rows(x) for x in (query, key, value))
        self.g, self.beta = g.contiguous(), beta.contiguous()
        batch, self.length, groups, self.wide = query.shape
        self.width = value.shape[3]
        self.heads = batch * value.shape[2]
        self.chunks = triton.cdiv(self.length, CHUNK)
        self.scale = self.wide**-0.5
        self.sizes: dict[str, Any] = {
            "HK": groups, "HV": value.shape[2], "DK": self.wide, "C": CHUNK,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        rows = (batch * groups, self.chunks, CHUNK)
        self.queries, self.keys = (query.new_empty(*rows, self.wide) for _ in range(2))
        self.query_factors, self.key_factors = (g.new_empty(rows, dtype=torch.float32) for _ in range(2))
        self.inverses, self.scores = (query.new_empty(self.heads, self.chunks, CHUNK, CHUNK) for _ in range(2))
        delta_kernels.prepare[(self.chunks, self.heads)](
            query, key, self.g, self.beta, self.queries, self.keys, self.query_factors, self.key_factors, self.inverses,
            self.scores, self.length, *query.stride()[:2], *key.stride()[:2], self.scale, **self.sizes,
            num_warps=tuning.prepare_warps,
        )  # fmt: skip

    def scan(self, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Answers, or (``keep``) states before chunks and corrections; the others are empty."""
        nothing = self.queries.new_empty(0)
        out = nothing if keep else torch.empty(self.value.shape, dtype=nothing.dtype, device=nothing.device)
        states = self.queries.new_empty(self.heads, self.chunks, self.wide, self.width) if keep else nothing
        written = self.queries.new_empty(self.heads, self.chunks, CHUNK, self.width) if keep else nothing
        block = min(tuning.scan_block, self.width)
        delta_kernels.scan[(self.width // block, self.heads)](
            self.queries, self.keys, self.value, self.g, self.beta, self.inverses, self.scores, out, states, written,
            self.length, *self.value.stride()[:2], **self.sizes, DV=self.width, BV=block, CHUNKS=self.chunks, KEEP=keep,
            num_warps=tuning.scan_warps, num_stages=1,
        )  # fmt: skip
        return out, states, written

    def scan_back(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the states behind chunks, and of what the systems are solved for."""
        grad_states = self.queries.new_empty(self.heads, self.chunks, self.wide, self.width)
        grad_rest = self.queries.new_empty(self.heads, self.chunks, CHUNK, self.width)
        block = min(tuning.back_block, self.width)
        delta_kernels.scan_back[(self.width // block, self.heads)](
            self.queries, self.keys, self.g, self.beta, self.inverses, self.scores, grad, grad_states, grad_rest,
            self.length, **self.sizes, DV=self.width, BV=block, CHUNKS=self.chunks, num_warps=tuning.back_warps,
            num_stages=1,
        )  # fmt: skip
        return grad_states, grad_rest

    def local_back(self, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of queries and keys per value head, of values, g and beta."""
        _, states, written = self.scan(keep=True)
        grad_states, grad_rest = self.scan_back(grad)
        grad_value = torch.empty(self.value.shape, dtype=states.dtype, device=states.device)
        grad_query, grad_key = (states.new_empty(*grad_value.shape[:3], self.wide) for _ in range(2))
        grad_g, grad_beta = (torch.empty_like(self.g, dtype=torch.float32) for _ in range(2))
        delta_kernels.local_back[(self.chunks, self.heads)](
            self.queries, self.keys, self.query_factors, self.key_factors, self.value, self.g, self.beta, states,
            written, grad, grad_states, grad_rest, grad_query, grad_key, grad_value, grad_g, grad_beta, self.length,
            *self.value.stride()[:2], self.scale, **self.sizes, DV=self.width, BV=min(tuning.local_block, self.width),
            num_warps=tuning.local_warps, num_stages=1,
        )  # fmt: skip
        return grad_query, grad_key, grad_value, grad_g, grad_beta


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A view whose heads and features lie side by side; a copy where they do not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels hold these: widths that are powers of two from 16 to 128, and on a GPU half precision."""
    widths = (query.shape[3], value.shape[3])
    powers = all(16 <= width <= 128 and width & (width - 1) == 0 for width in widths)
    half = not query.is_cuda or query.dtype in (torch.bfloat16, torch.float16)
    return powers and half and query.dtype == key.dtype == value.dtype and value.shape[2] % key.shape[2] == 0


@torch.library.custom_op("qwen_vla::gated_delta", mutates_args=())
def gated_delta(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The gated delta rule over whole sequences from an empty state; queries and keys are normalised here.

    Args:
        query: (B, L, key heads, d).
        key: (B, L, key heads, d).
        value: (B, L, heads, e); each key head serves heads / key heads of them.
        g: (B, L, heads) logarithm of the decay, ≤ 0.
        beta: (B, L, heads), how much of a token's correction is written.

    Returns:
        (B, L, heads, e) in the dtype of ``query``.
    """
    return _Call(query, key, value, g, beta).scan(keep=False)[0]


@gated_delta.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return query.new_empty(value.shape)


@torch.library.custom_op("qwen_vla::gated_delta_backward", mutates_args=())
def gated_delta_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``gated_delta``'s five inputs, in their shapes and dtypes."""
    call = _Call(query, key, value, g, beta)
    grad_query, grad_key, grad_value, grad_g, grad_beta = call.local_back(grad.contiguous())
    groups = query.shape[2]
    if groups != value.shape[2]:
        grad_query, grad_key = (x.unflatten(2, (groups, -1)).sum(3) for x in (grad_query, grad_key))
    return grad_query, grad_key, grad_value, grad_g.to(g.dtype), grad_beta.to(beta.dtype)


@gated_delta_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, g, beta = (x.new_empty(x.shape) for x in (query, key, value, g, beta))
    return query, key, value, g, beta


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return gated_delta_backward(grad, *ctx.saved_tensors)


gated_delta.register_autograd(_back, setup_context=_keep)


@torch.library.custom_op("qwen_vla::causal_convolution", mutates_args=())
def causal_convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu of a depthwise convolution over tokens that looks back only.

    Args:
        x: (B, L, C).
        weight: (C, taps), the last one for the token itself.

    Returns:
        (B, L, C) in the dtype of ``x``.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    batch, length, channels = x.shape
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    delta_kernels.convolve[_blocks(x)](
        x, weight.t().contiguous(), out, length, channels, *x.stride()[:2], TAPS=weight.shape[1], T=TOKENS, N=CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return out


@causal_convolution.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("qwen_vla::causal_convolution_backward", mutates_args=())
def causal_convolution_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``causal_convolution``'s two inputs."""
    x = x if x.stride(2) == 1 else x.contiguous()
    batch, length, channels = x.shape
    taps, blocks = weight.t().contiguous(), _blocks(x)
    grad_sum, grad_x = (torch.empty((batch, length, channels), dtype=x.dtype, device=x.device) for _ in range(2))
    parts = torch.empty((blocks[0] * batch, *taps.shape), dtype=torch.float32, device=x.device)
    sizes = {"TAPS": len(taps), "T": TOKENS, "N": CHANNELS, "num_warps": 4}
    delta_kernels.convolve_back[blocks](
        x, taps, grad.contiguous(), grad_sum, parts, length, channels, *x.stride()[:2], **sizes
    )
    delta_kernels.convolve_input[blocks](grad_sum, taps, grad_x, length, channels, **sizes)
    return grad_x, parts.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format)


@causal_convolution_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _blocks(x: torch.Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[1], TOKENS), triton.cdiv(x.shape[2], CHANNELS), x.shape[0]


def _convolve_back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return causal_convolution_backward(grad, *ctx.saved_tensors)


causal_convolution.register_autograd(_convolve_back, setup_context=_keep)
