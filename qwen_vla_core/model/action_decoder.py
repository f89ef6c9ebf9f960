"""The action decoder: a single-stream DiT over [context tokens, action tokens] [P].

Context tokens are the backbone's last hidden states (projected), plus, if the state enters as a token, one more. Action
tokens are the noisy chunk, one token per step, each with its own flow time τ. Rotary positions have three sections and
continue after the backbone's largest position, so that text, image and action share one coordinate system.

Two arrangements of the same layers, chosen in the configuration (see ``DecoderConfig.context``):

* ``cached`` [O]: context tokens run through the blocks without τ and without seeing actions. Their keys and values do
  not change between Euler steps: ``encode_context`` computes them once, ``denoise_step`` uses them.
* ``joint`` [P]: everything is one sequence in every step, modulated by τ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import nn

from qwen_vla_core.model.attention import attend
from qwen_vla_core.model.config import DecoderConfig

Modulation = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Context:
    """What the decoder keeps of one observation.

    Attributes:
        tokens: (B, L, width) projected context tokens; what ``joint`` and the cache-free path start from.
        rotary: cos and sin of the context's positions, (B, 1, L, head_dim).
        mask: (B, 1, 1, L) bool, True = real token; None when nothing is padded, which keeps the fast kernel.
        next_position: (B,) first position of the action tokens.
        layers: per block (keys, values), each (B, heads, L, head_dim); empty where nothing is cached.
    """

    tokens: torch.Tensor
    rotary: Rotary
    mask: torch.Tensor | None
    next_position: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def repeat(self, times: int) -> Context:
        """Every observation ``times`` times in a row, for several noise draws per backbone pass."""
        if times == 1:
            return self

        def rep(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(times, 0)

        return Context(
            rep(self.tokens),
            (rep(self.rotary[0]), rep(self.rotary[1])),
            None if self.mask is None else rep(self.mask),
            rep(self.next_position),
            tuple((rep(k), rep(v)) for k, v in self.layers),
        )


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Per-head norm of queries and keys: keeps logits bounded in half precision."""
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary embedding of (B, heads, L, d) with cos, sin (B, 1, L, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN: affine-free norm, then shift and scale from the flow time."""
    return functional.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift


def sinusoid(values: torch.Tensor, size: int) -> torch.Tensor:
    """(…) → (…, size) cosines and sines at geometric frequencies."""
    half = size // 2
    scale = torch.exp(-math.log(10000.0) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values[..., None] * scale
    return torch.cat((angles.cos(), angles.sin()), -1)


class SwiGLU(nn.Module):
    """Gated feed-forward; three matrices without bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and SwiGLU, each behind AdaLN. 70.8M parameters at the paper's width."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(config.head_dim))
        self.key_norm = nn.Parameter(torch.ones(config.head_dim))
        self.ffn = SwiGLU(config.width, config.ffn)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def times(self, condition: torch.Tensor) -> Modulation:
        """(…, width) time condition → the six AdaLN terms, (…, width) each."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(functional.silu(condition)).chunk(6, dim=-1)
        return shift1, scale1, gate1, shift2, scale2, gate2

    def project(self, normed: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, L, width) → rotated queries, rotated keys, values, each (B, heads, L, head_dim)."""
        query, key, value = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(rms_norm(query, self.query_norm), rotary), rotate(rms_norm(key, self.key_norm), rotary), value

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """(B, heads, L, head_dim) → (B, L, width)."""
        return self.out(attended.transpose(1, 2).flatten(2))

    def context_step(
        self, x: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Context tokens attending to each other, without τ; returns tokens, keys and values."""
        query, key, value = self.project(functional.layer_norm(x, x.shape[-1:]), rotary)
        x = x + self.merge(attend(query, key, value, mask))
        x = x + self.ffn(functional.layer_norm(x, x.shape[-1:]))
        return x, key, value

    def context_keys(self, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the keys and values of ``context_step``, where nothing reads its tokens."""
        _, key, value = self.project(functional.layer_norm(x, x.shape[-1:]), rotary)
        return key, value

    def forward(
        self,
        x: torch.Tensor,
        times: Modulation,
        rotary: Rotary,
        mask: torch.Tensor | None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Modulated tokens attending to themselves and, if given, to a cached prefix of keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = times
        query, key, value = self.project(modulate(x, shift1, scale1), rotary)
        if prefix is not None:
            key, value = torch.cat((prefix[0], key), 2), torch.cat((prefix[1], value), 2)
        x = x + gate1 * self.merge(attend(query, key, value, mask))
        return x + gate2 * self.ffn(modulate(x, shift2, scale2))


class ActionDecoder(nn.Module):
    """Predicts ``noise − data`` for a noisy chunk, given a context."""

    def __init__(self, config: DecoderConfig, context_width: int, state_token: bool) -> None:
        """
        Args:
            config: shape.
            context_width: hidden size of the backbone.
            state_token: whether the state vector is one more context token.
        """
        super().__init__()
        self.config = config
        width = config.width
        self.context_in = nn.Linear(context_width, width, bias=False)
        self.state_in = nn.Linear(config.state_channels, width) if state_token else None
        self.action_in = nn.Sequential(nn.Linear(config.channels, width), nn.SiLU(), nn.Linear(width, width))
        self.action_out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, config.channels))
        self.time_in = nn.Sequential(nn.Linear(config.time_embedding, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output_modulation = nn.Linear(width, 2 * width)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Xavier everywhere; AdaLN and the last layer start at zero, so that training starts from the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        adaptive = [self.output_modulation, *(block.modulation for block in self.blocks)]
        for last in (*adaptive, self.action_out[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def rotary(self, positions_3bl: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Interleaved multi-section rotary angles, as in the backbone.

        Args:
            positions_3bl: (3, B, L) time, height, width positions.
            dtype: dtype of the result; angles are computed in float32.

        Returns:
            cos and sin, (B, 1, L, head_dim).
        """
        half = self.config.head_dim // 2
        exponents = torch.arange(half, device=positions_3bl.device, dtype=torch.float32) / half
        angles = positions_3bl[..., None].float() * self.config.rope_theta**-exponents
        mixed = angles[0].clone()
        for axis in (1, 2):
            picked = slice(axis, 3 * self.config.mrope_section[axis], 3)
            mixed[..., picked] = angles[axis][..., picked]
        mixed = torch.cat((mixed, mixed), -1)[:, None]
        return mixed.cos().to(dtype), mixed.sin().to(dtype)

    def time_condition(self, tau: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, n) flow times → (B, n, width). τ is scaled to 0…1000, the range sinusoid embeddings are made for."""
        return self.time_in(sinusoid(1000.0 * tau.float(), self.config.time_embedding).to(dtype))

    def embed_context(
        self,
        hidden_bld: torch.Tensor,
        positions_3bl: torch.Tensor,
        mask_bl: torch.Tensor | None,
        state_bs: torch.Tensor | None = None,
    ) -> Context:
        """Projects the backbone's hidden states (and the state) to context tokens, without running any block.

        Args:
            hidden_bld: (B, L, D).
            positions_3bl: (3, B, L) M-RoPE positions the backbone used.
            mask_bl: (B, L) bool, True = real; None when nothing is padded.
            state_bs: (B, state_channels) normalised, zero-padded; required exactly if built with a state token.
        """
        if (state_bs is not None) != (self.state_in is not None):
            raise ValueError("state must be given exactly when state_mode is dit_token")
        tokens = self.context_in(hidden_bld)
        positions = positions_3bl
        valid = positions.amax(0) if mask_bl is None else positions.amax(0).masked_fill(~mask_bl, -1)
        following = valid.amax(1) + 1
        if self.state_in is not None and state_bs is not None:
            tokens = torch.cat((tokens, self.state_in(state_bs.to(tokens.dtype))[:, None]), 1)
            positions = torch.cat((positions, following.expand(3, -1)[..., None]), 2)
            if mask_bl is not None:
                mask_bl = functional.pad(mask_bl, (0, 1), value=True)
            following = following + 1
        mask = None if mask_bl is None else mask_bl[:, None, None, :]
        return Context(tokens, self.rotary(positions, tokens.dtype), mask, following)

    def encode_context(self, context: Context) -> Context:
        """Fills the per-block keys and values (``cached`` only; a no-op for ``joint``)."""
        if self.config.context == "joint":
            return context
        layers, x = [], context.tokens
        for index, block in enumerate(self.blocks):
            x, key, value = self._context_block(index, block, x, context)
            layers.append((key, value))
        return Context(context.tokens, context.rotary, context.mask, context.next_position, tuple(layers))

    def _context_block(
        self, index: int, block: nn.Module, x: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert isinstance(block, Block)
        if index < len(self.blocks) - 1:
            return block.context_step(x, context.rotary, context.mask)
        # Nothing reads the last block's context tokens: only its keys and values are needed.
        return x, *block.context_keys(x, context.rotary)

    def denoise_step(
        self,
        context: Context,
        noisy_bhk: torch.Tensor,
        tau_bh: torch.Tensor,
        channel_mask_bk: torch.Tensor,
        step_mask_bh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One evaluation of the velocity field.

        Args:
            context: from ``encode_context``; one from ``embed_context`` (no keys and values) gives the same answer,
                recomputing the context in this call.
            noisy_bhk: (B, H, K) noisy chunk; padded channels are ignored, whatever they hold.
            tau_bh: (B, H) flow time per action token, or (B, 1) where all tokens share it (cheaper).
            channel_mask_bk: (B, K) bool, True = real channel.
            step_mask_bh: (B, H) bool, True = real step; None = all real.

        Returns:
            (B, H, K) predicted ``noise − data``, exactly zero in padded channels and steps.
        """
        if self.config.context == "cached" and not context.layers:
            context = self.encode_context(context)
        batch, horizon, _ = noisy_bhk.shape
        valid = channel_mask_bk[:, None, :].expand(batch, horizon, -1)
        if step_mask_bh is not None:
            valid = valid & step_mask_bh[..., None]
        dtype = context.tokens.dtype
        index = torch.arange(horizon, device=noisy_bhk.device)
        actions = self.action_in(torch.where(valid, noisy_bhk, 0.0).to(dtype))
        # Rotary positions are relative: without the index small models take long to tell the chunk's steps apart [O].
        actions = actions + sinusoid(index.float(), self.config.width).to(dtype)
        positions = context.next_position[:, None] + index
        rotary = self.rotary(positions.expand(3, -1, -1), dtype)
        mask = self._key_mask(context, batch, horizon, step_mask_bh)
        condition = self.time_condition(tau_bh, dtype)

        if self.config.context == "cached":
            x = actions
            for block, prefix in zip(self.blocks, context.layers, strict=True):
                assert isinstance(block, Block)
                x = block(x, block.times(condition), rotary, mask, prefix)
        else:
            # Context tokens follow the chunk's current flow time: the latest of its tokens (a fixed prefix has τ = 0).
            shared = self.time_condition(tau_bh.amax(1, keepdim=True), dtype)
            length = context.tokens.shape[1]
            sequence_condition = torch.cat((shared.expand(-1, length, -1), condition.expand(-1, horizon, -1)), 1)
            joined = (torch.cat((context.rotary[0], rotary[0]), 2), torch.cat((context.rotary[1], rotary[1]), 2))
            x = torch.cat((context.tokens, actions), 1)
            for block in self.blocks:
                assert isinstance(block, Block)
                x = block(x, block.times(sequence_condition), joined, mask)
            x = x[:, length:]

        shift, scale = self.output_modulation(functional.silu(condition)).chunk(2, dim=-1)
        velocity = self.action_out(modulate(x, shift, scale)).to(noisy_bhk.dtype)
        return torch.where(valid, velocity, 0.0)

    @staticmethod
    def _key_mask(context: Context, batch: int, horizon: int, step_mask_bh: torch.Tensor | None) -> torch.Tensor | None:
        """(B, 1, 1, L + H) bool over [context, actions], or None when every token is real."""
        if context.mask is None and step_mask_bh is None:
            return None
        tokens = context.tokens
        left = context.mask
        if left is None:
            left = torch.ones(batch, 1, 1, tokens.shape[1], dtype=torch.bool, device=tokens.device)
        right = (
            torch.ones(batch, horizon, dtype=torch.bool, device=tokens.device) if step_mask_bh is None else step_mask_bh
        )
        return torch.cat((left, right[:, None, None, :]), -1)
