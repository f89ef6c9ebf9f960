"""The delta rule by matrix products is transformers' own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from qwen_vla_core.model.delta_rule import (
    UnitLowerInverse,
    causal_convolution,
    chunk_gated_delta_rule,
    use_matrix_products,
)


@pytest.mark.parametrize("alike", [False, True])
def test_the_inverse_is_exact_also_where_keys_are_alike(alike: bool) -> None:
    lower = torch.ones(2, 64, 64) if alike else torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    lower = lower.tril(-1).double().requires_grad_()
    inverse = UnitLowerInverse.apply(lower)
    torch.testing.assert_close(inverse @ (lower + torch.eye(64)), torch.eye(64).double().expand(2, -1, -1))
    single = UnitLowerInverse.apply(lower.float())
    assert (single - inverse).norm() / inverse.norm() < 1e-4


def test_the_gradient_of_the_inverse() -> None:
    lower = (torch.rand(1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1)) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: UnitLowerInverse.apply(x.tril(-1)), lower)


@pytest.mark.parametrize("length", [5, 64, 150])
def test_outputs_and_gradients_are_those_of_transformers(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    own = modeling.torch_chunk_gated_delta_rule
    shapes = {"query": (2, length, 2, 8), "key": (2, length, 2, 8), "value": (2, length, 4, 6)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["g"] = -torch.rand(2, length, 4, generator=generator)
    given["beta"] = torch.rand(2, length, 4, generator=generator)
    found = []
    for rule in (own, chunk_gated_delta_rule):
        inputs = {name: value.clone().requires_grad_() for name, value in given.items()}
        out, _ = rule(**inputs, use_qk_l2norm_in_kernel=True)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), {name: value.grad for name, value in inputs.items()}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("length", [2, 9])
def test_the_convolution_is_that_of_transformers(length: int) -> None:
    x, weight, bias = torch.randn(2, 6, length), torch.randn(6, 4), torch.randn(6)
    for given in (None, bias):
        expected = modeling.causal_conv1d_fn(x, weight, given, activation="silu")
        torch.testing.assert_close(causal_convolution(x, weight, given, activation="silu"), expected)


def test_it_is_used_where_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling.torch_chunk_gated_delta_rule
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", own)  # both are put back afterwards
    monkeypatch.setattr(modeling, "causal_conv1d_fn", modeling.causal_conv1d_fn)
    use_matrix_products()
    use_matrix_products()  # again: nothing more
    x = torch.randn(1, 3, 1, 4)
    arguments = {"query": x, "key": x, "value": x, "g": -torch.rand(1, 3, 1), "beta": torch.rand(1, 3, 1)}
    out, state = modeling.torch_chunk_gated_delta_rule(**arguments)
    expected, kept = modeling.torch_chunk_gated_delta_rule(**arguments, output_final_state=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert state is None and kept is not None
