"""A run that was killed and resumed is the run that was not; what breaks says so and spoils nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.checkpoint import load_checkpoint, read_config
from qwen_vla_core.model.policy import QwenVLA
from qwen_vla_core.sim.demonstration import Demonstration
from qwen_vla_core.training.first_skill import _Loop, train
from qwen_vla_core.training.recipe import Recipe

STATE = "training_state.safetensors"
STAGES = ("vision", "grounding", "instruction", "policy")


def run(recipe: Recipe, out: Path) -> dict:
    return train(recipe, out, out / "checkpoint", progress=False)


def averages(out: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(out / STATE).items() if key.startswith("average.")}


@pytest.fixture(scope="session")
def straight(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The uninterrupted run and its result. Tests must not change its folder."""
    out = tmp_path_factory.mktemp("straight")
    return out, run(recipe, out)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("vision", 1), ("grounding", 0), ("policy", 1), ("policy", 2)],
    ids=["before anything was saved", "after vision", "after grounding", "inside the policy stage"],
)
def test_killed_and_resumed_equals_uninterrupted(
    stage: str, step: int, recipe: Recipe, straight: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _Loop._step

    def killed(self: _Loop, at: int, *args: object) -> dict[str, float]:
        if (self.name, at) == (stage, step):
            raise KeyboardInterrupt
        return original(self, at, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path)
    run(recipe, tmp_path)
    expected, found = averages(straight[0]), averages(tmp_path)
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    ids = [read_config(out / "checkpoint")["weights_id"] for out in (straight[0], tmp_path)]
    assert ids[0] == ids[1]


def test_training_moves_both_halves_and_another_seed_goes_elsewhere(
    recipe: Recipe, straight: tuple[Path, dict], tmp_path: Path
) -> None:
    run(replace(recipe, seed=recipe.seed + 1), tmp_path)
    one, other = averages(straight[0]), averages(tmp_path)
    for part in (".visual.", ".language_model.", ".decoder."):
        names = [name for name in one if part in name]
        assert any(not torch.equal(one[name], other[name]) for name in names)
    moments = load_file(straight[0] / STATE)
    for part in (".visual.", ".language_model.", ".decoder."):
        moved = [value for name, value in moments.items() if "optimizer.exp_avg." in name and part in name]
        assert any(value.abs().max() > 0 for value in moved)


def test_a_finished_run_started_again_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    short = replace(recipe, **{name: replace(getattr(recipe, name), steps=1) for name in STAGES})
    run(short, tmp_path)
    before = (tmp_path / STATE).read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    weights = read_config(tmp_path / "checkpoint")["weights_id"]
    run(short, tmp_path)
    assert before == ((tmp_path / STATE).read_bytes(), (tmp_path / "log.jsonl").read_bytes())
    assert read_config(tmp_path / "checkpoint")["weights_id"] == weights


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_kept(
    recipe: Recipe, straight: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = QwenVLA.loss, []

    def diverging(self: QwenVLA, *args: object, **options: object) -> dict[str, torch.Tensor]:
        losses = original(self, *args, **options)  # type: ignore[arg-type]
        calls.extend(["policy"] if "action" in losses else [])
        return losses if len(calls) < 3 else {**losses, "action": losses["action"] * float("nan")}

    with monkeypatch.context() as patch:
        patch.setattr(QwenVLA, "loss", diverging)
        with pytest.raises(UserError, match=r"policy step 2: the loss is not finite.*training_state") as caught:
            run(recipe, tmp_path)
    assert "learning rates" in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / STATE).values())
    run(recipe, tmp_path)
    for name, value in averages(straight[0]).items():
        torch.testing.assert_close(averages(tmp_path)[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("damage", ["cut short", "header", "foreign"])
def test_a_damaged_state_is_one_clear_line(
    damage: str, recipe: Recipe, straight: tuple[Path, dict], tmp_path: Path
) -> None:
    good = (straight[0] / STATE).read_bytes()
    broken = {"cut short": good[:-1000], "header": b"\xff" * 64 + good[64:], "foreign": b"not a state"}[damage]
    (tmp_path / STATE).write_bytes(broken)
    with pytest.raises(UserError, match=rf"{STATE}: damaged training state .*; delete it to start again") as caught:
        run(recipe, tmp_path)
    assert "\n" not in str(caught.value) and (tmp_path / STATE).read_bytes() == broken


def test_a_state_of_another_model_is_refused(
    recipe: Recipe, straight: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_vla_core.training import first_skill

    build = first_skill.build_tiny

    def larger_vocabulary(*args: object, **options: object) -> QwenVLA:
        policy = build(*args, **options)  # type: ignore[arg-type]
        policy.backbone.resize_vocabulary(2000)
        return policy

    (tmp_path / STATE).write_bytes((straight[0] / STATE).read_bytes())
    monkeypatch.setattr(first_skill, "build_tiny", larger_vocabulary)
    with pytest.raises(UserError, match="another model"):
        run(recipe, tmp_path)


def test_the_checkpoint_loads_and_predicts_with_the_averaged_weights(
    straight: tuple[Path, dict], episodes: list[Demonstration], aloha: Embodiment
) -> None:
    out, result = straight
    policy = load_checkpoint(out / "checkpoint")
    averaged = {name.removeprefix("average.policy."): value for name, value in averages(out).items()}
    for name, value in policy.named_parameters():
        torch.testing.assert_close(value, averaged[name].half().float(), rtol=0, atol=0, msg=name)
    assert not any("probe" in name for name in policy.state_dict())
    episode = episodes[0]
    images = {view: pictures[0] for view, pictures in episode.images.items()}
    observation = Observation(images, episode.rows.state[0].astype(np.float64), episode.instruction, stamp_ns=7)
    chunk = policy.predict(observation, generator=torch.Generator().manual_seed(0))
    assert chunk.actions_hc.shape == (16, 14) and chunk.channels == aloha.channels and chunk.stamp_ns == 7
    assert np.isfinite(chunk.actions_hc).all()
    assert result["episodes"] == 2 and result["policy"]["steps"] == 3
    provenance = read_config(out / "checkpoint")["provenance"]
    assert provenance["recipe"]["policy"]["batch_size"] == 2 and provenance["result"]["policy"]["action"] > 0


def test_log_and_plot_show_every_stage_once(straight: tuple[Path, dict]) -> None:
    rows = [json.loads(line) for line in (straight[0] / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, 0) for stage in STAGES]
    assert set(rows[-1]) == {"stage", "step", "action", "text"}
    assert (straight[0] / "loss.png").read_bytes().startswith(b"\x89PNG")
