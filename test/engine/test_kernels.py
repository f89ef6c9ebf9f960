"""The CUDA kernels against the torch operations, on the CPU in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen_vla_core.engine import ops as torch_ops
from qwen_vla_core.engine.ops import DeltaLayer, TorchOps, Valid

pytest.importorskip("triton", reason="Triton has no build for this platform")

from qwen_vla_core.engine.triton_ops import TritonOps

PLAIN, KERNELS = TorchOps(), TritonOps()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        return
    for left, right in zip(found, expected, strict=True):
        close(left, right)


def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.randn(*shape)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_norms_add_what_came_before(gated: bool, added: bool) -> None:
    x, y = torch.randn(2, 2, 5, 96)
    gate, scale, shift = torch.randn(3, 96)
    given = (y if added else None, gate if gated and added else None, scale, shift)
    close(KERNELS.add_layer_norm(x, *given), PLAIN.add_layer_norm(x, *given))
    close(KERNELS.add_layer_norm(x, given[0]), PLAIN.add_layer_norm(x, given[0]))
    close(KERNELS.add_rms_norm(x, given[0], scale, 1e-6), PLAIN.add_rms_norm(x, given[0], scale, 1e-6))
    close(KERNELS.silu_product(x), PLAIN.silu_product(x))
    weight, bias = torch.randn(40, 96) / 10, torch.randn(40)
    close(KERNELS.linear_gelu(x, weight, bias), PLAIN.linear_gelu(x, weight, bias))


@pytest.mark.parametrize("length", [40, 150])
@pytest.mark.parametrize("alike", [False, True])
def test_the_delta_rule(length: int, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one triangular system, in chunks, and as kernels; also where all tokens have the same key."""
    heads, key_heads, key_width, width = 4, 2, 16, 32
    channels = 2 * key_heads * key_width + heads * width
    layer = DeltaLayer(
        key_heads, heads, key_width, width, torch.randn(channels, 4) / 2, -3 * torch.rand(heads), torch.randn(heads),
        torch.randn(width), 1e-6,
    )  # fmt: skip
    projected = torch.randn(2, 1 if alike else length, channels + heads * width + 2 * heads)
    projected = projected.expand(2, length, -1).contiguous()
    whole = PLAIN.delta_net(projected, layer)
    close(KERNELS.delta_net(projected, layer), whole)
    monkeypatch.setattr(torch_ops, "ONE_CHUNK", 1)
    close(PLAIN.delta_net(projected, layer), whole)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_of_text_and_of_pictures(gated: bool) -> None:
    heads, groups, width = 4, 2, 32
    projected = torch.randn(2, 20, ((2 if gated else 1) * heads + 2 * groups) * width)
    norms = torch.randn(2, width)
    given = (norms, angles(2, 20, 1, 16), heads, groups, 1e-6, gated)
    close(KERNELS.text_attention(projected, *given), PLAIN.text_attention(projected, *given))
    projected, rotary = torch.randn(2, 24, 3 * heads * width), angles(24, 1, width)
    close(KERNELS.image_attention(projected, rotary, heads), PLAIN.image_attention(projected, rotary, heads))


def test_attention_of_the_decoder_leaves_padding_out() -> None:
    heads, width, prompt, horizon = 4, 32, 70, 9
    lengths = torch.tensor([[50, 9], [70, 5]], dtype=torch.int32)
    slots = torch.arange(prompt + 1)
    shown = (slots < lengths[:, :1]) | (slots >= prompt)
    every = torch.cat((shown, torch.arange(horizon) < lengths[:, 1:]), 1)
    valid = Valid(shown[:, None, None], every[:, None, None], lengths, prompt, horizon)
    norms = torch.randn(2, width)
    projected = torch.randn(2, prompt + 1, 3 * heads * width)
    rotary = angles(2, 1, prompt + 1, width)
    query, keys = PLAIN.context_heads(projected, norms, rotary, heads)
    found = KERNELS.context_heads(projected, norms, rotary, heads)
    close(found, (query, keys))
    query, keys = found
    close(KERNELS.context_attention(query, keys, valid), PLAIN.context_attention(query, keys, valid))
    given = (torch.randn(2, horizon, 3 * heads * width), norms, angles(2, 1, horizon, width), heads, keys, valid)
    close(KERNELS.action_attention(*given), PLAIN.action_attention(*given))


def test_products_with_few_rows_and_the_norm_that_sums_their_parts() -> None:
    x, weight = torch.randn(2, 9, 512), torch.randn(192, 512) / 20
    close(KERNELS.few(x, weight), PLAIN.few(x, weight))
    close(KERNELS.few_gated(x, weight), PLAIN.few_gated(x, weight))
    parts, residual = KERNELS.few_summed(x, weight), torch.randn(2, 9, 192)
    assert parts.shape == (4, 2, 9, 192)
    gate, scale, shift = torch.randn(3, 192)
    expected = PLAIN.add_layer_norm(residual, PLAIN.few_summed(x, weight), gate, scale, shift)
    close(KERNELS.add_layer_norm(residual, parts, gate, scale, shift), expected)
    odd = torch.randn(100, 512)  # no plan fits: the library's product
    close(KERNELS.few(x, odd), PLAIN.few(x, odd))
