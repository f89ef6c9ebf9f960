"""A recipe is read once, strictly: a mistake is one line with file, line, key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.presets import PRESETS
from qwen_vla_core.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
GOOD = """\
embodiment: aloha
preset: tiny
data: [data/one, data/two]
seed: 0
vision: {steps: 4, batch_size: 3, learning_rate: 2e-3}
grounding: {steps: 2, batch_size: 2, questions: 3, learning_rate: 1e-3}
policy:
  steps: 3
  batch_size: 2
  noise_draws: 4
  learning_rate: 1.0e-3
  backbone_learning_rate: 5.0e-4
  questions: 2
  text_weight: 0.2
instruction: {steps: 5, batch_size: 4, questions: 0, learning_rate: 1e-3}
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_a_recipe_is_read_as_written_and_the_rest_has_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    assert recipe.data == ("data/one", "data/two")
    assert recipe.grounding.learning_rate == 1e-3 and recipe.policy.noise_draws == 4
    assert recipe.save_every == 500 and recipe.ema_decay == 0.999 and recipe.threads == 1


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_names_what_exists(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.preset in PRESETS and recipe.data
    assert load_embodiment(recipe.embodiment).simulation is not None


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("  noise_draws: 4", "  noise_draw: 4", 10, "policy.noise_draw: unknown key; fix: did you mean 'noise_draws'"),
        ("seed: 0", "seed: 0\nlearning_rate: 1", 5, "learning_rate: unknown key"),
        ("  steps: 3\n", "", 7, "policy.steps: missing"),
        ("preset: tiny\n", "", 1, "preset: missing"),
        ("steps: 4,", "steps: -1,", 5, "vision.steps: -1 is too small; fix: use at least 0"),
        ("seed: 0", "seed: zero", 4, "seed: expected a whole number"),
        ("seed: 0", "seed: -1", 4, "seed: -1 is too small; fix: use at least 0"),
        ("steps: 2,", "steps: 2.5,", 6, "grounding.steps: expected a whole number"),
        ("batch_size: 2,", "batch_size: 0,", 6, "grounding.batch_size: 0 is too small; fix: use at least 1"),
        ("  learning_rate: 1.0e-3", "  learning_rate: 0", 11, "policy.learning_rate: 0"),
        ("  text_weight: 0.2", "  text_weight: .nan", 14, "policy.text_weight"),
        ("  text_weight: 0.2", "  text_weight: -1", 14, "policy.text_weight: -1"),
        ("data: [data/one, data/two]", "data: data/one", 3, "data: expected a list"),
        ("seed: 0", "seed: 0\nseed: 1", 5, "seed"),
        ("seed: 0", "seed: !!python/object:os.system 0", 4, "seed"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_key_and_fix(
    tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(UserError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    message = str(caught.value)
    assert f"recipe.yaml:{line}: " in message and said in message and "fix: " in message and "\n" not in message


def test_train_says_in_one_line_what_is_wrong_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    for text, said in (
        (GOOD.replace("tiny", "paper"), "preset 'paper'"),
        (GOOD.replace("aloha", "no_such_robot"), "no_such_robot"),
        (GOOD.replace("data/one", str(tmp_path / "nowhere")), "nowhere"),
        (GOOD.replace("[data/one, data/two]", "[]"), "`data`"),
    ):
        path.write_text(text)
        assert main(["train", "run", "--recipe", str(path), "--out", str(out), "--json"]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error
    assert main(["train", "run", "--recipe", str(tmp_path / "none.yaml"), "--out", str(out)]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []
