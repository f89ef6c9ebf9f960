"""Names, paths and headers of LeRobot datasets v2.1 and v3.0 [X: lerobot 0.4, read and written by it].

v2.1 has one parquet file per episode and one mp4 per episode and view, and JSON lines as metadata. v3.0 puts many
episodes into one parquet file and one mp4 per view, and its metadata into parquet; an episode knows its files, its rows
and from which second of the video on it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from qwen_vla_core.errors import UserError

Version = Literal["v3.0", "v2.1"]
VERSIONS: tuple[Version, ...] = ("v3.0", "v2.1")
READABLE = (*VERSIONS, "v2.0")  # v2.0 is laid out as v2.1 and lacks only statistics per episode
INFO = "meta/info.json"
STATS = "meta/stats.json"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
PERTURBED, RECORDED_TIME = "perturbed", "recorded_timestamp"
CHUNK_SIZE = 1000  # files (v3.0) or episodes (v2.1) per folder
DATA_MB, VIDEO_MB = 100, 200
# LeRobot compares times as float32 to 1e-4 s; above 1,024 s float32 is coarser than that.
VIDEO_SECONDS = 1000.0

TASKS_V3 = "meta/tasks.parquet"
EPISODES_V3 = "meta/episodes"
TASKS_V2, EPISODES_V2, STATS_V2 = "meta/tasks.jsonl", "meta/episodes.jsonl", "meta/episodes_stats.jsonl"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH: dict[str, str] = {
    "v3.0": f"data/{_FILE}.parquet",
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
}
VIDEO_PATH: dict[str, str] = {
    "v3.0": f"videos/{{video_key}}/{_FILE}.mp4",
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
EPISODES_PATH_V3 = f"{EPISODES_V3}/{_FILE}.parquet"


@dataclass(frozen=True)
class Feature:
    """A column.

    Attributes:
        dtype: as NumPy calls it, or ``string``.
        shape: of one step; (1,) is a plain number.
        names: of the last dimension, if it has any.
    """

    dtype: str
    shape: tuple[int, ...] = (1,)
    names: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As ``info.json`` holds it."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "names": None if self.names is None else list(self.names),
        }

    @property
    def arrow(self) -> pa.DataType:
        """Its column's type; vectors have a fixed length, which is what LeRobot casts to."""
        value = pa.string() if self.dtype == "string" else pa.from_numpy_dtype(np.dtype(self.dtype))
        if self.shape == (1,):
            return value
        for size in reversed(self.shape):
            value = pa.list_(value, size)
        return value


# Columns of every dataset, which LeRobot adds by itself.
TIMESTAMP = Feature("float32")
DEFAULT_FEATURES: dict[str, Feature] = {
    "timestamp": TIMESTAMP,
    "frame_index": Feature("int64"),
    "episode_index": Feature("int64"),
    "index": Feature("int64"),
    "task_index": Feature("int64"),
}


def file_place(number: int) -> dict[str, int]:
    """Chunk and file index of the ``number``-th file."""
    return {"chunk_index": number // CHUNK_SIZE, "file_index": number % CHUNK_SIZE}


def episode_place(episode: int) -> dict[str, int]:
    """Chunk and episode index in v2.1's paths."""
    return {"episode_chunk": episode // CHUNK_SIZE, "episode_index": episode}


def view_feature(view: str) -> str:
    """Feature name of a view's pictures."""
    return IMAGES + view


def rate_json(fps: float) -> int | float:
    """LeRobot writes whole rates as integers."""
    return int(fps) if float(fps).is_integer() else float(fps)


def video_info(size: tuple[int, int], fps: float) -> dict[str, Any]:
    """The header of a view that this package encodes."""
    width, height = size
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": rate_json(fps),
            "video.channels": 3,
            "has_audio": False,
        },
    }


def make_info(
    version: Version,
    fps: float,
    features: Mapping[str, Any],
    totals: Mapping[str, int],
    robot_type: str | None,
    limits_mb: tuple[int, int] = (DATA_MB, VIDEO_MB),
) -> dict[str, Any]:
    """``info.json``.

    Args:
        version: of the layout.
        fps: rows per second.
        features: every column and view, as JSON.
        totals: ``episodes``, ``frames``, ``tasks``.
        robot_type: free text.
        limits_mb: sizes above which a data and a video file are not continued (v3.0).
    """
    views = sum(feature["dtype"] == "video" for feature in features.values())
    episodes = totals["episodes"]
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": robot_type,
        "total_episodes": episodes,
        "total_frames": totals["frames"],
        "total_tasks": totals["tasks"],
        "chunks_size": CHUNK_SIZE,
        "fps": rate_json(fps),
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH[version],
        "video_path": VIDEO_PATH[version] if views else None,
        "features": dict(features),
    }
    if version == "v3.0":
        info["data_files_size_in_mb"], info["video_files_size_in_mb"] = limits_mb
    else:
        info["total_videos"] = views * episodes
        info["total_chunks"] = -(-episodes // CHUNK_SIZE)
    return info


def read_info(root: Path) -> dict[str, Any]:
    """The header of a dataset, of a version that can be read.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = root / INFO
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, _ = info["codebase_version"], [info[key] for key in ("fps", "features", "data_path")]
        float(info["fps"])
    except FileNotFoundError:
        raise UserError(f"{root}: not a LeRobot dataset (no {INFO}); give the folder that holds meta/") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged header ({type(error).__name__}: {error}); convert the dataset again"
        ) from None
    if version == "v2.0":
        raise UserError(
            f"{path}: version v2.0 has no statistics per episode; bring it to v2.1 with lerobot's converter"
        )
    if version not in VERSIONS:
        raise UserError(f"{path}: version {version!r}; this program reads {' and '.join(VERSIONS)}")
    return info
