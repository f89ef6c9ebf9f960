"""Sampling that continues committed actions: pulled towards them, or around them exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.engine.conditioning import normalised_target, predict_continued
from qwen_vla_core.engine.local import LocalEngine
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Committed, Observation, Request
from qwen_vla_core.model import flow
from qwen_vla_core.model.guidance import guidance_weight, integrate_clamped, integrate_guided, soft_mask
from qwen_vla_core.model.policy import QwenVLA, Stats

H, C, K = 16, 14, 64
NOISE = np.random.default_rng(4).standard_normal((H, K)).astype(np.float32)


@pytest.fixture
def ask(policy: QwenVLA, observe: Callable[..., Observation]) -> Callable[..., np.ndarray]:
    """The chunk for one observation and fixed noise, (H, C)."""
    engine = LocalEngine(policy)

    def predict(committed: Committed | None = None, seed: int = 0) -> np.ndarray:
        return engine.predict([Request(observe(seed), "aloha", committed, NOISE)])[0].chunk.actions_hc

    return predict


def test_the_mask_is_one_while_frozen_then_falls_to_zero() -> None:
    weights = soft_mask(horizon=16, frozen=4, overlap=10)
    assert weights[:4].tolist() == [1.0] * 4 and not weights[10:].any()
    falling = weights[3:11]
    assert (falling[:-1] > falling[1:]).all()
    assert weights[4] == pytest.approx(6 / 7 * np.expm1(6 / 7) / np.expm1(1))  # the published formula
    assert soft_mask(16, 0, 0).sum() == 0 and soft_mask(16, 16, 16).sum() == 16
    for frozen, overlap in ((5, 4), (-1, 3), (0, 17)):
        with pytest.raises(ValueError, match="soft mask"):
            soft_mask(16, frozen, overlap)


def test_the_pull_is_the_published_one_and_clipped() -> None:
    t = 0.3  # in the paper's time, which runs from noise to data
    spread = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
    assert guidance_weight(1 - t) == pytest.approx((1 - t) / (t * spread))
    assert guidance_weight(1.0) == guidance_weight(0.0) == guidance_weight(0.999) == 5.0


def test_guidance_on_a_known_flow_reaches_the_target_where_the_mask_is_one() -> None:
    """Data at 2 for every noise: x̂0 = 2 everywhere, its Jacobian is zero, so only the free version can move it."""

    def velocity(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return (noisy - 2.0) / tau[..., None]

    noise = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    target = torch.full((1, 8, 3), -1.0)
    weight = torch.zeros(1, 8, 3)
    weight[:, :4] = 1.0
    pulled = integrate_guided(velocity, noise, 10, target, weight, jacobian=False)
    through = integrate_guided(velocity, noise, 10, target, weight, jacobian=True)
    torch.testing.assert_close(pulled[:, 4:], flow.integrate(velocity, noise, 10)[:, 4:])
    assert (pulled[:, :4] < 0.6).all()  # half the way to the target in the last step alone
    few = integrate_guided(velocity, noise, 4, target, weight, jacobian=False)
    assert ((few[:, :4] > -1.0) & (few[:, :4] < -0.4)).all()  # most of the way, never beyond
    torch.testing.assert_close(through, torch.full_like(through, 2.0))


def test_guidance_through_the_jacobian_is_the_gradient_of_the_weighted_error() -> None:
    """One Euler step of a linear flow x̂0 = A x: the pull is Aᵀ W (Y − A x), by hand."""
    matrix = torch.tensor([[0.5, 0.2], [0.0, 0.8]])

    def velocity(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return (noisy - noisy @ matrix.T) / tau[..., None]

    x, y, w = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.3, 0.4]]]), torch.tensor([[[1.0, 0.5]]])
    clean = x @ matrix.T
    expected = clean + ((w * (y - clean)) @ matrix)  # β is clipped at the number of steps
    torch.testing.assert_close(integrate_guided(velocity, x, 1, y, w, jacobian=True), expected)


@pytest.mark.parametrize(("use", "left"), [("guided", 0.3), ("guided_jacobian", 0.95)])
def test_the_models_chunk_is_pulled_towards_what_is_committed(
    make_policy: Callable[..., QwenVLA], observe: Callable[..., Observation], use: str, left: float
) -> None:
    """A gentle decoder: with a wild one the published pull, which goes through its Jacobian, may lead anywhere."""
    policy = make_policy(awake=False)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    engine = LocalEngine(policy)
    free = engine.predict([Request(observe(), "aloha", None, NOISE)])[0].chunk.actions_hc
    committed = Committed(np.clip(free[:8] + 0.3, -0.9, 1.4), frozen=4, use=use)
    pulled = engine.predict([Request(observe(), "aloha", committed, NOISE)])[0].chunk.actions_hc

    def distance(chunk: np.ndarray, rows: slice) -> float:
        return float(np.abs(chunk[rows] - committed.actions_hc[rows]).mean())

    first, later = slice(0, 4), slice(4, 8)
    assert distance(pulled, first) < left * distance(free, first)
    assert distance(pulled, first) / distance(free, first) < distance(pulled, later) / distance(free, later) < 1


def test_frozen_actions_are_exact_in_a_clamped_chunk_and_the_rest_follows_them(ask: Callable) -> None:
    free = ask()
    committed = Committed(np.clip(free[:6] + 0.2, -0.9, 1.4), frozen=4, use="prefix")
    chunk = ask(committed)
    np.testing.assert_allclose(chunk[:4], committed.actions_hc[:4], atol=1e-5)
    assert np.abs(chunk[4:] - free[4:]).max() > 1e-4  # it saw them
    np.testing.assert_allclose(ask(dataclasses.replace(committed, frozen=0)), free, atol=1e-4)


def test_clamped_tokens_have_flow_time_zero_and_never_move() -> None:
    seen: list[torch.Tensor] = []

    def velocity(noisy: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        seen.append(tau.clone())
        assert torch.equal(noisy[0, :2], target[0, :2])
        return torch.ones_like(noisy)

    target = torch.arange(8.0).reshape(1, 4, 2)
    frozen = torch.tensor([[True, True, False, False]])
    result = integrate_clamped(velocity, torch.zeros(1, 4, 2), 5, target, frozen)
    assert torch.equal(result[0, :2], target[0, :2]) and torch.allclose(result[0, 2:], torch.tensor(-1.0))
    assert all(not tau[0, :2].any() for tau in seen)
    assert [round(float(tau[0, 3]), 2) for tau in seen] == [1.0, 0.8, 0.6, 0.4, 0.2]


def test_the_same_request_gives_the_same_chunk_alone_or_beside_others(
    policy: QwenVLA, observe: Callable[..., Observation], ask: Callable
) -> None:
    committed = Committed(np.zeros((5, C)), frozen=2)
    plan = [None, committed, dataclasses.replace(committed, use="prefix"), dataclasses.replace(committed, frozen=5)]
    requests = [Request(observe(0), "aloha", each, NOISE) for each in plan]
    together = [each.chunk.actions_hc for each in LocalEngine(policy).predict(requests)]
    for each, chunk in zip(plan, together, strict=True):
        np.testing.assert_allclose(chunk, ask(each), atol=1e-5)


def test_the_jacobian_can_be_had_under_an_engine_that_runs_in_inference_mode(
    policy: QwenVLA, observe: Callable[..., Observation], ask: Callable
) -> None:
    committed = Committed(np.zeros((5, C)), frozen=2, use="guided_jacobian")
    with torch.inference_mode():
        (answer,) = predict_continued(policy, [Request(observe(), "aloha", committed, NOISE)])
    np.testing.assert_allclose(answer.chunk.actions_hc, ask(committed), atol=1e-6)
    assert set(answer.seconds) == {"preprocess", "backbone", "denoise"}


def test_a_relative_robots_prefix_is_anchored_to_the_state_of_the_new_observation(
    make_policy: Callable[..., QwenVLA], observe: Callable[..., Observation], aloha: Embodiment, stats: Stats
) -> None:
    policy = make_policy()
    control = dataclasses.replace(aloha.control, convention="relative_joint")
    policy.add_embodiment(robot := dataclasses.replace(aloha, control=control), stats)
    actions_hc = np.random.default_rng(1).uniform(0.0, 0.3, (6, C))
    targets = []
    for seed in (0, 1):
        near = observe(seed)  # relative actions inside the quantiles, beyond which they are clipped
        near = dataclasses.replace(near, state=0.4 * near.state)
        request = Request(near, "aloha", Committed(actions_hc, 3, "prefix"), NOISE)
        target = normalised_target(policy, request, H)
        parts = relative_parts("relative_joint", robot.actions, robot.state)
        relative = to_relative(parts, actions_hc, request.observation.state)
        np.testing.assert_allclose(target[:6, :C], stats.action.normalize(relative))
        assert not target[6:].any() and not target[:, C:].any()
        chunk = LocalEngine(policy).predict([request])[0].chunk.actions_hc
        np.testing.assert_allclose(chunk[:3], actions_hc[:3], atol=1e-5)  # absolute again, wherever the robot is
        targets.append(target)
    assert np.abs(targets[0] - targets[1])[:6, :6].min() > 1e-3


@pytest.mark.parametrize(
    ("actions", "frozen", "told"),
    [
        (np.zeros((H + 1, C)), 0, "must be"),
        (np.zeros((4, C - 1)), 0, "must be"),
        (np.zeros((4, C)), 5, "frozen is 5"),
        (np.full((4, C), np.nan), 2, "finite"),
    ],
)
def test_what_cannot_be_continued_is_named(ask: Callable, actions: np.ndarray, frozen: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        ask(Committed(actions, frozen))
