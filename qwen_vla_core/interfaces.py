"""The few values that travel between the rooms of the house: observation in, action chunk out.

Everything here is plain NumPy: a controller, a simulator and a recorder share it without importing torch or ROS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one instant.

    Attributes:
        images: view name → (height, width, 3) uint8 RGB. Every view of the embodiment is present: a missing camera
            is a fault to be handled before an observation exists, never a black picture.
        state: (n_state,) float64 in the embodiment's channel units (after the state map).
        instruction: what the robot was asked to do, in natural language.
        stamp_ns: time of the observation in nanoseconds (the reference camera's stamp, or simulation time).
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str
    stamp_ns: int = 0


@dataclass(frozen=True)
class ActionChunk:
    """H consecutive actions predicted from one observation.

    Attributes:
        actions_hc: (H, c) float64 in the embodiment's channel units (before the command map).
        channels: the c channel names, in column order.
        stamp_ns: the stamp of the observation that caused it.
        period_s: action i is due at ``stamp + (i + 1) * period_s``.
    """

    actions_hc: np.ndarray
    channels: tuple[str, ...]
    stamp_ns: int
    period_s: float


class Policy(Protocol):
    """Anything that turns an observation into a chunk: the model, an expert, a remote server."""

    def predict(self, observation: Observation) -> ActionChunk: ...


class World(Protocol):
    """A simulated robot with a task. One ``step`` is one control period (``1 / control_hz`` seconds)."""

    control_hz: float
    channels: tuple[str, ...]
    instruction: str

    def reset(self, seed: int, instruction: str | None = None) -> None: ...

    def step(self, action_c: np.ndarray) -> None: ...

    def state(self) -> np.ndarray: ...

    def render(self, view: str, width: int, height: int) -> np.ndarray: ...

    def success(self) -> bool: ...
