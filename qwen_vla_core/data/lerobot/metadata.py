"""What a LeRobot dataset says about its episodes, read from either version into the same arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_vla_core.data.lerobot.layout import (
    CHUNK_SIZE,
    EPISODES_V2,
    EPISODES_V3,
    STATS_V2,
    TASKS_V2,
    TASKS_V3,
    episode_place,
    file_place,
)
from qwen_vla_core.errors import UserError

INFO_COLUMN = "info"  # our addition to LeRobot's episode table: JSON text
_INDEX = "__index_level_0__"  # what pandas calls an index without a name; LeRobot keeps the task's text there


@dataclass(frozen=True)
class VideoPlaces:
    """Where each episode's pictures of one view lie.

    Attributes:
        file: (episodes,) int64, number of the mp4 (v3.0) or of the episode (v2.1).
        start_s: (episodes,) float64, seconds into the file.
    """

    file: np.ndarray
    start_s: np.ndarray


@dataclass(frozen=True)
class EpisodeTable:
    """All episodes, in order.

    Attributes:
        lengths: (episodes,) int64.
        file: (episodes,) int64, number of the parquet file (v3.0) or of the episode (v2.1).
        first_row: (episodes,) int64, row of that file at which the episode begins.
        videos: feature → places.
        tasks: per episode, the instructions its metadata names.
        infos: JSON text per episode, empty where there is none.
    """

    lengths: np.ndarray
    file: np.ndarray
    first_row: np.ndarray
    videos: Mapping[str, VideoPlaces]
    tasks: Sequence[Sequence[str]]
    infos: Sequence[str]

    def __len__(self) -> int:
        return len(self.lengths)


def data_file(root: Path, info: Mapping[str, Any], number: int) -> Path:
    """Path of a parquet file by the number in ``EpisodeTable.file``."""
    return root / str(info["data_path"]).format(**_place(info, number))


def video_file(root: Path, info: Mapping[str, Any], key: str, number: int) -> Path:
    """Path of an mp4 by the number in ``VideoPlaces.file``."""
    return root / str(info["video_path"]).format(video_key=key, **_place(info, number))


def _place(info: Mapping[str, Any], number: int) -> dict[str, int]:
    if info["codebase_version"] == "v3.0":
        return file_place(number)
    size = int(info.get("chunks_size", CHUNK_SIZE))
    return {**episode_place(number), "episode_chunk": number // size}


def video_keys(info: Mapping[str, Any]) -> list[str]:
    """Features whose pictures are videos."""
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def read_tasks(root: Path, info: Mapping[str, Any]) -> list[str]:
    """Instructions by ``task_index``.

    Raises:
        UserError: the file is missing or damaged, or numbers are missing.
    """
    if info["codebase_version"] == "v3.0":
        path = root / TASKS_V3
        if not path.exists() and not info.get("total_episodes"):
            return []
        table = read_parquet(path)
        texts = [name for name in table.column_names if name != "task_index" and _is_text(table.schema.field(name))]
        if "task_index" not in table.column_names or not texts:
            raise UserError(f"{path}: has columns {table.column_names}, needs task_index and the task's text")
        pairs = zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True)
    else:
        path = root / TASKS_V2
        if not path.exists() and not info.get("total_episodes"):
            return []
        lines = read_json_lines(path, ("task_index", "task"))
        pairs = zip([line["task_index"] for line in lines], [line["task"] for line in lines], strict=True)
    tasks = dict(pairs)
    if sorted(tasks) != list(range(len(tasks))):
        raise UserError(f"{path}: task numbers {sorted(tasks)[:5]}… are not 0 to {len(tasks) - 1}; convert it again")
    return [str(tasks[index]) for index in range(len(tasks))]


def read_episodes(root: Path, info: Mapping[str, Any]) -> EpisodeTable:
    """The table of episodes.

    Raises:
        UserError: a file is missing or damaged, or episodes are missing.
    """
    return _read_v3(root, info) if info["codebase_version"] == "v3.0" else _read_v2(root, info)


def _read_v3(root: Path, info: Mapping[str, Any]) -> EpisodeTable:
    keys = video_keys(info)
    paths = sorted((root / EPISODES_V3).glob("*/*.parquet"))
    if not paths and info.get("total_episodes"):
        raise UserError(f"{root / EPISODES_V3}: no table of episodes; copy or convert the dataset again")
    needed = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for key in keys:
        needed += [f"videos/{key}/{column}" for column in ("chunk_index", "file_index", "from_timestamp")]
    columns: dict[str, list[Any]] = {name: [] for name in (*needed, INFO_COLUMN)}
    for path in paths:
        names = _parquet_names(path)
        missing = [name for name in needed if name not in names]
        if missing:
            raise UserError(f"{path}: has no column '{missing[0]}'; copy or convert the dataset again")
        part = read_parquet(path, [name for name in columns if name in names])
        for name in columns:
            columns[name] += part[name].to_pylist() if name in names else [""] * len(part)
    order = np.argsort(np.array(columns["episode_index"], np.int64), kind="stable")
    _check_numbers(root / EPISODES_V3, np.array(columns["episode_index"], np.int64)[order])

    def integers(name: str) -> np.ndarray:
        return np.array(columns[name], np.int64)[order]

    file = integers("data/chunk_index") * CHUNK_SIZE + integers("data/file_index")
    first = integers("dataset_from_index")
    starts = {number: first[file == number].min() for number in np.unique(file)}
    videos = {
        key: VideoPlaces(
            integers(f"videos/{key}/chunk_index") * CHUNK_SIZE + integers(f"videos/{key}/file_index"),
            np.array(columns[f"videos/{key}/from_timestamp"], np.float64)[order],
        )
        for key in keys
    }
    return EpisodeTable(
        lengths=integers("length"),
        file=file,
        first_row=first - np.array([starts[number] for number in file], np.int64),
        videos=videos,
        tasks=[columns["tasks"][i] or [] for i in order],
        infos=[columns[INFO_COLUMN][i] or "" for i in order],
    )


def _read_v2(root: Path, info: Mapping[str, Any]) -> EpisodeTable:
    path = root / EPISODES_V2
    lines = [] if not path.exists() and not info.get("total_episodes") else read_json_lines(path, ("length",))
    lines = sorted(lines, key=lambda line: line.get("episode_index", -1))
    numbers = np.array([line.get("episode_index", -1) for line in lines], np.int64)
    _check_numbers(path, numbers)
    here = np.arange(len(lines))
    zero = np.zeros(len(lines))
    return EpisodeTable(
        lengths=np.array([line["length"] for line in lines], np.int64),
        file=here,
        first_row=zero.astype(np.int64),
        videos={key: VideoPlaces(here, zero) for key in video_keys(info)},
        tasks=[line.get("tasks", []) for line in lines],
        infos=[line.get(INFO_COLUMN, "") for line in lines],
    )


def _check_numbers(path: Path, numbers: np.ndarray) -> None:
    if not np.array_equal(numbers, np.arange(len(numbers))):
        wrong = int(np.argmax(numbers != np.arange(len(numbers))))
        raise UserError(f"{path}: episode {wrong} is missing or there twice; copy or convert the dataset again")


def episode_stats(root: Path, info: Mapping[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    """Statistics of every episode that has any: feature → entry → value."""
    if info["codebase_version"] != "v3.0":
        path = root / STATS_V2
        for line in read_json_lines(path, ("stats",)) if path.exists() else ():
            yield line["stats"]
        return
    for path in sorted((root / EPISODES_V3).glob("*/*.parquet")):
        names = [name for name in _parquet_names(path) if name.startswith("stats/")]
        table = read_parquet(path, names)
        for row in range(len(table)):
            stats: dict[str, dict[str, Any]] = {}
            for name in names:
                feature, _, entry = name.removeprefix("stats/").rpartition("/")
                stats.setdefault(feature, {})[entry] = table[name][row].as_py()
            yield stats


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """``tasks.parquet`` as pandas writes a frame whose index is the task's text: LeRobot looks tasks up there."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), _INDEX: pa.array(tasks, pa.string())})

    def column(name: str | None, field: str, kind: str, numpy: str) -> dict[str, Any]:
        return {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

    about = {
        "index_columns": [_INDEX],
        "column_indexes": [column(None, "None", "unicode", "object") | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [
            column("task_index", "task_index", "int64", "int64"),
            column(None, _INDEX, "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file.

    Raises:
        UserError: missing, cut short or not parquet.
    """
    try:
        return pq.ParquetFile(path).read(list(columns) if columns is not None else None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); copy or convert the dataset again") from None


def _parquet_names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); copy or convert the dataset again") from None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _is_text(field: pa.Field) -> bool:
    return bool(pa.types.is_string(field.type) or pa.types.is_large_string(field.type))


def read_json_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """A file of one JSON object per line.

    Raises:
        UserError: missing, or a line is no object or lacks a key (names the line).
    """
    lines = []
    try:
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                for key in needed:
                    line[key]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: damaged line ({type(error).__name__}: {error})") from None
            lines.append(line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or convert the dataset again") from None
    return lines
