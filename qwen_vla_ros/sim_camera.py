"""Renders a simulated robot's cameras without holding up its physics.

A picture takes longer than a control step, and an OpenGL context belongs to one thread. So the cameras look at a twin:
a second world, reset with the same seed (hence the same colours, light and camera poses), into which the state of the
real one is copied for each round of pictures (0.1 ms under the lock).
"""

from __future__ import annotations

import threading
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.sim.registry import make_world


class TwinCamera:
    """A twin of ``world``; ``reset`` and ``snapshot`` must be called with the physics standing still."""

    def __init__(self, name: str, world: Any, **options: Any) -> None:
        """``world`` is ``make_world(name, **options)``, and so is its twin."""
        self._world = world
        self._twin: Any = make_world(name, **options)
        self._lock = threading.Lock()

    def reset(self, seed: int, instruction: str) -> None:
        """Follows ``world.reset``: the twin gets the same appearance."""
        with self._lock:
            self._twin.reset(seed, instruction)

    def snapshot(self) -> None:
        """Copies the world's present state into the twin."""
        with self._lock:
            mujoco.mj_copyData(self._twin.data, self._twin.model, self._world.data)

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of the last snapshot; always from the same thread."""
        with self._lock:
            pixels: np.ndarray = self._twin.render(view, width, height)
            return pixels

    def close(self) -> None:
        """Frees the renderers, in the thread that rendered."""
        with self._lock:
            self._twin.close()
