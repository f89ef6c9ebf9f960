"""The files of a LeRobot dataset of any origin: rows by episode, pictures by episode and feature, no meaning yet."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_vla_core.data.lerobot.layout import read_info
from qwen_vla_core.data.lerobot.metadata import data_file, read_episodes, read_tasks, video_file
from qwen_vla_core.data.video import Clip, Decoder, VideoReader
from qwen_vla_core.errors import UserError

PICTURES = ("video", "image")  # dtypes whose values are pictures
_OPEN_FILES = 32  # of each kind kept open: opening a video takes as long as decoding ten frames


class LeRobotFiles:
    """A dataset v3.0, v2.1 or v2.0. Opening reads metadata only; may be pickled; not shared between threads.

    Attributes:
        path: of the folder.
        info: the header, as in ``meta/info.json``.
        features: its columns and pictures.
        fps: rows per second.
        table: all episodes.
        tasks: instructions by ``task_index``.
    """

    def __init__(self, path: str | Path, decoder: Decoder = "auto") -> None:
        """
        Args:
            path: folder that holds ``meta/``.
            decoder: of videos.

        Raises:
            UserError: not a dataset, or damaged.
        """
        self.path = Path(path)
        self.info = read_info(self.path)
        self.features: dict[str, Any] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.table = read_episodes(self.path, self.info)
        self.tasks: Sequence[str] = read_tasks(self.path, self.info)
        self._decoder: Decoder = decoder
        self._files: OrderedDict[tuple[str, Path], Any] = OrderedDict()
        self._hash: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def data_path(self, episode: int) -> Path:
        """Parquet file of an episode."""
        return data_file(self.path, self.info, int(self.table.file[episode]))

    def episode_table(self, episode: int) -> pa.Table:
        """All columns of an episode; only the row groups that it touches are read."""
        path = self.data_path(episode)
        first, length = int(self.table.first_row[episode]), int(self.table.lengths[episode])
        file, ends = self._opened("rows", path)
        total = int(ends[-1]) if len(ends) else 0
        if first + length > total:
            raise UserError(
                f"{path}: has {total} rows, episode {episode} needs rows {first} to {first + length - 1}; "
                f"copy or convert the dataset again"
            )
        groups = range(
            int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, first + length, "left")) + 1
        )
        table = self._row_groups(path, file, list(groups) if length else [])
        begin = int(ends[groups[0] - 1]) if length and groups[0] else 0
        table = table.slice(first - begin if length else 0, length)
        numbers = table["episode_index"].to_numpy()
        if len(table) != length or np.any(numbers != episode):
            row = first + (int(np.argmax(numbers != episode)) if len(numbers) else 0)
            raise UserError(
                f"{path}: row {row} does not belong to episode {episode}; copy or convert the dataset again"
            )
        return table

    def _row_groups(self, path: Path, file: Any, groups: list[int]) -> pa.Table:
        """Row groups of a file; the last ones read are kept, because other writers put many episodes into one."""
        key = ("table", path)
        kept = self._files.get(key)
        if kept is not None and kept[0] == groups:
            return kept[1]
        try:
            table = file.read_row_groups(groups, use_threads=False)  # workers use the cores
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            raise UserError(
                f"{path}: row group {groups[0] if groups else 0} cannot be read ({reason}); "
                f"copy or convert the dataset again"
            ) from None
        self._keep(key, (groups, table))
        return table

    def frames(self, episode: int, feature: str, steps: Sequence[int]) -> np.ndarray:
        """(len(steps), height, width, 3) uint8 RGB, in the order asked for.

        Raises:
            UserError: the video is missing, cut short or has no frame at such a step.
        """
        if self.features[feature]["dtype"] == "image":
            return self._embedded(episode, feature, steps)
        first = self.first_frame(episode, feature)
        try:
            return self.video(episode, feature).frames([first + int(step) for step in steps])
        except UserError as error:
            raise UserError(f"episode {episode}, {feature}, steps {list(steps)[:5]}: {error}") from None

    def video(self, episode: int, feature: str) -> VideoReader:
        """The open file that shows an episode; the same object for episodes of the same file."""
        number = int(self.table.videos[feature].file[episode])
        reader: VideoReader = self._opened("video", video_file(self.path, self.info, feature, number))
        return reader

    def first_frame(self, episode: int, feature: str) -> int:
        """Number, in its file, of the frame that shows step 0: the one whose time is the episode's start."""
        start = float(self.table.videos[feature].start_s[episode])
        reader = self.video(episode, feature)
        first = reader.frame_at(start, 0.5 / self.fps) if start else 0
        end = first + int(self.table.lengths[episode])
        if end > reader.count:
            raise UserError(
                f"{reader.path}: has {reader.count} frames, episode {episode} needs up to frame {end - 1}; "
                f"copy or convert the dataset again"
            )
        return first

    def clip(self, episode: int, feature: str) -> Clip:
        """The episode's pictures as part of a file, for copying without encoding again."""
        path = self.video(episode, feature).path
        return Clip(path, self.first_frame(episode, feature), int(self.table.lengths[episode]))

    def _embedded(self, episode: int, feature: str, steps: Sequence[int]) -> np.ndarray:
        """Pictures that lie in the parquet file as PNG or JPEG bytes."""
        column = self.episode_table(episode)[feature]
        pictures = []
        for step in steps:
            value = column[int(step)].as_py() or {}
            data = value.get("bytes")
            if data is None and value.get("path") and (self.path / value["path"]).is_file():
                data = (self.path / value["path"]).read_bytes()
            picture = cv2.imdecode(np.frombuffer(data or b"\0", np.uint8), cv2.IMREAD_COLOR)
            if picture is None:
                row = int(self.table.first_row[episode]) + int(step)
                raise UserError(f"{self.data_path(episode)}: row {row}: '{feature}' is no picture; convert it again")
            pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        height, width = self.features[feature]["shape"][:2]
        return np.stack(pictures) if pictures else np.empty((0, height, width, 3), np.uint8)

    def _opened(self, kind: str, path: Path) -> Any:
        key = (kind, path)
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        if kind == "video":
            opened: Any = VideoReader(path, self._decoder)
        else:
            try:
                file = pq.ParquetFile(path)
                ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
                opened = (file, ends)
            except (OSError, pa.ArrowException) as error:
                reason = (str(error).splitlines() or [""])[0][:160]
                raise UserError(f"{path}: cannot be read ({reason}); copy or convert the dataset again") from None
        self._keep(key, opened)
        return opened

    def _keep(self, key: tuple[str, Path], value: Any) -> None:
        self._files[key] = value
        alike = [other for other in self._files if other[0] == key[0]]
        for other in alike[: -_OPEN_FILES if key[0] != "table" else -1]:
            dropped = self._files.pop(other)
            if hasattr(dropped, "close"):
                dropped.close()

    def content_hash(self) -> str:
        """SHA-256 over header, episode and task tables and all rows; videos count by name and size."""
        if self._hash is None:
            digest = hashlib.sha256()
            files = sorted(path for folder in ("meta", "data", "videos") for path in (self.path / folder).rglob("*"))
            for path in files:
                if not path.is_file() or path.name in ("stats.json", "qwen_vla.json"):
                    continue
                digest.update(f"{path.relative_to(self.path).as_posix()} {path.stat().st_size}\n".encode())
                if path.suffix != ".mp4":
                    with path.open("rb") as file:
                        while block := file.read(1 << 20):
                            digest.update(block)
            self._hash = digest.hexdigest()
        return self._hash
