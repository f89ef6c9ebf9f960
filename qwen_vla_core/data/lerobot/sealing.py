"""Staged episodes become files of the dataset: one group at a time, the episode table last.

Everything is written beside its place and renamed into it. Until the episode table names a group, its files are not
part of the dataset, and a run that goes on overwrites or removes them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_vla_core.data.lerobot import layout
from qwen_vla_core.data.lerobot.episode_stats import QUANTILES, row_stats
from qwen_vla_core.data.lerobot.metadata import INFO_COLUMN, data_file, tasks_table, video_file
from qwen_vla_core.data.lerobot.staging import STAGING, Staged
from qwen_vla_core.data.video import join_videos
from qwen_vla_core.files import atomic_write_bytes, fsync


@dataclass(frozen=True)
class Group:
    """Neighbouring episodes that become files together.

    Attributes:
        episodes: staged, in order.
        first_episode: number of the first.
        first_row: its first row in the dataset.
        file: number of the files (v3.0).
        task_index: instruction → number, for all instructions known by now.
    """

    episodes: Sequence[Staged]
    first_episode: int
    first_row: int
    file: int
    task_index: Mapping[str, int]


def seal(root: Path, info: Mapping[str, Any], group: Group) -> None:
    """Makes a group part of the dataset; its staging folders may be removed afterwards."""
    if info["codebase_version"] == "v3.0":
        _seal_v3(root, info, group)
    else:
        _seal_v2(root, info, group)


def drop_orphans(root: Path, info: Mapping[str, Any], next_file: int, episodes: int) -> None:
    """Removes files that an earlier run wrote and no table of episodes names, and half-written metadata."""
    for path in (root / "meta").glob(".*.*"):  # `files.atomic_write_bytes` writes beside the file it replaces
        path.unlink()
    if info["codebase_version"] == "v3.0":
        patterns = [("data", "*/file-*.parquet"), ("videos", "*/*/file-*.mp4")]
        for folder, pattern in patterns:
            for path in (root / folder).glob(pattern):
                chunk = int(path.parent.name.removeprefix("chunk-"))
                if chunk * layout.CHUNK_SIZE + int(path.stem.removeprefix("file-")) >= next_file:
                    path.unlink()
        return
    for folder, pattern in (("data", "*/episode_*.parquet"), ("videos", "*/*/episode_*.mp4")):
        for path in (root / folder).glob(pattern):
            if int(path.stem.removeprefix("episode_")) >= episodes:
                path.unlink()


def _seal_v3(root: Path, info: Mapping[str, Any], group: Group) -> None:
    tasks = tasks_table(list(group.task_index))
    _replace(root, root / layout.TASKS_V3, partial(_write_table, tasks))
    tables = _final_tables(group)

    def write_rows(file: BinaryIO) -> None:
        first = next(tables)
        with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            writer.write_table(first)  # one row group per episode: reading one episode reads no other
            for table in tables:
                writer.write_table(table)

    _replace(root, data_file(root, info, group.file), write_rows)
    for key in group.episodes[0].videos:
        clips = [staged.video(key) for staged in group.episodes]
        _replace(root, video_file(root, info, key, group.file), partial(join_videos, clips=clips, fps=info["fps"]))
    place = layout.file_place(group.file)
    path = root / layout.EPISODES_PATH_V3.format(**place)
    table = _episode_table(group, float(info["fps"]))
    _replace(root, path, partial(_write_table, table))


def _episode_table(group: Group, fps: float) -> pa.Table:
    place = layout.file_place(group.file)
    columns: dict[str, list[Any]] = {}
    row, shown = group.first_row, 0
    for offset, staged in enumerate(group.episodes):
        values: dict[str, Any] = {
            "episode_index": group.first_episode + offset,
            "tasks": list(staged.tasks),
            "length": staged.length,
            "data/chunk_index": place["chunk_index"],
            "data/file_index": place["file_index"],
            "dataset_from_index": row,
            "dataset_to_index": row + staged.length,
        }
        for key in staged.videos:
            values[f"videos/{key}/chunk_index"] = place["chunk_index"]
            values[f"videos/{key}/file_index"] = place["file_index"]
            values[f"videos/{key}/from_timestamp"] = shown / fps
            values[f"videos/{key}/to_timestamp"] = (shown + staged.length) / fps
        for feature, entries in _stats(staged, group, offset, row).items():
            values |= {f"stats/{feature}/{key}": value for key, value in entries.items()}
        values["meta/episodes/chunk_index"], values["meta/episodes/file_index"] = place.values()
        values[INFO_COLUMN] = json.dumps(staged.info, ensure_ascii=False)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        row, shown = row + staged.length, shown + staged.length
    return pa.table(columns)


def _seal_v2(root: Path, info: Mapping[str, Any], group: Group) -> None:
    row = group.first_row
    lines, stats = [], []
    for offset, (staged, table) in enumerate(zip(group.episodes, _final_tables(group), strict=True)):
        number = group.first_episode + offset
        _replace(root, data_file(root, info, number), partial(_write_table, table))
        for key in staged.videos:
            _link(root, staged.video(key).path, video_file(root, info, key, number))
        line = {"episode_index": number, "tasks": list(staged.tasks), "length": staged.length}
        lines.append(line | {INFO_COLUMN: json.dumps(staged.info, ensure_ascii=False)})
        stats.append({"episode_index": number, "stats": _stats(staged, group, offset, row)})
        row += staged.length
    tasks = [{"task_index": index, "task": task} for task, index in group.task_index.items()]
    atomic_write_bytes(root / layout.TASKS_V2, _json_lines(tasks))
    for name, added in ((layout.STATS_V2, stats), (layout.EPISODES_V2, lines)):
        path = root / name
        known = path.read_bytes().split(b"\n")[: group.first_episode] if path.exists() else []
        atomic_write_bytes(path, b"".join(line + b"\n" for line in known) + _json_lines(added))


def _final_tables(group: Group) -> Iterator[pa.Table]:
    row = group.first_row
    for offset, staged in enumerate(group.episodes):
        table = staged.table()
        local = table["task_index"].to_numpy()
        numbers = np.array([group.task_index[task] for task in staged.tasks], np.int64)[local]
        columns = {name: table[name] for name in table.column_names if name != "task_index"}
        columns["episode_index"] = pa.array(np.full(staged.length, group.first_episode + offset, np.int64))
        columns["index"] = pa.array(np.arange(row, row + staged.length))
        columns["task_index"] = pa.array(numbers)
        yield pa.table(columns)
        row += staged.length


def _stats(staged: Staged, group: Group, offset: int, row: int) -> dict[str, Mapping[str, Any]]:
    """Statistics of an episode, with those of the columns that only its place gives."""
    stats = dict(staged.stats)
    frames = stats["frame_index"]
    stats["index"] = {key: value if key in ("std", "count") else [value[0] + row] for key, value in frames.items()}
    count, number = [staged.length], [float(group.first_episode + offset)]
    stats["episode_index"] = {**dict.fromkeys(("min", "max", "mean", *QUANTILES), number), "std": [0.0], "count": count}
    tasks = np.array([group.task_index[task] for task in staged.tasks])
    if len(tasks) > 1:
        tasks = tasks[staged.table()["task_index"].to_numpy()]
    stats["task_index"] = {key: value.tolist() for key, value in row_stats(tasks).items()} | {"count": count}
    return stats


def _write_table(table: pa.Table, file: BinaryIO) -> None:
    pq.write_table(table, file, compression="zstd")


def _replace(root: Path, path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes in the staging folder, flushes to the disk, renames."""
    temporary = root / STAGING / "half-written"
    temporary.unlink(missing_ok=True)  # of a killed run; it may be a second name of a staged video
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    _move(temporary, path)


def _link(root: Path, source: Path, path: Path) -> None:
    """A second name for a file that is complete: the staged episode keeps its own until it is removed."""
    temporary = root / STAGING / "half-written"
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    fsync(temporary)
    _move(temporary, path)


def _move(temporary: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(path)
    fsync(path.parent)


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
