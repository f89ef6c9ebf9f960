"""Plans of the CUDA kernel for products with few rows, for ``engine.py --tune``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from qwen_vla_core.engine.graphs import Recorded
from qwen_vla_core.engine.network import Network
from qwen_vla_core.engine.ops import TorchOps

# columns and depth of a block, warps, pipeline stages
PLANS = (
    (16, 128, 4, 4), (16, 256, 4, 3), (16, 128, 2, 6), (32, 64, 4, 6), (32, 128, 4, 3), (32, 128, 4, 5),
    (32, 256, 4, 3), (32, 128, 8, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 8, 3), (64, 64, 4, 4),
    (128, 64, 4, 4), (128, 64, 8, 3),
)  # fmt: skip
SPLITS = {"qkv": (1,), "out": (1, 2, 4, 8), "up": (1,), "down": (2, 4, 8, 16)}


def events(call: Callable[[], Any], repeats: int, warm: int = 3) -> float:
    """Median milliseconds on the GPU, by CUDA events around each call."""
    for _ in range(warm):
        call()
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


@torch.inference_mode()
def tune(network: Network, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every plan for each product of a DiT block, over the weights of all blocks in turn so that no cache helps."""
    found: list[dict[str, Any]] = []
    for name in SPLITS:
        weights = [getattr(block, name) for block in network.decoder.blocks]
        rows = sorted(_product(name, weights, say), key=lambda row: float(row["us"]))
        least = weights[0].numel() * weights[0].element_size()
        for row in (*rows[:6], *(row for row in rows[6:] if row["plan"] == "library")):
            say(f"  {name:<5} {row['us']:6.2f} us, {least / row['us'] / 1e3:6.0f} GB/s  {row['plan']}")
        found += rows
    return found


def _product(name: str, weights: list[torch.Tensor], say: Callable[[str], None]) -> list[dict[str, Any]]:
    from qwen_vla_core.engine import triton_ops

    gated = name == "up"
    x = torch.randn(1, 16, weights[0].shape[1], device=weights[0].device, dtype=weights[0].dtype)
    plain, ops = TorchOps(), triton_ops.TritonOps()
    library = functools.partial(plain.few_gated if gated else plain.few, x)
    rows: list[dict[str, Any]] = [{"product": name, "plan": "library", "us": _each(library, weights)}]
    for plan in PLANS:
        triton_ops.FEW = triton_ops.FEW_GATED = triton_ops.Plan(*plan)
        for split in SPLITS[name]:
            try:
                us = _each(functools.partial(_call, ops, x, gated, split), weights)
            except Exception as error:  # a plan that does not fit this chip
                say(f"  {name} {plan} {split}: {str(error)[:90]}")
                continue
            rows.append({"product": name, "plan": (*plan, split), "us": us})
    return rows


def _call(ops: Any, x: torch.Tensor, gated: bool, split: int, weight: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = ops._few(x, weight, gated, split)
    return answer


def _each(call: Callable[[torch.Tensor], Any], weights: list[torch.Tensor]) -> float:
    """Microseconds per product."""
    recorded = Recorded(lambda: [call(weight) for weight in weights], weights[0].device, None)
    return 1000 * events(recorded, 5, warm=1) / len(weights)
