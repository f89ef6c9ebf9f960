"""A stage from its recipe to a checkpoint: it learns, it resumes exactly, and it stops before it spoils anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_support import log, mixture, run, stage_recipe

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import load_checkpoint
from qwen_vla_core.training import engine, stage
from qwen_vla_core.training.distributed import Ranks
from qwen_vla_core.training.feed import Feed
from qwen_vla_core.training.frozen_prompts import FrozenPrompts
from qwen_vla_core.training.seeing import SeeingTask
from qwen_vla_core.training.state import latest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole")
    run(stage_recipe(path, mixture(folder)), path / "run")
    return path / "run"


@pytest.mark.parametrize("at", [1, 2, 4])
def test_killed_and_resumed_equals_uninterrupted(folder: Path, whole: Path, tmp_path: Path, at: int) -> None:
    recipe, out = stage_recipe(tmp_path, mixture(folder)), tmp_path / "run"

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == at:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, out, hooks=engine.Hooks(logged=kill))
    run(recipe, out)
    final = {row["step"]: row for row in log(out)}
    for row, expected in zip(final.values(), log(whole), strict=True):
        assert row == pytest.approx(expected)
    undisturbed, found = load_checkpoint(whole / "checkpoint"), load_checkpoint(out / "checkpoint")
    for (name, one), (_, other) in zip(undisturbed.named_parameters(), found.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_the_losses_fall(folder: Path, tmp_path: Path) -> None:
    recipe = stage_recipe(tmp_path, mixture(folder, batch_size=8), steps=30, log_every=1, save_every=30)
    run(recipe, tmp_path / "run")
    rows = log(tmp_path / "run")
    for key, share in (("action", 0.9), ("text", 0.6)):
        assert sum(row[key] for row in rows[-5:]) < share * sum(row[key] for row in rows[:5])
    assert {"grad_norm", "lr_vision", "lr_language", "lr_decoder", "mfu"} <= rows[0].keys()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = stage_recipe(tmp_path, mixture(folder)), tmp_path / "run"
    make = Feed.make

    def poisoned(self: Feed, step: int, samples: Any) -> Any:
        batch = make(self, step, samples)
        if step == 3:
            batch.parts[0]["actions"][0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(Feed, "make", poisoned)
    with pytest.raises(UserError, match=r"cpt, step 3: the loss is not finite; .* lower optim.rates"):
        run(recipe, out)
    good = latest(out)
    assert good is not None and good.name == "step_00000002"
    monkeypatch.undo()
    assert run(recipe, out)["steps"] == 5


def test_another_recipe_does_not_go_on_from_this_state(folder: Path, tmp_path: Path, whole: Path) -> None:
    recipe = stage_recipe(tmp_path, mixture(folder), ["loss.text=0.5"])
    with pytest.raises(UserError, match="belongs to another run"):
        run(recipe, whole)


def test_a_new_model_needs_robots(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"start: name the checkpoint .*--from.* or give `embodiments`"):
        run(stage_recipe(tmp_path, mixture(folder), embodiments=[]), tmp_path / "run")


def test_a_robot_without_data_is_named(folder: Path, tmp_path: Path) -> None:
    recipe = stage_recipe(tmp_path, mixture(folder), embodiments=["aloha", "widowx"])
    with pytest.raises(UserError, match="embodiments: widowx has no data"):
        run(recipe, tmp_path / "run")


def test_a_new_decoder_behind_a_known_backbone(folder: Path, tmp_path: Path, whole: Path) -> None:
    """For comparisons of what only the decoder knows, behind one backbone."""
    recipe = stage_recipe(
        tmp_path, mixture(folder), start=str(whole / "checkpoint"), renew={"context": "joint", "state": "none"}, steps=2
    )
    with stage.opened(recipe, tmp_path / "run", Ranks(), progress=False) as opened:
        before = load_checkpoint(whole / "checkpoint")
        for (name, one), (_, other) in zip(
            before.backbone.named_parameters(), opened.policy.backbone.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        assert opened.policy.decoder.state_in is None and not opened.policy.decoder.action_out[-1].weight.any()
    run(recipe, tmp_path / "run")
    config = load_checkpoint(tmp_path / "run/checkpoint").config
    assert (config.decoder.context, config.state_mode) == ("joint", "none")
    with pytest.raises(UserError, match="renew: the new decoder would stay as it begins"):
        stage_recipe(tmp_path, mixture(folder), start="x", renew={}, optim={"rates": {"vision": 1e-3}})


def test_t2a_reads_every_prompt_once(folder: Path, tmp_path: Path, whole: Path) -> None:
    mixed = mixture(folder, asks=())
    mixed["families"][0] |= {"whole": True, "datasets": [{"path": str(folder), "embodiment": "aloha"}]}
    recipe = stage_recipe(
        tmp_path,
        mixed,
        stage="t2a",
        start=str(whole / "checkpoint"),
        optim={"rates": {"decoder": 1e-3}},
        loss={"tau": "sigmoid_normal", "draws": 2},
    )
    with stage.opened(recipe, tmp_path / "run", Ranks(), progress=False) as opened:
        task, encoded = FrozenPrompts(opened), []
        encode = opened.policy._encode
        opened.policy._encode = lambda batch: encoded.append(len(batch["input_ids"])) or encode(batch)  # type: ignore
        batch = next(task.steps(0, 1)).parts[0]
        inputs = {key: value for key, value in batch.items() if key not in ("noise", "tau")}
        options = {"noise": batch["noise"], "tau": batch["tau"], "repeat": 2}
        remembered = task.module(inputs, **options)
        again = task.module(inputs, **options)
        distinct = len({tuple(row.tolist()) for row in inputs["input_ids"]})
        assert encoded == [distinct] and "pixel_values" not in inputs
        opened.policy._encode = encode  # type: ignore[method-assign]
        plain = opened.policy(inputs, **options)
    assert remembered == again
    torch.testing.assert_close(remembered["action"], plain["action"], rtol=1e-4, atol=1e-5)
    before = load_checkpoint(whole / "checkpoint")
    run(recipe, tmp_path / "run", task=FrozenPrompts)
    after = load_checkpoint(tmp_path / "run/checkpoint")
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one, other) or name.startswith("decoder."), name
    assert not torch.equal(before.decoder.action_out[-1].weight, after.decoder.action_out[-1].weight)


def test_the_vision_stage_teaches_the_tower_alone(folder: Path, tmp_path: Path) -> None:
    recipe = stage_recipe(
        tmp_path, mixture(folder, asks=()), stage="vision", optim={"rates": {"vision": 1e-3}}, steps=24, save_every=24
    )
    with stage.opened(recipe, tmp_path / "run", Ranks(), progress=False) as opened:
        before = {name: value.detach().clone() for name, value in opened.policy.named_parameters()}
        engine.run(SeeingTask(opened), recipe, Ranks(), tmp_path / "run", {}, engine.Hooks(), progress=False)
        changed = {name for name, value in opened.policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(".visual." in name for name in changed)
    rows = log(tmp_path / "run")
    for key in ("cells", "place"):
        assert sum(row[key] for row in rows[-6:]) < sum(row[key] for row in rows[:6])
