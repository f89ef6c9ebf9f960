"""The policy's network as two functions of fixed shapes, ``prefill`` and ``integrate``: called or captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from qwen_vla_core.engine.buckets import Arrangement
from qwen_vla_core.engine.decoder import FastDecoder
from qwen_vla_core.engine.ops import KeyValues, Rotary, TorchOps
from qwen_vla_core.engine.qwen import FastQwen
from qwen_vla_core.model.action_decoder import Context
from qwen_vla_core.model.policy import QwenVLA


@dataclass(frozen=True)
class Prefix:
    """What is kept of a batch of observations while its chunks are integrated.

    Attributes:
        tokens: (B, C, width) context tokens.
        keys: per block, keys and values; empty for ``context: joint``.
    """

    tokens: torch.Tensor
    keys: list[KeyValues]

    def context(self, arrangement: Arrangement) -> Context:
        """The same as the eager decoder's value, for samplers that call ``ActionDecoder.denoise_step`` themselves."""
        return Context(
            self.tokens,
            arrangement.context_rotary,
            arrangement.valid.context_mask,
            arrangement.next_position,
            tuple(self.keys),
        )


@runtime_checkable
class Tunable(Protocol):
    """Operations that choose between plans by measuring them."""

    def tune(self, kind: str, weights: list[torch.Tensor], rows: int) -> object: ...


class Network:
    """Backbone and decoder of one policy."""

    def __init__(self, policy: QwenVLA, ops: TorchOps) -> None:
        """
        Args:
            policy: in evaluation mode, on its device. Its projections are joined in place (``qwen.join``).
            ops: torch or CUDA kernels.
        """
        self.policy, self.ops, self.fast = policy, ops, None
        with torch.inference_mode(False), torch.no_grad():  # the policy keeps its weights and may be differentiated
            if FastQwen.supports(policy.backbone):
                self.fast = FastQwen(policy.backbone, policy.processor.image, ops)
            self.decoder = FastDecoder(policy.decoder, ops)
        self.cached = policy.config.decoder.context == "cached"

    def text_rotary(self, positions_3bl: torch.Tensor) -> Rotary:
        """The backbone's cos and sin; empty where transformers' class computes its own."""
        if self.fast is None:
            empty = positions_3bl.new_empty(0)
            return empty, empty
        return self.fast.text_rotary(positions_3bl)

    def prefill(
        self, arrangement: Arrangement, pictures: tuple[torch.Tensor, ...], state_bs: torch.Tensor | None
    ) -> Prefix:
        """Pictures, prompt and state → what every Euler step reads; once per observation."""
        hidden = self._hidden(arrangement, pictures)
        tokens = self.decoder.tokens(hidden, state_bs)
        if not self.cached:
            return Prefix(tokens, [])
        return Prefix(tokens, self.decoder.context(tokens, arrangement.context_rotary, arrangement.valid))

    def integrate(self, arrangement: Arrangement, prefix: Prefix, noise_bhk: torch.Tensor, steps: int) -> torch.Tensor:
        """Noise → normalised chunks (B, H, K); every Euler step."""
        if self.cached:
            return self.decoder.integrate(
                noise_bhk, arrangement.real, steps, prefix.keys, arrangement.action_rotary, arrangement.valid
            )
        context, decoder = prefix.context(arrangement), self.policy.decoder
        channels, real_steps = arrangement.real.any(1), arrangement.real.any(2)
        current = torch.where(arrangement.real, noise_bhk, 0.0)
        for index in range(steps):
            tau = current.new_full((current.shape[0], 1), 1.0 - index / steps)
            mask = real_steps if arrangement.bucket.padded else None
            current = current - decoder.denoise_step(context, current, tau, channels, mask) / steps
        return current

    def warm(self, arrangement: Arrangement, steps: int) -> None:
        """Makes the constants of these shapes and steps, which must not happen inside a captured graph."""
        if self.fast is not None:
            for (height, width), _ in arrangement.bucket.pictures:
                patch = self.fast.image.patch_size
                self.fast.grid((height // patch, width // patch))
        if self.cached:
            self.decoder.terms(steps)
            self.decoder.indices(arrangement.bucket.horizon)

    def tune(self, rows: int) -> None:
        """Lets the kernels measure how they read this decoder's weights fastest; nothing without kernels or CUDA."""
        ops, blocks = self.ops, self.decoder.blocks
        if not self.cached or not isinstance(ops, Tunable) or blocks[0].qkv.device.type != "cuda":
            return
        ops.tune("few", [block.qkv for block in blocks], rows)
        ops.tune("few_summed", [block.out for block in blocks], rows)
        ops.tune("few_gated", [block.up for block in blocks], rows)
        ops.tune("few_summed", [block.down for block in blocks], rows)

    def _hidden(self, arrangement: Arrangement, pictures: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(B, L, D) last hidden states."""
        if self.fast is None:
            return self._hidden_of_class(arrangement, pictures)
        patch = self.fast.image.patch_size
        seen = [
            self.fast.see(group, self.fast.grid((group.shape[1] // patch, group.shape[2] // patch)))
            for group in pictures
        ]
        together = tuple(torch.cat(parts) for parts in zip(*seen, strict=True))
        slots = torch.cat(arrangement.slots) if seen else arrangement.ids.new_empty(0)
        return self.fast.read(arrangement.ids, together, slots, arrangement.text_rotary)

    def _hidden_of_class(self, arrangement: Arrangement, pictures: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """By transformers' own forward, which wants the pictures in the order of their tokens."""
        processor: Any = self.policy.processor
        found: list[tuple[int, torch.Tensor, tuple[int, int]]] = []
        for group, slots in zip(pictures, arrangement.slots, strict=True):
            patches, grid = processor.patchify(group)
            per_picture = slots.view(len(group), -1)[:, 0].tolist()
            found += [(first, values, grid) for first, values in zip(per_picture, patches, strict=True)]
        found.sort(key=lambda item: item[0])
        pad = processor.token_id("<|image_pad|>")
        encoded = self.policy.backbone.encode(
            arrangement.ids,
            (arrangement.ids == pad).long(),
            torch.cat([values for _, values, _ in found]) if found else None,
            torch.tensor([(1, *grid) for _, _, grid in found], device=arrangement.ids.device) if found else None,
        )
        return encoded.hidden
