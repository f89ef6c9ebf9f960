"""Advantages and losses against numbers worked out by hand, and the update's bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch

from qwen_vla_core.training.ppo import (
    Decisions,
    PpoConfig,
    divergence_terms,
    explained_variance,
    gae,
    normalise,
    optimise,
    policy_terms,
    value_terms,
)

torch.set_num_threads(1)


def test_published_defaults() -> None:
    config = PpoConfig()
    assert (config.gamma, config.gae_lambda, config.clip, config.epochs, config.value_weight) == (0.99, 0.95, 0.2, 4, 1)


def test_advantages_of_a_successful_episode_by_hand() -> None:
    advantages, returns = gae([0.0, 1.0], [0.5, 0.8], 0.0, gamma=0.9, gae_lambda=0.5)
    last = 1.0 + 0.0 - 0.8  # the end is worth nothing beyond its reward
    first = 0.0 + 0.9 * 0.8 - 0.5 + 0.9 * 0.5 * last
    torch.testing.assert_close(advantages, torch.tensor([first, last]))
    torch.testing.assert_close(returns, torch.tensor([first + 0.5, last + 0.8]))


def test_a_time_out_goes_on_in_its_last_value_and_a_failure_does_not() -> None:
    timed_out, _ = gae([0.0, 0.0], [0.5, 0.8], 0.7, gamma=0.9, gae_lambda=0.5)
    failed, _ = gae([0.0, 0.0], [0.5, 0.8], 0.0, gamma=0.9, gae_lambda=0.5)
    last = 0.9 * 0.7 - 0.8
    torch.testing.assert_close(timed_out, torch.tensor([0.9 * 0.8 - 0.5 + 0.45 * last, last]))
    torch.testing.assert_close(failed, torch.tensor([0.9 * 0.8 - 0.5 + 0.45 * -0.8, -0.8]))


def test_with_lambda_one_returns_are_discounted_rewards_whatever_was_expected() -> None:
    _, returns = gae([0.0, 0.0, 1.0], [0.3, -2.0, 5.0], 0.0, gamma=0.9, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([0.81, 0.9, 1.0]))


def test_normalised_advantages_have_unit_variance_and_equal_ones_say_nothing() -> None:
    scaled = normalise(torch.tensor([1.0, 2.0, 6.0]))
    assert scaled.mean().abs() < 1e-6 and scaled.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert (normalise(torch.zeros(4)) == 0).all()


def test_each_robot_is_compared_with_itself_alone() -> None:
    advantages = torch.tensor([0.0, 1.0, 10.0, 11.0])
    scaled = normalise(advantages, ["weak", "weak", "strong", "strong"])
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-5, rtol=0)
    assert (normalise(advantages)[:2] < 0).all()  # together, all that the weak one did would be unlearnt


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.5, 1.0, -1.2), (1.1, 1.0, -1.1), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5)],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float) -> None:
    log_prob = torch.tensor([math.log(ratio)])
    found = policy_terms(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(0.9, 0.5, 1.0, 0.09), (0.6, 0.5, 1.0, 0.16), (1.2, 0.5, 0.0, 1.44), (0.1, 0.5, 0.0, 0.09)],
)
def test_the_clipped_value_loss_by_hand(value: float, old: float, target: float, loss: float) -> None:
    found = value_terms(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_divergence_is_zero_for_the_same_policy_and_positive_otherwise() -> None:
    log_prob = torch.tensor([-1.0, 0.5, 2.0])
    assert (divergence_terms(log_prob, log_prob) == 0).all()
    assert (divergence_terms(log_prob + torch.tensor([0.1, -0.3, 0.5]), log_prob) > 0).all()


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.ones(3), returns) == pytest.approx(0.0)
    assert explained_variance(torch.ones(3), torch.ones(3)) == 0.0


class Bandit:
    """N decisions of a policy with one number: log-probability weight·x, value weight·y."""

    def __init__(self, n: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(2, n, generator=generator)
        self.actor = torch.nn.Parameter(torch.zeros(()))
        self.critic = torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.actor, self.critic], lr=0.05)
        zeros = torch.zeros(n)
        advantage = torch.randn(n, generator=generator)
        self.decisions = Decisions(zeros, zeros, advantage, 0.1 * self.y)

    def evaluate(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor * self.x[indices], self.critic * self.y[indices]

    def run(self, **options) -> dict[str, float]:
        split = options.pop("split", lambda indices: [indices])
        config = PpoConfig(**options)
        generator = torch.Generator().manual_seed(1)
        return optimise(self.evaluate, self.decisions, self.optimizer, config, generator, split)


def test_the_update_goes_where_advantages_point_and_values_go_to_returns() -> None:
    bandit = Bandit()
    found = bandit.run(epochs=30, clip=10.0)
    assert math.copysign(1, bandit.actor.item()) == math.copysign(1, (bandit.decisions.advantage * bandit.x).sum())
    assert bandit.critic.item() == pytest.approx(0.1, abs=0.01)
    assert found["updates"] == 120 and found["loss"] == pytest.approx(found["policy_loss"] + found["value_loss"])


def test_a_minibatch_in_parts_gives_the_gradient_of_the_whole() -> None:
    whole, parts = Bandit(), Bandit()
    whole.run(epochs=2, minibatches=2)
    parts.run(epochs=2, minibatches=2, split=lambda indices: list(indices.split(4)))
    assert parts.actor.item() == pytest.approx(whole.actor.item(), abs=1e-6)
    assert parts.critic.item() == pytest.approx(whole.critic.item(), abs=1e-6)


def test_at_the_first_update_nothing_has_changed_yet() -> None:
    found = Bandit().run(epochs=1, minibatches=1)
    assert found["kl"] == 0.0 and found["clip_fraction"] == 0.0


def test_too_far_from_the_policy_that_acted_ends_the_update() -> None:
    free, held = Bandit(), Bandit()
    assert free.run(epochs=20, clip=10.0)["updates"] == 80
    stopped = held.run(epochs=20, clip=10.0, target_kl=1e-4)
    assert 0 < stopped["updates"] < 80 and abs(held.actor.item()) < abs(free.actor.item())


def test_ratios_beyond_the_clip_range_are_counted_and_pull_no_further() -> None:
    bandit = Bandit()
    found = bandit.run(epochs=200)
    assert 0 < found["clip_fraction"] <= 1
    before = bandit.actor.item()
    bandit.run(epochs=50)
    assert abs(bandit.actor.item() - before) < 0.2


def test_a_loss_that_is_not_finite_touches_nothing() -> None:
    bandit = Bandit()
    bandit.x[:] = float("nan")
    with pytest.raises(FloatingPointError):
        bandit.run()
    assert bandit.actor.item() == 0.0
