"""A robot's own simulated world as a suite of one axis and one task: what ``eval run`` without ``--suite`` runs."""

from __future__ import annotations

from typing import Any

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.embedded import EmbeddedSuite
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION, PublishedProtocol, Trial

ALL = "all"


class WorldSuite(EmbeddedSuite):
    """The world that an embodiment names."""

    name = "world"

    def __init__(self, embodiment: str, task: str | None) -> None:
        """
        Args:
            embodiment: shipped name or YAML.
            task: of its world; ``all`` for all, None for its first.

        Raises:
            UserError: the robot has no simulated world, or the world no such task.
        """
        from qwen_vla_core.sim.registry import world_class

        robot = load_embodiment(embodiment)
        if robot.simulation is None:
            raise UserError(f"--embodiment {robot.name}: its YAML names no `simulation.world` to evaluate in")
        self.embodiment, self.world = embodiment, robot.simulation.world
        kind = world_class(self.world)
        if task not in (None, ALL, *kind.task_names):
            raise UserError(f"--task {task}: use one of {', '.join(kind.task_names)}, all")
        self.known: tuple[str, ...] = kind.task_names
        self.tasks = (task or self.known[0],)
        self.title = f"{robot.name}: {self.tasks[0]}"
        self.axes = {IN_DISTRIBUTION: "what demonstrations showed, other seeds"}
        self.protocol = PublishedProtocol(
            source="ours",
            tag="O",
            trials_per_task=100,
            horizon_steps={"*": round(kind.limit_s * kind.control_hz)},
            control_hz=kind.control_hz,
            seeds="100000, 100001, …; demonstrations start at 0",
            success="as the world defines it: docs/simulation.md",
        )

    def options_of(self, trial: Trial) -> dict[str, Any]:
        """See ``EmbeddedSuite``."""
        return {"tasks": self.known if trial.task == ALL else (trial.task,)}
