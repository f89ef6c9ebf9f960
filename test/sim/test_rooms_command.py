"""The commands with a mobile base: expert, demos, render, and an untrained policy that is measured all the same."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.cli import main
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.sim.worlds.rooms import RoomsWorld

MEASURES = {"navigation_error_m", "oracle_success", "spl", "ndtw", "path_m", "bumps"}


def test_expert_reports_the_measures_per_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "expert", "--embodiment", "mobile_base", "--episodes", "3", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert set(tasks) == {"goto", "past", "through"}
    for line in tasks.values():
        assert line["successes"] == 3 and set(line["metrics"]) == MEASURES and line["metrics"]["spl"] > 0.9


def test_demonstrations_are_waypoints_relative_to_the_first_frame(tmp_path: Path) -> None:
    out = str(tmp_path / "walks")
    options = ["--episodes", "2", "--task", "past", "--out", out, "--json"]
    assert main(["sim", "demos", "--embodiment", "mobile_base", *options]) == 0
    data = LeRobotDataset(out)
    assert data.contract.convention == "waypoint" and data.contract.frequency_hz == 2 and len(data.lengths) == 2
    rows = data.rows(0)
    parts = relative_parts("waypoint", data.contract.action, data.contract.state)
    first = np.stack([to_relative(parts, a[None], s)[0] for a, s in zip(rows.action, rows.state, strict=True)])
    assert np.abs(first[:, :2]).max() < 0.36 and np.abs(first[:, 2]).max() < 0.8  # half a second at full speed
    assert np.abs(first[-2:]).max() < 0.02  # it has stopped
    scene = RoomsWorld.read_scene(json.loads(rows.extra["scene"][0]))
    assert scene.task == "past" and RoomsWorld.questions(scene, np.random.default_rng(0))


def test_render_shows_the_view_and_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "still.png"
    sentence = "go past the blue pillar and stop at the red ball"
    options = ["--out", str(out), "--instruction", sentence, "--randomize"]
    assert main(["sim", "render", "--embodiment", "mobile_base", *options]) == 0
    picture = cv2.imread(str(out))
    assert picture.shape[1] == 640 and picture.std() > 20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["expert", "--task", "pick"], "goto, past, through"),
        (["render", "--out", "x.png", "--instruction", "pick up the red cube"], "go past the"),
    ],
)
def test_tasks_are_those_of_the_world(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *arguments, "--embodiment", "mobile_base"]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and "\n" not in error


def test_an_untrained_policy_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_vla_core.model.checkpoint import save_checkpoint
    from qwen_vla_core.model.policy import Stats
    from qwen_vla_core.model.presets import build_tiny

    robot, rng = load_embodiment("mobile_base"), np.random.default_rng(0)
    stats = Stats(
        action=Quantiles.fit(rng.normal(size=(100, 3)) * [0.3, 0.1, 0.2], robot.channels),
        state=Quantiles.fit(rng.normal(size=(100, 5)), robot.state_channels),
    )
    save_checkpoint(build_tiny([robot], {robot.name: stats}, seed=0), tmp_path / "untrained")
    options = ["--checkpoint", str(tmp_path / "untrained"), "--episodes", "2", "--timeout", "3", "--task", "all"]
    assert main(["eval", "run", "--embodiment", "mobile_base", *options, "--language", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["success"]["trials"] == 2 and set(report["metrics"]) == MEASURES | {
        "progress",
        "jerk_mean",
        "jerk_max",
    }
    assert 0.0 <= report["metrics"]["spl"] <= 1.0
    for row in report["episodes"]:
        assert row["other"]["target"] != row["target"] and row["other"]["instruction"] != row["instruction"]
