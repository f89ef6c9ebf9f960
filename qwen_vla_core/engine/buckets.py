"""Requests of one or several robots as one batch of fixed shapes.

Rows are padded on the right. The backbone is causal, so padding cannot reach a real token and needs no mask there; the
action decoder looks in both directions and gets a mask, but only where something is really padded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen_vla_core.engine.inputs import Ready, Row, Size
from qwen_vla_core.engine.ops import Rotary, Valid
from qwen_vla_core.model.policy import QwenVLA

LENGTH_STEP = 32  # prompt buckets, in tokens with the pictures' own
LONG_STEP = 128  # beyond LONG tokens
LONG = 512
KEPT_ARRANGEMENTS = 64


@dataclass(frozen=True)
class Bucket:
    """The shapes of a batch; two batches of one bucket can share a CUDA graph.

    Attributes:
        batch: B rows.
        pictures: (size, how many) of every picture size in the batch.
        length: L, tokens of the longest prompt, padding included.
        horizon: H, action tokens of the longest chunk.
        padded: whether a row may be shorter, so that masks are needed.
    """

    batch: int
    pictures: tuple[tuple[Size, int], ...]
    length: int
    horizon: int
    padded: bool


@dataclass(frozen=True)
class Arrangement:
    """What of a batch depends on robots and sentences only, on the device.

    Attributes:
        bucket: its shapes.
        ids: (B, L) long.
        slots: per picture size, (tokens,) long, where its pictures' tokens go in the flattened (B · L).
        text_rotary: the backbone's cos and sin, (B, L, 1, r).
        context_rotary: the decoder's, (B, 1, C, d); C is L and, if the state is a token, one more.
        action_rotary: the decoder's, (B, 1, H, d).
        valid: which tokens of the decoder's sequence are real.
        next_position: (B,) long, of the first action token.
        real: (B, H, K) bool, real channels of real steps.
    """

    bucket: Bucket
    ids: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    text_rotary: Rotary
    context_rotary: Rotary
    action_rotary: Rotary
    valid: Valid
    next_position: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A batch ready to run; everything but ``arrangement`` is on the CPU.

    Attributes:
        arrangement: see there.
        pictures: per picture size, (N, height, width, 3) uint8.
        state: (B, state channels) float32, or None where the decoder takes no state token.
    """

    arrangement: Arrangement
    pictures: tuple[torch.Tensor, ...]
    state: torch.Tensor | None


def bucket_length(tokens: int) -> int:
    """The bucket of a prompt: few different lengths, little padding; there is no longest one."""
    step = LENGTH_STEP if tokens <= LONG else LONG_STEP
    return -(-tokens // step) * step


class Packer:
    """Makes ``Packed`` batches for one policy."""

    def __init__(self, policy: QwenVLA, text_rotary: Callable[[torch.Tensor], Rotary], fixed: bool) -> None:
        """
        Args:
            policy: on its device.
            text_rotary: (3, B, L) positions → the backbone's cos and sin.
            fixed: round lengths up to buckets, for programs compiled or captured per shape; False: no padding that the
                batch does not need.
        """
        self.policy, self.fixed = policy, fixed
        self._text_rotary = text_rotary
        self._kept: OrderedDict[tuple[int, ...], tuple[tuple[Row, ...], Arrangement]] = OrderedDict()

    def __call__(self, ready: Sequence[Ready]) -> Packed:
        """One batch of these requests, in order."""
        groups: dict[Size, list[torch.Tensor]] = {}
        for request in ready:
            for size, picture in zip(request.row.sizes, request.pictures, strict=True):
                groups.setdefault(size, []).append(picture)
        decoder = self.policy.config.decoder
        state = None
        if self.policy.config.state_mode == "dit_token":
            padded = np.zeros((len(ready), decoder.state_channels), dtype=np.float32)
            for line, request in zip(padded, ready, strict=True):
                line[: len(request.state)] = request.state
            state = torch.from_numpy(padded)
        arrangement = self.arrangement(tuple(request.row for request in ready))
        return Packed(arrangement, tuple(torch.stack(group) for group in groups.values()), state)

    def arrangement(self, rows: tuple[Row, ...]) -> Arrangement:
        """The kept arrangement of these rows, or a new one."""
        key = tuple(map(id, rows))  # rows are kept beside it, so an id cannot be given to another row
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        made = self._arrange(rows)
        self._kept[key] = (rows, made)
        if len(self._kept) > KEPT_ARRANGEMENTS:
            self._kept.popitem(last=False)
        return made

    @torch.no_grad()
    def _arrange(self, rows: tuple[Row, ...]) -> Arrangement:
        policy, decoder, device = self.policy, self.policy.config.decoder, self.policy.device
        lengths, horizons = [row.length for row in rows], [row.horizon for row in rows]
        length = bucket_length(max(lengths)) if self.fixed else max(lengths)
        horizon = max(horizons)
        padded = self.fixed or len(set(lengths)) > 1 or len(set(horizons)) > 1
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        slots: dict[Size, list[torch.Tensor]] = {}
        for index, row in enumerate(rows):
            ids[index, : row.length] = row.ids
            ids[index, row.length :] = row.ids[-1]
            positions[:, index, : row.length] = row.positions
            for size, where in zip(row.sizes, row.slots, strict=True):
                slots.setdefault(size, []).append(where + index * length)
        following = torch.tensor([row.next_position for row in rows])
        positions = positions.to(device)
        context_positions = positions
        if policy.config.state_mode == "dit_token":
            context_positions = torch.cat((positions, following.to(device).expand(3, -1)[..., None]), 2)
            following = following + 1
        counts = torch.tensor([lengths, horizons], dtype=torch.int32).T.contiguous()
        steps = torch.arange(horizon)
        real_steps = steps < counts[:, 1:]
        action_positions = (following[:, None] + steps).to(device).expand(3, -1, -1)
        real = real_steps[..., None] & (
            torch.arange(decoder.channels) < torch.tensor([row.channels for row in rows])[:, None, None]
        )
        context_mask = key_mask = None
        if padded:
            shown = torch.ones(len(rows), context_positions.shape[2], dtype=torch.bool)
            shown[:, :length] = torch.arange(length) < counts[:, :1]
            context_mask = shown[:, None, None].to(device)
            key_mask = torch.cat((shown, real_steps), 1)[:, None, None].to(device)
        dtype = policy.decoder.context_in.weight.dtype
        bucket = Bucket(
            len(rows),
            tuple((size, len(where)) for size, where in slots.items()),
            length,
            horizon,
            padded,
        )
        return Arrangement(
            bucket=bucket,
            ids=ids.to(device),
            slots=tuple(torch.cat(where).to(device) for where in slots.values()),
            text_rotary=self._text_rotary(positions),
            context_rotary=policy.decoder.rotary(context_positions, dtype),
            action_rotary=policy.decoder.rotary(action_positions, dtype),
            valid=Valid(context_mask, key_mask, counts.to(device), length, horizon),
            next_position=following.to(device),
            real=real.to(device),
        )
