"""VITRA-1M: a million short hand episodes reconstructed from Ego4D, EPIC-KITCHENS, EgoExo4D and Something-Something V2.

Source: arXiv 2510.21571, github.com/microsoft/VITRA (data/data.md), VITRA-VLA/VITRA-1M; the code is MIT, the videos
must be had from their owners and undistorted with VITRA's script. Layout: ``<dataset>/episodic_annotations/
<dataset>_<video>_ep_<n>.npy``, each a stored dictionary: ``extrinsics`` (T, 4, 4) world → camera, ``video_name``,
``video_decode_frame`` (T) frames of the video, ``text`` {side: [(words, (first, end))]}, and per hand ``kept_frames``
(T) 0/1, ``transl_worldspace`` (T, 3) of the wrist, ``global_orient_worldspace`` (T, 3, 3), ``hand_pose``
(T, 15, 3, 3) and ``joints_worldspace`` (T, 21, 3), all of the right MANO model; a left hand is its mirror image.
Checked against the episode that VITRA publishes in its repository.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.action_job import option
from qwen_vla_core.data.hands import hdf5
from qwen_vla_core.data.hands.convert import add_arguments as add_shared
from qwen_vla_core.data.hands.convert import convert_hands
from qwen_vla_core.data.hands.object_npy import read_dict
from qwen_vla_core.data.hands.points import mano_fingers, mano_wrist
from qwen_vla_core.data.hands.track import SIDES, HandRecording, HandTrack, track_points
from qwen_vla_core.data.source_frames import Size, VideoFrames, stored_size, video_facts
from qwen_vla_core.errors import UserError

_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
FINGERS = {"rotations": "mano", "points": "points"}  # --fingers → pose space


@dataclass(frozen=True)
class Item:
    """One annotation file."""

    name: str
    path: str


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is a folder somewhere above the ``.npy`` files."""
    add_shared(parser)
    parser.add_argument("--videos", type=Path, help="folder somewhere above the (undistorted) videos (default: SRC)")
    parser.add_argument("--fps", type=float, help="rate of the videos, for --no-pictures (default: 30)")
    parser.add_argument(
        "--fingers",
        choices=tuple(FINGERS),
        default="rotations",
        help="finger poses from MANO's rotations, or from joint positions like the other corpora (default: rotations)",
    )


def items(src: Path, options: Any = None) -> list[Item]:
    """Every annotation file below a folder."""
    return [Item(path.stem, str(path)) for path in sorted(src.rglob("*_ep_*.npy"))]


def read(item: Item, options: Any) -> HandRecording:
    """One episode.

    Raises:
        UserError: the file is damaged, a key is missing or has other dimensions, or its video is missing.
    """
    path = Path(item.path)
    found = read_dict(path)
    to_camera = _array(found, path, "extrinsics", (None, 4, 4))
    total = len(to_camera)
    valid = hdf5.rigid(to_camera)
    camera = np.linalg.inv(np.where(valid[:, None, None], to_camera, np.eye(4)))
    numbers = _array(found, path, "video_decode_frame", (total,)).astype(int)
    if (np.diff(numbers) <= 0).any():
        raise UserError(f"{path}: 'video_decode_frame' does not increase")
    pose = FINGERS[str(option(options, "fingers", "rotations"))]
    hands = {side: _hand(found, path, side, total, pose) for side in SIDES}
    rate, frames = float(option(options, "fps", 30.0)), None
    if not option(options, "no_pictures", False):
        video = _video(options, path, str(found.get("video_name", "")))
        facts = video_facts(video)
        rate = facts.fps
        frames = VideoFrames(str(video), tuple(map(int, numbers)), _size(facts.size, options))
    return HandRecording(
        name=item.name,
        where=item.path,
        fps=rate / _step(numbers),
        camera=camera,
        camera_valid=valid,
        hands=hands,
        texts=[],
        frames=frames,
        pose=pose,
        hand_texts={side: _texts(found, path, side, total) for side in SIDES},
    )


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """See ``convert_hands``. Episodes of videos with another rate than the first are dropped, with this reason."""
    src = Path(src)
    if option(options, "videos") is None:
        options.videos = src
    found = items(src)
    size, rate = None, float(option(options, "fps", 30.0))
    if found:
        first = read(found[0], options)
        size, rate = (first.frames.size if first.frames else None), first.fps
    source = {
        "name": "vitra",
        "licence": "annotations MIT; videos as Ego4D, EPIC-KITCHENS, EgoExo4D, Something-Something V2",
        "layout": "VITRA-1M episodic_annotations",
        "path": str(src),
    }
    pose = FINGERS[str(option(options, "fingers", "rotations"))]
    return convert_hands(Path(out), read, found, (rate, size), source, options, workers, progress, pose)


def _hand(found: Mapping[str, Any], path: Path, side: str, total: int, pose: str) -> HandTrack:
    hand = found.get(side)
    if not isinstance(hand, dict):
        raise UserError(f"{path}: has no '{side}'")
    kept = _array(hand, path, "kept_frames", (total,), side) > 0.5
    points = _array(hand, path, "joints_worldspace", (total, 21, 3), side)
    if pose == "points":
        return track_points(points, side, kept)
    turns = _array(hand, path, "global_orient_worldspace", (total, 3, 3), side)
    bends = _array(hand, path, "hand_pose", (total, 15, 3, 3), side)
    place = _array(hand, path, "transl_worldspace", (total, 3), side)
    whole = _rotations(turns) & _rotations(bends).reshape(total, 15).all(axis=1) & np.isfinite(place).all(axis=1)
    keep = kept & whole
    wrist = mano_wrist(np.where(keep[:, None, None], turns, np.eye(3)), np.nan_to_num(place), side)
    return HandTrack(wrist, mano_fingers(np.where(keep[:, None, None, None], bends, np.eye(3))), keep)


def _rotations(matrices: np.ndarray) -> np.ndarray:
    flat = matrices.reshape(-1, 3, 3)
    full = np.tile(np.eye(4), (len(flat), 1, 1))
    full[:, :3, :3] = flat
    return hdf5.rigid(full)


def _texts(found: Mapping[str, Any], path: Path, side: str, total: int) -> list[str]:
    """Words of every step; ranges are [first, end)."""
    texts = [""] * total
    try:
        for words, (first, end) in found["text"][side]:
            for step in range(max(0, int(first)), min(total, int(end))):
                texts[step] = str(words)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: 'text.{side}' is no list of (words, (first, end))") from None
    return texts


def _array(found: Mapping[str, Any], path: Path, key: str, shape: tuple[int | None, ...], side: str = "") -> np.ndarray:
    name = f"{side}.{key}" if side else key
    if key not in found:
        raise UserError(f"{path}: has no '{name}'")
    try:
        values = np.asarray(found[key], np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{path}: '{name}' holds no numbers") from None
    if values.ndim != len(shape) or any(w is not None and w != h for w, h in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise UserError(f"{path}: '{name}' has shape {values.shape}, expected ({wanted})")
    return values


def _step(numbers: np.ndarray) -> int:
    return int(np.median(np.diff(numbers))) if len(numbers) > 1 else 1


def _video(options: Any, path: Path, name: str) -> Path:
    folder = Path(option(options, "videos", path.parent))
    found = _index(str(folder)).get(name)
    if found is None:
        raise UserError(f"--videos {folder}: no video '{name}' for {path.name}; name its folder, or use --no-pictures")
    return Path(found)


@functools.cache
def _index(folder: str) -> dict[str, str]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
    return {path.stem: str(path) for path in paths}


def _size(size: Size, options: Any) -> Size:
    return stored_size(size, int(option(options, "height", 224)))
