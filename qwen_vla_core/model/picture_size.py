"""Which size a picture has for the model; without torch, so that a robot that only sends pictures knows it too."""

from __future__ import annotations

import math


def target_size(height: int, width: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's rule: multiples of a token's side, nearly the same shape, an area within the limits."""
    new_h, new_w = max(side, round(height / side) * side), max(side, round(width / side) * side)
    if new_h * new_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_h = max(side, math.floor(height / shrink / side) * side)
        new_w = max(side, math.floor(width / shrink / side) * side)
    elif new_h * new_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_h, new_w = math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return new_h, new_w
