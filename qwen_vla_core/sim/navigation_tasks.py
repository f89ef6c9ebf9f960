"""Instruction text ↔ navigation task. The text alone decides what counts as success."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_vla_core.errors import UserError

COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow")
SHAPES: tuple[str, ...] = ("pillar", "ball", "box")
LANDMARKS: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
DOORWAYS: tuple[str, ...] = tuple(f"{colour} doorway" for colour in COLOURS)
TASKS: tuple[str, ...] = ("goto", "past", "through")

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "goto": (
        "go to the {goal}",
        "drive to the {goal}",
        "stop at the {goal}",
        "move to the {goal} and stop there",
    ),
    "past": (
        "go past the {via} and stop at the {goal}",
        "pass the {via}, then stop at the {goal}",
        "drive by the {via} and go to the {goal}",
        "go to the {goal}, passing the {via} on the way",
    ),
    "through": (
        "go through the {via} and stop at the {goal}",
        "drive through the {via} to the {goal}",
        "take the {via}, then stop at the {goal}",
        "go to the {goal} through the {via}",
    ),
}


@dataclass(frozen=True)
class NavigationTask:
    """Where to stop, and what to pass or go through before.

    Attributes:
        name: goto, past or through.
        goal: a landmark, "red ball".
        via: a landmark (past), a doorway (through), or None (goto).
    """

    name: str
    goal: str
    via: str | None = None


def _sentences() -> dict[str, NavigationTask]:
    known = {}
    for name, templates in PARAPHRASES.items():
        ways: tuple[str | None, ...] = {"goto": (None,), "past": LANDMARKS, "through": DOORWAYS}[name]
        for template in templates:
            for goal in LANDMARKS:
                for via in ways:
                    if via != goal:
                        known[template.format(goal=goal, via=via)] = NavigationTask(name, goal, via)
    return known


_KNOWN = _sentences()


def parse_instruction(text: str) -> NavigationTask:
    """Finds the task a sentence asks for. Case, spaces and a final full stop do not matter.

    Raises:
        UserError: the sentence is not one of the known forms.
    """
    task = _KNOWN.get(" ".join(text.lower().split()).rstrip(".!"))
    if task is None:
        forms = "; ".join(form for templates in PARAPHRASES.values() for form in templates)
        raise UserError(
            f"instruction {text!r}: this world does not know it; use one of: {forms} "
            f"(goal and via: {', '.join(COLOURS)} with {', '.join(SHAPES)}, via also doorway)"
        )
    return task


def phrase(task: NavigationTask, rng: np.random.Generator | None = None) -> str:
    """A sentence for ``task``: the plain one, or a random paraphrase when a generator is given."""
    templates = PARAPHRASES[task.name]
    return templates[0 if rng is None else int(rng.integers(len(templates)))].format(goal=task.goal, via=task.via)


def reworded(task: NavigationTask, text: str, other: NavigationTask) -> str:
    """``other`` in the wording that ``text`` gave ``task``; in its plain one where they are of different kinds."""
    if task.name != other.name:
        return phrase(other)
    plain = " ".join(text.lower().split()).rstrip(".!")
    template = next(t for t in PARAPHRASES[task.name] if t.format(goal=task.goal, via=task.via) == plain)
    return template.format(goal=other.goal, via=other.via)
