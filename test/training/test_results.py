"""Tables of results say what the files say, and refuse a folder without any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from qwen_vla_core.evaluation.report import summarise

PROGRAM = Path(__file__).parents[2] / "training/results.py"


def write(path: Path, successes: int, trials: int) -> None:
    rows = [
        {"seed": i, "success": i < successes, "chosen": "red", "target": "red", "seconds": 1.0, "metrics": {"spl": 0.5}}
        for i in range(trials)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summarise(rows, {})))


def table(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_line_per_rate_of_one_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "aloha_pick.json", 9, 10)
    out = table(tmp_path)
    assert out.returncode == 0, out.stderr
    assert "| aloha_pick: success | 9/10 = 90% [60%, 98%] |" in out.stdout
    assert "| aloha_pick: means | spl 0.50 |" in out.stdout


def test_a_column_per_world_across_runs(tmp_path: Path) -> None:
    write(tmp_path / "with/aloha.json", 9, 10)
    write(tmp_path / "with/rooms.json", 5, 10)
    write(tmp_path / "without/aloha.json", 2, 10)
    error = {"errors": {"policy": {"chunk": 0.03, "interval_95": [0.02, 0.04]}}}
    (tmp_path / "without/open_loop.json").write_text(json.dumps(error))
    lines = table(tmp_path, "--across").stdout.splitlines()
    assert lines[0] == "| | aloha | rooms | open_loop |"
    assert lines[2].startswith("| with | 9/10") and lines[3].startswith("| without | 2/10")
    assert lines[3].endswith("|  | 0.0300 [0.0200, 0.0400] |")


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        out = table(folder)
        assert out.returncode == 2 and "holds no results" in out.stderr
