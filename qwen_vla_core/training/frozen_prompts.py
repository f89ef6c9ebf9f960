"""T2A's task: flow matching on whole sequences, behind a frozen backbone whose readings of prompts are remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qwen_vla_core.model.backbone import Encoded
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.flops import Work, work_of
from qwen_vla_core.training.stage import PolicyTask, Stage

REMEMBERED = 20_000  # prompts: 12 GB at the paper's width of 2,560 and 60 tokens each, 600 MB at the tiny one


class FrozenPrompts(PolicyTask):
    """``PolicyTask`` that reads each prompt once."""

    def __init__(self, stage: Stage) -> None:
        """See ``PolicyTask``; the backbone has no rate."""
        super().__init__(stage)
        self.module = _Remembering(self.module, stage.policy)

    def work(self, part: Mapping[str, torch.Tensor]) -> Work:
        """Without the backbone's reading, which is nearly always remembered."""
        return work_of(part, self._draws, read=False)


class _Remembering(nn.Module):
    def __init__(self, module: nn.Module, policy: QwenVLA) -> None:
        super().__init__()
        self.module = module
        self._policy = (policy,)  # in a tuple: it is no part of this module
        self._known: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()

    def forward(self, batch: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        return self.module(batch, hidden=self.read(batch), **options)

    @torch.no_grad()
    def read(self, batch: dict[str, torch.Tensor]) -> Encoded:
        """What the backbone would say to the batch; only new prompts are put to it."""
        policy, ids, mask = self._policy[0], batch["input_ids"], batch["attention_mask"].bool()
        device = policy.device
        keys = [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
        new = {key: index for index, key in enumerate(keys) if key not in self._known}
        if new:
            rows = torch.tensor(list(new.values()), device=ids.device)
            was_training = policy.backbone.training
            policy.backbone.eval()
            text = {key: batch[key][rows] for key in ("input_ids", "mm_token_type_ids", "attention_mask")}
            hidden = policy._encode(text).hidden
            policy.backbone.train(was_training)
            for key, row in zip(new, hidden, strict=True):
                self._known[key] = row[: len(key)].float().cpu()
        width = next(iter(self._known.values())).shape[-1]
        hidden = torch.zeros(*ids.shape, width, device=device)
        for index, key in enumerate(keys):
            self._known.move_to_end(key)
            hidden[index, : len(key)] = self._known[key].to(device)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        return Encoded(hidden, positions.to(device), None if bool(mask.all()) else mask.to(device))
