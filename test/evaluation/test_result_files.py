"""Result files: what was appended stays, a run goes on after a crash, and another run's file is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.results import ResultFile, find_results, is_result, read_result

HEADER = {"suite": "aloha", "settings": {"checkpoint": "a", "execute_steps": 5}, "seed": 7, "weights": "w"}


def row(seed: int, success: bool = True) -> dict[str, Any]:
    key = f"in_distribution/pick/{seed}"
    return {"key": key, "axis": "in_distribution", "task": "pick", "seed": seed, "success": success, "metrics": {}}


def test_rows_are_on_the_disk_as_they_come_and_half_a_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile(path, HEADER, resume=False) as file:
        file.append(row(7))
        assert [r["seed"] for r in read_result(path).rows] == [7]  # before it is closed
        file.append(row(8, False))
    with path.open("a") as torn:
        torn.write('{"key": "in_distribution/pick/9", "succ')
    assert [r["seed"] for r in read_result(path).rows] == [7, 8]
    with ResultFile(path, HEADER, resume=True) as file:
        assert list(file.rows) == ["in_distribution/pick/7", "in_distribution/pick/8"]
        file.append(row(9))
    assert [(r["seed"], r["success"]) for r in read_result(path).rows] == [(7, True), (8, False), (9, True)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_is_never_overwritten_nor_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResultFile(path, HEADER, resume=True).close()  # nothing to go on with: it begins
    with pytest.raises(UserError, match="is there already; add --resume"):
        ResultFile(path, HEADER, resume=False)
    for changed, said in (
        ({"weights": "other"}, "the weights are not those"),
        ({"seed": 8}, "seed was 7 and is now 8"),
        ({"settings": {"checkpoint": "a", "execute_steps": 2}}, "--execute-steps was 5 and is now 2"),
    ):
        with pytest.raises(UserError, match=said):
            ResultFile(path, {**HEADER, **changed}, resume=True)
    with ResultFile(path, HEADER, resume=True), pytest.raises(UserError, match="another run is writing it"):
        ResultFile(path, HEADER, resume=True)
    ResultFile(path, {**HEADER, "episodes": 100}, resume=True).close()  # more trials of the same are no other run


def test_damage_before_the_last_line_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultFile(path, HEADER, resume=False) as file:
        file.append(row(7))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", lines[1], ""]))
    with pytest.raises(UserError, match="damaged"):
        read_result(path)


def test_the_older_form_is_read(tmp_path: Path) -> None:
    old = tmp_path / "aloha_pick.json"
    episode = {"seed": 3, "success": True, "seconds": 2.0, "metrics": {}, "chosen": "red", "target": "red"}
    old.write_text(json.dumps({"settings": {"embodiment": "aloha", "task": "pick"}, "episodes": [episode]}))
    result = read_result(old)
    assert result.rows[0]["key"] == "pick/3" and result.axes == ("in_distribution",) and result.suite == "world"
    shipped = Path(__file__).parents[2] / "checkpoints/belt.results/belt.json"
    assert len(read_result(shipped).rows) == 100 and is_result(shipped)
    (tmp_path / "other.json").write_text('{"something": 1}')
    assert find_results(tmp_path) == [old]
    with pytest.raises(UserError, match="no results of"):
        read_result(tmp_path / "other.json")
