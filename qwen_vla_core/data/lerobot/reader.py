"""Reading LeRobot datasets of any origin as an ``ActionDataset``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_vla_core.data.contract import CONTRACT_FILE, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot.files import PICTURES, LeRobotFiles
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
)
from qwen_vla_core.data.lerobot.staging import STAGING
from qwen_vla_core.data.video import Clip, Decoder, VideoReader
from qwen_vla_core.errors import UserError


class LeRobotDataset:
    """A dataset v3.0, v2.1 or v2.0. Opening reads metadata only; may be pickled; not shared between threads.

    Attributes:
        files: what lies below, without meaning.
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
        self.files = LeRobotFiles(path, decoder)
        self.path, self.info, self.fps = self.files.path, self.files.info, self.files.fps
        self.name = self.path.resolve().name
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
        self.features: dict[str, Any] = self.files.features
        self._check_features()
        self._view_features = self._find_views(views or {})
        self.views: Sequence[str] = tuple(view for view in self.contract.views if view in self._view_features)
        self.table, self.tasks = self.files.table, self.files.tasks
        self.lengths = self.table.lengths
        if self.unfinished:
            warnings.warn(f"{self.path}: is unfinished; go on with --resume to complete it", stacklevel=2)

    @property
    def unfinished(self) -> bool:
        """Whether a writer was stopped before it closed the dataset."""
        return (self.path / STAGING).is_dir()

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
        pictures = [key for key, feature in self.features.items() if feature["dtype"] in PICTURES]
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
        table = self.files.episode_table(episode)
        length = len(table)
        extra = {
            name: column_values(table[name], self.features[name]["dtype"])
            for name in self.features
            if name in table.column_names
            and name not in (*DEFAULT_FEATURES, ACTION, STATE, PERTURBED, RECORDED_TIME)
            and self.features[name]["dtype"] not in PICTURES
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
                f"{self.files.data_path(episode)}: row {self.table.first_row[episode] + row} has task {task[row]}, but "
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

    def _vectors(self, table: pa.Table, name: str, episode: int) -> np.ndarray:
        """(T, c) float32 of a feature."""
        width = int(self.features[name]["shape"][0])
        path, first = self.files.data_path(episode), int(self.table.first_row[episode])
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
        """(len(steps), height, width, 3) uint8 RGB, in the order asked for; see ``LeRobotFiles.frames``."""
        return self.files.frames(episode, self._view_features[view], steps)

    def is_video(self, view: str) -> bool:
        """Whether a view's pictures lie in video files, not in the rows."""
        return bool(self.features[self._view_features[view]]["dtype"] == "video")

    def video(self, episode: int, view: str) -> VideoReader:
        """The open file that shows an episode; the same object for episodes of the same file."""
        return self.files.video(episode, self._view_features[view])

    def first_frame(self, episode: int, view: str) -> int:
        """Number, in ``video(episode, view)``, of the frame that shows step 0."""
        return self.files.first_frame(episode, self._view_features[view])

    def clip(self, episode: int, view: str) -> Clip:
        """The episode's pictures as part of a file, for copying without encoding again."""
        return self.files.clip(episode, self._view_features[view])

    def content_hash(self) -> str:
        """SHA-256 over header, episode and task tables and all rows; videos count by name and size."""
        return self.files.content_hash()


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
