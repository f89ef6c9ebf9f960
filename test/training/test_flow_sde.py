"""Sampling with one stochastic denoising step: its formula, its marginals, its density and that density's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from qwen_vla_core.model import flow
from qwen_vla_core.training.flow_sde import (
    SdeConfig,
    Transition,
    counted_elements,
    log_prob,
    normal_log_prob,
    sample_chunk,
    sde_step,
)

torch.set_num_threads(1)
MEAN, SPREAD = 0.3, 0.4  # of the analytic data distribution


def towards_gaussian(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """The exact velocity E[noise − data | noisy] for data N(MEAN, SPREAD²) and noise N(0, 1)."""
    t = tau[..., None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return -MEAN + (t - (1 - t) * SPREAD**2) / variance * (noisy - (1 - t) * MEAN)


def draw(config: SdeConfig, rows: int, index: torch.Tensor | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    noise, fresh = torch.randn(2, rows, 3, 2, generator=generator)
    if index is None:
        index = torch.randint(config.steps, (rows,), generator=generator)
    counted = torch.ones(rows, 3, 2, dtype=torch.bool)
    return sample_chunk(towards_gaussian, noise, fresh, index, counted, config), noise, counted


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_without_noise_it_is_the_ordinary_integration(steps: int) -> None:
    drawn, noise, _ = draw(SdeConfig(steps, noise_level=0.0), 64)
    torch.testing.assert_close(drawn.chunk, flow.integrate(towards_gaussian, noise, steps), rtol=0, atol=1e-5)
    assert (drawn.log_prob == 0).all() and (drawn.std == 0).all()


@pytest.mark.parametrize(
    ("index", "sigma"),
    [
        (0, 0.5 * math.sqrt(1.0 / 0.25)),  # t = 1: the next time's 1 − t = 0.25 in the denominator
        (1, 0.5 * math.sqrt(0.75 / 0.25)),
        (2, 0.5 * math.sqrt(0.5 / 0.5)),
        (3, 0.5 * math.sqrt(0.25 / 0.75)),
    ],
)
def test_the_step_is_the_published_formula(index: int, sigma: float) -> None:
    t, delta, x, v = 1.0 - index / 4, 0.25, 0.7, -0.2
    x0, x1 = x - v * t, x + v * (1 - t)
    expected = x0 * (1 - (t - delta)) + x1 * (t - delta - sigma**2 * delta / (2 * t))
    mean, std = sde_step(torch.full((1, 1, 1), x), torch.full((1, 1, 1), v), torch.tensor([index]), SdeConfig(4, 0.5))
    assert mean.item() == pytest.approx(expected, abs=1e-6)
    assert std.item() == pytest.approx(sigma * math.sqrt(delta), abs=1e-6)


def test_the_stochastic_equation_has_the_marginals_of_the_ordinary_one() -> None:
    """With every step stochastic, noise becomes data at every time; a wrong drift or σ shows at once."""
    steps, config = 100, SdeConfig(100, 0.5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40_000, 1, 1, generator=generator)
    for index in range(steps):
        tau = torch.full((len(x), 1), 1.0 - index / steps)
        mean, std = sde_step(x, towards_gaussian(x, tau), torch.full((len(x),), index), config)
        x = mean + std[:, None, None] * torch.randn(x.shape, generator=generator)
        after = 1.0 - (index + 1) / steps
        if index in (20, 50, 80, 99):
            spread = math.sqrt((1 - after) ** 2 * SPREAD**2 + after**2)
            assert x.mean().item() == pytest.approx((1 - after) * MEAN, abs=0.02)
            assert x.std().item() == pytest.approx(spread, rel=0.03)


def test_one_stochastic_step_leaves_the_distribution_of_chunks_as_it_is() -> None:
    ordinary, *_ = draw(SdeConfig(20, 0.0), 20_000)
    stochastic, *_ = draw(SdeConfig(20, 0.5), 20_000)
    assert (stochastic.chunk - ordinary.chunk).abs().mean() > 0.02  # other chunks …
    assert stochastic.chunk.mean().item() == pytest.approx(ordinary.chunk.mean().item(), abs=0.01)
    assert stochastic.chunk.std().item() == pytest.approx(ordinary.chunk.std().item(), rel=0.03)  # … of the same kind


def test_exactly_one_step_of_each_row_is_stochastic() -> None:
    config = SdeConfig(4, 0.5)
    index = torch.arange(4).repeat(8)
    drawn, noise, _ = draw(config, 32, index)
    for row, k in enumerate(index.tolist()):
        before = noise[row : row + 1]
        for i in range(4):
            if i == k:
                torch.testing.assert_close(drawn.transition.before[row : row + 1], before)
                before = drawn.transition.after[row : row + 1]
            else:
                before = before - towards_gaussian(before, torch.tensor([[1 - i / 4]])) / 4
        torch.testing.assert_close(drawn.chunk[row : row + 1], before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_recomputed_log_probability_is_the_sampled_one_and_that_of_torch(reduction: str) -> None:
    config = SdeConfig(4, 0.5, reduction)  # type: ignore[arg-type]
    drawn, _, counted = draw(config, 50)
    again = log_prob(towards_gaussian, drawn.transition, counted, config)
    torch.testing.assert_close(again, drawn.log_prob, rtol=0, atol=1e-5)
    normal = torch.distributions.Normal(drawn.mean, drawn.std[:, None, None])
    elements = normal.log_prob(drawn.transition.after).flatten(1)
    torch.testing.assert_close(again, elements.sum(1) if reduction == "sum" else elements.mean(1), rtol=0, atol=1e-5)


def test_only_executed_steps_and_real_channels_count() -> None:
    channels = torch.tensor([[True, True, False]])
    counted = counted_elements(channels, 4, 2)
    assert counted.sum() == 4
    config = SdeConfig(4, 0.5)
    before, after = torch.zeros(1, 4, 3), torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))

    def likely(after: torch.Tensor) -> torch.Tensor:
        step = Transition(torch.tensor([2]), before, after)
        return log_prob(lambda x, tau: torch.zeros_like(x), step, counted, config)

    other = after.clone()
    other[:, 2:] = 9.0  # not executed
    other[:, :, 2] = float("nan")  # padding
    torch.testing.assert_close(likely(other), likely(after))
    other[:, 1, 1] += 0.5
    assert not torch.allclose(likely(other), likely(after))
    with pytest.raises(ValueError, match="5 executed steps of 4"):
        counted_elements(channels, 4, 5)


def test_the_log_probability_is_differentiable_and_right() -> None:
    """Against finite differences of the log-probability itself."""
    config = SdeConfig(4, 0.5)
    drawn, _, counted = draw(config, 8)
    shift = torch.zeros(3, 2, requires_grad=True)
    log_prob(lambda x, tau: towards_gaussian(x, tau) + shift, drawn.transition, counted, config).sum().backward()
    assert shift.grad is not None
    for at in ((0, 0), (2, 1)):
        values = []
        for delta in (1e-2, -1e-2):
            moved = torch.zeros(3, 2)
            moved[at] = delta
            field = lambda x, tau, moved=moved: towards_gaussian(x, tau) + moved  # noqa: E731
            values.append(log_prob(field, drawn.transition, counted, config).double().sum().item())
        assert shift.grad[at].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2, abs=1e-2)


def test_half_precision_velocities_are_judged_in_float32() -> None:
    value, mean = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    counted = torch.ones(4, 3, 2, dtype=torch.bool)
    assert normal_log_prob(value, mean, torch.full((4,), 0.1), counted).dtype == torch.float32


def test_an_impossible_configuration_is_refused() -> None:
    for steps, level in ((0, 0.5), (4, -0.1)):
        with pytest.raises(ValueError, match="at least"):
            SdeConfig(steps, level)
