"""The generalist's own recipes, shortened: every stage runs from its page, in order, and moves its own loss down.

Takes about a minute. Reinforcement learning is not among them: that it raises success is shown in test_rl.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen_vla_core import cli
from qwen_vla_core.model.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
DEMOS = (  # embodiment, task, folder of the demonstrations, of the corrections
    ("aloha", "pick", "aloha_pick", "aloha_pick_corrections"),
    ("aloha", "transfer", "aloha_transfer", "aloha_transfer_corrections"),
    ("widowx", "place", "widowx_place", "widowx_corrections"),
    ("mobile_base", "all", "rooms_all", "rooms_corrections"),
)
# stages that learn from corrections of the one before, and the ending of their folders
CORRECTED = {"sft_first": "", "sft": "_2", "sft_last": "_3"}
# recipe, the stage it goes on from, steps, the losses that have to fall, to which share of what they were at first
STAGES = (
    ("vision", None, 40, {"cells": 0.8, "place": 0.8}),
    ("where", "vision", 30, {"text": 0.7}),
    ("requests", "where", 30, {"text": 0.7}),
    ("t2a", "requests", 30, {"action": 0.9}),
    ("cpt", "t2a", 30, {"action": 0.95, "navigation": 0.95}),
    ("sft_first", "cpt", 20, {"action": 1.0, "navigation": 1.0}),
    ("sft", "sft_first", 20, {"action": 1.0, "navigation": 1.0}),
    ("sft_last", "sft", 8, {}),  # the same loop on more mixtures; too short to move what is learnt already
)


def demonstrate(out: Path, embodiment: str, task: str, *options: str) -> None:
    arguments = ["--embodiment", embodiment, "--task", task, "--out", str(out), *options]
    assert cli.main(["sim", "demos", *arguments, "--json"]) == 0


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes beside a folder of very few data, laid out as in the repository."""
    path = tmp_path_factory.mktemp("generalist")
    recipes = path / "training/recipes/generalist"
    shutil.copytree(ROOT / "training/recipes/generalist", recipes)
    for mixture in recipes.glob("*.yaml"):
        text = mixture.read_text()
        mixture.write_text(text.replace("batch_size: 32", "batch_size: 8").replace("batch_size: 24", "batch_size: 6"))
    for embodiment, task, name, _ in DEMOS:
        demonstrate(path / "data" / name, embodiment, task, "--episodes", "2")
    dropped = path / "data/aloha_transfer_drops"
    demonstrate(dropped, "aloha", "transfer", "--episodes", "1", "--noise", "1", "--drops", "0.5", "--seed", "60000")
    assert cli.main(["data", "t2a", "--count", "16", "--out", str(path / "data/t2a"), "--workers", "1", "--json"]) == 0
    return path


def test_every_stage_moves_its_own_loss(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes, out = workshop / "training/recipes/generalist", workshop / "runs"
    for name, before, steps, shares in STAGES:
        if name in CORRECTED:
            for embodiment, task, _, folder in DEMOS:
                pilot = ["--pilot", str(out / f"{before}/checkpoint"), "--seed", "20000", "--episodes", "1"]
                demonstrate(workshop / "data" / f"{folder}{CORRECTED[name]}", embodiment, task, *pilot)
        changes = [f"steps={steps}", "optim.warmup_steps=2", "log_every=1", "loader.workers=0", "save_every=1000"]
        command = ["train", "run", "--recipe", str(recipes / f"{name}.yaml"), "--out", str(out / name), "--json"]
        command += [part for change in changes for part in ("--set", change)]
        command += [] if before is None else ["--from", str(out / before / "checkpoint")]
        assert cli.main(command) == 0, name
        rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        for loss, share in shares.items():
            found = [row[loss] for row in rows if loss in row]
            part = len(found) // 4
            assert sum(found[-part:]) < share * sum(found[:part]), (name, loss, found)
        assert (out / name / "curves.png").stat().st_size > 10_000
    policy = load_checkpoint(out / "sft_last/checkpoint")
    assert set(policy.embodiments) == {"aloha", "widowx", "mobile_base"}
    capsys.readouterr()
    assert cli.main([*command[:-2], "--from", str(out / "sft/checkpoint")]) == 0
    assert "sft: done already" in capsys.readouterr().out
    assert cli.main(["train", "plot", str(out), "--out", str(workshop / "all.png")]) == 0


def test_a_dry_run_says_what_would_be_done(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = workshop / "training/recipes/generalist/vision.yaml"
    assert cli.main(["train", "run", "--recipe", str(recipe), "--dry-run", "--json", "--set", "loader.workers=0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 3000 and plan["eta_s"] > 0
    assert {group["name"]: group["trained"] > 0 for group in plan["groups"]} == {
        "vision": True,
        "language": False,
        "decoder": False,
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sft", "steps=1", "start: name the checkpoint"),
        ("cpt", "loss.tau=sigmoid_normal", "loss.tau: CPT draws flow times from 'beta'"),
        ("t2a", "mixture=robots.yaml", "T2A learns from whole episodes without pictures"),
        ("where", "mixture=robots.yaml", "this stage learns from conversations alone"),
        ("vision", "mixture=where_mixture.yaml", "aloha has no data in where_mixture.yaml"),
        ("vision", "embodiments=[aloha, nobody]", "nobody"),
    ],
)
def test_what_is_not_this_stage_is_refused(
    workshop: Path, capsys: pytest.CaptureFixture[str], name: str, change: str, message: str
) -> None:
    recipe = workshop / f"training/recipes/generalist/{name}.yaml"
    start = [] if name in ("sft", "vision") else ["--set", "embodiments=[aloha, widowx, mobile_base]"]
    start += [] if name in ("sft", "vision") else ["--set", "model.backbone=qwen3_vl"]
    out = ["--out", str(workshop / "refused"), "--set", "loader.workers=0"]
    assert cli.main(["train", "run", "--recipe", str(recipe), *start, *out, "--set", change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
