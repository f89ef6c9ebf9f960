"""``TritonOps``: the operations of ``ops.TorchOps`` as CUDA kernels.

Between matrix products a step of the decoder is a few dozen values per thread: its time is the number of kernels, and
that of its products is reading their weights. So what lies between two products is one kernel, and products with few
rows are split over as many processors as it takes to read at full speed.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
import triton

from qwen_vla_core.engine import kernels
from qwen_vla_core.engine.ops import DeltaLayer, KeyValues, Rotary, TorchOps, Valid

logger = logging.getLogger(__name__)

CHUNK = 64  # tokens of the delta rule solved at once
FEW_ROWS = 64  # more rows than this go to the library's matrix product


@dataclass(frozen=True)
class Plan:
    """How ``kernels.few`` is cut: output columns and depth per block, warps, stages of its pipeline."""

    columns: int
    depth: int
    warps: int
    stages: int

    split: int = 1  # parts of the depth that different blocks sum, for ``few_summed``


PLAIN = Plan(32, 128, 4, 5)
SUMMED = Plan(32, 128, 4, 5, 4)
# What is tried on a device for the products of its decoder: the best differs between chips and widths.
PLANS = (
    Plan(16, 256, 4, 3),
    Plan(32, 128, 4, 4),
    Plan(32, 256, 4, 3),
    Plan(32, 256, 8, 3),
    Plan(64, 128, 4, 3),
    Plan(64, 128, 8, 4),
)
SPLITS = (2, 4, 8)


def _pointer(tensor: torch.Tensor | None, fallback: torch.Tensor) -> torch.Tensor:
    return fallback if tensor is None else tensor


def _fits(*sizes: int) -> bool:
    """Whether kernels can hold these sizes in one block: powers of two that a matrix unit takes."""
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _stages(x: torch.Tensor) -> int:
    """Stages of a software pipeline that holds 64 KiB each: as many as fit this chip's shared memory."""
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return 1
    return 2 if torch.cuda.get_device_capability(x.device) in ((8, 0), (9, 0), (10, 0)) else 1


class TritonOps(TorchOps):
    """Every operation as kernels; see ``TorchOps`` for what each does."""

    name = "triton"

    def __init__(self) -> None:
        self.plans: dict[tuple[object, ...], Plan] = {}

    def _norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        epsilon: float,
        centred: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(x)
        total = x if y is None else torch.empty_like(x)
        parts = 0 if y is None else y.numel() // x.numel()
        block = triton.next_power_of_2(width)
        kernels.add_norm[(rows,)](
            x, _pointer(y, x), _pointer(gate, x), _pointer(scale, x), _pointer(shift, x), total, out, width, epsilon,
            PARTS=parts, GATED=gate is not None, SCALED=scale is not None, SHIFTED=shift is not None,
            CENTRED=centred, BLOCK=block, num_warps=4 if block <= 2048 and rows > FEW_ROWS else 8,
        )  # fmt: skip
        return total, out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, y, None, weight, None, epsilon, False)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, y, gate, scale, shift, epsilon, True)

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cuda":  # there the fused form is the exact one, not tanh
            return super().linear_gelu(x, weight, bias)
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], -1)

    def silu_product(self, both: torch.Tensor) -> torch.Tensor:
        width = both.shape[-1] // 2
        rows = both.numel() // (2 * width)
        out = both.new_empty(*both.shape[:-1], width)
        kernels.silu_product[(rows, triton.cdiv(width, 1024))](both, out, width, BLOCK=1024, num_warps=4)
        return out

    def delta_net(self, projected: torch.Tensor, layer: DeltaLayer) -> torch.Tensor:
        batch, length, stride = projected.shape
        if not _fits(layer.key_width, layer.value_width, 16 * layer.value_heads):
            return super().delta_net(projected, layer)
        heads, chunks, channels = layer.value_heads, triton.cdiv(length, CHUNK), layer.channels
        mixed = projected.new_empty(batch, length, channels)
        kernels.convolution[(triton.cdiv(length, 8), triton.cdiv(channels, 256), batch)](
            projected, layer.taps, mixed, length, stride, channels, TAPS=layer.taps.shape[1], TOKENS=8, BLOCK=256,
            num_warps=4,
        )  # fmt: skip

        tokens = batch * heads * chunks * CHUNK
        queries, keys, readers = (projected.new_empty(tokens * layer.key_width) for _ in range(3))
        scores = projected.new_empty(tokens * CHUNK)
        values = torch.empty(tokens * layer.value_width, dtype=torch.float32, device=projected.device)
        falls = torch.empty(tokens // CHUNK, dtype=torch.float32, device=projected.device)
        gate_at = channels + heads * layer.value_width
        precision = _precision(projected.dtype)
        kernels.delta_chunks[(chunks, batch * heads)](
            mixed, projected, layer.decay, layer.time_bias, queries, keys, values, readers, scores, falls, length,
            stride, gate_at, layer.key_width**-0.5, HK=layer.key_heads, HV=heads, DK=layer.key_width,
            DV=layer.value_width, C=CHUNK, PRECISION=precision,
            EXACT=precision, num_warps=8,
        )  # fmt: skip
        out = projected.new_empty(batch, length, heads * layer.value_width)
        part = min(32, layer.value_width)
        kernels.delta_scan[(layer.value_width // part, batch * heads)](
            queries, keys, values, readers, scores, falls, out, length, HV=heads, DK=layer.key_width,
            DV=layer.value_width, BV=part, C=CHUNK, CHUNKS=chunks, PRECISION=precision, num_warps=4,
            num_stages=_stages(projected),
        )  # fmt: skip
        gated = torch.empty_like(out)
        kernels.gated_norm[(batch * length,)](
            out, projected, layer.norm, gated, stride, channels, layer.epsilon, HV=heads, DV=layer.value_width,
            num_warps=8,
        )  # fmt: skip
        return gated

    @staticmethod
    def _split(
        x: torch.Tensor,
        norms: torch.Tensor | None,
        rotary: Rotary,
        heads: int,
        groups: int,
        width: int,
        gated: bool,
        into: KeyValues,
        epsilon: float = 1e-6,
    ) -> torch.Tensor:
        """Queries (B, heads, L, width) of (B, L, …) ``x``; its keys and values go ``into`` tensors of theirs."""
        batch, length, stride = x.shape
        query = x.new_empty(batch, heads, length, width)
        keys, values = into
        step = 2 * width if gated else width
        key_at = heads * step
        weights = (x, x) if norms is None else norms
        block = 8
        parts = triton.cdiv(heads, block) + 2 * triton.cdiv(groups, block)
        turned = rotary[0].shape[-1]
        kernels.split_heads[(batch * length, parts)](
            x, weights[0], weights[1], rotary[0], rotary[1], query, keys, values, stride, step, key_at,
            key_at + groups * width, heads, groups, length, rotary[0].numel() // turned, epsilon, D=width, R=turned,
            REPEAT=keys.shape[1] // groups, NORMED=norms is not None, N=block,
            num_warps=4 if width > 64 else 2,
        )  # fmt: skip
        return query

    def text_attention(
        self,
        projected: torch.Tensor,
        norms: torch.Tensor,
        rotary: Rotary,
        heads: int,
        groups: int,
        epsilon: float,
        gated: bool,
    ) -> torch.Tensor:
        batch, length, stride = projected.shape
        width = norms[0].shape[0]
        if not _fits(width, rotary[0].shape[-1]):
            return super().text_attention(projected, norms, rotary, heads, groups, epsilon, gated)
        key, value = (projected.new_empty(batch, heads, length, width) for _ in range(2))
        query = self._split(projected, norms, rotary, heads, groups, width, gated, (key, value), epsilon=epsilon)
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        seen = seen.transpose(1, 2).contiguous()
        if not gated:
            return seen.flatten(2)
        out = torch.empty_like(seen)
        kernels.sigmoid_product[(batch * length, heads)](
            seen, projected, out, stride, HEADS=heads, D=width, num_warps=1
        )
        return out.flatten(2)

    def image_attention(self, projected: torch.Tensor, rotary: Rotary, heads: int) -> torch.Tensor:
        count, patches, stride = projected.shape
        width = stride // (3 * heads)
        if not _fits(width):
            return super().image_attention(projected, rotary, heads)
        key, value = (projected.new_empty(count, heads, patches, width) for _ in range(2))
        query = self._split(projected, None, rotary, heads, heads, width, False, (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).flatten(2)

    def context_heads(
        self, projected: torch.Tensor, norms: torch.Tensor, rotary: Rotary, heads: int
    ) -> tuple[torch.Tensor, KeyValues]:
        batch, length, stride = projected.shape
        width = stride // (3 * heads)
        if not _fits(width):
            return super().context_heads(projected, norms, rotary, heads)
        keys, values = (projected.new_empty(batch, heads, length, width) for _ in range(2))
        query = self._split(projected, norms, rotary, heads, heads, width, False, (keys, values))
        return query, (keys, values)

    def context_attention(self, query: torch.Tensor, keys: KeyValues, valid: Valid) -> torch.Tensor:
        batch, heads, tokens, width = query.shape
        if not _fits(width):
            return super().context_attention(query, keys, valid)
        out = query.new_empty(batch, tokens, heads * width)
        kernels.context_attention[(triton.cdiv(tokens, 64), batch * heads)](
            query, keys[0], keys[1], valid.lengths, out, tokens, valid.prompt, heads, width**-0.5,
            BLOCKS=triton.cdiv(tokens, 64), D=width, Q=64, K=64, PRECISION=_precision(query.dtype), num_warps=4,
            num_stages=_stages(query),
        )  # fmt: skip
        return out

    def action_attention(
        self, projected: torch.Tensor, norms: torch.Tensor, rotary: Rotary, heads: int, context: KeyValues, valid: Valid
    ) -> torch.Tensor:
        batch, tokens, stride = projected.shape
        width = stride // (3 * heads)
        if not _fits(width):
            return super().action_attention(projected, norms, rotary, heads, context, valid)
        slots = context[0].shape[2]
        out = projected.new_empty(batch, tokens, heads * width)
        kernels.action_attention[(batch * heads,)](
            projected, norms[0], norms[1], rotary[0], rotary[1], context[0], context[1], valid.lengths, out, tokens,
            valid.prompt, slots, heads, width**-0.5, BLOCKS=triton.cdiv(slots, 128), D=width,
            Q=max(16, triton.next_power_of_2(tokens)), K=128, PRECISION=_precision(projected.dtype), num_warps=4,
            num_stages=1 if projected.dtype == torch.float32 else 2,
        )  # fmt: skip
        return out

    def few(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._few(x, weight, "few")

    def few_gated(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._few(x, weight, "few_gated")

    def few_summed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._few(x, weight, "few_summed")

    def _few(self, x: torch.Tensor, weight: torch.Tensor, kind: str, plan: Plan | None = None) -> torch.Tensor:
        gated, depth = kind == "few_gated", x.shape[-1]
        rows, width = x.numel() // depth, weight.shape[0] // (2 if gated else 1)
        if plan is None:
            plan = self.plans.get((kind, *weight.shape), SUMMED if kind == "few_summed" else PLAIN)
        if rows > FEW_ROWS or width % plan.columns or depth % (plan.depth * plan.split):
            return super().few_gated(x, weight) if gated else super().few(x, weight)
        shape, split = (*x.shape[:-1], width), plan.split
        out = x.new_empty(shape) if split == 1 else x.new_empty((split, *shape), dtype=torch.float32)
        kernels.few[(width // plan.columns, split)](
            x, weight, out, rows, width, depth, GATED=gated, SPLIT=split, STEPS=depth // split // plan.depth,
            M=max(16, triton.next_power_of_2(rows)), N=plan.columns, K=plan.depth, PRECISION=_precision(x.dtype),
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        return out

    @torch.inference_mode()
    def tune(self, kind: str, weights: list[torch.Tensor], rows: int) -> dict[Plan, float]:
        """Measures every plan for one product and keeps the fastest.

        Args:
            kind: ``few``, ``few_gated`` or ``few_summed``.
            weights: of all blocks, read one after the other so that no cache helps.
            rows: of x.

        Returns:
            Microseconds per product (with the norm that sums its parts, for ``few_summed``) of every plan that ran.
        """
        device, depth = weights[0].device, weights[0].shape[1]
        x = torch.randn(1, rows, depth, device=device, dtype=weights[0].dtype)
        residual = torch.randn(1, rows, weights[0].shape[0], device=device, dtype=weights[0].dtype)
        splits = SPLITS if kind == "few_summed" else (1,)
        found: dict[Plan, float] = {}
        for base in PLANS:
            for split in splits:
                plan = dataclasses.replace(base, split=split)
                try:
                    found[plan] = self._time(x, weights, kind, plan, residual)
                except Exception as error:  # a plan that this chip has no room for
                    logger.debug("%s %s: %s", kind, plan, error)
        if found:
            key = (kind, *weights[0].shape)
            self.plans[key] = min(found, key=lambda plan: found[plan])
        return found

    def _time(
        self, x: torch.Tensor, weights: list[torch.Tensor], kind: str, plan: Plan, residual: torch.Tensor
    ) -> float:
        def once() -> None:
            for weight in weights:
                y = self._few(x, weight, kind, plan)
                if kind == "few_summed":
                    self.add_layer_norm(residual, y)

        once()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        times = []
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return 1000.0 * sorted(times)[1] / len(weights)
