"""Evaluation during training, of an untrained policy: run for real, in other processes, and repeatable."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_support import awaken, tiny_policy

import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

pytest.importorskip("mujoco")

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Settings, run_seeds
from qwen_vla_core.evaluation.report import summarise
from qwen_vla_core.model.checkpoint import save_checkpoint
from qwen_vla_core.training.evaluation import evaluate_checkpoint, parse_worlds, record_evaluations
from qwen_vla_core.training.run_log import EVALUATIONS, read_rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(awaken(tiny_policy(load_embodiment("mobile_base"), model_type="qwen3_vl")), folder)
    return folder


def test_episodes_run_in_a_spawned_process_and_are_those_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), os.environ.get("OMP_NUM_THREADS")
    videos = tmp_path / "videos"
    worlds = parse_worlds(["mobile_base"])
    (row,) = evaluate_checkpoint(checkpoint, worlds, 2, seed=7, workers=1, video_folder=videos, timeout=1.0)
    assert torch.equal(torch.get_rng_state(), state) and os.environ.get("OMP_NUM_THREADS") == threads
    assert (row["embodiment"], row["seed"], row["episodes"]) == ("mobile_base", 7, 2)
    assert row["success"]["trials"] == 2 and row["success"]["successes"] == 0 and row["wall_seconds"] > 0
    assert len(row["success"]["interval_95"]) == 2 and row["mean_seconds_to_success"] is None
    from PIL import Image

    with Image.open(row["film"]) as film:
        assert film.width <= 480 and film.n_frames >= 3
    assert list(videos.iterdir()) == [Path(row["film"])]
    # The same seeds in this process, as `qwen-vla eval` runs them: the same walks to the last digit.
    settings = Settings("mobile_base", str(checkpoint), row["task"], timeout=1.0)
    assert summarise(list(run_seeds(settings, [7, 8], 1)), {})["metrics"] == row["metrics"]
    assert row["metrics"]["path_m"] > 0


def test_rows_are_appended_even_after_half_a_line(tmp_path: Path) -> None:
    row = {"embodiment": "aloha", "task": "pick", "success": {"rate": 0.0}}
    assert record_evaluations(tmp_path, 10, [row], "cpt") == [{"stage": "cpt", "step": 10, **row}]
    with (tmp_path / EVALUATIONS).open("a") as file:
        file.write('{"stage": "cp')
    record_evaluations(tmp_path, 20, [row], "cpt")
    rows = read_rows(tmp_path / EVALUATIONS, lambda r: (r["step"], r["embodiment"]))
    assert [r["step"] for r in rows] == [10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / EVALUATIONS).read_text().splitlines()[::2]] == [10, 20]


def test_worlds_are_checked_before_training(checkpoint: Path) -> None:
    assert parse_worlds(["aloha", "widowx/place", "aloha/all"]) == [
        ("aloha", None),
        ("widowx", "place"),
        ("aloha", "all"),
    ]
    for text, message in (
        ("nobody", "evaluate.embodiments: nobody: "),
        ("aloha/juggle", "its world has the tasks pick, transfer and all"),
    ):
        with pytest.raises(UserError, match=message):
            parse_worlds([text])
    with pytest.raises(UserError, match=r"evaluation in widowx's world: the checkpoint .* drives mobile_base"):
        evaluate_checkpoint(checkpoint, parse_worlds(["widowx"]))
    with pytest.raises(UserError, match="no such folder"):
        evaluate_checkpoint(checkpoint.parent / "gone", parse_worlds(["aloha"]))
    assert evaluate_checkpoint(checkpoint.parent / "gone", []) == []
