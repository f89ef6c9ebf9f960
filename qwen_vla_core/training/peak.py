"""What a device can do at most, to say how well it is used."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Part of the name that CUDA reports → dense bfloat16 peak in FLOP/s with float32 accumulation, from the makers' data
# sheets: NVIDIA's of each product (its "with sparsity" figures halved), for GeForce the architecture white papers, and
# AMD's of the Instinct series. Longer names stand before the shorter ones that they contain.
PEAKS: dict[str, float] = {
    "B300": 2.25e15,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.5e12,
    "H200 NVL": 835.5e12,
    "H200": 989.5e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 383e12,
}


@dataclass(frozen=True)
class Peak:
    """The most a device can do.

    Attributes:
        flops: per second.
        source: ``data sheet`` or ``measured``.
        name: the device's own.
    """

    flops: float
    source: str
    name: str


def peak_of(device: torch.device | str) -> Peak | None:
    """Dense bfloat16 peak of a CUDA device: from the table, else measured once. None for other devices."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = listed_peak(name)
    return Peak(known, "data sheet", name) if known else Peak(measured_peak(device), "measured", name)


def listed_peak(name: str) -> float | None:
    """The table's figure for a name such as ``NVIDIA H100 80GB HBM3``; None if it is not listed."""
    words = f" {name.replace('-', ' ')} ".lower()
    return next((flops for part, flops in PEAKS.items() if f" {part.lower()} " in words), None)


def measured_peak(device: torch.device | str, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of the best of some bfloat16 products of two square matrices.

    Less than a data sheet says, so that a utilisation from it is not comparable with one from the table.

    Args:
        device: any.
        size: rows; 8192 keeps a large GPU busy for milliseconds.
        repeats: timed products after one that is not.
    """
    device = torch.device(device)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for trial in range(repeats + 1):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if trial:
            best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def utilisation(flops: float, seconds: float, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation (MFU): the share of its peak that one device used.

    Args:
        flops: model FLOPs of what this device did (``FlopModel.total``); of several ranks their mean.
        seconds: it took.
        peak: of the device; None gives None.
    """
    return flops / seconds / peak.flops if peak is not None and seconds > 0 else None
