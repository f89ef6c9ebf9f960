"""A policy spread over ranks: DDP (every rank holds everything) or FSDP2 (every rank holds a slice), and its thrift.

Order of the calls, each optional: freeze groups → ``compile_blocks`` → ``checkpoint_activations`` → ``parallelise`` →
build the optimizer (FSDP2 replaces the parameters) → ``restore_state``.

Gradients are **sums** over ranks, not means: a loss that every rank divides by counts over all ranks has then the
gradient that one rank would have had.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.delta_rule import use_kernels
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.training.distributed import Ranks
from qwen_vla_core.training.stage_recipe import ALL_TWICE, NOTHING_TWICE, Recompute

Kind = Literal["ddp", "fsdp2"]
Precision = Literal["bf16", "fp32"]
# What action_decoder.py calls on a block from outside, besides forward.
BLOCK_METHODS = ("context_step", "context_keys", "times")
COMPILED_VARIANTS = 64  # of one function


def autocast(ranks: Ranks, precision: Precision) -> torch.autocast:
    """The context that forward passes run in: bfloat16 autocast, or nothing. Weights and moments stay float32 [X]."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=precision == "bf16")


class EveryPart(nn.Module):
    """The policy, with every part in use in every forward on every rank.

    One rank's batch may hold pictures and actions, another's only text. DDP would wait for gradients that never come,
    FSDP2 for a gathering of weights that the other rank never starts. So a batch without pictures looks at one black
    picture of a single token, one without actions denoises one chunk without a valid step: both add exactly zero. That
    costs less than ``find_unused_parameters``, which walks the graph of every step, and it helps FSDP2 too.
    """

    def __init__(self, policy: QwenVLA, vision: bool, decoder: bool, head: bool) -> None:
        """
        Args:
            policy: what computes.
            vision: whether batches without pictures look at one.
            decoder: whether batches without actions denoise a chunk.
            head: whether batches without answers use the language head.
        """
        super().__init__()
        self.policy = policy
        self.vision, self.decoder, self.head = vision, decoder, head
        visual: Any = policy.backbone.visual
        side = int(visual.spatial_merge_size)
        values = visual.patch_embed.proj.weight[0].numel()
        # Whether to do so in the next forward; see ``accumulating``. DDP needs it only when gradients travel.
        self.complete = True
        # Buffers would follow the module's device by themselves, but would also be part of its state.
        self.picture = (torch.zeros(side * side, values), torch.tensor([[1, side, side]]))

    def forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        """``QwenVLA.forward``: the sums of the losses that the batch has."""
        if not self.complete:
            return dict(self.policy(batch, **options))
        nothing: list[torch.Tensor] = []
        # With ``hidden`` given no rank runs its backbone.
        reads = options.get("hidden") is None
        if self.vision and reads and batch.get("pixel_values") is None:
            pixels, grid = (part.to(self.policy.device) for part in self.picture)
            seen = tree_leaves(self.policy.backbone.visual(pixels, grid_thw=grid))
            nothing += [part.sum() for part in seen if torch.is_tensor(part) and part.is_floating_point()]
        idle = self.decoder and "actions" not in batch
        if idle:
            still = torch.zeros(1, 1, self.policy.config.decoder.channels, device=self.policy.device)
            options = {"noise": still, "tau": still[..., 0], "hidden": options.get("hidden")}
            batch = self._with_idle_chunk(batch, still)
        sums = self.policy(batch, **options)
        if idle:
            nothing += [sums.pop(key) for key in ("action", "navigation") if key in sums]
        if self.head and reads and not self._has_answers(batch):
            width = self.policy.backbone.hidden_size
            nothing.append(self.policy.backbone.logits(torch.zeros(1, width, device=self.policy.device)).sum())
        if nothing:
            zero = torch.stack([part.float() for part in nothing]).sum() * 0.0
            key = next(iter(sums), "text")
            sums[key] = sums[key] + zero if sums else zero
        return sums

    def _with_idle_chunk(self, batch: Mapping[str, torch.Tensor], still: torch.Tensor) -> dict[str, torch.Tensor]:
        """The first row acts, for one step that is not valid."""
        idle = {
            "action_rows": torch.zeros(1, dtype=torch.long, device=still.device),
            "actions": still,
            "channel_mask": torch.ones_like(still[:, 0], dtype=torch.bool),
            "step_mask": torch.zeros_like(still[..., 0], dtype=torch.bool),
            "kind": torch.zeros(1, dtype=torch.long, device=still.device),
        }
        if self.policy.config.state_mode == "dit_token":
            idle["state"] = still.new_zeros(1, self.policy.config.decoder.state_channels)
        return {**batch, **idle}

    @staticmethod
    def _has_answers(batch: Mapping[str, torch.Tensor]) -> bool:
        return "labels" in batch and bool((batch["labels"][:, 1:] >= 0).any())


def parallelise(policy: QwenVLA, kind: Kind, ranks: Ranks, precision: Precision = "bf16") -> nn.Module:
    """The module to call forward on, on this rank's device; arguments and result are those of ``QwenVLA.forward``.

    ``policy`` keeps its parameter names and is what to save, average and clip; under FSDP2 its parameters become
    ``DTensor`` slices, so build the optimizer afterwards. Groups frozen before the call stay frozen. All ranks start
    from rank 0's weights.

    Args:
        policy: built alike on every rank.
        kind: ``ddp`` or ``fsdp2``; without torchrun there is one rank and both mean the plain policy.
        ranks: from ``distributed.start``.
        precision: under FSDP2 on CUDA, ``bf16`` also gathers weights in bfloat16; gradients are reduced in float32.
    """
    if kind not in ("ddp", "fsdp2"):
        raise UserError(f"scale.parallel {kind!r}: use ddp or fsdp2")
    if kind == "fsdp2" and any("lora_" in name for name, _ in policy.named_parameters()):
        raise UserError("scale.parallel: adapters (lora) cannot be sharded; use ddp, their states are small")
    policy.to(ranks.device)
    sharded = kind == "fsdp2" and dist.is_initialized()
    model = policy.backbone.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parts = EveryPart(
        policy,
        vision=sharded or _trains(policy.backbone.visual),
        decoder=sharded or _trains(policy.decoder),
        head=head is not embedding and (sharded or head.requires_grad),
    )
    if not dist.is_initialized():
        return parts
    if kind == "ddp":
        return replicated(parts)
    for tensor in (*policy.parameters(), *policy.buffers()):
        dist.broadcast(tensor.data, 0)
    return _sharded(parts, ranks, precision)


@contextlib.contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """Holds one micro-batch's forward and backward; ranks exchange gradients only for the last one of a step.

    Under DDP ranks may do different numbers of micro-batches, at least one each; under FSDP2 weights are gathered in
    every pass, so all ranks must do equally many.

    Args:
        module: from ``parallelise``.
        last: whether the optimizer steps after this micro-batch.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    else:
        parts = module.module if isinstance(module, DistributedDataParallel) else module
        if isinstance(parts, EveryPart):
            parts.complete = last
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def checkpoint_activations(policy: QwenVLA, recompute: Recompute = ALL_TWICE) -> None:
    """Keeps only the inputs of layers and computes the rest again in the backward pass: less memory, a third more time.

    The backbone's text layers and vision blocks use transformers' own checkpointing (in training mode only), the
    decoder's blocks torch's.

    Args:
        policy: before it is spread over ranks.
        recompute: shares of each part's layers, evenly spaced.
    """
    if recompute == NOTHING_TWICE:
        return
    model = policy.backbone.model
    # Later versions of transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layers, share in zip(_backbone_layers(policy), (recompute.vision, recompute.language), strict=True):
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = _chosen(number, share)
    for number, block in enumerate(policy.decoder.blocks):
        if _chosen(number, recompute.decoder):
            for name in ("forward", "context_step"):
                setattr(block, name, _recomputed(getattr(block, name)))


def _chosen(number: int, share: float) -> bool:
    """Whether a layer is among the share: 0.5 is every second one."""
    return math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)


def _backbone_layers(policy: QwenVLA) -> list[list[Any]]:
    """Vision blocks, and text layers."""
    roots: tuple[Any, ...] = (policy.backbone.visual, policy.backbone.model.model.language_model)
    return [[part for part in root.modules() if isinstance(part, GradientCheckpointingLayer)] for root in roots]


def compile_blocks(policy: QwenVLA) -> None:
    """Compiles what is repeated, one layer at a time: text layers, vision blocks and the decoder's blocks.

    Layers that are alike share the code, so compiling takes a minute or two, not the whole network's time. Call it
    before ``checkpoint_activations``, which wraps what was compiled.

    Raises:
        UserError: nothing can be compiled here, usually for want of a C++ compiler.
    """
    device = policy.device
    try:
        torch.compile(lambda x: x * 2.0 + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # inductor wraps whatever the tool chain says in exceptions of its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"scale.compile: torch.compile does not work on {device.type} here ({reason}); "
            "install a C++ compiler (g++) or set scale.compile to false"
        ) from error
    # ``choose_backend`` is cached and pure: tracing through its cache changes nothing.
    warnings.filterwarnings("ignore", message="(?s).*Dynamo detected a call to a `functools.lru_cache`")
    # One function to dynamo: two kinds of text layers, training or not, masked or not, sizes fixed or not.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    for layer in [layer for layers in _backbone_layers(policy) for layer in layers]:
        layer.forward = torch.compile(layer.forward)
    for block in policy.decoder.blocks:
        for name in ("forward", *BLOCK_METHODS):
            setattr(block, name, torch.compile(getattr(block, name)))


def prepare_cuda(policy: QwenVLA, ranks: Ranks, precision: Precision) -> None:
    """What makes a step fast on a GPU and changes nothing but rounding; does nothing on a CPU.

    Qwen3.5's linear layers run on kernels of their own (``delta_rule``), patches are embedded by a matrix product, and
    under bfloat16 autocast the products that stay float32 may use TF32.

    Args:
        policy: before it is spread over ranks.
        ranks: this process among all.
        precision: of the stage.
    """
    if ranks.device.type != "cuda":
        return
    if policy.backbone.config.model_type == "qwen3_5":
        use_kernels()
    policy.backbone.embed_patches_by_product()
    if precision == "bf16":
        torch.set_float32_matmul_precision("high")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def replicated(parts: nn.Module) -> nn.Module:
    """A module with the same parameters on every rank, whose gradients are sums; every parameter must be in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is not in older versions
        module = DistributedDataParallel(parts, gradient_as_bucket_view=True, broadcast_buffers=False)
    # A lambda, because DDP compares the hook's annotations with types, and ours are strings.
    module.register_comm_hook(None, lambda state, bucket: _summed(bucket))
    return module


def _summed(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own reduction divides by the number of ranks; here losses are divided by global counts already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _sharded(parts: EveryPart, ranks: Ranks, precision: Precision) -> nn.Module:
    policy = parts.policy
    # The blocks' parts return views; nothing is computed in place on them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    half = torch.bfloat16 if precision == "bf16" and ranks.device.type == "cuda" else None
    # Autocast decides what is computed in bfloat16; inputs are not cast, or targets and flow times would lose digits.
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.world,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in [layer for layers in _backbone_layers(policy) for layer in layers]:
        fully_shard(layer, **settings)
    for block in policy.decoder.blocks:
        # A block is used three times in a forward pass: gathered once, it stays until the backward pass.
        fully_shard(block, reshard_after_forward=False, **settings)
        for name in BLOCK_METHODS:
            register_fsdp_forward_method(block, name)
    fully_shard(parts, **settings)
    for module in parts.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has neither means nor scaled sums
    return parts


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call
