"""``qwen-vla sim``: reports that machines can read, pictures that open, mistakes named by their flag."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from PIL import Image

from qwen_vla_core.cli import main
from qwen_vla_core.data.lerobot import LeRobotDataset


def test_expert_reports_success_with_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "expert", "--episodes", "3", "--task", "pick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["tasks"]["pick"]
    assert report["episodes"] == 3 and report["successes"] == 3
    assert 0.3 < report["interval95"][0] < 0.6 and report["interval95"][1] == pytest.approx(1.0)
    assert main(["sim", "expert", "--episodes", "1", "--task", "pick"]) == 0
    assert "1/1" in capsys.readouterr().out


def test_demos_writes_a_lerobot_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos"
    assert main(["sim", "demos", "--episodes", "1", "--task", "pick", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1
    dataset = LeRobotDataset(out)
    assert len(dataset) == 1 and dataset.fps == 10 and dataset.contract.prompt.robot_tag == "ALOHA"
    assert dataset.source["embodiment"] == "aloha" and dataset.source["world"] == "aloha"


def test_render_writes_a_still_and_a_film(tmp_path: Path) -> None:
    still, moving = tmp_path / "still.png", tmp_path / "film.gif"
    assert main(["sim", "render", "--out", str(still), "--seed", "2"]) == 0
    assert cv2.imread(str(still)).std() > 20
    args = ["sim", "render", "--out", str(moving), "--expert", "--instruction", "lift the blue cube"]
    assert main(args) == 0
    with Image.open(moving) as film:
        assert getattr(film, "n_frames", 1) > 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["expert", "--task", "juggle"], "--task"),
        (["expert", "--episodes", "0"], "--episodes"),
        (["demos", "--episodes", "1", "--out", "x", "--noise", "2"], "--noise"),
        (["demos", "--episodes", "1", "--out", "x", "--drops", "0.5"], "--drops"),
        (["demos", "--episodes", "1", "--out", "x", "--workers", "0"], "--workers"),
        (["render", "--out", "x.jpg"], "--out"),
        (["render", "--out", "x.png", "--instruction", "sing"], "instruction"),
        (["render", "--out", "x.png", "--embodiment", "no_such_robot"], "no_such_robot"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sim", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []
