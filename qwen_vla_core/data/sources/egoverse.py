"""EgoVerse: 1,300 hours of people at work, one Zarr v3 store per episode.

Source: github.com/GaTech-RL2/EgoVerse (MIT code; the data's terms with its partners). Layout, as its writer makes it:
``**/<episode>.zarr`` (or a folder with ``zarr.json``) with ``{left,right}.obs_keypoints`` (T, 63) = 21 points in
world metres, ``obs_head_pose`` (T, 7) = camera → world as x, y, z and quaternion w, x, y, z, ``images.front_1`` (T)
JPEG bytes, ``annotations`` JSON bytes {text, start_idx, end_idx}; attributes ``fps``, ``total_frames``,
``embodiment``, ``task_name``, ``task_description``. Arrays are padded: only ``total_frames`` rows count. A hand that
was not tracked is all zeros, or holds 1e9. Episodes without key points (Aria's, at the commit that was read) are
dropped: a palm pose alone says nothing about fingers. Only stores made by the tests were converted here.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.data.action_job import option
from qwen_vla_core.data.hands.convert import add_arguments as add_shared
from qwen_vla_core.data.hands.convert import convert_hands
from qwen_vla_core.data.hands.track import SIDES, HandRecording, HandTrack, track_points
from qwen_vla_core.data.source_frames import EncodedFrames, first_size, stored_size
from qwen_vla_core.errors import UserError

_FAR = 1e6  # metres; 1e9 stands for "not tracked"
PICTURES = "images.front_1"


@dataclass(frozen=True)
class Item:
    """One store."""

    name: str
    path: str


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is a folder somewhere above the stores."""
    add_shared(parser)


def items(src: Path, options: Any = None) -> list[Item]:
    """Every store below a folder: a folder whose ``zarr.json`` describes a group."""
    found = []
    for path in sorted(src.rglob("zarr.json")):
        try:
            if json.loads(path.read_text(encoding="utf-8")).get("node_type") == "group":
                found.append(Item(path.parent.relative_to(src).as_posix(), str(path.parent)))
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{path}: damaged; copy the store again") from None
    return found


def read(item: Item, options: Any) -> HandRecording:
    """One episode.

    Raises:
        UserError: the store is damaged, an array is missing or has other dimensions.
    """
    store = _open(item.path)
    attributes = dict(store.attrs)
    total, fps = int(attributes.get("total_frames", 0)), float(attributes.get("fps", 0))
    if total < 1 or fps <= 0:
        raise UserError(f"{item.path}: attributes total_frames={total}, fps={fps:g}; both must be positive")
    head = _numbers(store, item.path, "obs_head_pose", 7, total)
    valid = np.isfinite(head).all(axis=1) & (np.abs(head) < _FAR).all(axis=1)
    valid &= np.linalg.norm(head[:, 3:], axis=1) > 0.5
    camera = np.tile(np.eye(4), (total, 1, 1))
    turn = np.roll(np.where(valid[:, None], head[:, 3:], [1.0, 0, 0, 0]), -1, axis=1)
    camera[:, :3, :3] = Rotation.from_quat(turn).as_matrix()
    camera[:, :3, 3] = np.where(valid[:, None], head[:, :3], 0.0)
    hands = {side: _hand(store, item.path, side, total) for side in SIDES}
    frames = None
    if not option(options, "no_pictures", False):
        pictures = tuple(bytes(data) for data in _raw(store, item.path, PICTURES, total))
        size = stored_size(first_size(pictures, item.path), int(option(options, "height", 224)))
        frames = EncodedFrames(pictures, size, f"{item.path}: {PICTURES}")
    texts = _texts(store, attributes, item.path, total)
    return HandRecording(item.name, item.path, fps, camera, valid, hands, texts, frames)


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """See ``convert_hands``. Episodes of another rate than the first are dropped, with this reason."""
    found, size, rate = items(Path(src)), None, 30.0
    if found:
        first = read(found[0], options)
        size, rate = (first.frames.size if first.frames else None), first.fps
    source = {
        "name": "egoverse",
        "licence": "see github.com/GaTech-RL2/EgoVerse",
        "layout": "EgoVerse Zarr v3 episodes",
        "path": str(src),
    }
    return convert_hands(Path(out), read, found, (rate, size), source, options, workers, progress)


def _hand(store: Any, path: str, side: str, total: int) -> HandTrack:
    name = f"{side}.obs_keypoints"
    if name not in store:
        return track_points(np.zeros((total, 21, 3)), side, np.zeros(total, bool))
    points = _numbers(store, path, name, 63, total).reshape(total, 21, 3)
    tracked = np.isfinite(points).all(axis=(1, 2)) & (np.abs(points) < _FAR).all(axis=(1, 2))
    tracked &= (np.abs(points).sum(axis=2) > 0).all(axis=1)
    return track_points(np.where(tracked[:, None, None], points, 0.0), side, tracked)


def _texts(store: Any, attributes: dict[str, Any], path: str, total: int) -> list[str]:
    """Timed words where there are any, else the task's."""
    task = str(attributes.get("task_description") or attributes.get("task_name") or "")
    if "annotations" not in store or store["annotations"].shape[0] == 0:
        return [task] * total
    texts = [""] * total
    for number, data in enumerate(_raw(store, path, "annotations", store["annotations"].shape[0])):
        try:
            entry = json.loads(bytes(data).decode("utf-8"))
            start, end = max(0, int(entry["start_idx"])), min(total - 1, int(entry["end_idx"]))
            texts[start : end + 1] = [str(entry["text"])] * (end + 1 - start)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: annotation {number} is no {{text, start_idx, end_idx}}") from None
    return texts


def _numbers(store: Any, path: str, name: str, width: int, total: int) -> np.ndarray:
    values = np.asarray(_raw(store, path, name, total), np.float64)
    if values.shape != (total, width):
        raise UserError(f"{path}: '{name}' has shape {values.shape}, expected ({total}, {width})")
    return values


def _raw(store: Any, path: str, name: str, total: int) -> Any:
    if name not in store:
        raise UserError(f"{path}: has no array '{name}'")
    try:
        values = store[name][:total]
    except Exception as error:  # every codec of a store has exceptions of its own
        raise UserError(f"{path}: '{name}' is damaged ({type(error).__name__}); copy the store again") from None
    if len(values) != total:
        raise UserError(f"{path}: '{name}' has {len(values)} rows, total_frames says {total}")
    return values


def _open(path: str) -> Any:
    try:
        zarr: Any = importlib.import_module("zarr")
    except ImportError:
        raise UserError("EgoVerse's stores need zarr; pip install 'zarr>=3'") from None
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:  # see `_raw`
        raise UserError(f"{path}: not a readable Zarr store ({type(error).__name__}); copy it again") from None
