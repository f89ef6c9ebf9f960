"""``qwen-vla finetune`` on a made-up robot: what it refuses, chooses, writes, and says about what was learned."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

from memory_dataset import ROBOT_YAML, MemoryDataset, healthy
from tiny_support import awaken, tiny_policy

from qwen_vla_core import cli
from qwen_vla_core.data.lerobot import LeRobotWriter
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.model.checkpoint import load_checkpoint, save_checkpoint
from qwen_vla_core.training.finetune import choose_method, plan
from qwen_vla_core.training.run_log import read_rows


def store(data: MemoryDataset, folder: Path) -> Path:
    with LeRobotWriter(folder, data.contract, family="manipulation", views={"ego": (48, 48)}) as writer:
        for rows, pictures in zip(data.episodes, data.pictures, strict=True):
            words = [data.tasks[int(rows.task[0])]]
            writer.add_episode(dataclasses.replace(rows, task=np.zeros(len(rows), np.int64)), words, pictures)
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another robot, the new one's YAML, and demonstrations of it."""
    path = tmp_path_factory.mktemp("finetune")
    (path / "pair.yaml").write_text(ROBOT_YAML)
    save_checkpoint(awaken(tiny_policy(load_embodiment("mobile_base"), model_type="qwen3_vl")), path / "start")
    store(healthy(6, steps=30), path / "demonstrations")
    return path


def finetune(workshop: Path, *options: str, data: str = "demonstrations") -> int:
    arguments = ["--embodiment", str(workshop / "pair.yaml"), "--data", str(workshop / data)]
    return cli.main(["finetune", *arguments, "--checkpoint", str(workshop / "start"), "--device", "cpu", *options])


def test_a_checkpoint_learns_the_robot_and_says_how_well(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workshop / "run"
    options = (
        "--out",
        str(out),
        "--steps",
        "60",
        "--batch-size",
        "8",
        "--set",
        "save_every=20",
        "--set",
        "log_every=10",
    )
    assert finetune(workshop, *options) == 0
    said = capsys.readouterr().out
    assert "full: " in said and "left out: 1 episodes" in said and "qwen-vla up" in said
    rows = read_rows(out / "open_loop.jsonl", lambda row: row["step"])
    assert [row["step"] for row in rows] == [20, 40, 60]
    errors = [row["errors"]["policy"]["chunk"] for row in rows]
    assert errors[-1] < errors[0] and {"stay", "repeat"} <= rows[0]["errors"].keys()
    policy = load_checkpoint(out / "checkpoint", "cpu")
    assert "pair" in policy.embodiments and "mobile_base" in policy.embodiments
    mixture = yaml.safe_load((out / "mixture.yaml").read_text())
    assert mixture["families"][0]["datasets"][0]["leave_out"] == 1
    # The same command again: the run is done. Another one does not overwrite it.
    assert finetune(workshop, *options) == 0 and "done already" in capsys.readouterr().out
    assert finetune(workshop, *options, "--left-out", "2") == 2
    assert "--out" in (error := capsys.readouterr().err) and "mixture.yaml of another run" in error


def test_a_dry_run_says_what_it_would_do_and_trains_nothing(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workshop / "dry"
    assert finetune(workshop, "--out", str(out), "--steps", "50", "--method", "lora", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "lora: --method lora" in said and not (out / "checkpoint").exists()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["lora"]["rank"] == 16


def test_data_that_do_not_fit_are_refused_before_anything_is_trained(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = healthy(3, steps=20)
    broken.episodes[1].action[5:9, 0] = 40.0  # degrees, it seems
    store(broken, workshop / "wild")
    assert finetune(workshop, "--out", str(workshop / "none"), data="wild") == 2
    error = capsys.readouterr().err
    assert "does not fit pair" in error and "wrong_units" in error and "--force" in error
    assert not (workshop / "none").exists()
    other = ["finetune", "--embodiment", "widowx", "--data", str(workshop / "demonstrations")]
    assert cli.main([*other, "--checkpoint", str(workshop / "start")]) == 2
    assert "action channels" in capsys.readouterr().err


def test_bad_numbers_name_their_flag(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--steps", "0"), ("--batch-size", "0"), ("--left-out", "-1"), ("--report-minutes", "0")):
        assert finetune(workshop, flag, value) == 2
        assert flag in capsys.readouterr().err
    assert finetune(workshop, "--left-out", "6", "--out", str(workshop / "none")) == 2
    assert "--left-out: 6 of 6 episodes" in capsys.readouterr().err


def test_method_and_length_follow_from_the_sizes() -> None:
    assert choose_method("auto", 2_600_000)[0] == "full" and choose_method("auto", 4_000_000_000)[0] == "lora"
    assert choose_method("full", 4_000_000_000)[0] == "full"
    small = plan("auto", 1_000_000, [[100] * 20], 32, None, None)
    assert small.left_out == (2,) and small.frames == 1800 and small.steps == 1000
    large = plan("auto", 4_000_000_000, [[300] * 500, [300] * 3], 32, None, None)
    assert large.left_out == (50, 1) and large.steps == 30_000
    with pytest.raises(UserError, match="leaves none"):
        plan("auto", 1, [[10]], 32, None, None)
