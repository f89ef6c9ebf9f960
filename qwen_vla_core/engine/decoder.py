"""The action decoder's two passes with fixed shapes: context once, then Euler steps without time embeddings.

Every chunk is integrated over the same flow times, so the AdaLN terms of every block and step are computed once per
number of steps, and a step reads a fifth fewer weights. Where all action tokens share τ, an AdaLN layer norm is one
affine layer norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from qwen_vla_core.engine.ops import KeyValues, Rotary, TorchOps, Valid
from qwen_vla_core.engine.qwen import join
from qwen_vla_core.model.action_decoder import ActionDecoder, Block, sinusoid


@dataclass(frozen=True)
class BlockWeights:
    """One DiT block's matrices."""

    qkv: torch.Tensor
    out: torch.Tensor
    up: torch.Tensor  # gate and up
    down: torch.Tensor
    norms: torch.Tensor  # of queries and keys, (2, head_dim)


@dataclass(frozen=True)
class StepTerms:
    """The AdaLN terms of one flow time; scales hold the 1, every vector has the decoder's width."""

    blocks: tuple[tuple[torch.Tensor, ...], ...]  # per block: shift, scale, gate of attention, then of feed-forward
    last: tuple[torch.Tensor, torch.Tensor]  # shift and scale before the output


class FastDecoder:
    """``ActionDecoder`` with ``context: cached``, for chunks whose tokens share their flow time."""

    def __init__(self, decoder: ActionDecoder, ops: TorchOps) -> None:
        """
        Args:
            decoder: on its device; gate and up projections are joined in place.
            ops: torch or CUDA kernels.
        """
        self.decoder, self.ops, self.heads = decoder, ops, decoder.config.heads
        self.blocks = [self._weights(block) for block in decoder.blocks]
        self._terms: dict[int, tuple[StepTerms, ...]] = {}
        self._indices: dict[int, torch.Tensor] = {}

    @staticmethod
    def _weights(block: torch.nn.Module) -> BlockWeights:
        assert isinstance(block, Block)
        return BlockWeights(
            block.qkv.weight.data,
            block.out.weight.data,
            join([block.ffn.gate, block.ffn.up]),
            block.ffn.down.weight.data,
            torch.stack((block.query_norm.data, block.key_norm.data)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.decoder.context_in.weight.dtype

    @torch.no_grad()
    def terms(self, steps: int) -> tuple[StepTerms, ...]:
        """The AdaLN terms of every Euler step, computed at the first use of this number of steps."""
        if steps not in self._terms:
            device = self.decoder.context_in.weight.device
            tau = 1.0 - torch.arange(steps, device=device, dtype=torch.float32)[:, None] / steps
            condition = self.decoder.time_condition(tau, self.dtype)[:, 0]
            blocks = []
            for block in self.decoder.blocks:
                assert isinstance(block, Block)
                shift1, scale1, gate1, shift2, scale2, gate2 = block.times(condition)
                blocks.append((shift1, scale1 + 1.0, gate1, shift2, scale2 + 1.0, gate2))
            shift, scale = self.decoder.output_modulation(functional.silu(condition)).chunk(2, -1)
            self._terms[steps] = tuple(
                StepTerms(
                    tuple(tuple(term[step].contiguous() for term in block) for block in blocks),
                    (shift[step].contiguous(), (scale[step] + 1.0).contiguous()),
                )
                for step in range(steps)
            )
        return self._terms[steps]

    @torch.no_grad()
    def indices(self, horizon: int) -> torch.Tensor:
        """(H, width) what is added to action token i because it is the i-th."""
        if horizon not in self._indices:
            index = torch.arange(horizon, device=self.decoder.context_in.weight.device, dtype=torch.float32)
            self._indices[horizon] = sinusoid(index, self.decoder.config.width).to(self.dtype)
        return self._indices[horizon]

    def tokens(self, hidden_bld: torch.Tensor, state_bs: torch.Tensor | None) -> torch.Tensor:
        """Hidden states and state → context tokens (B, C, width)."""
        tokens = self.ops.linear(hidden_bld.to(self.dtype), self.decoder.context_in.weight)
        if self.decoder.state_in is not None and state_bs is not None:
            tokens = torch.cat((tokens, self.decoder.state_in(state_bs.to(self.dtype))[:, None]), 1)
        return tokens

    def context(self, tokens: torch.Tensor, rotary: Rotary, valid: Valid) -> list[KeyValues]:
        """Context tokens → keys and values of every block.

        Args:
            tokens: (B, C, width).
            rotary: cos and sin, (B, 1, C, head_dim).
            valid: which are real.
        """
        ops, x = self.ops, tokens
        y: torch.Tensor | None = None
        found = []
        for index, block in enumerate(self.blocks):
            x, normed = ops.add_layer_norm(x, y)
            query, keys = ops.context_heads(ops.linear(normed, block.qkv), block.norms, rotary, self.heads)
            found.append(keys)
            if index == len(self.blocks) - 1:
                break  # nothing reads the last block's context tokens
            x, normed = ops.add_layer_norm(x, ops.linear(ops.context_attention(query, keys, valid), block.out))
            y = ops.linear(ops.silu_product(ops.linear(normed, block.up)), block.down)
        return found

    def velocity(
        self,
        noisy_bhk: torch.Tensor,
        terms: StepTerms,
        context: list[KeyValues],
        rotary: Rotary,
        valid: Valid,
    ) -> torch.Tensor:
        """One evaluation of the velocity field; see ``ActionDecoder.denoise_step``.

        Args:
            noisy_bhk: (B, H, K) float32, zero in padded channels and steps.
            terms: of this step's flow time.
            context: from ``context``.
            rotary: cos and sin of the actions, (B, 1, H, head_dim).
            valid: which tokens are real.

        Returns:
            (B, H, K) predicted ``noise − data``; padded channels and steps hold anything finite.
        """
        ops, decoder = self.ops, self.decoder
        x = decoder.action_in(noisy_bhk.to(self.dtype)) + self.indices(noisy_bhk.shape[1])
        y: torch.Tensor | None = None
        gate: torch.Tensor | None = None
        for block, (shift1, scale1, gate1, shift2, scale2, gate2), known in zip(
            self.blocks, terms.blocks, context, strict=True
        ):
            x, normed = ops.add_layer_norm(x, y, gate, scale1, shift1)
            attended = ops.action_attention(ops.few(normed, block.qkv), block.norms, rotary, self.heads, known, valid)
            x, normed = ops.add_layer_norm(x, ops.few_summed(attended, block.out), gate1, scale2, shift2)
            y, gate = ops.few_summed(ops.few_gated(normed, block.up), block.down), gate2
        _, normed = ops.add_layer_norm(x, y, gate, terms.last[1], terms.last[0])
        velocity: torch.Tensor = decoder.action_out(normed)
        return velocity

    def integrate(
        self,
        noise_bhk: torch.Tensor,
        real_bhk: torch.Tensor,
        steps: int,
        context: list[KeyValues],
        rotary: Rotary,
        valid: Valid,
    ) -> torch.Tensor:
        """All Euler steps from τ = 1 to 0; as ``flow.integrate``."""
        current = torch.where(real_bhk, noise_bhk, 0.0)
        stride = real_bhk * (-1.0 / steps)
        for terms in self.terms(steps):
            velocity = self.velocity(current, terms, context, rotary, valid)
            current = torch.addcmul(current, velocity.to(current.dtype), stride)
        return current
