"""Cubes on a moving belt, in the manner of DOMINO: success and manipulation score, at speeds never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_vla_core.evaluation.suites.embedded import IN_DISTRIBUTION, EmbeddedSuite
from qwen_vla_core.evaluation.suites.progress import ManipulationScore, Stages
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher

AXES = {
    IN_DISTRIBUTION: "20 cm/s, other seeds",
    "slower": "10 cm/s",
    "faster": "28 cm/s",
    "colour": "even seeds: the cube asked for has a colour never shown or named; odd seeds: all the others have",
    "instance": "cylinders, blocks, tiles, smaller and larger cubes instead of the cubes of 4 cm",
    "background": "coloured and patterned table and floor, light outside the range of the demonstrations",
    "instruction": "sentences that no demonstration used",
}
SPEEDS = {"slower": {"belt_speed": 0.10}, "faster": {"belt_speed": 0.28}}  # m/s; 0.20 in demonstrations


class BeltSuite(EmbeddedSuite):
    """One task with a target that does not wait; speed is the axis that only a dynamic suite has."""

    name = "belt"
    title = "Belt (embedded): pick the named cube off a moving belt, measured as DOMINO"
    embodiment = "widowx"
    world = "widowx"
    axes = AXES
    tasks = ("belt",)
    metrics = ("progress", "manipulation_score", "route_completion", "named_cube_lifted", "named_cube_lost")
    shifts = ("colour", "instance", "background", "instruction")
    world_options = SPEEDS
    protocol = PublishedProtocol(
        source="DOMINO (arXiv 2603.15620): success rate and manipulation score, moving targets, zero-shot",
        tag="X",
        trials_per_task=100,
        horizon_steps={"*": 750},
        control_hz=50.0,
        seeds="100000, 100001, …: one scene each, the same for every axis",
        success="the named cube is 5 cm above the belt and touched for 0.2 s, and had never left the belt by itself",
        preprocessing=("two views at 256×192, resized by the checkpoint's processor", "5 of 8 actions executed"),
        deviations=(
            "one task on our own belt instead of DOMINO's 35 in RoboTwin",
            "no clutter, so DOMINO's penalty for touching it never applies; scores are 0 to 1 instead of 0 to 100",
        ),
    )

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """See ``Suite``."""
        return (Stages(world.task.name), ManipulationScore(world))
