"""Trials of a suite through the real graph: the same scenes, judged inside the simulator, one row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mujoco", reason="the simulator is not installed")

from qwen_vla_core.cli import main
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.results import read_result
from qwen_vla_core.sim.registry import make_world
from qwen_vla_ros.suite_runner import WatchedEpisode, episode_row


def test_a_trial_runs_in_the_graph_and_is_recorded(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rollouts = tmp_path / "ros.jsonl", tmp_path / "rollouts"
    run = ["eval", "run", "--suite", "aloha", "--axis", "colour", "--task", "pick", "--checkpoint", str(checkpoint)]
    run += ["--ros", "--timeout", "1.5", "--episodes", "1", "--output", str(out), "--rollouts", str(rollouts)]
    assert main(run) == 0
    (row,) = read_result(out).rows
    world = make_world("aloha", tasks=("pick",), shift="colour")
    world.reset(100_000)
    assert row["instruction"] == world.instruction and row["target"] == world.target and row["variant"] == "named"
    assert row["success"] is False and row["seconds"] >= 1.5 and row["metrics"]["progress"] < 1.0
    (about,) = rollouts.glob("*/episode_000/episode.json")
    assert json.loads(about.read_text())["instruction"] == row["instruction"]
    before = out.read_bytes()
    capsys.readouterr()
    assert main([*run, "--resume"]) == 0  # complete: no graph is started
    assert out.read_bytes() == before and "0/1 = 0%" in capsys.readouterr().out


def test_a_watched_episode_measures_what_the_suite_does() -> None:
    watched = WatchedEpisode("belt", "faster", "belt")
    world: Any = make_world("widowx", **watched.world_options)
    assert world.belt.speed > 0.2
    for _ in range(2):
        world.reset(3)
        watched.begin()
        world.step(world.command())
        watched.step(world)
        row = watched.row(world)
        assert row["metrics"]["manipulation_score"] < 1.0 and row["metrics"]["progress"] == 0.0
        assert row["chosen"] is None and row["target"] == world.target
    assert set(episode_row(world)["metrics"]) == {"named_cube_lifted", "named_cube_lost"}


@pytest.mark.parametrize(("suite", "axis", "said"), [("none", "colour", "--suite none"), ("aloha", "wind", "'wind'")])
def test_what_the_simulator_cannot_run_is_told(suite: str, axis: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        WatchedEpisode(suite, axis, "pick")
