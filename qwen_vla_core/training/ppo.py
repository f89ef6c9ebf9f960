"""Proximal policy optimisation with generalised advantages: the arithmetic, without policies or worlds.

One chunk is one step of the decision process: one reward, one value, one log-probability, one advantage [P].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from qwen_vla_core.embodiment.spec import doc

Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class PpoConfig:
    """The published hyper-parameters, and what was not published.

    ``timeouts: bootstrap`` suits tasks without a time limit of their own. Where only success before the limit counts it
    rewards dawdling: a linear value of frozen features cannot see how little time is left, tends to 1 and makes a
    failure worth as much as a success (measured; docs/training.md).
    """

    gamma: float = field(default=0.99, metadata=doc("Discount per chunk [P].", minimum=0.0, maximum=1.0))
    gae_lambda: float = field(default=0.95, metadata=doc("λ of the advantages [P].", minimum=0.0, maximum=1.0))
    clip: float = field(default=0.2, metadata=doc("Clip range of ratios and values [P].", exclusive_minimum=0.0))
    epochs: int = field(default=4, metadata=doc("Passes over the decisions of an iteration [P].", minimum=1))
    value_weight: float = field(default=1.0, metadata=doc("c_v, weight of the value loss [P].", minimum=0.0))
    timeouts: Literal["failure", "bootstrap"] = field(
        default="failure",
        metadata=doc("What the end of the time is: the end, as evaluations count it [O], or the last value [X]."),
    )
    minibatches: int = field(
        default=4, metadata=doc("Optimizer steps per pass; each takes its share of the decisions [O].", minimum=1)
    )
    clip_norm: float = field(default=1.0, metadata=doc("Gradient clipping [X].", exclusive_minimum=0.0))
    value_first: int = field(
        default=0, metadata=doc("First iterations that train the value alone: it knows nothing yet [X].", minimum=0)
    )
    target_kl: float | None = field(
        default=None,
        metadata=doc("Ends an iteration's update early above this divergence; default: never [O].", minimum=0.0),
    )


@dataclass(frozen=True)
class Decisions:
    """What one iteration's update knows of its N decisions; all (N,) float32.

    Attributes:
        log_prob: under the policy that took them.
        value: what was expected then.
        advantage: normalised.
        returns: what the value should have been.
    """

    log_prob: torch.Tensor
    value: torch.Tensor
    advantage: torch.Tensor
    returns: torch.Tensor

    def __len__(self) -> int:
        return len(self.log_prob)


def gae(
    rewards: Sequence[float], values: Sequence[float], last_value: float, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates of one episode.

    Args:
        rewards: of its T decisions.
        values: expected before each of them.
        last_value: what was still to be expected at its end: 0 where it ended, with ``timeouts: bootstrap`` the value
            of the last observation where only the time ran out.
        gamma: discount.
        gae_lambda: λ.

    Returns:
        Advantages and returns (advantage + value), (T,) float32 each.
    """
    advantages = torch.zeros(len(rewards))
    following, running = last_value, 0.0
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * following - values[t] + gamma * gae_lambda * running
        advantages[t] = running
        following = values[t]
    return advantages, advantages + torch.tensor(values, dtype=torch.float32)


def normalise(advantages_n: torch.Tensor, groups: Sequence[str] | None = None) -> torch.Tensor:
    """Zero mean, unit variance over an iteration; all equal (all failed, nothing expected) stays zero.

    Args:
        advantages_n: (N,) of all decisions.
        groups: N names; each group by itself. Robots differ in how often they succeed: against their common mean
            everything that the weaker robot did looks bad, and is unlearnt (measured; docs/training_rl.md) [O].
    """
    names = [""] * len(advantages_n) if groups is None else list(groups)
    result = torch.zeros_like(advantages_n)
    for name in dict.fromkeys(names):
        own = torch.tensor([other == name for other in names], device=advantages_n.device)
        centred = advantages_n[own] - advantages_n[own].mean()
        result[own] = centred / (centred.square().mean().sqrt() + 1e-8)
    return result


def policy_terms(
    log_prob_n: torch.Tensor, old_log_prob_n: torch.Tensor, advantage_n: torch.Tensor, clip: float
) -> torch.Tensor:
    """(N,) clipped surrogate losses, to be averaged."""
    ratio = (log_prob_n - old_log_prob_n).exp()
    return -torch.minimum(ratio * advantage_n, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage_n)


def value_terms(value_n: torch.Tensor, old_value_n: torch.Tensor, returns_n: torch.Tensor, clip: float) -> torch.Tensor:
    """(N,) clipped squared errors: the worse of the value and the value held within ``clip`` of the old one [P]."""
    held = old_value_n + (value_n - old_value_n).clamp(-clip, clip)
    return torch.maximum((value_n - returns_n).square(), (held - returns_n).square())


def divergence_terms(log_prob_n: torch.Tensor, old_log_prob_n: torch.Tensor) -> torch.Tensor:
    """(N,) non-negative estimates ``r − 1 − log r`` of KL(old ‖ new) [X]."""
    difference = log_prob_n - old_log_prob_n
    return difference.exp() - 1.0 - difference


def explained_variance(values_n: torch.Tensor, returns_n: torch.Tensor) -> float:
    """1 − Var(returns − values) / Var(returns); 0 where all returns are equal."""
    spread = returns_n.var(correction=0)
    return float(1.0 - (returns_n - values_n).var(correction=0) / spread) if spread > 1e-12 else 0.0


def optimise(
    evaluate: Evaluate,
    decisions: Decisions,
    optimizer: torch.optim.Optimizer,
    config: PpoConfig,
    generator: torch.Generator,
    split: Callable[[torch.Tensor], list[torch.Tensor]] = lambda indices: [indices],
) -> dict[str, float]:
    """Runs one iteration's epochs.

    Args:
        evaluate: (n,) indices of decisions → log-probabilities and values (n,) under the current weights.
        decisions: of this iteration.
        optimizer: of what is trained. Its groups are clipped one by one: the gradient of the value, large while little
            is known, must not scale down that of the policy.
        config: see there.
        generator: decides the minibatches.
        split: divides a minibatch's indices into parts that are evaluated one after another (memory; several robots).
            Their gradients add up to that of the whole minibatch.

    Returns:
        Averages over all minibatches: ``policy_loss``, ``value_loss``, ``loss``, ``kl``, ``clip_fraction``,
        ``grad_norm``; and ``updates``, the number of optimizer steps.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; the weights have not been touched by it.
    """
    sums: dict[str, float] = {}
    updates = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(decisions), generator=generator)
        for minibatch in order.tensor_split(min(config.minibatches, len(decisions))):
            optimizer.zero_grad(set_to_none=True)
            found = dict.fromkeys(("policy_loss", "value_loss", "kl", "clip_fraction"), 0.0)
            for part in split(minibatch):
                terms = _part(evaluate, decisions, part, config)
                loss = (terms["policy_loss"] + config.value_weight * terms["value_loss"]) / len(minibatch)
                loss.backward()
                for key, value in terms.items():
                    found[key] += float(value.detach()) / len(minibatch)
            found["loss"] = found["policy_loss"] + config.value_weight * found["value_loss"]
            norms = [_clip(group["params"], config.clip_norm) for group in optimizer.param_groups]
            found["grad_norm"] = sum(norm**2 for norm in norms) ** 0.5
            if not torch.isfinite(torch.tensor(list(found.values()))).all():
                raise FloatingPointError("the loss or its gradient is not finite")
            if config.target_kl is not None and found["kl"] > config.target_kl:
                optimizer.zero_grad(set_to_none=True)
                return _averages(sums, found, updates)
            optimizer.step()
            updates += 1
            sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
    return _averages(sums, sums, updates)


def _part(evaluate: Evaluate, decisions: Decisions, part: torch.Tensor, config: PpoConfig) -> dict[str, torch.Tensor]:
    """Sums over a part of a minibatch."""
    log_prob, value = evaluate(part)
    device = log_prob.device
    old, expected = decisions.log_prob[part].to(device), decisions.value[part].to(device)
    advantage, returns = decisions.advantage[part].to(device), decisions.returns[part].to(device)
    outside = ((log_prob - old).exp() - 1.0).abs() > config.clip
    return {
        "policy_loss": policy_terms(log_prob, old, advantage, config.clip).sum(),
        "value_loss": value_terms(value, expected, returns, config.clip).sum(),
        "kl": divergence_terms(log_prob, old).sum(),
        "clip_fraction": outside.float().sum(),
    }


def _clip(parameters: list[nn.Parameter], most: float) -> float:
    return float(nn.utils.clip_grad_norm_(parameters, most))


def _averages(sums: dict[str, float], last: dict[str, float], updates: int) -> dict[str, float]:
    """Means over the updates made; where the very first was refused, what was found there."""
    means = {key: value / updates for key, value in sums.items()} if updates else dict(last)
    return {**means, "updates": float(updates)}
