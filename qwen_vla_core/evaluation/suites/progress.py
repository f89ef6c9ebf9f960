"""How far an episode came: stages that a task has on its way, and DOMINO's manipulation score.

A success says that the last stage was reached, progress how many of them were: 0.5 for a cube that was gripped and
lifted but not put down where it should. The stages are our choice [O]; that partial completion is reported beside
success is usual [X].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

EVERY_S = 0.1  # simulated seconds between two looks
OVER_PLATE = 0.05  # metres from the plate's middle
OUT_OF_BOUNDS = 0.5  # DOMINO: factor where the target leaves the workspace before it is grasped [X]

Stage = Callable[[Any], bool]


def _held(world: Any) -> bool:
    return any(len(fingers) == 2 for (_, colour), fingers in world.touching().items() if colour == world.task.colour)


def _touched(world: Any) -> bool:
    return any(fingers for (_, colour), fingers in world.touching().items() if colour == world.task.colour)


def _lifted(world: Any) -> bool:
    return bool(world.lifted_cube() == world.task.colour)


def _in_both(world: Any) -> bool:
    touching = world.touching()
    return all(touching[arm, world.task.colour] for arm in world.arms)


def _over_plate(world: Any) -> bool:
    away = world.cube_position(world.task.colour) - world.plate_position()
    return bool(_touched(world) and np.hypot(*away[:2]) <= OVER_PLATE)


def _passed(world: Any) -> bool:
    return bool(world.passed)


def _at_goal(world: Any) -> bool:
    """Within reach of the goal, having passed what was named: the stage that oracle success asks for too."""
    return bool(world.passed and world.nearest_in_reach() == world.task.goal)


def _done(world: Any) -> bool:
    return bool(world.success())


# task → its stages in order; the last one is success.
STAGES: Mapping[str, tuple[tuple[str, Stage], ...]] = {
    "pick": (("touched", _touched), ("held", _held), ("done", _done)),
    "transfer": (("held", _held), ("lifted", _lifted), ("in both hands", _in_both), ("done", _done)),
    "place": (("held", _held), ("lifted", _lifted), ("over the plate", _over_plate), ("done", _done)),
    "belt": (("touched", _touched), ("held", _held), ("done", _done)),
    "goto": (("at the goal", _at_goal), ("done", _done)),
    "past": (("passed", _passed), ("at the goal", _at_goal), ("done", _done)),
    "through": (("passed", _passed), ("at the goal", _at_goal), ("done", _done)),
}


class Stages:
    """A ``Watcher``: the share of a task's stages that were reached, each counted once and in any order."""

    def __init__(self, task: str) -> None:
        self._left = dict(STAGES[task])
        self._count = len(self._left)
        self._steps = 0

    def step(self, world: Any) -> None:
        """See ``Watcher``."""
        self._steps += 1
        if self._steps % max(1, round(EVERY_S * world.control_hz)) == 0 or world.ended():
            self._look(world)

    def _look(self, world: Any) -> None:
        self._left = {name: stage for name, stage in self._left.items() if not stage(world)}

    def metrics(self, world: Any) -> dict[str, float]:
        """``progress`` in 0..1; 1 for every success."""
        self._look(world)
        return {"progress": 1.0 if world.success() else 1.0 - len(self._left) / self._count}


class ManipulationScore:
    """A ``Watcher``: DOMINO's score of an episode with a moving target, in 0..1.

    Route completion times penalties [X: DOMINO's evaluation code]. Completion is 1 after a success, else how much
    nearer the hand has come to where the target was last, as a share of its distance at the start. Losing the target
    costs half. DOMINO's penalty for touching clutter does not apply: nothing but what is asked about lies on our belt.
    """

    def __init__(self, world: Any) -> None:
        self._start = [world.pinch(arm).copy() for arm in world.arms]

    def step(self, world: Any) -> None:
        """See ``Watcher``; only start and end count."""

    def metrics(self, world: Any) -> dict[str, float]:
        """``manipulation_score`` and ``route_completion``, each in 0..1."""
        if world.success():
            return {"manipulation_score": 1.0, "route_completion": 1.0}
        target = world.cube_position(world.task.colour)
        completion = 0.0
        for arm, start in zip(world.arms, self._start, strict=True):
            before, after = (float(np.linalg.norm(hand - target)) for hand in (start, world.pinch(arm)))
            completion = max(completion, float(np.clip((before - after) / before, 0.0, 1.0)))
        lost = bool(world.metrics().get("named_cube_lost"))
        return {"manipulation_score": completion * (OUT_OF_BOUNDS if lost else 1.0), "route_completion": completion}
