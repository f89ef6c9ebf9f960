"""Adapters: only they and the decoder train; merged into the weights they compute what they computed beside them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_support import awaken, tiny_batch, tiny_policy
from torch.utils.flop_counter import FlopCounterMode

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import load_checkpoint, save_checkpoint
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.flops import FlopModel, work_of
from qwen_vla_core.training.lora import TARGETS, apply_lora, has_lora, merge_lora, merged

pytest.importorskip("peft")
CLASSES = ["qwen3_vl", "qwen3_5"]


def outputs(policy: QwenVLA, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Losses and a chunk, in one vector."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sums = policy(batch, generator=generator)
        chunk = policy.sample(batch, steps=2, generator=generator)
    return torch.cat([torch.stack(list(sums.values())), chunk.flatten()])


def adapted(robot: Embodiment, model_type: str, steps: int = 2, **options: Any) -> QwenVLA:
    """A policy whose adapters have learnt something."""
    policy = awaken(tiny_policy(robot, model_type=model_type))
    apply_lora(policy, rank=4, alpha=8.0, **options)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        sums = policy(tiny_batch(policy, robot, seed=step), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.stack(list(sums.values())).sum().backward()
        optimizer.step()
    return policy.eval()


@pytest.mark.parametrize("model_type", CLASSES)
def test_only_adapters_and_the_decoder_train(aloha: Embodiment, model_type: str) -> None:
    before = awaken(tiny_policy(aloha, model_type=model_type)).state_dict()
    after = adapted(aloha, model_type).state_dict()
    for name, tensor in before.items():
        now = after.get(name, after.get(f"{name.rpartition('.')[0]}.base_layer.weight"))
        if name.startswith("backbone."):
            assert torch.equal(now, tensor), name
    moved = [name for name in before if name.startswith("decoder.") and not torch.equal(before[name], after[name])]
    assert len(moved) > 20
    new = {name for name in after if ".lora_" in name}
    adapted_layers = {name.split(".lora_")[0].rpartition(".")[2] for name in new}
    assert adapted_layers == set(TARGETS[model_type]) and all("language_model.layers" in name for name in new)
    assert all(after[name].abs().sum() > 0 for name in new)  # B starts at zero: it has learnt


@pytest.mark.parametrize("model_type", CLASSES)
def test_merged_equals_unmerged(aloha: Embodiment, model_type: str) -> None:
    policy = adapted(aloha, model_type)
    batch = tiny_batch(policy, aloha, seed=9)
    beside = outputs(policy, batch)
    with merged(policy):
        inside = outputs(policy, batch)
        names = set(policy.state_dict())
    assert torch.allclose(inside, beside, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(policy, batch), beside)  # unmerged again, to the last bit
    merge_lora(policy)
    plain = tiny_policy(aloha, model_type=model_type)
    assert names == set(policy.state_dict()) == set(plain.state_dict())
    assert torch.equal(outputs(policy, batch), inside)
    assert not has_lora(policy) and all(p.requires_grad for p in policy.parameters())
    assert not torch.allclose(outputs(awaken(plain).eval(), batch), inside, atol=1e-3)


def test_a_checkpoint_saved_in_mid_training_is_an_ordinary_one(aloha: Embodiment, tmp_path: Path) -> None:
    policy = adapted(aloha, "qwen3_vl")
    with merged(policy):
        save_checkpoint(policy, tmp_path / "checkpoint")
    batch = tiny_batch(policy, aloha, seed=9)
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert torch.allclose(outputs(loaded, batch), outputs(policy, batch), rtol=1e-4, atol=1e-5)
    assert has_lora(policy) and not has_lora(loaded)


def test_fresh_adapters_change_nothing_and_are_a_function_of_the_seed(aloha: Embodiment) -> None:
    policies = [tiny_policy(aloha, model_type="qwen3_vl") for _ in range(3)]
    batch = tiny_batch(policies[0], aloha)
    before = outputs(policies[0].eval(), batch)
    state = torch.get_rng_state()
    count = [apply_lora(policy, rank=4, seed=seed) for policy, seed in zip(policies, (1, 1, 2), strict=True)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs(policies[0], batch), before)
    weights = [torch.cat([p.flatten() for n, p in q.named_parameters() if "lora_A" in n]) for q in policies]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert set(count) == {sum(p.numel() for p in policies[0].backbone.parameters() if p.requires_grad)}


def test_adapters_save_the_gradients_of_the_weights_in_the_count_too(aloha: Embodiment) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl")
    full = FlopModel.of(policy)
    apply_lora(policy, rank=4)
    batch = tiny_batch(policy, aloha)
    work = work_of(batch, padded=True)
    ours = FlopModel.of(policy)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.stack(list(policy(batch).values())).sum().backward()
    # The first layer's own inputs need no gradient, which the count does not know.
    assert counter.get_total_flops() <= ours.total(work) <= 1.02 * counter.get_total_flops()
    assert ours.language(work) < 0.8 * full.language(work)


def test_mistakes_are_named(aloha: Embodiment, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl")
    with pytest.raises(UserError, match="no adapters to merge"):
        merge_lora(policy)
    with pytest.raises(UserError, match="no adapters to merge"), merged(policy):
        pass
    for wrong in ({"rank": 0}, {"rank": 4, "alpha": 0.0}, {"rank": 4, "dropout": 1.0}):
        with pytest.raises(UserError, match="lora: rank"):
            apply_lora(policy, **wrong)  # type: ignore[arg-type]
    apply_lora(policy, rank=2)
    with pytest.raises(UserError, match="has adapters already"):
        apply_lora(policy, rank=2)
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'qwen_vla_ros\[train\]'"):
        apply_lora(policy, rank=2)
