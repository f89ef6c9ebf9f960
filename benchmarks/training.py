#!/usr/bin/env python3
"""One training step of a preset with random weights: seconds, memory, tokens per second, model FLOPs utilisation.

    python benchmarks/training.py --preset paper --batch 32 --recompute vision=1 --compile [--fsdp] [--json FILE]
    python benchmarks/training.py --preset small --device cpu --batch 2 --steps 1

Protocol: rows of ``--views`` pictures of 224² and ``--prompt`` text tokens, no padding, ``--draws`` noise draws of
16 actions each; everything trained (``--stage t2a``: the decoder alone, behind kept hidden states); bfloat16 autocast
over float32 weights, AdamW, gradient clipping, as `training/cpt.py` does it. Medians after two steps that do not count.
MFU counts model FLOPs (docs/training_engine.md): what is computed twice by ``--recompute`` counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qwen_vla_core.model.batching import on_device
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.presets import preset_network
from qwen_vla_core.model.processor import ImageConfig, Processor
from qwen_vla_core.model.tokenizer import train_tokenizer
from qwen_vla_core.training.distributed import Ranks, clip_gradients, start, stop
from qwen_vla_core.training.flops import FlopModel, work_of
from qwen_vla_core.training.optim import build_optimizer, freeze, parameter_groups
from qwen_vla_core.training.parallel import autocast, checkpoint_activations, compile_blocks, parallelise, prepare_cuda
from qwen_vla_core.training.peak import peak_of, utilisation
from qwen_vla_core.training.stage_recipe import ALL_TWICE, OptimSpec, Rates, Recompute

HORIZON = 16
SIDE = 224


def build(preset: str, device: torch.device, train_backbone: bool) -> QwenVLA:
    """The preset's network with random float32 weights, made where it will be used: four billion draws take seconds
    on a GPU and minutes on a CPU."""
    config, meta_backbone, _ = _on_meta(preset)
    with device:
        policy = QwenVLA(config, type(meta_backbone).from_config(config.backbone, initialise=False), _processor())
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
                else:
                    parameter.zero_()
            for name, parameter in policy.named_parameters():
                if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                    parameter.fill_(1.0)
    rates = dict.fromkeys(("vision", "language"), 1e-5 if train_backbone else 0.0) | {"decoder": 1e-4}
    freeze(policy, rates)
    return policy.train()


def _on_meta(preset: str) -> tuple[Any, Any, Any]:
    with torch.device("meta"):
        return preset_network(preset)


def _processor() -> Processor:
    return Processor(train_tokenizer(("view",)), ImageConfig())


def batch_of(policy: QwenVLA, rows: int, views: int, prompt: int, draws: int) -> dict[str, torch.Tensor]:
    """Synthetic rows as ``collate_rows`` and ``draw_flow`` make them."""
    config: Any = policy.backbone.config
    vision = config.vision_config
    side = SIDE // vision.patch_size
    tokens = (side // vision.spatial_merge_size) ** 2
    device = policy.device
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 200, (rows, prompt), generator=generator)
    picture = torch.tensor(
        [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
    )
    ids = torch.cat((picture.repeat(views).expand(rows, -1), text), 1)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    channels = policy.config.decoder.channels
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(rows * views * side * side, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * (rows * views)),
        "actions": torch.randn(rows, HORIZON, channels, generator=generator),
        "channel_mask": torch.arange(channels)[None].expand(rows, -1) < 14,
        "kind": torch.zeros(rows, dtype=torch.long),
        "noise": torch.randn(rows * draws, HORIZON, channels, generator=generator),
        "tau": torch.rand(rows * draws, 1, generator=generator),
    }
    if policy.config.state_mode == "dit_token":
        batch["state"] = torch.zeros(rows, policy.config.decoder.state_channels)
    return on_device(batch, device)


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Times the steps of one configuration."""
    began = time.perf_counter()
    alone = options.stage == "t2a"
    policy = build(options.preset, ranks.device, not alone)
    batch = batch_of(policy, options.batch, options.views, options.prompt, options.draws)
    work = work_of(batch, options.draws, read=not alone)
    flops = FlopModel.of(policy).total(work)
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    prepare_cuda(policy, ranks, "bf16")
    if options.compile:
        compile_blocks(policy)
    checkpoint_activations(policy, options.recompute)
    module = parallelise(policy, "fsdp2" if options.fsdp else "ddp", ranks)
    spec = OptimSpec(rates=Rates(vision=1e-5, language=1e-5, decoder=1e-4), warmup_steps=0)
    optimizer = build_optimizer(parameter_groups(policy.named_parameters(), spec), spec)
    inputs = {key: value for key, value in batch.items() if key not in ("noise", "tau")}
    given: dict[str, Any] = {"noise": batch["noise"], "tau": batch["tau"], "repeat": options.draws}
    if alone:
        with torch.no_grad(), autocast(ranks, "bf16"):
            given["hidden"] = policy._encode(inputs)
    cuda = ranks.device.type == "cuda"
    losses = []

    def step() -> torch.Tensor:
        with autocast(ranks, "bf16"):
            loss = module(inputs, **given)["action"] / options.batch
        loss.backward()
        clip_gradients(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    marks = [_mark(cuda)]
    for index in range(options.steps + 2):
        if index == 2 and cuda:
            torch.cuda.reset_peak_memory_stats()
        losses.append(step())
        marks.append(_mark(cuda))
    seconds = _between(marks, cuda)
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    if options.profile or options.trace:
        _profile(step, options, cuda)
    median = statistics.median(seconds[2:])
    peak = peak_of(ranks.device)
    used = utilisation(flops, median, peak)
    return {
        "preset": options.preset,
        "stage": options.stage,
        "batch": options.batch,
        "views": options.views,
        "tokens_per_row": int(batch["input_ids"].shape[1]),
        "draws": options.draws,
        "recompute": vars(options.recompute),
        "compile": options.compile,
        "fsdp2": options.fsdp,
        "ranks": ranks.world,
        "parameters": parameters,
        "trained": trained,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "model_tflop": round(flops / 1e12, 3),
        "tokens": work.tokens,
        "seconds_per_step": round(median, 4),
        "seconds_all": [round(value, 4) for value in seconds],
        "tokens_per_s": round(work.tokens / median, 1),
        "samples_per_s": round(options.batch / median, 2),
        "peak": None if peak is None else {"tflops": peak.flops / 1e12, "source": peak.source},
        "mfu": None if used is None else round(used, 4),
        "memory_gib": memory,
        "losses": [round(float(value), 5) for value in losses],
        "total_s": round(time.perf_counter() - began, 1),
    }


def _mark(cuda: bool) -> Any:
    """The end of a step, without waiting for it on a GPU: as in training, Python is ahead of the device."""
    if not cuda:
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def _between(marks: list[Any], cuda: bool) -> list[float]:
    if not cuda:
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000.0 for before, after in pairwise(marks)]


def _profile(step: Callable[[], object], options: argparse.Namespace, cuda: bool) -> None:
    """Two steps: the dearest operations, and where the device waits."""
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            step()
        if cuda:
            torch.cuda.synchronize()
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    if options.profile:
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=options.profile, max_name_column_width=60))


def _shares(text: str) -> Recompute:
    if text == "all":
        return ALL_TWICE
    return Recompute(**{part: float(share) for part, _, share in (item.partition("=") for item in text.split(","))})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=("paper", "small", "tiny"), default="small")
    parser.add_argument("--stage", choices=("cpt", "t2a"), default="cpt", help="t2a: the decoder alone")
    parser.add_argument("--batch", type=int, default=8, help="observations in a step")
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="text tokens")
    parser.add_argument("--draws", type=int, default=4, help="noise draws per observation")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that do not count")
    parser.add_argument(
        "--recompute", type=_shares, default=Recompute(), metavar="vision=1,language=0.5",
        help="activation checkpointing: share of each part's layers; all: of every layer",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="repeated layers through torch.compile")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 (under torchrun)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N dearest operations of 2 steps")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="two steps for chrome://tracing, .json.gz")
    parser.add_argument("--json", type=Path, help="append the result to this file, one JSON per line")
    options = parser.parse_args()
    ranks = start(options.device)
    try:
        result = measure(options, ranks)
    finally:
        stop()
    if ranks.first:
        print(json.dumps(result, indent=1))
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
