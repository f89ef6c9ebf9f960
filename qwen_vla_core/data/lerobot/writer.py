"""Writing a LeRobot dataset that can be killed at any moment and goes on where it stopped.

An episode is staged (``staging``), numbered by a rename, and joined with its neighbours when a file is full
(``sealing``). While the folder ``.staging`` exists, the dataset is unfinished; what its tables name is complete all the
same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_vla_core.data.contract import CONTRACT_FILE, CONTRACT_VERSION, FAMILIES, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import layout
from qwen_vla_core.data.lerobot.episode_stats import Totals
from qwen_vla_core.data.lerobot.layout import ACTION, STATE, Feature, Version, view_feature
from qwen_vla_core.data.lerobot.metadata import (
    EpisodeTable,
    data_file,
    episode_stats,
    read_episodes,
    read_parquet,
    read_tasks,
)
from qwen_vla_core.data.lerobot.sealing import Group, drop_orphans, seal
from qwen_vla_core.data.lerobot.staging import PREPARED, STAGING, EpisodeStager, Frames, Staged, disk_errors
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.data.video import CRF
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

_EPISODE = "episode-"
_MB = 1 << 20


class LeRobotWriter:
    """A dataset being written; a context manager. Left normally, it is finished; left by an error, unfinished.

    Attributes:
        stager: writes episodes in any process; hand what it returns to ``add_staged`` in the order wanted.
        infos: what was noted for every complete episode, those of earlier runs included.
    """

    def __init__(
        self,
        path: str | Path,
        contract: DataContract,
        *,
        family: str,
        views: Mapping[str, tuple[int, int]] | None = None,
        version: Version = "v3.0",
        source: Mapping[str, Any] | None = None,
        extras: Mapping[str, str | Feature] | None = None,
        resume: bool = False,
        crf: int = CRF,
        data_mb: float = layout.DATA_MB,
        video_mb: float = layout.VIDEO_MB,
    ) -> None:
        """Begins a dataset, or goes on with one.

        Args:
            path: folder of the dataset.
            contract: its state and action channels become columns, its rate the dataset's.
            family: of the training mixture.
            views: view → (width, height), both even; those of the contract that have pictures here.
            version: of the layout.
            source: provenance (name, licence, …), kept in ``meta/qwen_vla.json``.
            extras: further columns: name → dtype (``bool``, ``string``, …) or ``Feature``. ``perturbed`` and
                ``recorded_timestamp`` are filled from the rows' own fields.
            resume: go on with what an earlier run left, finished or not.
            crf: quality of pictures.
            data_mb: size at which a parquet file is not continued.
            video_mb: size at which an mp4 is not continued.

        Raises:
            UserError: the folder holds a dataset and ``resume`` is off, or one with other settings.
        """
        if family not in FAMILIES:
            raise UserError(f"{path}: family {family!r} is none of {', '.join(FAMILIES)}")
        unknown = set(views or {}) - set(contract.views)
        if unknown:
            raise UserError(f"{path}: view '{min(unknown)}' is not among the contract's: {', '.join(contract.views)}")
        features = {}
        for name, channels in ((STATE, contract.state_channels), (ACTION, contract.action_channels)):
            if channels:
                features[name] = Feature("float32", (len(channels),), channels)
        for name, extra in (extras or {}).items():
            features[name] = Feature(extra) if isinstance(extra, str) else extra
        sizes = {view_feature(view): size for view, size in (views or {}).items()}
        header = {name: feature.to_json() for name, feature in features.items()}
        header |= {key: layout.video_info(size, contract.frequency_hz) for key, size in sizes.items()}
        sidecar: dict[str, Any] = {"version": CONTRACT_VERSION, "family": family, "contract": contract.to_json()}
        sidecar["source"] = dict(source or {})
        stager = EpisodeStager(Path(path), contract.frequency_hz, features, sizes, crf)
        tag = contract.prompt.robot_tag
        self._begin(stager, version, header, tag, sidecar, resume, (data_mb, video_mb))

    @classmethod
    def copy_of(
        cls,
        path: str | Path,
        info: Mapping[str, Any],
        version: Version,
        sizes: Mapping[str, tuple[int, int]],
        sidecar: Mapping[str, Any] | None,
        resume: bool,
    ) -> LeRobotWriter:
        """A writer for the columns and views of another dataset, whatever they are.

        Args:
            path: folder of the dataset.
            info: the other's header.
            version: of the layout.
            sizes: video feature → (width, height).
            sidecar: contents of ``meta/qwen_vla.json``; None where the other has none.
            resume: as above.
        """
        writer = cls.__new__(cls)
        stager = EpisodeStager(Path(path), float(info["fps"]), {}, sizes)
        header = {name: value for name, value in info["features"].items() if name not in layout.DEFAULT_FEATURES}
        limits = (layout.DATA_MB, layout.VIDEO_MB)
        writer._begin(stager, version, header, info.get("robot_type"), sidecar, resume, limits)
        return writer

    def _begin(
        self,
        stager: EpisodeStager,
        version: Version,
        header: Mapping[str, Any],
        robot_type: str | None,
        sidecar: Mapping[str, Any] | None,
        resume: bool,
        limits_mb: tuple[float, float],
    ) -> None:
        self.stager = stager
        self.root = stager.root
        self._limits = limits_mb
        self._tasks: dict[str, int] = {}
        self._staging = self.root / STAGING
        self._robot_type = robot_type
        default = {name: feature.to_json() for name, feature in layout.DEFAULT_FEATURES.items()}
        self._features = {**header, **default}
        self._version: Version = version
        exists = (self.root / layout.INFO).exists()
        if exists and not resume:
            raise UserError(f"{self.root}: holds a dataset already; use --resume to go on, or write to another folder")
        with disk_errors(self.root):
            self._staging.mkdir(parents=True, exist_ok=True)
            self._lock = (self._staging / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.root}: another process is writing this dataset; wait for it") from None
            try:
                if exists:
                    self._check_same(sidecar)
                else:
                    if sidecar is not None:
                        atomic_write_json(self.root / CONTRACT_FILE, sidecar)
                    self._episodes, self._rows = 0, 0
                    self._write_info()
                self._take_up()
            except BaseException:
                self._lock.close()
                raise

    def _check_same(self, sidecar: Mapping[str, Any] | None) -> None:
        """Refuses to go on with other settings than those the dataset was begun with."""
        info = layout.read_info(self.root)
        now = {"codebase_version": self._version, "fps": layout.rate_json(self.stager.fps), "features": self._features}
        for key, value in now.items():
            if _plain(info[key]) != _plain(value):
                raise UserError(f"{self.root}: was begun with another {key}; write to another folder")
        path = self.root / CONTRACT_FILE
        if sidecar is not None and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            for key in ("family", "contract"):
                if known.get(key) != _plain(sidecar[key]):
                    raise UserError(f"{path}: was begun with another {key}; write to another folder")

    def _take_up(self) -> None:
        """Finds what is complete: in the tables, and staged after them."""
        info = layout.read_info(self.root)
        table = read_episodes(self.root, info)
        self._episodes, self._rows = len(table), int(table.lengths.sum())
        self._tasks = {task: index for index, task in enumerate(read_tasks(self.root, info))}
        self._next_file = _next_file(table)
        if info["total_episodes"] != self._episodes:  # killed between the table and the header
            self._write_info()
        self.infos: list[dict[str, Any]] = [json.loads(text) if text else {} for text in table.infos]
        drop_orphans(self.root, info, self._next_file, self._episodes)
        for folder in self._staging.glob(f"{PREPARED}*"):
            shutil.rmtree(folder, ignore_errors=True)
        self._pending: list[Staged] = []
        numbered = sorted(self._staging.glob(f"{_EPISODE}*"))
        for folder in numbered:
            number = int(folder.name.removeprefix(_EPISODE))
            staged = Staged.read(folder) if number == self._episodes + len(self._pending) else None
            if staged is None:
                shutil.rmtree(folder)
            else:
                self._pending.append(staged)
                self.infos.append(dict(staged.info))

    @property
    def episodes(self) -> int:
        """Complete episodes, those of earlier runs included."""
        return self._episodes + len(self._pending)

    def add_episode(
        self,
        rows: EpisodeRows,
        tasks: Sequence[str],
        frames: Mapping[str, Frames] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> int:
        """Stages and adds one episode (see ``EpisodeStager.stage``); returns its number."""
        return self.add_staged(self.stager.stage(rows, tasks, frames, info))

    def add_staged(self, staged: Staged) -> int:
        """Adds an episode that ``stager`` wrote; returns its number. From here on it survives any crash."""
        with disk_errors(self.root):
            if self._pending and self._full(staged):
                self._seal()
            number = self.episodes
            folder = staged.folder.rename(self._staging / f"{_EPISODE}{number:09d}")
            moved = Staged(folder, staged.length, staged.tasks, staged.info, staged.stats, staged.videos)
            self._pending.append(moved)
            self.infos.append(dict(staged.info))
            return number

    def _full(self, staged: Staged) -> bool:
        """Whether a file must end before this episode."""
        together = [*self._pending, staged]
        first = self._pending[0]
        if len(together) > layout.CHUNK_SIZE and self._version == "v2.1":
            return True
        if sum(episode.row_bytes for episode in together) > self._limits[0] * _MB:
            return True
        for key, video in staged.videos.items():
            size = sum(episode.videos[key]["bytes"] for episode in together)
            if size > self._limits[1] * _MB or video["signature"] != first.videos[key]["signature"]:
                return True
        return bool(staged.videos) and sum(e.length for e in together) > layout.VIDEO_SECONDS * self.stager.fps

    def _seal(self) -> None:
        if not self._pending:
            return
        for staged in self._pending:
            for task in staged.tasks:
                self._tasks.setdefault(task, len(self._tasks))
        group = Group(self._pending, self._episodes, self._rows, self._next_file, self._tasks)
        seal(self.root, self._info(), group)
        self._episodes += len(self._pending)
        self._rows += sum(staged.length for staged in self._pending)
        self._next_file += 1
        self._write_info()
        for staged in self._pending:
            shutil.rmtree(staged.folder)
        self._pending = []

    def _info(self) -> dict[str, Any]:
        totals = {"episodes": self._episodes, "frames": self._rows, "tasks": len(self._tasks)}
        limits = (layout.DATA_MB, layout.VIDEO_MB)
        return layout.make_info(self._version, self.stager.fps, self._features, totals, self._robot_type, limits)

    def _write_info(self) -> None:
        atomic_write_json(self.root / layout.INFO, self._info())

    def close(self) -> None:
        """Finishes the dataset: all files joined, statistics written, nothing staged. Without episodes nothing stays.

        Raises:
            UserError: the disk refuses; what is complete stays, and ``resume`` goes on.
        """
        with disk_errors(self.root):
            self._seal()
            if self._episodes:
                atomic_write_json(self.root / layout.STATS, self._statistics())
            else:
                for name in (layout.INFO, CONTRACT_FILE):
                    (self.root / name).unlink(missing_ok=True)
            self._lock.close()
            shutil.rmtree(self._staging)
            if not self._episodes:
                with contextlib.suppress(OSError):  # somebody else's files
                    (self.root / "meta").rmdir()
                    self.root.rmdir()

    def _statistics(self) -> dict[str, Any]:
        info = self._info()
        totals = Totals()
        for stats in episode_stats(self.root, info):
            totals.add(stats)
        table = read_episodes(self.root, info)
        paths = [data_file(self.root, info, int(number)) for number in np.unique(table.file)]
        return totals.result(_sketches(paths, self._features))

    def abandon(self) -> None:
        """Stops without finishing: what is complete stays, marked by the folder ``.staging``."""
        try:
            with contextlib.suppress(UserError), disk_errors(self.root):
                self._seal()
        finally:
            self._lock.close()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _next_file(table: EpisodeTable) -> int:
    files = [table.file, *(places.file for places in table.videos.values())]
    return max((int(numbers.max()) + 1 for numbers in files if len(numbers)), default=0)


def _sketches(paths: Sequence[Path], features: Mapping[str, Any]) -> dict[str, list[QuantileSketch]]:
    """Quantiles of every column of floating-point numbers, one sketch per channel."""
    names = [
        name
        for name, feature in features.items()
        if feature["dtype"].startswith("float") and len(feature["shape"]) == 1 and name != "timestamp"
    ]
    sketches = {name: [QuantileSketch() for _ in range(features[name]["shape"][0])] for name in names}
    for path in paths:
        table = read_parquet(path, names)
        for name in names:
            column = table[name].combine_chunks()
            flat = column.flatten() if isinstance(column, pa.FixedSizeListArray | pa.ListArray) else column
            values = flat.to_numpy(zero_copy_only=False).reshape(len(table), -1)
            for channel, sketch in zip(values.T, sketches[name], strict=True):
                sketch.add(channel)
    return sketches
