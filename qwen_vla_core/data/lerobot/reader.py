"""Reading LeRobot datasets of any origin as an ``ActionDataset``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_vla_core.data.contract import CONTRACT_FILE, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot.layout import (
    ACTION,
    DEFAULT_FEATURES,
    IMAGES,
    INFO,
    PERTURBED,
    RECORDED_TIME,
    STATE,
    TASKS_V2,
    TASKS_V3,
    read_info,
)
from qwen_vla_core.data.lerobot.metadata import data_file, read_episodes, read_tasks, video_file
from qwen_vla_core.data.lerobot.staging import STAGING
from qwen_vla_core.data.video import Clip, Decoder, VideoReader
from qwen_vla_core.errors import UserError

_OPEN_FILES = 8  # parquet and video files kept open
_PICTURES = ("video", "image")


class LeRobotDataset:
    """A dataset v3.0, v2.1 or v2.0. Opening reads metadata only; may be pickled; not shared between threads.

    Attributes:
        path: of the folder.
        name: its last part.
        family: of the training mixture.
        contract: channels, prompt, rate.
        fps: rows per second.
        tasks: instructions by ``EpisodeRows.task``.
        lengths: (episodes,) int64.
        views: views of the contract that have pictures here.
        info: the header, as in ``meta/info.json``.
    """

    def __init__(
        self,
        path: str | Path,
        contract: DataContract | None = None,
        *,
        family: str | None = None,
        views: Mapping[str, str] | None = None,
        decoder: Decoder = "auto",
    ) -> None:
        """
        Args:
            path: folder that holds ``meta/``.
            contract: what the columns mean; None takes it from ``meta/qwen_vla.json``.
            family: of the training mixture; None takes it from there, or ``manipulation``.
            views: view → feature, where pictures are not called ``observation.images.VIEW``.
            decoder: of videos.

        Raises:
            UserError: not a dataset, damaged, without a contract, or with other dimensions than the contract's.
        """
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.info = read_info(self.path)
        self.decoder: Decoder = decoder
        sidecar = _read_sidecar(self.path)
        if contract is None and sidecar is None:
            raise UserError(
                f"{self.path}: has no {CONTRACT_FILE}, so nothing says what its channels mean; "
                f"name the robot with --embodiment FILE"
            )
        where = str(self.path / CONTRACT_FILE)
        self.contract = contract or DataContract.from_json((sidecar or {}).get("contract", {}), where)
        self.family = family or str((sidecar or {}).get("family", "manipulation"))
        self.source: dict[str, Any] = dict((sidecar or {}).get("source", {}))
        self.fps = float(self.info["fps"])
        self.features: dict[str, Any] = self.info["features"]
        self._check_features()
        self._view_features = self._find_views(views or {})
        self.views: Sequence[str] = tuple(view for view in self.contract.views if view in self._view_features)
        self.table = read_episodes(self.path, self.info)
        self.tasks: Sequence[str] = read_tasks(self.path, self.info)
        self.lengths = self.table.lengths
        self._files: OrderedDict[tuple[str, Path], Any] = OrderedDict()
        if self.unfinished:
            warnings.warn(f"{self.path}: is unfinished; go on with --resume to complete it", stacklevel=2)

    @property
    def unfinished(self) -> bool:
        """Whether a writer was stopped before it closed the dataset."""
        return (self.path / STAGING).is_dir()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def _check_features(self) -> None:
        for feature, channels, needed in (
            (ACTION, self.contract.action_channels, bool(self.contract.action)),
            (STATE, self.contract.state_channels, bool(self.contract.state)),
        ):
            if not needed:
                continue
            if feature not in self.features:
                raise UserError(f"{self.path / INFO}: has no feature '{feature}'; convert the dataset again")
            shape = list(self.features[feature]["shape"])
            if shape != [len(channels)]:
                raise UserError(
                    f"{self.path / INFO}: '{feature}' has shape {shape}, but {self.contract.prompt.robot_tag} has "
                    f"{len(channels)} channels; name the robot this dataset was recorded with"
                )

    def _find_views(self, given: Mapping[str, str]) -> dict[str, str]:
        """View → feature, by name or as given."""
        pictures = [key for key, feature in self.features.items() if feature["dtype"] in _PICTURES]
        found = {view: IMAGES + view for view in self.contract.views if IMAGES + view in pictures}
        for view, feature in given.items():
            if view not in self.contract.views:
                raise UserError(f"views: '{view}' is not a view of the contract ({', '.join(self.contract.views)})")
            if feature not in pictures:
                raise UserError(f"{self.path}: has no pictures '{feature}'; it has {', '.join(pictures) or 'none'}")
            found[view] = feature
        if self.contract.views and pictures and not found:
            raise UserError(
                f"{self.path}: its pictures are {', '.join(pictures)}; map them with --view "
                f"{self.contract.views[0]}={pictures[0]}"
            )
        return found

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def infos(self) -> Sequence[Mapping[str, Any]]:
        """What was noted per episode; empty for datasets of other origin."""
        return [json.loads(text) if text else {} for text in self.table.infos]

    def rows(self, episode: int) -> EpisodeRows:
        """The numbers of an episode.

        Raises:
            UserError: the file is missing, cut short or of other dimensions; names file and row.
        """
        table = self.episode_table(episode)
        length = len(table)
        extra = {
            name: column_values(table[name], self.features[name]["dtype"])
            for name in self.features
            if name in table.column_names
            and name not in (*DEFAULT_FEATURES, ACTION, STATE, PERTURBED, RECORDED_TIME)
            and self.features[name]["dtype"] not in _PICTURES
        }
        state = self._vectors(table, STATE, episode) if self.contract.state else np.zeros((length, 0), np.float32)
        action = self._vectors(table, ACTION, episode) if self.contract.action else np.zeros((length, 0), np.float32)
        time = RECORDED_TIME if RECORDED_TIME in table.column_names else "timestamp"
        pushed = table[PERTURBED].to_numpy().astype(bool) if PERTURBED in table.column_names else np.zeros(length, bool)
        task = table["task_index"].to_numpy().astype(np.int64)
        if length and not (task.min() >= 0 and task.max() < len(self.tasks)):
            row = int(np.argmax((task < 0) | (task >= len(self.tasks))))
            file = TASKS_V3 if self.info["codebase_version"] == "v3.0" else TASKS_V2
            raise UserError(
                f"{self.data_path(episode)}: row {self.table.first_row[episode] + row} has task {task[row]}, but "
                f"{file} holds {len(self.tasks)}; convert the dataset again"
            )
        return EpisodeRows(
            state=state,
            action=action,
            timestamp=table[time].to_numpy().astype(np.float64),
            task=task,
            perturbed=pushed,
            extra=extra,
        )

    def data_path(self, episode: int) -> Path:
        """Parquet file of an episode."""
        return data_file(self.path, self.info, int(self.table.file[episode]))

    def episode_table(self, episode: int) -> pa.Table:
        """All columns of an episode; only the row groups that it touches are read."""
        path = self.data_path(episode)
        first, length = int(self.table.first_row[episode]), int(self.table.lengths[episode])
        file = self._opened("rows", path)
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
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
            table = file.read_row_groups(groups)
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            raise UserError(
                f"{path}: row group {groups[0] if groups else 0} cannot be read ({reason}); "
                f"copy or convert the dataset again"
            ) from None
        self._keep(key, (groups, table))
        return table

    def _vectors(self, table: pa.Table, name: str, episode: int) -> np.ndarray:
        """(T, c) float32 of a feature."""
        width = int(self.features[name]["shape"][0])
        path, first = self.data_path(episode), int(self.table.first_row[episode])
        if name not in table.column_names:
            raise UserError(f"{path}: has no column '{name}'; copy or convert the dataset again")
        column = table[name].combine_chunks()
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(f"{path}: row {first + row}: '{name}' is empty; copy or convert the dataset again")
        if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
            return column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), 1)
        sizes = np.asarray(column.value_lengths().to_numpy(zero_copy_only=False))
        if np.any(sizes != width):
            row = int(np.argmax(sizes != width))
            raise UserError(
                f"{path}: row {first + row}: '{name}' has {int(sizes[row])} values, must be {width}; convert it again"
            )
        return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), width)

    def frames(self, episode: int, view: str, steps: Sequence[int]) -> np.ndarray:
        """(len(steps), height, width, 3) uint8 RGB, in the order asked for.

        Raises:
            UserError: the video is missing, cut short or has no frame at such a step.
        """
        feature = self._view_features[view]
        if self.features[feature]["dtype"] == "image":
            return self._embedded(episode, feature, steps)
        reader = self.video(episode, view)
        first = self.first_frame(episode, view)
        try:
            return reader.frames([first + int(step) for step in steps])
        except UserError as error:
            raise UserError(f"episode {episode}, view {view}, steps {list(steps)[:5]}: {error}") from None

    def is_video(self, view: str) -> bool:
        """Whether a view's pictures lie in video files, not in the rows."""
        return bool(self.features[self._view_features[view]]["dtype"] == "video")

    def video(self, episode: int, view: str) -> VideoReader:
        """The open file that shows an episode; the same object for episodes of the same file."""
        feature = self._view_features[view]
        number = int(self.table.videos[feature].file[episode])
        reader: VideoReader = self._opened("video", video_file(self.path, self.info, feature, number))
        return reader

    def first_frame(self, episode: int, view: str) -> int:
        """Number, in its file, of the frame that shows step 0: the one whose time is the episode's start."""
        start = float(self.table.videos[self._view_features[view]].start_s[episode])
        reader = self.video(episode, view)
        first = reader.frame_at(start, 0.5 / self.fps) if start else 0
        if first + self.lengths[episode] > reader.count:
            raise UserError(
                f"{reader.path}: has {reader.count} frames, episode {episode} needs up to frame "
                f"{first + self.lengths[episode] - 1}; copy or convert the dataset again"
            )
        return first

    def clip(self, episode: int, view: str) -> Clip:
        """The episode's pictures as part of a file, for copying without encoding again."""
        return Clip(self.video(episode, view).path, self.first_frame(episode, view), int(self.lengths[episode]))

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
            opened: Any = VideoReader(path, self.decoder)
        else:
            try:
                opened = pq.ParquetFile(path)
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

    _hash: str | None = None


def column_values(column: pa.ChunkedArray, dtype: str) -> Any:
    """A column as (T, …) array, or as a list of strings."""
    if dtype == "string":
        return column.to_pylist()
    return np.array(column.to_pylist()) if pa.types.is_nested(column.type) else column.to_numpy()


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    file = path / CONTRACT_FILE
    if not file.exists():
        return None
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        value["contract"]
        return value
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}); write the dataset again") from None
