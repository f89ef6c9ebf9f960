"""Simulated worlds of one process, driven by orders: start an episode, play a chunk; each answered by a look.

The policy lives elsewhere. This module is all that a worker process imports: NumPy and the simulator, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vla_core.evaluation.closed_loop import JudgedWorld, observe, play_chunk
from qwen_vla_core.interfaces import Observation

WorldFactory = Callable[[], JudgedWorld]


@dataclass(frozen=True)
class Start:
    """Begin a new episode.

    Attributes:
        seed: of the world's randomisation.
        instruction: what to do; None lets the world choose.
    """

    seed: int
    instruction: str | None = None


@dataclass(frozen=True)
class Play:
    """Execute the beginning of a chunk.

    Attributes:
        actions_hc: (steps to execute, c) absolute actions in the robot's channel units.
        period_s: between two actions.
    """

    actions_hc: np.ndarray
    period_s: float


Order = Start | Play


@dataclass(frozen=True)
class Look:
    """What there is to be seen after an order has been carried out.

    Attributes:
        observation: pictures as uint8; None where nothing more is to be decided.
        instruction: of this episode.
        ended: the world says that the episode is over, well or not.
        late: the world's own time limit has been reached.
        success: whether the task is done now.
        seconds: simulated time of the episode so far.
        chosen: the object acted on, if any.
        metrics: the world's numbers.
    """

    observation: Observation | None
    instruction: str
    ended: bool
    late: bool
    success: bool
    seconds: float
    chosen: str | None
    metrics: Mapping[str, float]


class WorldHost:
    """Worlds by slot number; each is built when it is first started, because building takes a second."""

    def __init__(self, factories: Mapping[int, WorldFactory]) -> None:
        """
        Args:
            factories: slot → how to build its world; importable by name, as they are sent to other processes.
        """
        self.factories = dict(factories)
        self.worlds: dict[int, Any] = {}
        self.setpoints: dict[int, np.ndarray] = {}

    def obey(self, orders: Mapping[int, Order]) -> dict[int, Look]:
        """Carries out one order per slot, one after the other; slot → what is to be seen then."""
        return {slot: self._obey(slot, order) for slot, order in orders.items()}

    def _obey(self, slot: int, order: Order) -> Look:
        if isinstance(order, Start):
            if slot not in self.worlds:
                self.worlds[slot] = self.factories[slot]()
            world = self.worlds[slot]
            world.reset(order.seed, order.instruction)
            self.setpoints[slot] = np.asarray(world.command(), dtype=np.float64)
        else:
            world = self.worlds[slot]
            until_s = min(world.time_s + len(order.actions_hc) * order.period_s, world.limit_s)
            self.setpoints[slot] = play_chunk(world, order.actions_hc, order.period_s, self.setpoints[slot], until_s)
        return self._look(world)

    @staticmethod
    def _look(world: Any) -> Look:
        ended = bool(world.ended())
        return Look(
            observation=None if ended else observe(world),
            instruction=world.instruction,
            ended=ended,
            late=world.time_s >= world.limit_s - 1e-9,
            success=bool(world.success()),
            seconds=float(world.time_s),
            chosen=world.chosen(),
            metrics=world.metrics(),
        )

    def close(self) -> None:
        """Releases the worlds that can be released (GL contexts)."""
        for world in self.worlds.values():
            getattr(world, "close", lambda: None)()
        self.worlds.clear()


def shares(slots: int, workers: int) -> Sequence[range]:
    """Slots of each worker: dealt in turn, so that robots that are listed one after another are spread."""
    return [range(worker, slots, workers) for worker in range(min(workers, slots))]
