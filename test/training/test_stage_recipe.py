"""Recipes of stages: one clear error with line and fix, changes from the command line, a hash of what matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.training.stage_recipe import load_stage

RECIPES = Path(__file__).parents[2] / "training/recipes/generalist"
STAGES = ("vision", "where", "requests", "t2a", "cpt", "sft")
TEXT = """\
stage: cpt
mixture: mixture.yaml
steps: 10
embodiments: [aloha]
optim:
  rates: {decoder: 1.0e-3}
"""


def written(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", [*STAGES, "../belt_first", "../belt_second", "../belt"])
def test_shipped_recipes_can_be_read(name: str) -> None:
    recipe = load_stage(RECIPES / f"{name}.yaml")
    assert recipe.path(recipe.mixture).is_file()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "stepps: 10", r"recipe.yaml:3: stepps: unknown key; fix: .*steps"),
        ("stage: cpt", "stage: ctp", r"recipe.yaml:1: stage: .*; fix: .*cpt"),
        ("decoder: 1.0e-3", "decoder: -1.0", r"recipe.yaml:6: optim.rates.decoder: -1.0 is too small"),
        ("decoder: 1.0e-3", "decoder: 0.0", r"optim.rates: every part is frozen"),
        ("stage: cpt", "stage: t2a", None),
        ("stage: cpt\n", "stage: t2a\nlora: {rank: 4}\n", None),
        ("rates: {decoder: 1.0e-3}", "rates: {vision: 1.0e-3}\nlora: {rank: 4}", r"vision: with `lora` the tower"),
        ("stage: cpt", "stage: vision", r"optim.rates.decoder: stage 0 has no actions"),
        ("steps: 10", "steps: 10\nscale: {parallel: fsdp2, together: false}", r"scale.together: every rank of fsdp2"),
        ("steps: 10", "steps: 10\nmodel: {pretrained: x}", r"model.pretrained: the tiny preset"),
    ],
)
def test_mistakes_name_line_key_and_fix(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    path = written(tmp_path, TEXT.replace(old, new))
    if message is None:
        load_stage(path)
        return
    with pytest.raises(UserError, match=message) as caught:
        load_stage(path)
    assert "\n" not in str(caught.value)


def test_t2a_trains_the_decoder_alone(tmp_path: Path) -> None:
    text = TEXT.replace("stage: cpt", "stage: t2a").replace("rates: {", "rates: {language: 1.0e-5, ")
    with pytest.raises(UserError, match="T2A trains the decoder alone; fix: leave vision and language at 0"):
        load_stage(written(tmp_path, text))


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path)
    recipe = load_stage(
        path, ["optim.rates.vision=1e-4", "loss.tau=sigmoid_normal", "lora=null", "loader.size=[96, 96]"]
    )
    assert recipe.optim.rates.vision == 1e-4 and recipe.optim.rates.decoder == 1e-3
    assert recipe.loss.tau == "sigmoid_normal" and recipe.lora is None and recipe.loader.size == (96, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps", "write it as key.subkey=value"),
        ("steps=", "steps"),
        ("steps=[1", "the value is no YAML"),
        ("steps.a=1", "steps has no keys"),
        ("stepps=1", "unknown key"),
        ("steps=-1", "too small"),
    ],
)
def test_changes_are_judged_like_the_file(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_stage(written(tmp_path), [change])


def test_the_choices_know_what_is_learnt_and_not_how_it_is_spread(tmp_path: Path) -> None:
    path = written(tmp_path)
    plain = load_stage(path).choices
    for change in ("scale.threads=2", "save_every=7", "loader.workers=3", "description=hello"):
        assert load_stage(path, [change]).choices == plain
    for change in ("steps=11", "seed=1", "loss.draws=2", "loader.jitter=0", "optim.rates.decoder=2e-3"):
        assert load_stage(path, [change]).choices != plain
