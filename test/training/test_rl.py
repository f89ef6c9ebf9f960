"""Stage IV as a whole: it raises the success of a weak policy, resumes exactly, and stops before it spoils anything."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reach_policy import build_policy, clone_demonstrator
from reach_world import make_reach
from safetensors.torch import load_file

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from qwen_vla_core.sim.registry import world_class
from qwen_vla_core.training import rl
from qwen_vla_core.training.ppo import PpoConfig
from qwen_vla_core.training.rl import train_rl
from qwen_vla_core.training.rl_page import main
from qwen_vla_core.training.rl_recipe import RlEvaluateSpec, RlRates, RlRecipe, WorldsSpec, load_rl_recipe
from qwen_vla_core.training.run_log import read_rows
from qwen_vla_core.training.state import latest

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
WORLDS = {"reacher": make_reach}


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cloned from a demonstrator that stops short of the goal: it comes near enough in three of ten scenes."""
    policy = build_policy()
    clone_demonstrator(policy)
    folder = tmp_path_factory.mktemp("rl") / "start"
    save_checkpoint(policy, folder)
    return folder


@pytest.fixture
def short(start: Path) -> RlRecipe:
    """Three iterations of eight episodes."""
    return RlRecipe(
        start=str(start),
        worlds=(WorldsSpec("reacher", worlds=4, chunks=2),),
        iterations=3,
        rounds=2,
        rates=RlRates(decoder=1e-4, value=1e-2),
        ppo=PpoConfig(minibatches=2, epochs=2),
        workers=0,
        precision="fp32",
    )


def run(recipe: RlRecipe, out: Path) -> dict[str, Any]:
    return train_rl(recipe, out, out / "checkpoint", progress=False, device="cpu", worlds=WORLDS)


def test_it_raises_the_success_of_a_weak_policy(start: Path, tmp_path: Path) -> None:
    recipe = RlRecipe(
        start=str(start),
        worlds=(WorldsSpec("reacher", worlds=128, chunks=2),),
        iterations=6,
        rounds=1,
        rates=RlRates(decoder=1e-4, value=1e-2),
        evaluate=RlEvaluateSpec(every=6, episodes=128),
        workers=0,
        precision="fp32",
        micro_batch=128,
    )
    rates = {step: found["reacher"]["rate"] for step, found in run(recipe, tmp_path)["evaluations"].items()}
    assert 0.1 < rates[0] < 0.5
    assert rates[6] > rates[0] + 0.3
    rows = read_rows(tmp_path / "log.jsonl", lambda row: row["step"])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["success"] > rows[0]["success"] + 0.2
    # The checkpoint is the better policy, with all that it needs, and the backbone that it had.
    kept, before = load_checkpoint(tmp_path / "checkpoint"), load_checkpoint(start)
    assert read_config(tmp_path / "checkpoint")["provenance"]["result"]["iterations"] == 6
    for name, value in kept.named_parameters():
        frozen = name.startswith("backbone.")
        assert torch.equal(value, before.get_parameter(name)) == frozen or value.numel() <= 8, name


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_and_resumed_equals_uninterrupted(
    at: int, short: RlRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(short, tmp_path / "straight")
    original: Callable[..., Any] = rl._Run._iterate

    def killed(self: Any, iteration: int) -> dict[str, Any]:
        row: dict[str, Any] = original(self, iteration)
        if iteration == at:
            raise KeyboardInterrupt  # after the update, before anything is written
        return row

    with monkeypatch.context() as patch:
        patch.setattr(rl._Run, "_iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(short, tmp_path / "killed")
    run(short, tmp_path / "killed")
    one, other = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [read_rows(tmp_path / name / "log.jsonl", lambda row: row["step"]) for name in ("straight", "killed")]
    for row, again in zip(*logs, strict=True):
        assert {k: row[k] for k in ("step", "success", "loss", "kl")} == {
            k: again[k] for k in ("step", "success", "loss", "kl")
        }


def test_more_iterations_go_on_and_another_recipe_is_refused(short: RlRecipe, tmp_path: Path) -> None:
    run(replace(short, iterations=1), tmp_path)
    assert run(replace(short, iterations=2, workers=0, save_every=5), tmp_path)["iterations"] == 2
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl", lambda row: row["step"])] == [1, 2]
    with pytest.raises(UserError, match="another run") as caught:
        run(replace(short, rates=RlRates(decoder=5e-4)), tmp_path)
    assert "rates.decoder" in str(caught.value) and "\n" not in str(caught.value)


def test_rates_fall_where_they_shall(short: RlRecipe, tmp_path: Path) -> None:
    run(replace(short, rates=replace(short.rates, shape="linear")), tmp_path)
    rows = read_rows(tmp_path / "log.jsonl", lambda row: row["step"])
    assert [row["lr_decoder"] for row in rows] == pytest.approx([1e-4, 1e-4 * 2 / 3, 1e-4 / 3])
    assert [row["lr_value"] for row in rows] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_the_value_may_learn_first(short: RlRecipe, tmp_path: Path) -> None:
    train_rl(replace(short, ppo=replace(short.ppo, value_first=2)), tmp_path, tmp_path / "checkpoint", worlds=WORLDS)
    rows = list(read_rows(tmp_path / rl.LOG, lambda row: row["step"]))
    assert [row["lr_decoder"] for row in rows] == [0.0, 0.0, 1e-4]
    assert all(row["lr_value"] == 1e-2 for row in rows)
    assert [row["kl"] > 1e-9 for row in rows] == [False, False, True]


def test_with_evaluations_the_best_weights_are_kept(
    short: RlRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success over the evaluations is made to be 2, 4, 3, 4 of 4 scenes: the weights after one iteration stay."""
    wanted = iter((2, 4, 3, 4))
    collect = rl.collect

    def judged(*args: Any, **options: Any) -> Any:
        episodes = collect(*args, **options)
        if args[5].noise_level == 0.0:
            most = next(wanted)
            for number, episode in enumerate(episodes):
                episode.success = number < most
        return episodes

    monkeypatch.setattr(rl, "collect", judged)
    recipe = replace(short, evaluate=RlEvaluateSpec(every=1, episodes=4))
    result = run(recipe, tmp_path)
    assert [v["reacher"]["successes"] for v in result["evaluations"].values()] == [2, 4, 3, 4]
    assert read_config(tmp_path / "checkpoint")["provenance"]["result"]["iterations"] == 1


def test_a_backbone_with_a_rate_learns_and_the_value_sees_what_it_saw(short: RlRecipe, tmp_path: Path) -> None:
    run(replace(short, iterations=1, rates=RlRates(vision=1e-4, language=1e-4, decoder=1e-4)), tmp_path)
    before = load_checkpoint(short.start).state_dict()
    after = load_checkpoint(tmp_path / "checkpoint").state_dict()
    for part in (".visual.", ".language_model.", "decoder."):
        assert any(not torch.equal(before[name], after[name]) for name in before if part in name), part


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_kept(
    short: RlRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, calls = rl.judge_again, []

    def diverging(*args: Any) -> Any:
        likely, value = judge(*args)
        calls.append(1)
        return likely * (float("nan") if len(calls) > 6 else 1.0), value

    monkeypatch.setattr(rl, "judge_again", diverging)
    with pytest.raises(UserError, match=r"rl iteration 1: .*not finite.*rates\.decoder") as caught:
        run(short, tmp_path)
    assert "\n" not in str(caught.value)
    state = latest(tmp_path)
    assert state is not None and state.name == "step_00000001"
    assert all(torch.isfinite(p).all() for p in load_checkpoint(tmp_path / "checkpoint").parameters())


def test_the_published_numbers_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text("start: generalist\nworlds: [{embodiment: aloha}]\niterations: 1\n")
    recipe = load_rl_recipe(path)
    [spec] = recipe.worlds
    assert (spec.worlds, spec.chunks, recipe.rounds) == (128, 8, 8)
    assert (recipe.rates.decoder, recipe.rates.value) == (5e-6, 1e-4)
    assert (recipe.rates.vision, recipe.rates.language, recipe.sampling.noise_level) == (0, 0, 0.5)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "training" / "recipes").glob("*/rl*.yaml"))
    + sorted((ROOT / "training" / "recipes" / "rl").glob("*")),
    ids=lambda p: f"{p.parent.stem}-{p.stem}",
)
def test_every_shipped_recipe_names_robots_and_tasks_that_exist(path: Path) -> None:
    recipe = load_rl_recipe(path)
    for spec in recipe.worlds:
        robot = load_embodiment(spec.embodiment)
        assert robot.simulation is not None
        assert set(spec.tasks) <= set(world_class(robot.simulation.world).task_names)
        assert spec.execute_steps is None or spec.execute_steps <= robot.control.horizon
    assert recipe.evaluate is not None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("iterations: 1", "iteration: 1", "rl.yaml:3: iteration: unknown key; fix: did you mean 'iterations'"),
        ("iterations: 1", "iterations: 0", "rl.yaml:3: iterations: 0 is too small"),
        ("[{embodiment: aloha}]", "[]", "rl.yaml:2: worlds: no worlds to learn in"),
        ("[{embodiment: aloha}]", "[{embodiment: aloha}, {embodiment: aloha}]", "worlds[1].embodiment: 'aloha'"),
        ("iterations: 1", "iterations: 1\nrates: {decoder: 0}", "rates: every part of the policy is frozen"),
        ("iterations: 1", "iterations: 1\nsampling: {noise_level: 0}", "sampling.noise_level: 0 is too small"),
        ("iterations: 1", "iterations: 1\nppo: {timeouts: ignore}", "ppo.timeouts: got the text 'ignore'"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_fix(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "rl.yaml"
    path.write_text("start: generalist\nworlds: [{embodiment: aloha}]\niterations: 1\n".replace(old, new))
    with pytest.raises(UserError) as caught:
        load_rl_recipe(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_the_checkpoint_is_said_before_anything_runs(short: RlRecipe, tmp_path: Path) -> None:
    for worlds, said in (
        ((WorldsSpec("aloha"),), "'aloha' is not in this checkpoint"),
        ((WorldsSpec("reacher", execute_steps=5),), r"worlds\[0\].execute_steps: 5 of a chunk of 4"),
    ):
        with pytest.raises(UserError, match=said):
            run(replace(short, worlds=worlds), tmp_path)
    with pytest.raises(UserError, match=r"names no `simulation\.world`"):
        train_rl(short, tmp_path, tmp_path / "checkpoint", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_it_would_do_and_changes_keys(tmp_path: Path) -> None:
    recipe = ROOT / "training" / "recipes" / "rl" / "aloha.yaml"
    command = [sys.executable, "training/rl.py", "--recipe", str(recipe), "--dry-run", "--set", "rates.decoder=2e-5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "decoder" in done.stdout and "rate 2e-05" in done.stdout and "language" in done.stdout
    assert "frozen" in done.stdout and "episodes an iteration" in done.stdout


def test_the_pages_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "training" / "recipes" / "rl" / "aloha.yaml")
    for arguments, said in (
        (["--recipe", recipe], "--out"),
        (["--recipe", recipe, "--out", str(tmp_path / "o"), "--set", "start=null"], "start: name the checkpoint"),
        (["--recipe", recipe, "--out", str(tmp_path / "o"), "--set", "rate.decoder=1"], "rate: unknown key"),
        (["--recipe", recipe, "--out", str(tmp_path / "o"), "--from", "no-such"], "'no-such': no such folder"),
        (["--recipe", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "o")], "none.yaml"),
    ):
        assert main("", arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_under_torchrun_it_says_what_is_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = str(ROOT / "training" / "recipes" / "rl" / "aloha.yaml")
    assert main("", ["--recipe", recipe, "--out", str(tmp_path / "o")]) == 2
    assert "workers" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_recipe_is_json(short: RlRecipe) -> None:
    assert json.loads(json.dumps(short.to_json()))["rates"] == dataclasses.asdict(short.rates)
