"""The few values that travel between the rooms of the house: observation in, action chunk out.

Everything here is plain NumPy: a controller, a simulator and a recorder share it without importing torch or ROS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

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


CommittedUse = Literal["guided", "guided_jacobian", "prefix"]


@dataclass(frozen=True)
class Committed:
    """What the robot will be doing anyway while the next chunk is computed: the rest of the plan being played.

    Attributes:
        actions_hc: (n, c) absolute actions in channel units, n <= H. Row i is due ``(i + 1)`` periods after the *new*
            observation's stamp, so that it lines up with row i of the new chunk.
        frozen: the first so many rows will have been executed before the new chunk can arrive.
        use: how the sampler is to continue them: pulled towards them with a soft mask (``guided``, and with the
            decoder's Jacobian), or with the frozen ones given as they are (``prefix``).
    """

    actions_hc: np.ndarray
    frozen: int
    use: CommittedUse = "guided"


@dataclass(frozen=True)
class Request:
    """One robot's question to an engine.

    Attributes:
        observation: what it sees now.
        embodiment: its name in the checkpoint.
        committed: the rest of its plan, for strategies that continue it; None: there is none.
        noise_hk: (H, K) starting noise of the sampler, for repeatable answers; None: drawn.
    """

    observation: Observation
    embodiment: str
    committed: Committed | None = None
    noise_hk: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """An engine's answer.

    Attributes:
        chunk: H actions from the request's observation.
        seconds: where the time went: preprocess, backbone, denoise (of the whole batch, if several were asked at once).
    """

    chunk: ActionChunk
    seconds: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Answers requests of one or several robots: the model in this process, or a server elsewhere."""

    def predict(self, requests: Sequence[Request]) -> list[Prediction]: ...


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
