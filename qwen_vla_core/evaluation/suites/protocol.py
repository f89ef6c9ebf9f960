"""What a benchmark suite is: trials along axes, worlds to run them in, and the published protocol they follow.

A suite is one short file. It names its trials without importing a simulator; the simulator is imported when the first
world is made, so that ``qwen-vla eval suites`` works where none is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from qwen_vla_core.evaluation.closed_loop import JudgedWorld

IN_DISTRIBUTION = "in_distribution"


@dataclass(frozen=True)
class Trial:
    """One episode of a suite. Two checkpoints are compared trial by trial, so the same trial is the same scene.

    Attributes:
        axis: what differs from the training distribution; ``in_distribution``: nothing.
        task: of the suite.
        seed: of the scene, given to the world's ``reset``; where a benchmark numbers its initial states, that number.
        instruction: what to do; None: the world draws it from the seed.
        limit_s: simulated seconds until the episode has failed; None: the world's own ``limit_s``.
        options: what else ``make_world`` needs (JSON). Trials with the same axis, task and options share a world.
    """

    axis: str
    task: str
    seed: int
    instruction: str | None = None
    limit_s: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the trial within its suite, in result files and when two of them are paired."""
        return f"{self.axis}/{self.task}/{self.seed}"

    @property
    def world_key(self) -> str:
        """The same for all trials that can be run in one world."""
        return json.dumps([self.axis, self.task, dict(self.options)], sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {**asdict(self), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Trial:
        """Restores what ``to_dict`` gave."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


@dataclass(frozen=True)
class PublishedProtocol:
    """How the benchmark's authors measure, pinned here so that nobody has to guess what a number means.

    Attributes:
        source: who published it (paper, repository).
        tag: P: the paper this project implements; X: the benchmark's own code or paper; O: our choice.
        trials_per_task: episodes of each task and axis that a published number is the mean of; 0: all there are.
        horizon_steps: control steps until an episode has failed, by axis or task; ``*`` for the others.
        control_hz: control steps per simulated second.
        seeds: how scenes are numbered.
        preprocessing: what happens to pictures, states and actions between simulator and policy.
        success: when an episode counts.
        deviations: where ours differs, and why numbers may therefore not be compared.
    """

    source: str
    tag: str
    trials_per_task: int
    horizon_steps: Mapping[str, int]
    control_hz: float
    seeds: str
    success: str
    preprocessing: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    def horizon(self, name: str) -> int:
        """Control steps of an axis or task."""
        return self.horizon_steps[name] if name in self.horizon_steps else self.horizon_steps["*"]

    def to_dict(self) -> dict[str, Any]:
        """For result files and pages."""
        return {**asdict(self), "horizon_steps": dict(self.horizon_steps)}


class SuiteWorld(JudgedWorld, Protocol):
    """A ``JudgedWorld`` as the runner drives it. ``reset(trial.seed, trial.instruction)`` begins a trial.

    Attributes:
        limit_s: simulated seconds after which an episode has failed.
        film_views: what a film shows; ``render`` knows them.
    """

    limit_s: float
    film_views: tuple[str, ...]

    @property
    def target(self) -> str | None:
        """The object asked for, in the words of ``chosen()``; None where there is no such thing."""
        ...

    def other_instruction(self) -> str | None:
        """The same sentence about another object of this scene; None where there is none."""
        ...

    def close(self) -> None:
        """Frees renderers and simulator."""
        ...


class Watcher(Protocol):
    """Measures an episode from the outside, step by step."""

    def step(self, world: Any) -> None:
        """After each control step."""
        ...

    def metrics(self, world: Any) -> dict[str, float]:
        """At the end; the same names in every episode of a task."""
        ...


class Suite(Protocol):
    """A benchmark.

    Attributes:
        name: for ``--suite`` and result files.
        title: one line for people.
        embodiment: name of the robot in a checkpoint that can run it (shipped, or from the checkpoint's folder).
        axes: axis → what differs along it, in report order.
        tasks: names.
        metrics: what an episode's ``metrics`` hold, beside success and seconds.
        protocol: as published.
    """

    name: str
    title: str
    embodiment: str
    axes: Mapping[str, str]
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    protocol: PublishedProtocol

    def missing(self) -> str | None:
        """Exactly what to install (a command, a download) before a world can be made; None: nothing."""
        ...

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Axis after axis, task after task, ``episodes`` of each from ``seed`` on, always in the same order."""
        ...

    def make_world(self, trial: Trial) -> SuiteWorld:
        """A world for this trial and for all with the same ``world_key``.

        Raises:
            UserError: something is not installed (``missing()``).
        """
        ...

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """What measures an episode of ``world``, which has just made its first step of ``trial``; may be empty."""
        ...
