"""How much arithmetic a batch is, from shapes alone: for model FLOPs utilisation and for estimates before a run.

Counted are **model FLOPs**, what the mathematics of one forward and one backward pass needs, after PaLM's appendix B
(Chowdhery et al., arXiv 2204.02311) and Kaplan et al. (arXiv 2001.08361): a multiplication and an addition are two, so
every number of a weight matrix costs 2 per token forward, 2 for the gradient of its input and 2 for its own, together
the well-known 6·N·tokens; scores and weighted values of attention cost 4·queries·keys·heads·head_dim forward and twice
that backward, causal or not, as PaLM counts them. A gated delta layer (Yang et al., arXiv 2412.06464) is counted by its
recurrence: decay aside, k·S, the rank-one update and q·S are 6·d_k·d_v per token and value head.

So what an implementation does beyond that does not count as work: recomputed activations, padding, chunked kernels of
the delta rule (which do about twice as much), the optimizer, norms and other element-wise work. What is frozen costs
its forward pass, and the gradient of its input only where something before it trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.model.processor import IGNORED_LABEL


@dataclass(frozen=True)
class Work:
    """What one batch makes the model read and write, in tokens.

    Attributes:
        rows: tokens of each row; empty where the backbone's reading was kept from earlier (T2A).
        frames: patches of each picture.
        answers: positions that go through the language head.
        contexts: context tokens of each row with actions, the state's token among them.
        states: how many rows have a state token.
        horizons: actions of each row with actions.
        draws: noise draws per row.
        times: flow times per draw: 1, or the horizon where each action has its own.
    """

    rows: tuple[int, ...]
    frames: tuple[int, ...]
    answers: int
    contexts: tuple[int, ...]
    states: int
    horizons: tuple[int, ...]
    draws: int = 1
    times: int = 1

    @property
    def tokens(self) -> int:
        """What ``tokens_per_s`` counts: tokens of the rows, and actions once per draw."""
        return sum(self.rows or self.contexts) + self.draws * sum(self.horizons)


def work_of(batch: Mapping[str, torch.Tensor], draws: int = 1, read: bool = True, padded: bool = False) -> Work:
    """Reads the sizes off a batch.

    Args:
        batch: from ``collate_rows``.
        draws: noise draws per observation.
        read: False where the backbone's hidden states are given.
        padded: count padding as well, as a profiler does.
    """
    shape = batch["input_ids"].shape
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones(shape, dtype=torch.bool)
    full = torch.full((shape[0],), shape[1])
    lengths = full if padded else mask.sum(1)
    grid = batch.get("image_grid_thw")
    frames = () if grid is None or not read else tuple(int(h * w) for t, h, w in grid.tolist() for _ in range(t))
    answers = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) if "labels" in batch and read else 0
    contexts, horizons, states = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 0
    if "actions" in batch:
        shown = batch.get("context_mask", mask)
        chosen = batch.get("action_rows", torch.arange(shape[0], device=shown.device))
        contexts = shown[chosen].sum(1)
        horizons = torch.full((len(chosen),), batch["actions"].shape[1])
        if padded:
            contexts = torch.full_like(contexts, int(contexts.max()))
        elif "step_mask" in batch:
            horizons = batch["step_mask"].sum(1)
        if "state" in batch:
            states = len(chosen)
            contexts = contexts + 1
    times = batch["tau"].shape[1] if "tau" in batch else 1
    if "prefix" in batch:
        times = int(batch["actions"].shape[1])
    return Work(
        rows=tuple(lengths.tolist()) if read else (),
        frames=frames,
        answers=answers,
        contexts=tuple(contexts.tolist()),
        states=states,
        horizons=tuple(horizons.tolist()),
        draws=draws,
        times=times,
    )


@dataclass(frozen=True)
class Weights:
    """Matrices that every token of one kind passes once.

    Attributes:
        count: their numbers.
        trained: of these, the ones that get a gradient.
    """

    count: int
    trained: int

    @classmethod
    def of(cls, *modules: nn.Module | None) -> Weights:
        """All matrices below ``modules``. Embedding tables are looked up, not multiplied with; vectors are left out."""
        tables = {
            id(module.weight)
            for root in modules
            if root is not None
            for module in root.modules()
            if isinstance(module, nn.Embedding)
        }
        found = {id(p): p for root in modules if root is not None for p in root.parameters() if p.ndim >= 2}
        matrices = [parameter for key, parameter in found.items() if key not in tables]
        return cls(sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad))

    def flops(self, tokens: int, through: bool) -> int:
        """Forward and backward of ``tokens``; ``through``: whether the input needs a gradient."""
        return 2 * tokens * (self.count + self.trained + (self.count if through else 0))


@dataclass(frozen=True)
class FlopModel:
    """A policy's sizes, read once; see ``FlopModel.of``.

    Attributes:
        config: of the backbone.
        decoder: its configuration.
        weights: name of a part → its matrices.
        trains: ``vision``, ``language``, ``decoder`` → whether anything in it trains.
    """

    config: Any
    decoder: Any
    weights: Mapping[str, Weights]
    trains: Mapping[str, bool]

    @classmethod
    def of(cls, policy: QwenVLA) -> FlopModel:
        """Reads shapes and ``requires_grad``; also of a policy on the meta device. Freeze first, shard afterwards."""
        model, decoder = policy.backbone.model, policy.decoder
        visual: Any = policy.backbone.visual
        mergers = [visual.merger, getattr(visual, "deepstack_merger_list", None)]
        blocks: list[Any] = list(decoder.blocks)
        first, last = decoder.action_in[0], decoder.action_in[2]
        weights = {
            "patch": Weights.of(visual.patch_embed),
            "vision": Weights.of(visual.blocks),
            "merger": Weights.of(*mergers),
            "language": Weights.of(model.model.language_model),
            # A tied head shares the table's numbers, but it does multiply with them.
            "head": _matrix(model.lm_head.weight),
            "context_in": Weights.of(decoder.context_in),
            "state_in": Weights.of(decoder.state_in),
            "action_in": Weights.of(first),
            "action": Weights.of(last, decoder.action_out),
            "qkv": Weights.of(*(block.qkv for block in blocks)),
            "qkv_last": Weights.of(blocks[-1].qkv),
            "blocks": Weights.of(*(module for block in blocks for module in (block.qkv, block.out, block.ffn))),
            "block_last": Weights.of(blocks[-1].qkv, blocks[-1].out, blocks[-1].ffn),
            "time_in": Weights.of(decoder.time_in[0]),
            "time": Weights.of(decoder.time_in[2]),
            "output_modulation": Weights.of(decoder.output_modulation),
            "modulation": Weights.of(*(block.modulation for block in blocks)),
        }
        trains = {
            "vision": _trains(visual.parameters()),
            "decoder": _trains(decoder.parameters()),
            "language": _trains(
                p for name, p in policy.backbone.named_parameters() if not name.startswith("model.model.visual.")
            ),
        }
        return cls(policy.backbone.config, policy.config.decoder, weights, trains)

    def backbone(self, work: Work) -> int:
        """FLOPs of the backbone with its head, forward and backward."""
        return self.vision(work) + self.language(work)

    def vision(self, work: Work) -> int:
        """FLOPs of the vision tower."""
        config = self.config.vision_config
        patches = sum(work.frames)
        merged = patches // config.spatial_merge_size**2
        through = self.trains["vision"]
        total = self.weights["patch"].flops(patches, through=False)
        total += self.weights["vision"].flops(patches, through) + self.weights["merger"].flops(merged, through)
        # Qwen2.5-VL attends inside windows in most of its layers.
        window = getattr(config, "window_size", None)
        whole = len(getattr(config, "fullatt_block_indexes", ())) if window else config.depth
        size = (window // config.patch_size) ** 2 if window else 0
        pairs = sum(whole * n * n + (config.depth - whole) * n * min(n, size) for n in work.frames)
        return total + attention_flops(pairs, config.hidden_size, through)

    def language(self, work: Work) -> int:
        """FLOPs of the text model and of the language head."""
        config = self.config.get_text_config()
        tokens = sum(work.rows)
        through = self.trains["vision"] or self.trains["language"]
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        linear = kinds.count("linear_attention")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        total = self.weights["language"].flops(tokens, through) + self.weights["head"].flops(work.answers, through)
        pairs = (len(kinds) - linear) * sum(n * n for n in work.rows)
        total += attention_flops(pairs, config.num_attention_heads * head_dim, through)
        if linear:
            state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
            total += linear * 6 * tokens * state * (3 if through else 1)
        return total

    def action_decoder(self, work: Work) -> int:
        """FLOPs of the action decoder over all draws; its weights cost what they do however the context is arranged."""
        config, weights = self.decoder, self.weights
        inner = config.heads * config.head_dim
        before = self.trains["vision"] or self.trains["language"]
        through = before or self.trains["decoder"]
        context, draws = sum(work.contexts), work.draws
        actions, chunks = draws * sum(work.horizons), draws * len(work.horizons)
        own, times = self.trains["decoder"], chunks * work.times
        total = weights["context_in"].flops(context - work.states, before)
        total += weights["state_in"].flops(work.states, through=False)
        total += weights["action_in"].flops(actions, through=False) + weights["action"].flops(actions, through)
        total += weights["output_modulation"].flops(times, own)
        lengths = list(zip(work.contexts, work.horizons, strict=True))
        if config.context == "joint":
            # Every token of the one sequence is modulated, in every draw.
            tokens = draws * context + actions
            total += weights["blocks"].flops(tokens, through) + weights["modulation"].flops(tokens, own)
            embedded = times + chunks
            pairs = config.depth * draws * sum((c + h) ** 2 for c, h in lengths)
        else:
            # The context is run once for all draws; of its last block only keys and values are needed.
            total += weights["blocks"].flops(context + actions, through) + weights["modulation"].flops(times, own)
            total += weights["qkv_last"].flops(context, through) - weights["block_last"].flops(context, through)
            embedded = times
            pairs = (config.depth - 1) * sum(c * c for c, _ in lengths)
            pairs += config.depth * draws * sum(h * (c + h) for c, h in lengths)
        total += weights["time_in"].flops(embedded, through=False) + weights["time"].flops(embedded, own)
        return total + attention_flops(pairs, inner, through)

    def total(self, work: Work) -> int:
        """Model FLOPs of one batch, forward and backward."""
        return self.backbone(work) + self.action_decoder(work)


def attention_flops(pairs: int, inner: int, through: bool) -> int:
    """Scores and weighted values of ``pairs`` (query, key) pairs over heads · head_dim = ``inner``."""
    return 4 * pairs * inner * (3 if through else 1)


def _matrix(weight: nn.Parameter) -> Weights:
    return Weights(weight.numel(), weight.numel() if weight.requires_grad else 0)


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
