from __future__ import annotations

import pytest
import torch

from qwen_vla_core.model import flow


def test_tau_one_is_noise_and_tau_zero_is_data() -> None:
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2, 3)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2, 3)), noise)


def test_target_is_noise_minus_data_and_the_sampler_walks_it_back() -> None:
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    seen: list[float] = []

    def exact(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        seen.append(float(tau[0, 0]))
        torch.testing.assert_close(noisy, flow.interpolate(data, noise, tau))
        return flow.velocity_target(data, noise)

    torch.testing.assert_close(flow.integrate(exact, noise, 4), data)
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="steps"):
        flow.integrate(lambda noisy, tau: noisy, torch.zeros(1, 1, 1), 0)


@pytest.mark.parametrize(
    ("config", "mean"),
    [
        (flow.FlowConfig(tau="sigmoid_normal"), 0.5),
        (flow.FlowConfig(tau="beta"), 0.999 * 0.6 + 0.001),
        (flow.FlowConfig(tau="beta", toward="data"), 0.999 * 0.4 + 0.001),
    ],
)
def test_tau_samplers_have_the_published_means(config: flow.FlowConfig, mean: float) -> None:
    tau = flow.sample_tau(20_000, config, torch.Generator().manual_seed(0))
    assert abs(float(tau.mean()) - mean) < 0.01
    assert float(tau.min()) > 0.0
    assert float(tau.max()) <= 1.0


@pytest.mark.parametrize("kind", ["sigmoid_normal", "beta"])
def test_a_generator_makes_tau_reproducible(kind: str) -> None:
    config = flow.FlowConfig(tau=kind)  # type: ignore[arg-type]
    first, second = (flow.sample_tau(5, config, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_loss_is_a_mean_over_steps_then_channels() -> None:
    prediction, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    target[0, 0, 0], target[0, 1, 0], target[0, 0, 1], target[0, 1, 2] = 2.0, 100.0, 4.0, float("nan")
    channels, steps = torch.tensor([[True, True, False]]), torch.tensor([[True, False]])
    assert flow.masked_mse(prediction, target, channels, steps).item() == pytest.approx((4.0 + 16.0) / 2)


def test_a_sample_without_valid_steps_does_not_count() -> None:
    prediction, target = torch.zeros(2, 1, 1), torch.full((2, 1, 1), 3.0)
    channels, steps = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[True], [False]])
    assert flow.masked_mse(prediction, target, channels, steps).item() == pytest.approx(9.0)
