"""What the suites of our own worlds share: trials by seed, a world per axis, and what they need installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.progress import Stages
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION, PublishedProtocol, Trial, Watcher

NEEDS = ("mujoco", "gym_aloha", "rtbdata")  # of the extra [sim]


class EmbeddedSuite:
    """A ``Suite`` in a world of ``qwen_vla_core.sim``; a subclass is a page of facts.

    Attributes:
        world: name in ``sim.registry``.
        world_options: axis → what else its world's constructor takes.
        shifts: the axes along which the world itself is shifted (``make_world(…, shift=AXIS)``).
    """

    name: str
    title: str
    embodiment: str
    world: str
    axes: Mapping[str, str]
    tasks: tuple[str, ...]
    metrics: tuple[str, ...] = ("progress",)
    protocol: PublishedProtocol
    shifts: tuple[str, ...] = ()
    world_options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def missing(self) -> str | None:
        """See ``Suite``."""
        lacking = [package for package in NEEDS if importlib.util.find_spec(package) is None]
        return f"pip install 'qwen_vla_ros[sim]'  (lacks {', '.join(lacking)})" if lacking else None

    def trials(self, episodes: int, seed: int) -> list[Trial]:
        """See ``Suite``; every axis and task has the same seeds, so that axes can be compared scene by scene."""
        return [
            Trial(axis, task, number)
            for axis in self.axes
            for task in self.tasks
            for number in range(seed, seed + episodes)
        ]

    def make_world(self, trial: Trial) -> Any:
        """See ``Suite``."""
        missing = self.missing()
        if missing:
            raise UserError(f"--suite {self.name}: install {missing}")
        from qwen_vla_core.sim.registry import make_world

        return make_world(self.world, **self.options_of(trial))

    def options_of(self, trial: Trial) -> dict[str, Any]:
        """What ``sim.registry.make_world`` is given for a trial; the ROS graph's simulator is given the same."""
        options: dict[str, Any] = {"tasks": (trial.task,), **self.world_options.get(trial.axis, {})}
        return {**options, "shift": trial.axis} if trial.axis in self.shifts else options

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """See ``Suite``."""
        return (Stages(world.task.name),)

    def make_expert(self, world: Any) -> Any:
        """The world's scripted expert, bound to the present episode."""
        from qwen_vla_core.sim.registry import make_expert

        return make_expert(self.world, world)

    def horizon_s(self) -> float:
        """Simulated seconds of an episode, as the protocol pins them."""
        return self.protocol.horizon("*") / self.protocol.control_hz


__all__ = ["IN_DISTRIBUTION", "EmbeddedSuite"]
