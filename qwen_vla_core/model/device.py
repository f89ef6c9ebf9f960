"""Where a policy runs, and in which precision: one rule for the node, the evaluation and the benchmarks."""

from __future__ import annotations

import torch

from qwen_vla_core.errors import UserError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for inference: bfloat16 on CUDA, float32 on the CPU.

    Args:
        name: one of ``DEVICES``; ``auto`` is CUDA where there is one.

    Raises:
        UserError: another name, or ``cuda`` on a machine without it.
    """
    if name not in DEVICES:
        raise UserError(f"device {name!r}: use one of {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device 'cuda': torch sees no CUDA device here; use auto or cpu")
    if available and name != "cpu":
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32
