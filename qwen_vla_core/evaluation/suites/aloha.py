"""Bimanual ALOHA over a table: in distribution, and the paper's five axes out of it, in our own simulator."""

from __future__ import annotations

from qwen_vla_core.evaluation.suites.embedded import IN_DISTRIBUTION, EmbeddedSuite
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol

TABLE_AXES = {
    IN_DISTRIBUTION: "what demonstrations showed, other seeds",
    "colour": "even seeds: the cube asked for has a colour never shown or named; odd seeds: all the others have",
    "instance": "cylinders, blocks, tiles, smaller and larger cubes instead of the cubes of 4 cm",
    "position": "all cubes lie outside the region of the demonstrations",
    "background": "coloured and patterned table and floor, light outside the range of the demonstrations",
    "instruction": "sentences that no demonstration used",
}


class AlohaSuite(EmbeddedSuite):
    """Named after the paper's axes [P]; the tasks, the robot's simulator and all numbers are ours."""

    name = "aloha"
    title = "ALOHA (embedded): pick and hand over a cube, with five axes out of distribution"
    embodiment = "aloha"
    world = "aloha"
    axes = TABLE_AXES
    tasks = ("pick", "transfer")
    shifts = tuple(axis for axis in TABLE_AXES if axis != IN_DISTRIBUTION)
    protocol = PublishedProtocol(
        source="arXiv 2605.30280: real ALOHA, in-domain and OOD by colour, instance, position, background, instruction",
        tag="P",
        trials_per_task=50,
        horizon_steps={"*": 600},
        control_hz=50.0,
        seeds="100000, 100001, …: one scene each, the same for every axis (position draws its own)",
        success="pick: 5 cm up and touched by the nearer arm; transfer: up in the other arm alone; each held for 0.2 s",
        preprocessing=("three views at 256×192, resized by the checkpoint's processor", "5 of 16 actions executed"),
        deviations=(
            "simulated, with our own tasks: the paper's OOD numbers are of a real robot and another set of tasks",
            "the number of trials per axis is ours; the paper does not print it",
        ),
    )
