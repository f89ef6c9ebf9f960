"""Which attention kernel the action decoder runs on: decided here and nowhere else.

The backbone picks its own through transformers (``attn_implementation``); ``choose_backend`` is given to it as well, so
that both halves agree.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> str:
    """``"flash"`` or ``"sdpa"``; the reason is logged the first time a device and dtype are asked for.

    Args:
        device_type: ``torch.device.type``.
        dtype: dtype of queries, keys and values.
    """
    if device_type != "cuda":
        backend, reason = "sdpa", f"flash-attn needs CUDA, the model is on {device_type}"
    elif dtype not in (torch.float16, torch.bfloat16):
        backend, reason = "sdpa", f"flash-attn needs fp16 or bf16, the model is {dtype}"
    elif importlib.util.find_spec("flash_attn") is None:
        backend, reason = "sdpa", "flash_attn is not installed (extra [flash])"
    else:
        backend, reason = "flash", "flash_attn is importable and the model is half precision on CUDA"
    if not torch.compiler.is_compiling():  # a log line would cut the compiled graph in two
        logger.info("attention backend: %s (%s)", backend, reason)
    return backend


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Unmasked or key-masked full attention.

    Args:
        query: (B, heads, Lq, d).
        key: (B, heads, Lk, d).
        value: (B, heads, Lk, d).
        mask: bool, broadcastable to (B, heads, Lq, Lk), True = may attend. None keeps the fastest kernel: callers pass
            a mask only where something is really padded. flash-attn takes no mask, so masked calls use SDPA.

    Returns:
        (B, heads, Lq, d).
    """
    if mask is None and choose_backend(query.device.type, query.dtype) == "flash":
        from flash_attn import flash_attn_func

        out = flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=False)
        return out.transpose(1, 2)
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return float32_sdpa(query, key, value, attn_mask=mask)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def float32_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """SDPA in float32 under CPU autocast: its bfloat16 backward pass is five times slower than the float32 one.

    Measured on the tiny model's training step (B = 32, three views): 0.89 s with, 0.71 s without bfloat16 attention,
    1.04 s without autocast.
    """
    with torch.autocast("cpu", enabled=False):
        out = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options)
    return out.to(query.dtype)


def use_float32_attention(model: PreTrainedModel) -> None:
    """Switches a transformers model to ``float32_sdpa``, for training under CPU autocast."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        with torch.autocast("cpu", enabled=False):
            out, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), _float(attention_mask), **options
            )
        return out.to(query.dtype), None

    AttentionInterface.register("sdpa_float32", attention)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    model.set_attn_implementation({"text_config": "sdpa_float32"})


def image_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a vision tower inside each picture, all pictures of one size in one call.

    transformers calls SDPA once per picture and layer; with three small views and a batch of 32 these calls were a
    quarter of the tower's training step (108 → 83 ms, forward and backward, two threads).

    Args:
        module: the attention layer.
        query: (1, heads, L, d), the patches of all pictures in a row.
        key: as ``query``.
        value: as ``query``.
        attention_mask: always None; the pictures' borders are in ``cu_seq_lens_q``.
        scaling: of the scores.
        cu_seq_lens_q: (pictures + 1,) borders.
        max_length_q: patches of the largest picture.
        options: of other implementations; ignored.

    Returns:
        (1, L, heads, d) and None.
    """
    assert cu_seq_lens_q is not None and attention_mask is None
    pictures = cu_seq_lens_q.shape[0] - 1
    _, heads, total, width = query.shape
    sdpa: Any = functional.scaled_dot_product_attention
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        sdpa = float32_sdpa
    # Asking the borders instead would make a GPU wait in every layer.
    if max_length_q is not None and pictures * max_length_q == total:
        q, k, v = (x[0].unflatten(1, (pictures, -1)).transpose(0, 1) for x in (query, key, value))
        out = sdpa(q, k, v, scale=scaling)
        return out.transpose(1, 2).reshape(1, total, heads, width), None
    split = [x.split(cu_seq_lens_q.diff().tolist(), dim=2) for x in (query, key, value)]
    outs = [sdpa(q, k, v, scale=scaling) for q, k, v in zip(*split, strict=True)]
    return torch.cat(outs, 2).transpose(1, 2), None


IMAGE_ATTENTION = "image_sdpa_with_flash_arguments"  # "flash" in the name makes transformers hand over the borders


def use_image_attention(model: PreTrainedModel) -> None:
    """Gives the vision tower ``image_attention``, unless flash-attn was chosen for it."""
    AttentionInterface.register(IMAGE_ATTENTION, image_attention)
    config: Any = model.model.visual.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = IMAGE_ATTENTION


def _float(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.float()
