"""One episode as a folder of its own, written in any process, until the writer joins it with its neighbours.

A staged episode is whole or it is not there: it is prepared under a name of its own and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot.episode_stats import PictureStats, row_stats
from qwen_vla_core.data.lerobot.layout import ACTION, PERTURBED, RECORDED_TIME, STATE, Feature, view_feature
from qwen_vla_core.data.video import CRF, Clip, VideoReader, encode_video, join_videos, video_signature
from qwen_vla_core.errors import UserError

STAGING = ".staging"
PREPARED = "new-"
GRID_TOLERANCE_S = 1e-4  # LeRobot's own: further off the grid of 1/fps its loader finds no frame
Frames = np.ndarray | Iterable[np.ndarray] | Clip
_ROWS, _ABOUT = "rows.parquet", "episode.json"


@dataclass(frozen=True)
class Staged:
    """A complete episode that no dataset holds yet.

    Attributes:
        folder: where it lies.
        length: steps.
        tasks: its instructions; the rows' ``task_index`` indexes into them until it is joined.
        info: whatever its maker noted.
        stats: feature → entry → value, as LeRobot keeps them.
        videos: feature → bytes and signature of its video.
    """

    folder: Path
    length: int
    tasks: tuple[str, ...]
    info: Mapping[str, Any]
    stats: Mapping[str, Mapping[str, Any]]
    videos: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Staged | None:
        """What ``stage`` left in a folder; None where a power cut or another program damaged it."""
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            whole = pq.read_metadata(folder / _ROWS).num_rows == about["length"] and all(
                (folder / f"{key}.mp4").stat().st_size == video["bytes"] for key, video in about["videos"].items()
            )
            names = ("length", "tasks", "info", "stats", "videos")
            staged = cls(folder, **{name: about[name] for name in names})
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None
        return staged if whole else None

    def table(self) -> pa.Table:
        """Its rows, without the numbers that only the dataset can give."""
        return pq.read_table(self.folder / _ROWS)

    @property
    def row_bytes(self) -> int:
        """Size of its rows on disk."""
        return (self.folder / _ROWS).stat().st_size

    def video(self, key: str) -> Clip:
        """The video of a feature."""
        return Clip(self.folder / f"{key}.mp4", 0, self.length)


@dataclass(frozen=True)
class EpisodeStager:
    """Writes episodes into the staging folder of a dataset; small and picklable, for worker processes.

    Attributes:
        root: of the dataset.
        fps: rows per second.
        features: columns besides those of every dataset.
        views: video feature → (width, height).
        crf: quality of encoded pictures.
    """

    root: Path
    fps: float
    features: Mapping[str, Feature]
    views: Mapping[str, tuple[int, int]]
    crf: int = CRF

    def stage(
        self,
        rows: EpisodeRows,
        tasks: Sequence[str],
        frames: Mapping[str, Frames] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Staged:
        """Writes one episode.

        Args:
            rows: its numbers; ``rows.task`` indexes into ``tasks``.
            tasks: its instructions.
            frames: view → T pictures (height, width, 3) uint8, or a ``Clip`` of a video, copied where that is possible.
            info: JSON, kept beside the episode.

        Raises:
            UserError: no rows, other dimensions, a value that is not finite, an unknown task, times off the rate's grid
                without a ``recorded_timestamp`` feature, or pictures of another number or size.
        """
        length = len(rows)
        if not length:
            raise UserError(f"{self._label(info)}: has no rows; leave it out")
        columns: dict[str, Any] = {STATE: rows.state, ACTION: rows.action, **rows.extra}
        columns[PERTURBED], columns[RECORDED_TIME] = rows.perturbed, rows.timestamp
        self._check_grid(rows, info)
        arrays = {name: self._column(name, feature, columns, length, info) for name, feature in self.features.items()}
        if np.any(rows.perturbed) and PERTURBED not in self.features:
            raise UserError(
                f"{self._label(info)}: is perturbed, but the dataset has no feature '{PERTURBED}'; declare it"
            )
        pictures = {view_feature(view): value for view, value in (frames or {}).items()}
        return self.stage_table(pa.table(arrays), np.asarray(rows.task), tasks, pictures, info)

    def stage_table(
        self,
        table: pa.Table,
        task: np.ndarray,
        tasks: Sequence[str],
        frames: Mapping[str, Frames],
        info: Mapping[str, Any] | None = None,
    ) -> Staged:
        """As ``stage``, for columns that are arrow already; ``frames`` by feature name."""
        length, info = len(table), dict(info or {})
        used, local = np.unique(np.asarray(task, np.int64), return_inverse=True)
        if len(task) != length or not np.all((used >= 0) & (used < len(tasks))):
            raise UserError(
                f"{self._label(info)}: task numbers {used.tolist()} in {len(task)} rows, but there are {len(tasks)} "
                f"tasks and {length} rows"
            )
        if set(frames) != set(self.views):
            raise UserError(
                f"{self._label(info)}: has pictures of {sorted(frames)}, the dataset's views are {sorted(self.views)}"
            )
        steps = np.arange(length)
        if "timestamp" not in table.column_names:
            table = table.append_column("timestamp", pa.array((steps / self.fps).astype(np.float32)))
        table = table.append_column("frame_index", pa.array(steps))
        table = table.append_column("task_index", pa.array(local.astype(np.int64)))
        folder = self.root / STAGING / f"{PREPARED}{uuid.uuid4().hex}"
        with keep_or_remove(folder, self.root):
            return self._write(folder, table, [tasks[i] for i in used], frames, info)

    def _write(
        self, folder: Path, table: pa.Table, tasks: list[str], frames: Mapping[str, Frames], info: dict[str, Any]
    ) -> Staged:
        folder.mkdir(parents=True)
        stats: dict[str, Mapping[str, np.ndarray]] = {name: row_stats(column) for name, column in _numbers(table)}
        with (folder / _ROWS).open("wb") as file:
            pq.write_table(table, file, compression="zstd")
        videos = {}
        for key, pictures in frames.items():
            path = folder / f"{key}.mp4"
            stats[key] = self._write_video(path, key, pictures, len(table), info)
            videos[key] = {"bytes": path.stat().st_size, "signature": video_signature(path)}
        plain = {name: {key: value.tolist() for key, value in entry.items()} for name, entry in stats.items()}
        about = {"length": len(table), "tasks": tasks, "info": info, "stats": plain, "videos": videos}
        (folder / _ABOUT).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        return Staged(folder, len(table), tuple(tasks), info, plain, videos)

    def _write_video(
        self, path: Path, key: str, frames: Frames, length: int, info: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray]:
        stats = PictureStats(length)
        encode: Any = partial(encode_video, size=self.views[key], fps=self.fps, crf=self.crf)
        try:
            with path.open("wb") as file:
                if not isinstance(frames, Clip):
                    count = encode(file, stats.watch(frames))
                elif (count := frames.count) == length:
                    reader = VideoReader(frames.path)
                    whole = range(frames.first, frames.first + frames.count)
                    if reader.size == self.views[key] and _stands_alone(reader, frames, self.fps):
                        join_videos(file, [frames], self.fps)
                        for index in sorted(stats.sampled):
                            stats.add(reader.frames([whole[index]])[0])
                    else:
                        encode(file, stats.watch(reader.frames([index])[0] for index in whole))
                    reader.close()
        except UserError as error:
            raise UserError(f"{self._label(info)}, {key}: {error}") from None
        if count != length:
            raise UserError(f"{self._label(info)}: {key} has {count} frames for {length} rows")
        return stats.result()

    def _check_grid(self, rows: EpisodeRows, info: Mapping[str, Any] | None) -> None:
        off = np.abs(np.asarray(rows.timestamp) - np.arange(len(rows)) / self.fps)
        if RECORDED_TIME not in self.features and len(off) and not off.max() <= GRID_TOLERANCE_S:
            row = int(np.argmax(~(off <= GRID_TOLERANCE_S)))
            raise UserError(
                f"{self._label(info)}, row {row}: its time {rows.timestamp[row]} s is off the grid of {self.fps} per "
                f"second; declare the feature '{RECORDED_TIME}' to keep such times"
            )

    def _column(
        self, name: str, feature: Feature, columns: Mapping[str, Any], length: int, info: Mapping[str, Any] | None
    ) -> pa.Array:
        if name not in columns:
            raise UserError(f"{self._label(info)}: has no '{name}', which is a feature of the dataset")
        values = columns[name]
        if feature.dtype == "string":
            if len(values) != length:
                raise UserError(f"{self._label(info)}: '{name}' has {len(values)} rows, the episode {length}")
            return pa.array([str(value) for value in values], pa.string())
        array = np.asarray(values)
        if feature.shape == (1,) and array.ndim == 2:
            array = array[:, 0] if array.shape[1] == 1 else array
        wanted = (length, *(() if feature.shape == (1,) else feature.shape))
        if array.shape != wanted:
            raise UserError(f"{self._label(info)}: '{name}' has shape {array.shape}, must be {wanted}")
        if not np.all(np.isfinite(array)):
            where = np.argwhere(~np.isfinite(array))[0]
            channel = feature.names[where[-1]] if feature.names and len(where) > 1 else name
            raise UserError(
                f"{self._label(info)}, row {where[0]}: '{name}' channel '{channel}' is {array[tuple(where)]}"
            )
        flat = pa.array(np.ascontiguousarray(array, feature.dtype).reshape(-1))
        for size in reversed(() if feature.shape == (1,) else feature.shape):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat

    def _label(self, info: Mapping[str, Any] | None) -> str:
        return f"{self.root}: episode {json.dumps(dict(info or {}), ensure_ascii=False)[:200]}"


def _stands_alone(reader: VideoReader, clip: Clip, fps: float) -> bool:
    """Whether the clip's packets can be cut out: keyframes at both ends, and frames where the rate puts them."""
    end = clip.first + clip.count
    if end > reader.count:
        raise UserError(f"{clip.path}: has {reader.count} frames, {end} are needed; convert it again")
    times = reader.times[clip.first : end]
    if np.abs(times - times[0] - np.arange(clip.count) / fps).max() > GRID_TOLERANCE_S:
        return False
    return reader.gop(clip.first)[0] == clip.first and (end == reader.count or reader.gop(end)[0] == end)


class DiskError(UserError):
    """The disk refused: no other episode would fare better."""


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """What the disk refuses, as one line that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        raise DiskError(
            f"{root}: {reason}; complete episodes are kept: make room, then run it again to go on (--resume)"
        ) from None


@contextlib.contextmanager
def keep_or_remove(folder: Path, root: Path) -> Iterator[None]:
    """Leaves a complete folder behind, or none."""
    try:
        with disk_errors(root):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _numbers(table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Every numeric column as (T, …) array, but those whose statistics follow from the episode's place."""
    for name in table.column_names:
        if name == "task_index":
            continue
        column, shape = table.column(name).combine_chunks(), [len(table)]
        while pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
            column = column.flatten()
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
            yield name, column.to_numpy(zero_copy_only=False).reshape(shape)
