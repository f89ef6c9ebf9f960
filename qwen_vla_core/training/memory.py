"""How much memory a training step will take, before it is tried.

What stays between steps is counted: weights, gradients, two moments of AdamW per trained number, averaged weights.
What a forward pass keeps for the backward pass depends on the code of every layer, on autocast and on the attention
kernel, so no formula of widths is trusted: one layer of every kind is really run, twice, on a few tokens, and the bytes
that autograd keeps are added up. From the two runs follow a part per token and a part per layer (half-precision copies
of weights), and from those the whole:

    kept        = weights + gradients + moments + average                            [each divided by ranks if sharded]
    ends        = answers · vocabulary · 12 + patches · width · 36 + tokens · width · 20 + context · width · 16
    activations = Σ layers (copies + per_token · tokens) + prefixes + ends
    recomputed  = Σ layers inputs + prefixes + max(Σ copies, 2 · largest layer) + ends      [activation checkpointing;
                  of a share of a part's layers: that share of both sums]
    peak        = kept + max(activations, trained numbers of AdamW's temporary)

``ends`` is what lies between the stacks of layers (embeddings, mergers, projections, the head), in bytes counted from
the code; ``prefixes`` are the context's keys and values, once per noise draw; a layer that is recomputed needs its
activations and their gradients.

Not in it: the libraries themselves (a CUDA context takes 0.5 GB), fragmentation of the allocator, the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.flops import Work
from qwen_vla_core.training.stage_recipe import NOTHING_TWICE, Recompute

# Bytes per number of the ends. Logits: in float32, their log-softmax, their gradient. Vision: four neighbours in the
# table of positions and their sum, the embedding, the merger. Text: embedding, pictures put in, final norm.
LOGIT, PATCH, TOKEN, CONTEXT = 12, 36, 20, 16
_FEW, _MORE = 64, 128  # tokens of the two runs; whole chunks of the delta rule


@dataclass(frozen=True)
class Memory:
    """Bytes of one device; see the module's formulas.

    Attributes:
        weights: in the dtype they have.
        gradients: of what trains.
        moments: AdamW's.
        average: averaged weights.
        activations: what the largest micro-batch keeps, with or without recomputation as planned.
        temporary: of AdamW's fused update.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    temporary: int

    @property
    def peak(self) -> int:
        """The most at once."""
        kept = self.weights + self.gradients + self.moments + self.average
        return kept + max(self.activations, self.temporary)

    def to_json(self) -> dict[str, int]:
        """For ``--json``."""
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Kept:
    """What one kind of layer keeps for its backward pass.

    Attributes:
        layers: how many there are.
        per_token: bytes.
        per_layer: bytes that do not depend on tokens.
        input_per_token: bytes of what goes in, all that stays under recomputation.
        tokens: of the micro-batch.
    """

    layers: int
    per_token: float
    per_layer: float
    input_per_token: float
    tokens: int

    @property
    def one(self) -> float:
        """Bytes of one layer."""
        return self.per_layer + self.per_token * self.tokens


def estimate_memory(
    policy: QwenVLA,
    parts: Sequence[Work],
    precision: str = "bf16",
    recompute: Recompute = NOTHING_TWICE,
    average: bool = True,
    ranks: int = 1,
    sharded: bool = False,
) -> Memory:
    """Estimates one rank's memory.

    Args:
        policy: frozen as it will be trained; checkpointed and compiled or not, but not sharded yet. It may be on the
            meta device: its layers are run where they are, those on the meta device as copies on the CPU.
        parts: micro-batches of one rank, from ``flops.work_of``; the largest counts.
        precision: ``bf16`` for autocast, ``fp32``.
        recompute: shares of the layers with activation checkpointing.
        average: whether averaged weights are kept.
        ranks: their number.
        sharded: whether what is kept between steps is divided among them (FSDP2).
    """
    share = ranks if sharded else 1
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    activations = [_activations(policy, work, precision == "bf16", recompute) for work in parts]
    return Memory(
        weights=weights // share,
        gradients=trained // share,
        moments=2 * trained // share,
        average=(weights if average else 0) // share,
        activations=round(max(activations, default=0)),
        temporary=trained // share,
    )


def _activations(policy: QwenVLA, work: Work, half: bool, recompute: Recompute) -> float:
    parts = (
        (_vision_layers(policy, work, half), recompute.vision),
        (_text_layers(policy, work, half), recompute.language),
        (_decoder_layers(policy, work, half), recompute.decoder),
    )
    kinds = [(kind, share) for part, share in parts for kind in part]
    if not kinds:
        return 0.0
    kept = sum((1.0 - share) * kind.layers * kind.one for kind, share in kinds)
    inputs = sum(share * kind.layers * kind.input_per_token * kind.tokens for kind, share in kinds)
    copies = sum(share * kind.layers * kind.per_layer for kind, share in kinds)
    again = 2 * max((kind.one for kind, share in kinds if share), default=0.0)
    return kept + inputs + max(copies, again) + _ends(policy, work) + _prefixes(policy, work, half)


def _ends(policy: QwenVLA, work: Work) -> float:
    text, visual = policy.backbone.config.get_text_config(), policy.backbone.config.vision_config
    sees, reads = _trains(policy)
    size = 0.0
    if sees:
        size += PATCH * sum(work.frames) * visual.hidden_size
    if reads:
        size += LOGIT * work.answers * text.vocab_size + TOKEN * sum(work.rows) * text.hidden_size
    return size + CONTEXT * sum(work.contexts) * policy.config.decoder.width


def _trains(policy: QwenVLA) -> tuple[bool, bool]:
    """Whether gradients go through the vision tower, and through the text model."""
    sees = any(p.requires_grad for p in policy.backbone.visual.parameters())
    return sees, sees or any(p.requires_grad for p in policy.backbone.parameters())


def _prefixes(policy: QwenVLA, work: Work, half: bool) -> float:
    config = policy.config.decoder
    if config.context == "joint":
        return 0.0
    numbers = 2 * sum(work.contexts) * config.heads * config.head_dim * config.depth
    return numbers * work.draws * (2.0 if half else 4.0)


def _vision_layers(policy: QwenVLA, work: Work, half: bool) -> list[Kept]:
    visual: Any = policy.backbone.visual
    patches = sum(work.frames)
    if not (_trains(policy)[0] and patches):
        return []
    size = visual.config.hidden_size
    head_dim = size // visual.config.num_heads

    def see(block: nn.Module, count: int) -> Any:
        x = _input(block, (count, size), True)
        turns = torch.zeros(count, head_dim, device=x.device)
        borders = torch.tensor([0, count], dtype=torch.int32, device=x.device)
        return block(x, cu_seqlens=borders, position_embeddings=(turns, turns), max_seqlen=count)

    return _kinds(visual.blocks, see, patches, 4.0 * size, half)


def _text_layers(policy: QwenVLA, work: Work, half: bool) -> list[Kept]:
    text: Any = policy.backbone.model.model.language_model
    tokens = len(work.rows) * max(work.rows, default=0)
    if not (_trains(policy)[1] and tokens):
        return []
    size = text.config.hidden_size
    rotary = _real(text.rotary_emb)

    def read(layer: nn.Module, count: int) -> Any:
        x = _input(layer, (1, count, size), True)
        positions = torch.arange(count, device=x.device).expand(3, 1, -1)
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=None)

    return _kinds(text.layers, read, tokens, 4.0 * size, half)


def _decoder_layers(policy: QwenVLA, work: Work, half: bool) -> list[Kept]:
    if not work.horizons or not any(p.requires_grad for p in policy.parameters()):
        return []
    config = policy.config.decoder
    blocks: Any = policy.decoder.blocks
    rows, draws, horizon = len(work.contexts), work.draws, max(work.horizons)
    context = max(work.contexts)
    per_token = 4.0 * config.width

    def turns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.zeros(1, 1, x.shape[1], config.head_dim, device=x.device)
        return angle, angle

    def denoise(block: Any, count: int, times: int, prefix: int) -> Any:
        x = _input(block, (1, count, config.width), True)
        condition = torch.zeros(1, times, config.width, device=x.device)
        if not prefix:
            return block(x, block.times(condition), turns(x), None)
        shape = (1, config.heads, prefix, config.head_dim)
        keys = (_input(block, shape, True), _input(block, shape, True))
        return block(x, block.times(condition), turns(x), None, keys)

    if config.context == "joint":
        tokens = rows * draws * (context + horizon)
        return _kinds(blocks, lambda block, count: denoise(block, count, count, 0), tokens, per_token, half)

    def read(block: Any, count: int) -> Any:
        x = _input(block, (1, count, config.width), True)
        return block.context_step(x, turns(x), None)

    found = _kinds(blocks, read, rows * context, per_token, half)
    # Actions with a prefix whose length per action is that of this batch: keys and values are kept joined.
    ratio = max(1, round(context / horizon))
    act = _kinds(
        blocks,
        lambda block, count: denoise(block, count // 8, 1, ratio * count // 8),
        rows * draws * horizon * 8,
        per_token / 8,
        half,
    )
    return found + act


def _kinds(layers: Any, run: Callable[[Any, int], Any], tokens: int, input_per_token: float, half: bool) -> list[Kept]:
    """Runs one of every kind of layer; alike are those with parameters of the same names and shapes."""
    groups: dict[tuple[Any, ...], list[nn.Module]] = {}
    for layer in layers:
        key = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
        groups.setdefault(key, []).append(layer)
    found = []
    for members in groups.values():
        layer = _real(members[0])
        with _as_written(layer):
            few, more = (kept_bytes(layer, partial(run, layer, count), half) for count in (_FEW, _MORE))
        per_token = (more - few) / (_MORE - _FEW)
        found.append(Kept(len(members), per_token, max(few - per_token * _FEW, 0.0), input_per_token, tokens))
    return found


@contextmanager
def _as_written(layer: Any) -> Iterator[None]:
    """The layer without recomputation and compilation, which replace its methods by attributes of the same names."""
    replaced = {name: value for name, value in vars(layer).items() if callable(getattr(type(layer), name, None))}
    recomputes = getattr(layer, "gradient_checkpointing", None)
    for name in replaced:
        delattr(layer, name)
    if recomputes is not None:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for name, value in replaced.items():
            setattr(layer, name, value)
        if recomputes is not None:
            layer.gradient_checkpointing = recomputes


def kept_bytes(module: nn.Module, run: Callable[[], Any], half: bool) -> int:
    """Bytes that autograd keeps of a call, without the module's parameters; what is kept twice counts once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(module.parameters()).device.type
    with (
        torch.enable_grad(),
        torch.autocast(device, torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = run()
    del output
    return sum(sizes.values())


def _input(layer: Any, shape: tuple[int, ...], gradient: bool) -> torch.Tensor:
    parameter = next(layer.parameters())
    return torch.zeros(shape, device=parameter.device, dtype=torch.float32, requires_grad=gradient)


def _real(module: Any) -> Any:
    """The module itself, or where it is only a shape, a copy of zeros on the CPU."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return module
    real = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*real.parameters(), *real.buffers()]:
            tensor.zero_()
    return real
