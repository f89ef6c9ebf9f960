"""Arithmetic counted from shapes against what torch counts while it computes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from tiny_support import tiny_batch, tiny_policy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.presets import preset_network
from qwen_vla_core.training.flops import FlopModel, Work, work_of
from qwen_vla_core.training.peak import Peak, listed_peak, measured_peak, peak_of, utilisation

CHUNK = 64  # tokens that transformers' delta rule takes at once
DRAWS = 3


@pytest.fixture(scope="module")
def make(aloha: Embodiment) -> Callable[..., QwenVLA]:
    return lambda **options: tiny_policy(aloha, **options)


def convolution_backward(gradient: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    """Torch's own formula forgets groups: it takes a convolution of single channels for one of all with all."""
    return 2 * prod(gradient) * prod(weight[1:]) * sum(part is not None for part in out_shape[:2])


def counted(policy: QwenVLA, batch: dict[str, torch.Tensor]) -> int:
    """What torch sees; its fused CPU attention is in no table, so attention is computed as plain products."""
    corrected = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.stack(list(policy(batch, repeat=DRAWS).values())).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("context", ["cached", "joint"])
@pytest.mark.parametrize("frozen", ["", "backbone", "backbone.model.model.visual"])
def test_qwen3_vl_agrees_with_torch_to_the_last_operation(
    make: Callable[..., QwenVLA], aloha: Embodiment, context: str, frozen: str
) -> None:
    policy = make(model_type="qwen3_vl", context=context)
    if frozen:
        policy.get_submodule(frozen).requires_grad_(False)
    batch = tiny_batch(policy, aloha)
    assert FlopModel.of(policy).total(work_of(batch, DRAWS, padded=True)) == counted(policy, batch)


def test_a_frozen_decoder_passes_gradients_through(make: Callable[..., QwenVLA], aloha: Embodiment) -> None:
    policy = make(model_type="qwen3_vl")
    policy.decoder.requires_grad_(False)
    batch = tiny_batch(policy, aloha)
    ours = FlopModel.of(policy).total(work_of(batch, DRAWS, padded=True))
    # Only the first block's actions need no gradient at their input.
    assert counted(policy, batch) <= ours <= 1.02 * counted(policy, batch)


def test_qwen2_5_vl_attends_inside_windows(make: Callable[..., QwenVLA], aloha: Embodiment) -> None:
    policy = make(model_type="qwen2_5_vl")
    batch = tiny_batch(policy, aloha)
    ours = FlopModel.of(policy).total(work_of(batch, DRAWS, padded=True))
    assert ours == pytest.approx(counted(policy, batch), rel=0.002)  # pictures of 6 × 8 patches leave windows half full


def test_qwen3_5_differs_by_what_its_chunked_kernel_does_more(make: Callable[..., QwenVLA], aloha: Embodiment) -> None:
    policy = make(model_type="qwen3_5")
    batch = tiny_batch(policy, aloha)
    work = work_of(batch, DRAWS, padded=True)
    text = policy.backbone.config.get_text_config()
    layers, heads = text.layer_types.count("linear_attention"), text.linear_num_value_heads
    key, value = text.linear_key_head_dim, text.linear_value_head_dim
    tokens = sum(-(-n // CHUNK) * CHUNK for n in work.rows)
    # Two chunk × chunk products of keys, one with values, three with the state; of the triangular solves only the
    # products in their backward pass are counted.
    kernel = tokens * (2 * 2 * CHUNK * key + 2 * CHUNK * value + 3 * 2 * key * value)
    solves = tokens * 2 * CHUNK * (key + value)
    recurrence = sum(work.rows) * 6 * key * value
    ours = FlopModel.of(policy).total(work)
    assert ours < counted(policy, batch)
    more = layers * heads * (3 * (kernel - recurrence) + solves)
    # The first chunk's state is zero and nothing reads the last one's: no gradient goes there.
    assert ours + more == pytest.approx(counted(policy, batch), rel=0.005)


def test_padding_is_no_work(make: Callable[..., QwenVLA], aloha: Embodiment) -> None:
    policy = make(model_type="qwen3_vl")
    model = FlopModel.of(policy)
    long = "red or maybe the very large and rather blue"
    alone = [work_of(tiny_batch(policy, aloha, (word,)), DRAWS) for word in ("red", long)]
    both = tiny_batch(policy, aloha, ("red", long))
    together = work_of(both, DRAWS)
    assert together.rows == alone[0].rows + alone[1].rows and len(set(together.rows)) == 2
    assert model.total(together) == sum(model.total(work) for work in alone)
    assert model.total(work_of(both, DRAWS, padded=True)) > model.total(together)
    both["step_mask"] = torch.arange(16).expand(2, -1) < 10
    assert work_of(both, DRAWS).horizons == (10, 10)
    assert together.tokens == sum(together.rows) + DRAWS * 2 * 16


def test_batches_without_pictures_actions_or_reading(make: Callable[..., QwenVLA], aloha: Embodiment) -> None:
    policy = make(model_type="qwen3_vl")
    model, batch = FlopModel.of(policy), tiny_batch(policy, aloha)
    kept = work_of(batch, DRAWS, read=False)
    assert model.backbone(kept) == 0 < model.action_decoder(kept)
    assert kept.tokens == sum(kept.contexts) + DRAWS * 32
    talk = {key: value for key, value in batch.items() if key not in ("actions", "state", "channel_mask", "kind")}
    assert model.action_decoder(work_of(talk)) == 0 < model.language(work_of(talk))
    del talk["pixel_values"], talk["image_grid_thw"]
    assert model.vision(work_of(talk)) == 0
    chosen = {**batch, "action_rows": torch.tensor([1]), "actions": batch["actions"][1:], "state": batch["state"][1:]}
    assert work_of(chosen).contexts == kept.contexts[1:] and work_of(chosen).states == 1


def test_the_papers_model_costs_about_six_per_weight_and_token() -> None:
    with torch.device("meta"):
        config, backbone, decoder = preset_network("paper")
        policy = QwenVLA.__new__(QwenVLA)
        torch.nn.Module.__init__(policy)
        policy.config, policy.backbone, policy.decoder = config, backbone, decoder
        model = FlopModel.of(policy)
    rows, frames = (300,) * 4, (196,) * 12
    work = Work(rows=rows, frames=frames, answers=0, contexts=rows, states=0, horizons=(16,) * 4)
    read = 6 * model.weights["language"].count * sum(rows)
    assert 1.0 < model.language(work) / read < 1.06  # attention is small at 300 tokens
    assert 3.4e9 < model.weights["language"].count < 4.0e9
    seen = 6 * model.weights["vision"].count * sum(frames)
    assert 1.0 < model.vision(work) / seen < 1.3


def test_peaks_are_found_by_the_name_that_cuda_reports() -> None:
    assert listed_peak("NVIDIA H200") == listed_peak("NVIDIA H100 80GB HBM3") == 989.5e12
    assert listed_peak("NVIDIA H100 PCIe") == 756e12 and listed_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert listed_peak("NVIDIA A10G") == 70e12 and listed_peak("NVIDIA L4") == 121e12
    assert listed_peak("NVIDIA GeForce RTX 4090") == 165.2e12 and listed_peak("NVIDIA H20") == 148e12
    assert listed_peak("Tesla V100-SXM2-16GB") is None


def test_utilisation_is_a_share_of_the_peak_and_nothing_on_a_cpu() -> None:
    assert peak_of("cpu") is None and utilisation(1e12, 1.0, None) is None
    assert utilisation(3e12, 2.0, Peak(6e12, "data sheet", "x")) == pytest.approx(0.25)
    assert measured_peak("cpu", size=64, repeats=2) > 0
