"""Reading what training runs wrote: ``log.jsonl`` and ``evaluations.jsonl``, of one run or of several.

A killed run may leave half a line, and a resumed one logs the steps after its last checkpoint a second time: half lines
are left out and of two rows about the same step the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError

LOG, EVALUATIONS = "log.jsonl", "evaluations.jsonl"
STAGES = ("vision", "grounding", "t2a", "cpt", "sft", "rl")  # in the order of training [P]
Row = dict[str, Any]


@dataclass(frozen=True)
class StageLog:
    """One stage of one run.

    Attributes:
        run: what people call the run: the folder above the stages' folders, or the run's own.
        stage: as its rows say.
        rows: by rising step, each step once.
        evaluations: rows of ``evaluations.jsonl``, by rising step; empty where nothing was evaluated.
    """

    run: str
    stage: str
    rows: tuple[Row, ...]
    evaluations: tuple[Row, ...] = ()


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a JSON-lines file. A killed run may have left half a line: the next row does not become its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and _last_byte(path) != b"\n":
            file.write(b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def read_rows(path: Path, key: Callable[[Row], Hashable]) -> list[Row]:
    """The rows of a JSON-lines file, the last one of each ``key``, by rising step."""
    rows: dict[Hashable, Row] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[key(row)] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def find_logs(paths: Sequence[Path]) -> list[Path]:
    """Every ``log.jsonl`` meant by ``paths``: the file itself, a run's folder, or a folder of runs.

    Raises:
        UserError: there is none at one of them.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            logs = [path]
        elif (path / LOG).is_file():
            logs = [path / LOG]
        else:
            logs = sorted(path.glob(f"*/{LOG}")) or sorted(path.glob(f"*/*/{LOG}"))
        if not logs:
            raise UserError(f"{path}: no {LOG} here or in a folder below; name the --out folder of a training run")
        found += [log for log in logs if log not in found]
    return found


def read_runs(paths: Sequence[Path]) -> list[StageLog]:
    """Every stage of every run below ``paths``, in the order of training, then of ``paths``.

    Raises:
        UserError: a path has no log, or a log has no row.
    """
    result: list[StageLog] = []
    for log in find_logs(paths):
        rows = read_rows(log, lambda row: (row.get("stage"), row["step"]))
        if not rows:
            raise UserError(f"{log}: holds no row with a step; is it the log of a training run?")
        file = log.parent / EVALUATIONS
        judged = []
        if file.is_file():
            judged = read_rows(file, lambda row: tuple(row.get(k) for k in ("stage", "step", "embodiment", "task")))
        stages = list(dict.fromkeys(str(row.get("stage", "")) for row in rows))
        for stage in stages:
            of_stage = [row for row in judged if row.get("stage", stage) == stage]
            same = tuple(row for row in rows if str(row.get("stage", "")) == stage)
            result.append(StageLog(_run_name(log, stages), stage, same, tuple(of_stage)))
    return sorted(result, key=lambda entry: _position(entry.stage, result))


def _run_name(log: Path, stages: Sequence[str]) -> str:
    """``generalist`` for ``runs/generalist/cpt/log.jsonl``: the folder that names only the stage tells nothing."""
    folder = log.resolve().parent
    return folder.parent.name if folder.name in stages else folder.name


def _position(stage: str, entries: Sequence[StageLog]) -> tuple[int, int]:
    """Published stages first, in their order; others as they appear."""
    if stage in STAGES:
        return STAGES.index(stage), 0
    return len(STAGES), [entry.stage for entry in entries].index(stage)
