"""Curves and TensorBoard: rows counted once, gaps kept, and pictures that hold what was logged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_vla_core.commands.train_jobs import plot
from qwen_vla_core.errors import UserError
from qwen_vla_core.training.curves import _finish, _panels, plot_runs, smooth
from qwen_vla_core.training.run_log import EVALUATIONS, LOG, find_logs, read_runs

matplotlib = pytest.importorskip("matplotlib")


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def row(stage: str, step: int, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 1.0 / (1 + step), "grad_norm": 1.0, "mfu": None, **values}


@pytest.fixture
def generalist(tmp_path: Path) -> Path:
    """Three stages of one run; the second was killed in the middle of a line and resumed from step 10."""
    root = tmp_path / "generalist"
    write(root / "sft" / LOG, [row("sft", 0)])
    first = [row("cpt", step, action=5.0, lr_decoder=1e-4, tokens_per_s=100.0) for step in (0, 10, 20, 30)]
    again = [row("cpt", step, action=1.0, lr_decoder=1e-4, tokens_per_s=100.0) for step in (10, 20)]
    log = write(root / "cpt" / LOG, first, '{"stage": "cp\n')
    log.write_text(log.read_text() + "".join(json.dumps(row) + "\n" for row in again))
    write(root / "t2a" / LOG, [row("t2a", 0), row("t2a", 20)])
    judged = [
        {"step": s, "embodiment": "aloha", "task": "pick", "success": {"rate": 0.5, "interval_95": [0.2, 0.8]}}
        for s in (0, 20)
    ]
    write(root / "cpt" / EVALUATIONS, judged)
    return root


def test_stages_come_in_the_order_of_training_and_resumed_rows_count_once(generalist: Path) -> None:
    logs = read_runs([generalist])
    assert [log.stage for log in logs] == ["t2a", "cpt", "sft"]
    assert {log.run for log in logs} == {"generalist"}
    cpt = logs[1]
    assert [r["step"] for r in cpt.rows] == [0, 10, 20, 30]
    assert [r["action"] for r in cpt.rows] == [5.0, 1.0, 1.0, 5.0]
    assert [r["step"] for r in cpt.evaluations] == [0, 20] and not logs[0].evaluations


def test_many_runs_share_a_short_legend() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    for run in ("first", "main", "last", "told"):
        for quantity, style in (("action", "-"), ("navigation", "--"), ("text", ":")):
            axis.plot([0, 1], [1, 0], style, label=f"{run}: {quantity}")
    _finish(axis, "loss")
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["first", "main", "last", "told", "action", "navigation", "text"]


def test_a_file_a_run_and_a_folder_of_runs_are_found_once(generalist: Path) -> None:
    log = generalist / "cpt" / LOG
    assert find_logs([log]) == [log] == find_logs([log.parent])
    assert len(find_logs([generalist, log.parent])) == 3
    assert len(find_logs([generalist.parent])) == 3
    with pytest.raises(UserError, match=r"nowhere: no log\.jsonl here"):
        find_logs([generalist / "nowhere"])
    (empty := generalist / "empty.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="holds no row with a step"):
        read_runs([empty])


def test_only_what_was_logged_gets_a_panel(generalist: Path) -> None:
    labels = [label for label, _ in _panels(read_runs([generalist]))]
    assert labels == ["loss", "learning rate", "gradient norm", "tokens/s", "closed-loop success"]
    rl = write(generalist / "rl" / LOG, [row("rl", 0, success=0.5, clip_fraction=0.1, kl=0.01)])
    assert [label for label, _ in _panels(read_runs([rl]))] == ["loss", "gradient norm", "share", "other"]


def test_smoothing_keeps_constants_ends_and_gaps() -> None:
    assert smooth(np.full(7, 3.0), 3).tolist() == [3.0] * 7
    assert smooth(np.array([0.0, 3.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.5]
    assert smooth(np.array([1.0, 5.0]), 1).tolist() == [1.0, 5.0]
    gaps = smooth(np.array([np.nan, np.nan, np.nan, 4.0]), 3)
    assert np.isnan(gaps[:2]).all() and gaps[2:].tolist() == [4.0, 4.0]


def test_the_lines_of_a_panel_are_the_logged_values(generalist: Path) -> None:
    from matplotlib.figure import Figure

    cpt = read_runs([generalist])[1]
    axis = Figure().subplots()
    dict(_panels([cpt]))["loss"](axis, cpt, 0, ["generalist"])
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines["action"] == [5.0, 1.0, 1.0, 5.0] and lines["loss"] == [1.0, 1 / 11, 1 / 21, 1 / 31]
    assert axis.get_yscale() == "log"


def test_the_command_draws_several_runs_into_one_picture(
    generalist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "specialist" / "cpt" / LOG, [row("cpt", 0, action=2.0)]).parent
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    picture = tmp_path / "pictures" / "curves.png"
    assert plot.run(parser.parse_args([str(generalist), str(other), "--out", str(picture), "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(e["run"], e["stage"], e["rows"]) for e in report["stages"]] == [
        ("generalist", "t2a", 2),
        ("generalist", "cpt", 4),
        ("specialist", "cpt", 1),
        ("generalist", "sft", 1),
    ]
    from PIL import Image

    drawn = np.asarray(Image.open(picture).convert("RGB"))
    assert drawn.shape[0] > 1000 and drawn.shape[1] > 1000
    assert {tuple(colour) for colour in drawn.reshape(-1, 3)[::7].tolist()} > {(0, 0x72, 0xB2)}
    with pytest.raises(UserError, match=r"--out .*curves\.gif: must end in"):
        plot_runs([generalist], tmp_path / "curves.gif")
