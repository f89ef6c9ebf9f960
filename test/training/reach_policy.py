"""A real, small QwenVLA for the reach world, cloned from a demonstrator that misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from reach_world import EMBODIMENT, ReachWorld

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.embodiment.load import parse_embodiment
from qwen_vla_core.evaluation.closed_loop import observe
from qwen_vla_core.model import flow
from qwen_vla_core.model.backbone import Backbone
from qwen_vla_core.model.config import ModelConfig
from qwen_vla_core.model.flow import FlowConfig
from qwen_vla_core.model.policy import QwenVLA, Stats
from qwen_vla_core.model.presets import TINY_DECODER, tiny_backbone
from qwen_vla_core.model.processor import AREA, ImageConfig, Processor
from qwen_vla_core.model.tokenizer import train_tokenizer
from qwen_vla_core.training.actor_critic import ActorCritic

MISS = 0.72  # the demonstrator goes this far


def build_policy(seed: int = 0) -> QwenVLA:
    """Untrained: 4 text layers, one picture token, a decoder of two blocks."""
    robot = parse_embodiment(EMBODIMENT)
    pixels = 32 * 32
    image = ImageConfig(
        patch_size=16, merge_size=2, temporal_patch_size=1, min_pixels=pixels, max_pixels=pixels, resample=AREA
    )
    processor = Processor(train_tokenizer(robot.views), image)
    backbone = tiny_backbone(len(processor.tokenizer), processor.tokenizer.get_vocab(), "qwen3_vl")
    decoder = replace(TINY_DECODER, width=64, depth=2, heads=2, ffn=128, channels=8, state_channels=8)
    config = ModelConfig(backbone, decoder, FlowConfig(steps=4), state_mode="dit_token", preset="tiny")
    stats = Stats(
        Quantiles((-1.2,) * 2, (1.2,) * 2, robot.channels), Quantiles((-1.2,) * 4, (1.2,) * 4, robot.state_channels)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = QwenVLA(config, Backbone.from_config(backbone), processor, {robot.name: robot}, {robot.name: stats})
        policy.decoder.reset_parameters()
    return policy.eval()


def clone_demonstrator(policy: QwenVLA, steps: int = 200, batch: int = 16, draws: int = 6) -> None:
    """Behaviour cloning of the decoder; picture and words are always the same, so they are read once."""
    world = ReachWorld()
    world.reset(0)
    with torch.no_grad():
        reading = ActorCritic(policy).read([observe(world)] * batch, "reacher")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(policy.decoder.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        rng = np.random.default_rng([1, step])
        states, chunks = np.zeros((batch, 4)), np.zeros((batch, 4, 2))
        for i in range(batch):
            world.reset(int(rng.integers(2**31)))
            point = rng.uniform(0, 1) * MISS * world.goal
            states[i] = [*point, *world.goal]
            way = np.linspace(0.25, 1, 4)[:, None]
            chunks[i] = point + way * (MISS * world.goal - point)
        stats = policy.stats["reacher"]
        state = torch.zeros(batch, 8)
        state[:, :4] = torch.as_tensor(stats.state.normalize(states), dtype=torch.float32)
        data = torch.zeros(batch, 4, 8)
        data[..., :2] = torch.as_tensor(stats.action.normalize(chunks), dtype=torch.float32)
        data, real = data.repeat_interleave(draws, 0), reading.channel_mask.repeat_interleave(draws, 0)
        noise = torch.randn(data.shape, generator=generator) * real[:, None]
        tau = torch.rand(batch * draws, 1, generator=generator)
        decoder = policy.decoder
        context = decoder.encode_context(decoder.embed_context(reading.hidden, reading.positions, None, state))
        predicted = decoder.denoise_step(context.repeat(draws), flow.interpolate(data, noise, tau), tau, real)
        loss = (predicted - (noise - data))[..., :2].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
