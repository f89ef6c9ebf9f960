"""The policy with a value head beside it, as reinforcement learning sees it: read, act, judge again.

The value is a linear function of the mean of the backbone's hidden states, behind a stop-gradient [P]: learning what to
expect must not change what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.action_decoder import Context
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.flow_sde import (
    Draw,
    SdeConfig,
    Transition,
    Velocity,
    counted_elements,
    log_prob,
    sample_chunk,
)


@dataclass(frozen=True)
class Reading:
    """What the backbone made of B observations of one robot. Worth keeping where it does not change: frozen.

    Attributes:
        hidden: (B, L, D) hidden states.
        positions: (3, B, L) M-RoPE positions.
        mask: (B, L) bool, True = real token.
        state: (B, state channels) where the decoder takes a state token.
        channel_mask: (B, K) bool, True = real channel.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    state: torch.Tensor | None
    channel_mask: torch.Tensor

    def rows(self) -> list[Reading]:
        """B readings of one observation each, without padding, copied to the CPU's memory."""
        return [
            Reading(
                self.hidden[i : i + 1, : int(count)].detach().cpu().clone(),
                self.positions[:, i : i + 1, : int(count)].cpu().clone(),
                self.mask[i : i + 1, : int(count)].cpu().clone(),
                None if self.state is None else self.state[i : i + 1].cpu().clone(),
                self.channel_mask[i : i + 1].cpu().clone(),
            )
            for i, count in enumerate(self.mask.sum(1))
        ]

    @staticmethod
    def stack(rows: Sequence[Reading], device: torch.device) -> Reading:
        """One batch of rows, padded on the right."""
        length = max(row.hidden.shape[1] for row in rows)

        def padded(x: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - x.shape[dim]
            return torch.cat((x, x.new_zeros([*x.shape[:dim], missing, *x.shape[dim + 1 :]])), dim) if missing else x

        states = [row.state for row in rows if row.state is not None]
        return Reading(
            torch.cat([padded(row.hidden, 1) for row in rows]).to(device),
            torch.cat([padded(row.positions, 2) for row in rows], 1).to(device),
            torch.cat([padded(row.mask, 1) for row in rows]).to(device),
            torch.cat(states).to(device) if states else None,
            torch.cat([row.channel_mask for row in rows]).to(device),
        )


class ActorCritic(nn.Module):
    """``policy`` and the linear head ``value`` that says how much success is to be expected."""

    def __init__(self, policy: QwenVLA) -> None:
        super().__init__()
        self.policy = policy
        self.value = nn.Linear(policy.backbone.hidden_size, 1, dtype=torch.float32).to(policy.device)
        nn.init.zeros_(self.value.weight)  # nothing is expected before anything has been seen
        nn.init.zeros_(self.value.bias)

    def read(self, observations: Sequence[Observation], robot: str) -> Reading:
        """Observations of one robot through the backbone."""
        inputs = self.policy.collate(observations, robot)
        encoded = self.policy.backbone.encode(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs.get("pixel_values"),
            inputs.get("image_grid_thw"),
            inputs.get("attention_mask"),
        )
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if encoded.mask is None else encoded.mask
        return Reading(encoded.hidden, encoded.positions, mask, inputs.get("state"), inputs["channel_mask"])

    def expected(self, reading: Reading) -> torch.Tensor:
        """(B,) values, float32."""
        with torch.autocast(reading.hidden.device.type, enabled=False):
            hidden = reading.hidden.detach().float()
            weight = reading.mask[..., None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
            return self.value(pooled)[:, 0]

    def act(
        self,
        reading: Reading,
        noise_bhk: torch.Tensor,
        fresh_bhk: torch.Tensor,
        index_b: torch.Tensor,
        executed: int,
        config: SdeConfig,
    ) -> Draw:
        """Samples chunks; the noises may hold anything in padded channels. See ``flow_sde.sample_chunk``."""
        real = reading.channel_mask[:, None]
        counted = counted_elements(reading.channel_mask, noise_bhk.shape[1], executed)
        noise, fresh = torch.where(real, noise_bhk, 0.0), torch.where(real, fresh_bhk, 0.0)
        return sample_chunk(self._velocity(reading), noise, fresh, index_b, counted, config)

    def judge(
        self, reading: Reading, transition: Transition, executed: int, config: SdeConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) log-probabilities of stored transitions and (B,) values, under the current weights."""
        counted = counted_elements(reading.channel_mask, transition.before.shape[1], executed)
        return log_prob(self._velocity(reading), transition, counted, config), self.expected(reading)

    def _velocity(self, reading: Reading) -> Velocity:
        decoder = self.policy.decoder
        hidden = reading.hidden.to(decoder.context_in.weight.dtype)
        mask = None if bool(reading.mask.all()) else reading.mask
        context: Context = decoder.encode_context(decoder.embed_context(hidden, reading.positions, mask, reading.state))
        return lambda noisy, tau: decoder.denoise_step(context, noisy, tau, reading.channel_mask)
