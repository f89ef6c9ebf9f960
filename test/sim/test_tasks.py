"""The words decide: every known sentence maps to its task, everything else is refused with the known forms."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.sim.tasks import PARAPHRASES, Task, parse_instruction, phrase


@pytest.mark.parametrize("name", list(PARAPHRASES))
@pytest.mark.parametrize("colour", COLOURS)
def test_every_paraphrase_means_its_task(name: str, colour: str) -> None:
    task = Task(name, colour)
    for template in PARAPHRASES[name]:
        assert parse_instruction(template.format(colour=colour)) == task
    for seed in range(5):
        assert parse_instruction(phrase(task, np.random.default_rng(seed))) == task
    assert parse_instruction("  " + phrase(task).upper() + ". ") == task


@pytest.mark.parametrize(
    "text", ["", "pick up the cube", "pick up the pink cube", "dance", "pick up the red cube twice"]
)
def test_other_sentences_are_refused_with_the_forms_that_exist(text: str) -> None:
    with pytest.raises(UserError, match=r"pick up the \{colour\} cube") as caught:
        parse_instruction(text)
    assert "\n" not in str(caught.value)
