"""Trajectory i of a robot, whichever process makes it and whenever: blocks of tasks that are drawn, planned, checked.

A task that cannot be done (out of reach, longer than the horizon) or that fails a check is drawn again with the next
attempt number; both are counted by reason. Everything depends on seed, robot, trajectory number and attempt alone.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.t2a.checks import check
from qwen_vla_core.data.t2a.language import instruction
from qwen_vla_core.data.t2a.planner import HORIZON, RATE_HZ, plan
from qwen_vla_core.data.t2a.robots import Arm, find_arm
from qwen_vla_core.data.t2a.scenes import TEMPLATES, Spec, Template, draw
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

BLOCK = 60  # trajectories planned together; whole blocks are planned always, so that the batch is always the same
MAX_ATTEMPTS = 200
GENERATOR = 1  # counts up whenever the same seed gives other trajectories


class Job(NamedTuple):
    """One block of one robot's trajectories: numbers ``block * BLOCK`` and the following."""

    robot: str
    templates: tuple[Template, ...]
    seed: int
    block: int


@dataclass(frozen=True)
class Sample:
    """One good trajectory.

    Attributes:
        spec: the task.
        text: its instruction.
        rows: (T + 1, n + 1) float32 joint angles and opening, the start included.
        phases: (label, first step, step after the last).
    """

    spec: Spec
    text: str
    rows: np.ndarray
    phases: tuple[tuple[str, int, int], ...]

    def episode(self) -> EpisodeRows:
        """As a dataset holds it: the state before each step and what is commanded there."""
        steps = len(self.rows) - 1
        return EpisodeRows(
            state=self.rows[:-1],
            action=self.rows[1:],
            timestamp=np.arange(steps) / RATE_HZ,
            task=np.zeros(steps, np.int64),
            perturbed=np.zeros(steps, bool),
        )

    def info(self) -> dict[str, Any]:
        """JSON for the episode's metadata: what the checks need, and where the motions begin and end."""
        return {"template": self.spec.template, "spec": self.spec.to_json(), "phases": [list(p) for p in self.phases]}


@dataclass
class Tally:
    """What became of the tasks that were drawn.

    Attributes:
        kept: good trajectories by template.
        impossible: reasons why tasks could not be planned, ``template: reason`` → count.
        failed: faults of planned trajectories, ``template: fault`` → count of trajectories.
    """

    kept: Counter[str] = field(default_factory=Counter)
    impossible: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Adds what another block counted."""
        self.kept.update(other.kept)
        self.impossible.update(other.impossible)
        self.failed.update(other.failed)


class Block(NamedTuple):
    """What a job gives."""

    samples: list[Sample]
    tally: Tally


def make_block(job: Job) -> Block:
    """Draws, plans, checks and words a block of trajectories.

    Raises:
        UserError: the robot is unknown, or a template cannot be done by it at all.
    """
    arm = find_arm(job.robot)
    tally = Tally()
    done: dict[int, Sample] = {}
    first = job.block * BLOCK
    for attempt in range(MAX_ATTEMPTS):
        left = [i for i in range(BLOCK) if i not in done]
        if not left:
            break
        key = [job.seed, zlib.crc32(job.robot.encode())]
        rngs = [np.random.default_rng([*key, first + i, attempt]) for i in left]
        specs = [
            draw(job.templates[(first + i) % len(job.templates)], arm, rng) for i, rng in zip(left, rngs, strict=True)
        ]
        for i, rng, spec, planned in zip(left, rngs, specs, plan(arm, specs), strict=True):
            if isinstance(planned, str):
                tally.impossible[f"{spec.template}: {planned}"] += 1
                continue
            rows = np.column_stack([planned.q, planned.gripper]).astype(np.float32)
            faults = check(arm, spec, rows[:-1], rows[1:])
            if faults:
                tally.failed[f"{spec.template}: {faults[0]}"] += 1
                continue
            done[i] = Sample(spec, instruction(spec, rng), rows, planned.phases)
            tally.kept[spec.template] += 1
    else:
        lost = sorted({job.templates[(first + i) % len(job.templates)] for i in range(BLOCK) if i not in done})
        raise UserError(
            f"--robots {job.robot}: {MAX_ATTEMPTS} draws gave no {', '.join(lost)} trajectory that it can do; "
            "leave that template or robot out"
        )
    return Block([done[i] for i in range(BLOCK)], tally)


def contract(arm: Arm) -> DataContract:
    """Prompt, rate and channels of a robot's dataset. H is the longest sequence: the whole motion is one chunk [P]."""
    groups = (
        ChannelGroup("arm", "joint_position", "rad", arm.channels[:-1]),
        ChannelGroup("gripper", "gripper", "fraction", arm.channels[-1:]),
    )
    return DataContract(
        prompt=PromptSpec(robot_tag=arm.tag, arms="single arm"),
        frequency_hz=RATE_HZ,
        horizon=HORIZON,
        convention="absolute_joint",
        views=(),
        state=groups,
        action=groups,
    )


def source(arm: Arm, templates: tuple[Template, ...], seed: int) -> dict[str, Any]:
    """Provenance of a robot's dataset; equal for what may be resumed."""
    return {
        "name": "t2a",
        "generator": GENERATOR,
        "robot": arm.name,
        "templates": list(templates),
        "seed": seed,
        "kinematics": arm.source,
        "licence": "generated by this program; no third-party data",
    }


def parse_templates(names: list[str]) -> tuple[Template, ...]:
    """Checks template names; none means all six.

    Raises:
        UserError: an unknown name, or one twice.
    """
    for name in names:
        if name not in TEMPLATES:
            raise UserError(f"--templates {name}: no such template; use some of {', '.join(TEMPLATES)}")
    if len(set(names)) < len(names):
        raise UserError(f"--templates {' '.join(names)}: a template is named twice; name it once")
    return tuple(template for template in TEMPLATES if template in names) if names else TEMPLATES
