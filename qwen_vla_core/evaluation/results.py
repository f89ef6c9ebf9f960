"""Result files: one JSON line for the run, one for every trial, appended and flushed as they come.

A killed run leaves every finished trial; the same command goes on after them. The older form, one JSON object with an
``episodes`` list, stays readable.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION
from qwen_vla_core.files import atomic_write_text

FORMAT = "qwen_vla.eval/1"
SUFFIX = ".jsonl"
# What has to be the same when a run goes on; episodes may become more.
FIXED = ("suite", "settings", "seed", "weights", "until_interval_below", "ros")

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One evaluated checkpoint.

    Attributes:
        path: the file.
        header: ``suite``, ``settings``, ``seed``, ``episodes``, ``weights``, ``axes``, ``protocol``, …; what an older
            file does not know is missing.
        rows: trials in their order, each with ``axis``, ``task``, ``key``.
    """

    path: Path
    header: Mapping[str, Any]
    rows: tuple[Row, ...] = field(default_factory=tuple)

    @property
    def suite(self) -> str:
        """Name of the suite; ``world`` for a robot's own world."""
        return str(self.header.get("suite") or "world")

    @property
    def name(self) -> str:
        """What people call it: checkpoint and file."""
        return f"{self.checkpoint}: {self.path.stem}"

    @property
    def checkpoint(self) -> str:
        """As it was given to the command; ``expert`` for the scripted one."""
        settings = self.header.get("settings", {})
        return "expert" if settings.get("expert") else str(settings.get("checkpoint", "?"))

    @property
    def early_stop(self) -> bool:
        """Whether the number of trials depended on their outcomes, so that only anytime-valid intervals hold."""
        return self.header.get("until_interval_below") is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """In the order of the suite, only those with trials."""
        present = dict.fromkeys(row["axis"] for row in self.rows)
        return tuple(axis for axis in dict.fromkeys([*self.header.get("axes", {}), *present]) if axis in present)

    def of(self, axis: str, task: str | None = None) -> list[Row]:
        """Rows of an axis, of one task of it or of all."""
        return [row for row in self.rows if row["axis"] == axis and task in (None, row["task"])]

    def tasks(self, axis: str) -> tuple[str, ...]:
        """Tasks that an axis has trials of."""
        return tuple(dict.fromkeys(row["task"] for row in self.of(axis)))


def is_result(path: Path) -> bool:
    """Whether a file looks like one of either form, without reading all of it."""
    if path.suffix not in (SUFFIX, ".json") or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(400)
    return FORMAT in start or (start.lstrip().startswith("{") and '"settings"' in start[:40])


def read_result(path: str | Path) -> Result:
    """Reads a result file of either form.

    Raises:
        UserError: it is neither, or damaged before its last line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if FORMAT in text[:400]:
        header, rows = _parse_lines(path, text)
        return Result(path, header, tuple(rows))
    try:
        value = json.loads(text)
        settings, episodes = value["settings"], value["episodes"]
        task = str(settings.get("task") or "default")
        rows = [{"axis": IN_DISTRIBUTION, "task": task, "key": f"{task}/{row['seed']}", **row} for row in episodes]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no results of `qwen-vla eval run --output`") from None
    return Result(path, {"settings": settings, "axes": {IN_DISTRIBUTION: ""}}, tuple(rows))


def _parse_lines(path: Path, text: str) -> tuple[dict[str, Any], list[Row]]:
    lines = text.split("\n")
    complete = lines[:-1]  # what follows the last newline was being written when the run was killed
    try:
        header, *rows = [json.loads(line) for line in complete if line]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); start again with another --output") from None
    return header, rows


class ResultFile:
    """A result file that is being written; only one process at a time can.

    Attributes:
        rows: key → row of the trials that are in it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool) -> None:
        """Opens or begins it.

        Args:
            path: ends in .jsonl.
            header: of this run; ``FIXED`` parts must be those of the file.
            resume: go on with a file that is there.

        Raises:
            UserError: the file is there and ``resume`` is not set, it is of another run, or it is being written.
        """
        self.path = path
        self.rows: dict[str, Row] = {}
        header = json.loads(json.dumps(header))
        if path.exists():
            if not resume:
                raise UserError(f"--output {path}: is there already; add --resume to go on, or name another file")
            stored, rows = _parse_lines(path, path.read_text(encoding="utf-8"))
            if stored.get("format") != FORMAT:
                raise UserError(f"--output {path}: not written by `qwen-vla eval run`; name another file")
            for key in FIXED:
                if stored.get(key) != header.get(key):
                    raise UserError(f"--resume {path}: {_difference(key, stored.get(key), header.get(key))}")
            self.rows = {row["key"]: row for row in rows}
        else:
            atomic_write_text(path, json.dumps({"format": FORMAT, **header}) + "\n")
        self._file: TextIO = path.open("r+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"--output {path}: another run is writing it") from None
        self._cut_half_a_line()

    def _cut_half_a_line(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self._file.fileno(), end)
        self._file.seek(0, os.SEEK_END)

    def append(self, row: Row) -> None:
        """Adds a trial; it is on the disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[row["key"]] = row

    def close(self) -> None:
        """Lets others write."""
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _difference(key: str, stored: Any, now: Any) -> str:
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        name = next(name for name in {**stored, **now} if stored.get(name) != now.get(name))
        return f"--{name.replace('_', '-')} was {stored.get(name)} and is now {now.get(name)}"
    if key == "weights":
        return "--checkpoint: the weights are not those of the trials in it"
    return f"{key.replace('_', '-')} was {stored} and is now {now}"


def weights_of(checkpoint: str | Path) -> str:
    """The identity of a checkpoint's weights, so that a result says what it is a result of."""
    from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint

    return str(read_config(resolve_checkpoint(checkpoint))["weights_id"])


def find_results(path: Path) -> Sequence[Path]:
    """The result files that a path means: itself, or those directly in a folder and in the folders below it."""
    if path.is_file():
        return [path]
    return [found for found in sorted(path.rglob("*.json*")) if is_result(found)]
