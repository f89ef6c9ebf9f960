"""The estimate of memory against what steps of a tiny model really took, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_support import tiny_batch, tiny_policy

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.presets import preset_network
from qwen_vla_core.training.flops import Work, work_of
from qwen_vla_core.training.lora import apply_lora
from qwen_vla_core.training.memory import estimate_memory, kept_bytes
from qwen_vla_core.training.parallel import checkpoint_activations
from qwen_vla_core.training.stage_recipe import ALL_TWICE, NOTHING_TWICE, Recompute

# Two steps with everything that the engine keeps. A first, smaller policy makes the libraries load what they need.
PROGRAM = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from tiny_support import tiny_batch, tiny_policy
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.model.attention import use_float32_attention
from qwen_vla_core.training.flops import work_of
from qwen_vla_core.training.memory import estimate_memory
from qwen_vla_core.training.parallel import checkpoint_activations
from qwen_vla_core.training.stage_recipe import ALL_TWICE, NOTHING_TWICE, Recompute

recompute, count = sys.argv[1] == "recompute", int(sys.argv[2])
robot = load_embodiment("aloha")

def build():
    policy = tiny_policy(robot, model_type="qwen3_vl").train()
    use_float32_attention(policy.backbone.model)
    return policy

def train(policy, batch, steps):
    if recompute:
        checkpoint_activations(policy)
    average = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, foreach=True)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(policy(batch, repeat=4).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

first = build()
train(first, tiny_batch(first, robot), 1)
policy = build()
batch = tiny_batch(policy, robot, ("red", "green") * (count // 2))
memory = estimate_memory(policy, [work_of(batch, 4, padded=True)], "bf16", ALL_TWICE if recompute else NOTHING_TWICE)
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
train(policy, batch, 2)
with open("/proc/self/status") as file:  # not ru_maxrss: it remembers the process that this one was forked from
    after = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
print(json.dumps({"measured": after - before, "estimated": memory.peak - memory.weights}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("way", "samples"), [("keep", 24), ("recompute", 48)])
def test_the_estimate_is_within_a_factor_of_two(way: str, samples: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way, str(samples)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < result["estimated"] / result["measured"] < 2.0, result


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.zeros(16, 8, requires_grad=True)
    assert kept_bytes(layer, lambda: layer(x), half=False) == 16 * 8 * 4
    assert kept_bytes(layer, lambda: layer(x) * layer(x), half=False) == 3 * 16 * 8 * 4  # the input, both factors
    assert kept_bytes(layer, lambda: layer(x), half=True) == (16 * 8 + 8 * 8) * 2  # copies of input and weight
    layer.requires_grad_(False)
    assert kept_bytes(layer, lambda: layer(x.detach()), half=False) == 0


def test_a_policy_that_recomputes_already_is_estimated_alike(aloha: Embodiment) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl").train()
    batch = tiny_batch(policy, aloha)
    ways = (NOTHING_TWICE, ALL_TWICE)
    before = [estimate_memory(policy, [work_of(batch, 4)], recompute=recompute) for recompute in ways]
    checkpoint_activations(policy)
    methods = [vars(block)["forward"] for block in policy.decoder.blocks]
    assert before == [estimate_memory(policy, [work_of(batch, 4)], recompute=recompute) for recompute in ways]
    assert methods == [vars(block)["forward"] for block in policy.decoder.blocks]
    assert all(layer.gradient_checkpointing for layer in policy.backbone.model.model.language_model.layers)


def test_a_share_of_the_layers_is_spread_evenly(aloha: Embodiment) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl").train()
    checkpoint_activations(policy, Recompute(language=0.5, decoder=0.25))
    layers = policy.backbone.model.model.language_model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [number % 2 == 1 for number in range(len(layers))]
    assert not any(block.gradient_checkpointing for block in policy.backbone.visual.blocks)
    assert ["forward" in vars(block) for block in policy.decoder.blocks] == [False, False, False, True]


def test_what_is_frozen_or_divided_costs_less(aloha: Embodiment) -> None:
    policy = tiny_policy(aloha, model_type="qwen3_vl")
    work = work_of(tiny_batch(policy, aloha), 4)
    full = estimate_memory(policy, [work])
    numbers = sum(p.numel() for p in policy.parameters())
    assert full.weights == full.gradients == full.average == 4 * numbers and full.moments == 8 * numbers
    assert full.peak == 20 * numbers + max(full.activations, full.temporary)
    double = estimate_memory(
        policy,
        [
            work,
            Work(
                work.rows * 2,
                work.frames * 2,
                work.answers * 2,
                work.contexts * 2,
                2 * work.states,
                work.horizons * 2,
                work.draws,
            ),
        ],
    )
    assert 1.7 * full.activations < double.activations <= 2 * full.activations
    sharded = estimate_memory(policy, [work], ranks=4, sharded=True)
    assert sharded.weights == full.weights // 4 and sharded.activations == full.activations
    again = estimate_memory(policy, [work], recompute=ALL_TWICE)
    half = estimate_memory(policy, [work], recompute=Recompute(vision=1.0, language=0.5))
    assert again.activations < half.activations < full.activations and again.moments == full.moments
    assert estimate_memory(policy, [work], "fp32").activations > full.activations
    assert estimate_memory(policy, [], average=False).average == 0
    policy.backbone.requires_grad_(False)
    frozen = estimate_memory(policy, [work])
    assert frozen.activations < 0.6 * full.activations and frozen.weights == full.weights
    assert frozen.gradients == 4 * sum(p.numel() for p in policy.decoder.parameters())
    assert not any(p.grad is not None for p in policy.parameters())


@pytest.mark.parametrize(("model_type", "context"), [("qwen3_5", "joint"), ("qwen2_5_vl", "cached")])
def test_every_class_and_arrangement_can_be_estimated(aloha: Embodiment, model_type: str, context: str) -> None:
    policy = tiny_policy(aloha, model_type=model_type, context=context)
    work = work_of(tiny_batch(policy, aloha), 4)
    full = estimate_memory(policy, [work])
    assert full.activations > full.weights
    pytest.importorskip("peft")
    apply_lora(policy, rank=2)
    adapted = estimate_memory(policy, [work])
    assert adapted.gradients < full.gradients and adapted.activations > 0.3 * full.activations


def test_shapes_on_the_meta_device_are_enough() -> None:
    with torch.device("meta"):
        config, backbone, decoder = preset_network("tiny")
        policy = QwenVLA.__new__(QwenVLA)
        torch.nn.Module.__init__(policy)
        policy.config, policy.backbone, policy.decoder = config, backbone, decoder
    work = Work((80,) * 4, (48,) * 12, 20, (81,) * 4, 4, (16,) * 4, 4)
    memory = estimate_memory(policy, [work])
    assert all(p.is_meta for p in policy.parameters())
    assert memory.weights == 4 * sum(p.numel() for p in policy.parameters()) and memory.activations > 2**20
