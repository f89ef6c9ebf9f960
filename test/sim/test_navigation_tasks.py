"""Sentences for walks, there and back."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.navigation_tasks import (
    DOORWAYS,
    LANDMARKS,
    PARAPHRASES,
    NavigationTask,
    parse_instruction,
    phrase,
    reworded,
)

TASKS = (
    NavigationTask("goto", "red ball"),
    NavigationTask("past", "red ball", "blue pillar"),
    NavigationTask("through", "yellow box", "green doorway"),
)


@pytest.mark.parametrize("task", TASKS)
def test_every_wording_is_understood(task: NavigationTask) -> None:
    rng = np.random.default_rng(0)
    said = {phrase(task, rng) for _ in range(60)}
    assert len(said) == len(PARAPHRASES[task.name]) >= 4
    assert all(parse_instruction(f"  {text.upper()}. ") == task for text in said)


def test_the_sentence_of_the_readme() -> None:
    assert phrase(TASKS[1]) == "go past the blue pillar and stop at the red ball"


def test_another_goal_keeps_the_wording() -> None:
    other = NavigationTask("past", "green box", "blue pillar")
    text = "go to the red ball, passing the blue pillar on the way"
    assert reworded(TASKS[1], text, other) == "go to the green box, passing the blue pillar on the way"
    assert reworded(TASKS[1], text, TASKS[0]) == "go to the red ball"


@pytest.mark.parametrize(
    "text", ["", "go to the purple ball", "go past the red ball and stop at the red ball", "go to the red doorway"]
)
def test_other_sentences_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UserError, match="go past the") as caught:
        parse_instruction(text)
    assert "\n" not in str(caught.value)


def test_names_are_colours_with_shapes() -> None:
    assert len(LANDMARKS) == 12 and len(DOORWAYS) == 4 and "red ball" in LANDMARKS
