"""Parameter groups and schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.model.presets import build_tiny
from qwen_vla_core.training.optim import build_optimizer, freeze, parameter_groups, part_of, scale_at, set_rates
from qwen_vla_core.training.stage_recipe import OptimSpec, Rates
from qwen_vla_core.training.state import Average, restore_state, save_state


def spec(**keys: object) -> OptimSpec:
    return OptimSpec(Rates(decoder=1.0), **keys)  # type: ignore[arg-type]


def test_every_parameter_is_in_one_group_at_its_rate(aloha: Embodiment) -> None:
    policy = build_tiny([aloha], model_type="qwen3_vl")
    rates = {"vision": 1e-4, "language": 2e-4, "decoder": 3e-4}
    groups = parameter_groups(policy.named_parameters(), OptimSpec(Rates(**rates), weight_decay=0.1))
    rate_of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
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
    assert all(g["part"] == "decoder" for g in parameter_groups(policy.named_parameters(), OptimSpec(Rates(**rates))))


def test_muon_has_the_matrices_inside_blocks_and_nothing_else(aloha: Embodiment) -> None:
    policy = build_tiny([aloha], model_type="qwen3_vl")
    rates = Rates(vision=1e-3, language=1e-3, decoder=1e-3)
    groups = parameter_groups(policy.named_parameters(), OptimSpec(rates, matrices="muon"))
    muon = {id(p) for g in groups for p in g["params"] if g["muon"]}
    names = {name for name, parameter in policy.named_parameters() if id(parameter) in muon}
    assert all(dict(policy.named_parameters())[name].ndim == 2 for name in names)
    for inside in ("visual.blocks.0.attn.qkv", "language_model.layers.3.mlp.up_proj", "decoder.blocks.1.ffn.down"):
        assert any(name.endswith(f"{inside}.weight") for name in names)
    for outside in ("embed", "patch", "action_in", "action_out", "context_in", "norm", "bias"):
        assert not any(outside in name for name in names)


def test_muon_and_adamw_learn_as_one_optimizer_and_resume(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Average]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"decoder": nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})})
        how = spec(matrices="muon")
        groups = parameter_groups(module.named_parameters(), OptimSpec(Rates(decoder=5e-2), matrices="muon"))
        return module, build_optimizer(groups, how), Average(module, 0.9)

    def learn(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            set_rates(optimizer, 1.0)
            inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = (module["decoder"]["blocks"](inputs) - inputs.roll(1, 1)).square().mean()  # type: ignore[index]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    module, optimizer, average = fresh()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    losses = learn(module, optimizer, 0, 60)
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in module.named_parameters())
    save_state(tmp_path, 60, module, optimizer, average, {})
    on = learn(module, optimizer, 60, 80)
    again, other, other_average = fresh()
    assert restore_state(tmp_path, again, other, other_average, {}) == 60
    assert learn(again, other, 60, 80) == on


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
    groups = parameter_groups(module.named_parameters(), OptimSpec(Rates(decoder=1e-3)))
    optimizer = build_optimizer(groups, spec())
    assert set_rates(optimizer, 0.5) == {"decoder": 5e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)
