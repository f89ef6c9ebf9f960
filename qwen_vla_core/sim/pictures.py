"""Pictures and films of a world: all views side by side, with the instruction under them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from qwen_vla_core.files import atomic_write_bytes
from qwen_vla_core.sim.demos import shrink
from qwen_vla_core.sim.registry import make_expert

TILE = (320, 240)  # width, height of one view
STILLS = 4  # moments of an episode shown in a PNG


def tile(world: Any) -> np.ndarray:
    """(height, width, 3) RGB: every view, named, and the instruction below."""
    views = []
    for view in world.film_views:
        picture = shrink(world.render(view, 2 * TILE[0], 2 * TILE[1]), TILE)
        cv2.putText(picture, view, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        views.append(picture)
    line = np.full((26, TILE[0] * len(views), 3), 32, np.uint8)
    text = f"{world.instruction}   {world.time_s:.1f} s" + ("   done" if world.success() else "")
    cv2.putText(line, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([np.hstack(views), line])


def film(world: Any, world_name: str, *, act: bool) -> list[np.ndarray]:
    """One frame of a world that has been reset, or one per decision until its expert has ended the episode."""
    frames = [tile(world)]
    if not act:
        return frames
    expert = make_expert(world_name, world)
    left = round(0.5 / world.decision_s)  # half a second more, to see the result
    while left and world.time_s < world.limit_s:
        for command in world.play(expert.action()):
            world.step(command)
        frames.append(tile(world))
        left -= world.ended()
    return frames


def save(path: str | Path, frames: Sequence[np.ndarray], period_s: float) -> None:
    """Writes a GIF of all frames, or a PNG of the first, the last and some between, one below the other.

    Args:
        path: ends in .gif or .png.
        frames: (height, width, 3) RGB each.
        period_s: simulated seconds between two frames.
    """
    path, buffer = Path(path), BytesIO()
    if path.suffix.lower() == ".gif":
        pictures = [Image.fromarray(frame).quantize(96) for frame in frames]
        pictures[0].save(
            buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 * period_s), loop=0
        )
    else:
        chosen = np.unique(np.linspace(0, len(frames) - 1, STILLS).round().astype(int))
        Image.fromarray(np.vstack([frames[i] for i in chosen])).save(buffer, "PNG", optimize=True)
    atomic_write_bytes(path, buffer.getvalue())
