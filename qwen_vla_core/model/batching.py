"""From rows to tensors: observations of any robots and conversations, in one right-padded batch.

The same code serves training and inference, so a policy sees at run time what it saw in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from qwen_vla_core.model.config import ModelConfig
from qwen_vla_core.model.processor import Processor, Sample

# What says how a batch is laid out.
LAYOUT = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
STATE_BINS = 256
Kind = Literal["action", "navigation"]
KINDS: tuple[Kind, ...] = ("action", "navigation")


def kind_of(convention: str) -> Kind:
    """The loss that the actions of a robot with this convention belong to."""
    return "navigation" if convention == "waypoint" else "action"


@dataclass(frozen=True)
class ActionRow:
    """One observation of one robot, with normalised numbers.

    Attributes:
        images: view → (height, width, 3) or (n, height, width, 3) uint8 RGB, in model order.
        prompt: the embodiment sentence with the instruction.
        state: (c_s,) normalised, or None for data that has no state to show (T2A).
        channels: c, the number of real action channels.
        actions_hc: (H, c) normalised targets; None at inference.
        step_mask_h: (H,) bool, False where a target means nothing; None = all real.
        turns: (question, answer) pairs after the prompt, see ``Sample``.
        kind: which loss its actions belong to [P: actions and navigation are weighted apart].
    """

    images: Mapping[str, np.ndarray]
    prompt: str
    state: np.ndarray | None
    channels: int
    actions_hc: np.ndarray | None = None
    step_mask_h: np.ndarray | None = None
    turns: tuple[tuple[str, str], ...] = ()
    kind: Kind = "action"


Row = ActionRow | Sample


def collate_rows(processor: Processor, config: ModelConfig, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """One batch of N rows, B of them with actions.

    Returns:
        What ``Processor.collate`` returns for all N rows (without ``labels`` where no row has an answer), and, where
        there are action rows, ``action_rows`` (B,) their positions (left out when all rows are), ``channel_mask``
        (B, K) bool, ``kind`` (B,) long, index into ``KINDS``, ``state`` (B, state channels) where the decoder takes a
        state token, ``actions`` (B, H, K) and, where a step is not real, ``step_mask`` (B, H) bool.
    """
    batch = processor.collate([conversation(row, config) for row in rows])
    if all(not row.turns for row in rows):
        del batch["labels"]
    where = [index for index, row in enumerate(rows) if isinstance(row, ActionRow)]
    acting = [row for row in rows if isinstance(row, ActionRow)]
    if not acting:
        return batch
    decoder = config.decoder
    if len(acting) < len(rows):
        batch["action_rows"] = torch.tensor(where)
    channels = torch.tensor([row.channels for row in acting])
    batch["channel_mask"] = torch.arange(decoder.channels) < channels[:, None]
    batch["kind"] = torch.tensor([KINDS.index(row.kind) for row in acting])
    if config.state_mode == "dit_token":
        states = torch.zeros(len(acting), decoder.state_channels)
        for row, state in zip(acting, states, strict=True):
            if row.state is not None:
                state[: len(row.state)] = torch.as_tensor(np.asarray(row.state, dtype=np.float32))
        batch["state"] = states
    if all(row.actions_hc is not None for row in acting):
        batch |= _targets(acting, decoder.channels)
    return batch


def _targets(rows: Sequence[ActionRow], channels: int) -> dict[str, torch.Tensor]:
    horizon = max(len(row.actions_hc) for row in rows if row.actions_hc is not None)
    actions = torch.zeros(len(rows), horizon, channels)
    mask = torch.zeros(len(rows), horizon, dtype=torch.bool)
    for index, row in enumerate(rows):
        target: Any = row.actions_hc
        actions[index, : len(target), : target.shape[1]] = torch.as_tensor(np.asarray(target, dtype=np.float32))
        valid = np.ones(len(target), bool) if row.step_mask_h is None else np.asarray(row.step_mask_h, dtype=bool)
        mask[index, : len(target)] = torch.from_numpy(valid)
    # A mask without padding is left out: it would cost the fast attention kernels.
    return {"actions": actions} if bool(mask.all()) else {"actions": actions, "step_mask": mask}


def conversation(row: Row, config: ModelConfig) -> Sample:
    """What the processor is given for a row: pictures, prompt (with the state, where it enters as text) and turns."""
    if isinstance(row, Sample):
        return row
    prompt = row.prompt
    if config.state_mode == "prompt" and row.state is not None:
        bins = np.clip((np.asarray(row.state) + 1.0) * 0.5 * STATE_BINS, 0, STATE_BINS - 1).astype(int)
        prompt = f"{prompt} State: {' '.join(map(str, bins))}."
    return Sample(row.images, prompt, row.turns)


def on_device(part: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch where it is computed, but for ``LAYOUT``: Python reads that, and a GPU would be waited for."""
    return {key: value if key in LAYOUT else value.to(device) for key, value in part.items()}
