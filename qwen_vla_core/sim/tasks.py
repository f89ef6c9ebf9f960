"""Instruction text ↔ task. The text alone decides what counts as success."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.randomize import COLOURS


@dataclass(frozen=True)
class Task:
    """What to do with which cube."""

    name: str
    colour: str


@dataclass(frozen=True)
class TaskBook:
    """The sentences one world knows.

    Attributes:
        paraphrases: task name → sentences with ``{colour}``; the first of each is the plain one.
    """

    paraphrases: Mapping[str, tuple[str, ...]]
    _known: dict[str, Task] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, templates in self.paraphrases.items():
            for template in templates:
                self._known.update({template.format(colour=colour): Task(name, colour) for colour in COLOURS})

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, the world's usual one first."""
        return tuple(self.paraphrases)

    def parse(self, text: str) -> Task:
        """Finds the task a sentence asks for. Case, spaces and a final full stop do not matter.

        Raises:
            UserError: the sentence is not one of the known forms.
        """
        task = self._known.get(" ".join(text.lower().split()).rstrip(".!"))
        if task is None:
            forms = "; ".join(form for templates in self.paraphrases.values() for form in templates)
            raise UserError(
                f"instruction {text!r}: this world does not know it; use one of: {forms} (colour: {', '.join(COLOURS)})"
            )
        return task

    def phrase(self, task: Task, rng: np.random.Generator | None = None) -> str:
        """A sentence for ``task``: the plain one, or a random paraphrase when a generator is given."""
        templates = self.paraphrases[task.name]
        return templates[0 if rng is None else int(rng.integers(len(templates)))].format(colour=task.colour)


PARAPHRASES: dict[str, tuple[str, ...]] = {
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
TWO_ARMS = TaskBook(PARAPHRASES)
TASKS, parse_instruction, phrase = TWO_ARMS.names, TWO_ARMS.parse, TWO_ARMS.phrase

PLATE_AND_BELT = TaskBook(
    {
        "place": (
            "put the {colour} cube on the plate",
            "place the {colour} cube on the plate",
            "move the {colour} cube onto the plate",
            "set the {colour} cube down on the plate",
        ),
        "belt": (
            "pick the {colour} cube off the belt",
            "catch the {colour} cube on the belt",
            "take the {colour} cube from the moving belt",
        ),
    }
)
