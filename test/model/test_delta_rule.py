"""The kernels of the gated delta rule are transformers' own function, forward and backward.

Without a GPU they run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from qwen_vla_core.model.delta_rule import use_kernels

pytest.importorskip("triton", reason="Triton has no build for this platform")

from qwen_vla_core.model.delta_op import causal_convolution, fits, gated_delta

own, own_convolution = (
    getattr(function, "replaced", function)
    for function in (modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn)
)


def given(length: int, decay: float = 1.0, alike: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of two key heads and four value heads; queries, keys and values are parts of one tensor."""
    generator = torch.Generator().manual_seed(length)
    mixed = torch.randn(2, 1 if alike else length, 2 * 2 * 16 + 4 * 32, generator=generator)
    return {
        "mixed": mixed.expand(2, length, -1).contiguous(),
        "g": -decay * torch.rand(2, length, 4, generator=generator),
        "beta": torch.rand(2, length, 4, generator=generator),
    }


def parts(mixed: torch.Tensor) -> dict[str, torch.Tensor]:
    query, key, value = mixed.split((32, 32, 128), -1)
    return {
        "query": query.unflatten(-1, (2, 16)),
        "key": key.unflatten(-1, (2, 16)),
        "value": value.unflatten(-1, (4, 32)),
    }


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> Any:
    """The recurrence as it is written down, token after token."""
    query, key = (x * ((x * x).sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, key = (x.repeat_interleave(2, 2) for x in (query * 16**-0.5, key))
    state = torch.zeros(2, 4, 16, 32, dtype=value.dtype)
    answers = []
    for token in range(value.shape[1]):
        state = state * g[:, token].exp()[..., None, None]
        told = (state * key[:, token][..., None]).sum(-2)
        correction = (value[:, token] - told) * beta[:, token][..., None]
        state = state + key[:, token][..., None] * correction[..., None, :]
        answers.append((state * query[:, token][..., None]).sum(-2))
    return torch.stack(answers, 1)


def learn(rule: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    out = rule(**parts(inputs["mixed"]), g=inputs["g"], beta=inputs["beta"])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: value.grad for name, value in inputs.items() if value.grad is not None}
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize("length", [5, 64, 150])
def test_outputs_and_gradients_are_those_of_transformers(length: int) -> None:
    inputs = given(length)
    expected = learn(lambda **x: own(**x, use_qk_l2norm_in_kernel=True)[0], inputs)
    found = learn(gated_delta, inputs)
    assert found.keys() == expected.keys() == {"out", "mixed", "g", "beta"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("decay", "alike"), [(0.01, False), (20.0, False), (0.01, True)])
def test_they_hold_where_it_is_hard(decay: float, alike: bool) -> None:
    """States that hardly fade or are gone at once, and tokens that all have one key."""
    inputs = given(70, decay, alike)
    exact = learn(one_by_one, {name: value.double() for name, value in inputs.items()})
    for name, value in learn(gated_delta, inputs).items():
        assert (value - exact[name]).norm() / exact[name].norm() < 5e-5, name


def test_torch_knows_the_operator() -> None:
    inputs = given(9)
    arguments = (*parts(inputs["mixed"]).values(), inputs["g"], inputs["beta"])
    torch.library.opcheck(gated_delta, tuple(x.detach().requires_grad_() for x in arguments))


@pytest.mark.parametrize("length", [2, 40])
def test_the_convolution_is_that_of_transformers(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    whole = torch.randn(2, length, 150, generator=generator)
    found = []
    for ours in (False, True):
        weight = torch.randn(130, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x = whole.clone().requires_grad_()
        part = x[..., 10:140]
        if ours:
            out = causal_convolution(part, weight)
        else:
            out = own_convolution(part.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), x.grad, weight.grad))
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    torch.library.opcheck(causal_convolution, (whole.requires_grad_(), torch.randn(150, 4, requires_grad=True)))


def test_it_is_used_where_it_fits_and_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", own)  # both are put back afterwards
    monkeypatch.setattr(modeling, "causal_conv1d_fn", own_convolution)
    use_kernels()
    use_kernels()  # again: nothing more
    called = []
    monkeypatch.setattr(
        "qwen_vla_core.model.delta_op._Call.scan", lambda *_, **__: called.append(1) or (torch.ones(1),)
    )
    inputs = given(3)
    arguments = {**parts(inputs["mixed"]), "g": inputs["g"], "beta": inputs["beta"], "use_qk_l2norm_in_kernel": True}
    with torch.no_grad():
        _, state = modeling.torch_chunk_gated_delta_rule(**arguments)
        assert called == [1] and state is None
        _, kept = modeling.torch_chunk_gated_delta_rule(**arguments, output_final_state=True)
        modeling.torch_chunk_gated_delta_rule(**{**arguments, "use_qk_l2norm_in_kernel": False})
        narrow = {name: arguments[name][..., :6] for name in ("query", "key", "value")}
        assert not fits(**narrow)
        modeling.torch_chunk_gated_delta_rule(**{**arguments, **narrow})
    assert called == [1] and kept is not None
    x, weight, bias = torch.randn(1, 6, 5), torch.randn(6, 4), torch.randn(6)
    expected = own_convolution(x, weight, bias, activation="silu")
    torch.testing.assert_close(modeling.causal_conv1d_fn(x, weight, bias, activation="silu"), expected)
    expected = own_convolution(x, weight, None, activation="silu")
    torch.testing.assert_close(modeling.causal_conv1d_fn(x, weight, None, activation="silu"), expected)


def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does; this needs no GPU."""
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_delta_kernels.py"))],
        env={**given, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 8
    for kernel in kernels:
        assert kernel["machine_code"] > 0 and kernel["shared"] <= 99 * 1024, kernel  # what consumer GPUs have
        assert kernel["tensor_cores" if "conv" not in kernel["kernel"] else "wide_reads"] > 0, kernel
