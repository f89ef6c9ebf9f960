"""Pictures of a MuJoCo model: one renderer per size, kept, and freed before the GL library goes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Mapping
from pathlib import Path

import mujoco
import numpy as np

_OPEN: weakref.WeakSet[Cameras] = weakref.WeakSet()


def _close_all() -> None:
    """At exit: renderers must go before the GL library's own handler, or each of them prints a traceback."""
    for cameras in list(_OPEN):
        cameras.close()


@functools.cache
def _load_triton() -> None:
    """Triton's library before the first picture, where there is one (20 ms; nothing of it is imported).

    Mesa's software renderer brings an LLVM, Triton 3.9 has another. Loaded after Mesa's, at the latest when torch first
    compiles or transformers is imported, it ends the process with a segmentation fault; before it, both work.
    """
    found = importlib.util.find_spec("triton")
    for folder in found.submodule_search_locations or () if found else ():
        for library in Path(folder).glob("_C/libtriton*.so"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))


class Cameras:
    """The views of a scene; use it from one thread only."""

    def __init__(self, model: mujoco.MjModel, names: Mapping[str, str]) -> None:
        """
        Args:
            model: may change its colours, lights and camera poses later.
            names: view → camera of the model.
        """
        self.model, self.names = model, names
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}

    def render(self, data: mujoco.MjData, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture of one view, at most 640×480.

        Raises:
            ValueError: unknown view.
        """
        if view not in self.names:
            raise ValueError(f"view {view!r} is not one of {', '.join(self.names)}")
        renderer = self._renderers.get((width, height))
        if renderer is None:
            _load_triton()
            renderer = self._renderers[width, height] = mujoco.Renderer(self.model, height, width)
            _OPEN.add(self)
            atexit.unregister(_close_all)  # handlers run last in, first out: ours must be newer than the GL library's
            atexit.register(_close_all)
        renderer.update_scene(data, self.names[view])
        return renderer.render()

    def close(self) -> None:
        """Frees the renderers; the next ``render`` makes a new one."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
