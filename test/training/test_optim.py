"""Parameter groups and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.training.optim import build_optimizer, freeze, parameter_groups, part_of, scale_at, set_rates
from qwen_vla_core.training.stage_recipe import OptimSpec, Rates


def spec(**keys: object) -> OptimSpec:
    return OptimSpec(Rates(decoder=1.0), **keys)  # type: ignore[arg-type]


def test_every_parameter_is_in_one_group_at_its_rate(aloha: Embodiment) -> None:
    policy = build_tiny([aloha], model_type="qwen3_vl")
    rates = {"vision": 1e-4, "language": 2e-4, "decoder": 3e-4}
    groups = parameter_groups(policy.named_parameters(), rates, 0.1)
    rate_of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert len(rate_of) == len(list(policy.parameters()))
    for name, parameter in policy.named_parameters():
        assert rate_of[id(parameter)] == (rates[part_of(name)], 0.1 if parameter.ndim > 1 else 0.0)
    assert {
        part_of(name) for name, _ in policy.backbone.visual.named_parameters(prefix="backbone.model.model.visual")
    } == {"vision"}


def test_parts_without_a_rate_are_frozen(aloha: Embodiment) -> None:
    policy = build_tiny([aloha], model_type="qwen3_vl")
    rates = {"vision": 0.0, "language": 0.0, "decoder": 1e-3}
    freeze(policy, rates)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if name.startswith("decoder.")}
    assert all(g["part"] == "decoder" for g in parameter_groups(policy.named_parameters(), rates, 0.0))


@pytest.mark.parametrize(
    ("keys", "at", "value"),
    [
        ({"warmup_steps": 10, "shape": "constant"}, 4, 0.5),
        ({"warmup_steps": 10, "shape": "constant"}, 99, 1.0),
        ({"warmup_steps": 0, "shape": "cosine"}, 50, 0.5),
        ({"warmup_steps": 0, "shape": "linear", "fall": 0.5}, 50, 1.0),
        ({"warmup_steps": 0, "shape": "linear", "fall": 0.5}, 75, 0.5),
        ({"warmup_steps": 0, "shape": "cosine", "floor": 0.2}, 100, 0.2),
    ],
)
def test_schedules(keys: dict[str, object], at: int, value: float) -> None:
    assert scale_at(at, 100, spec(**keys)) == pytest.approx(value)


def test_rates_follow_the_schedule() -> None:
    module = nn.ModuleDict({"decoder": nn.Linear(2, 2)})
    groups = parameter_groups(module.named_parameters(), {"vision": 0.0, "language": 0.0, "decoder": 1e-3}, 0.01)
    optimizer = build_optimizer(groups, spec())
    assert set_rates(optimizer, 0.5) == {"decoder": 5e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)
