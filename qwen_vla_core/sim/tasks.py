"""Instruction text ↔ task. The text alone decides what counts as success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.randomize import COLOURS

TaskName = Literal["pick", "transfer"]
TASKS: tuple[TaskName, ...] = ("pick", "transfer")

PARAPHRASES: dict[TaskName, tuple[str, ...]] = {
    "pick": (
        "pick up the {colour} cube",
        "grab the {colour} cube",
        "lift the {colour} cube",
        "take the {colour} cube",
    ),
    "transfer": (
        "transfer the {colour} cube to the other arm",
        "hand the {colour} cube over to the other arm",
        "pass the {colour} cube to the other arm",
    ),
}


@dataclass(frozen=True)
class Task:
    """What to do with which cube."""

    name: TaskName
    colour: str


_KNOWN: dict[str, Task] = {
    template.format(colour=colour): Task(name, colour)
    for name, templates in PARAPHRASES.items()
    for template in templates
    for colour in COLOURS
}


def parse_instruction(text: str) -> Task:
    """Finds the task a sentence asks for. Case, spaces and a final full stop do not matter.

    Raises:
        UserError: the sentence is not one of the known forms.
    """
    task = _KNOWN.get(" ".join(text.lower().split()).rstrip(".!"))
    if task is None:
        forms = "; ".join(form for templates in PARAPHRASES.values() for form in templates)
        raise UserError(
            f"instruction {text!r}: this world does not know it; use one of: {forms} (colour: {', '.join(COLOURS)})"
        )
    return task


def phrase(task: Task, rng: np.random.Generator | None = None) -> str:
    """A sentence for ``task``: the plain one, or a random paraphrase when a generator is given."""
    templates = PARAPHRASES[task.name]
    return templates[0 if rng is None else int(rng.integers(len(templates)))].format(colour=task.colour)
