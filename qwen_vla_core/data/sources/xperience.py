"""Xperience-10M: everyday work of people with head cameras, hand and body tracking, and timed words.

Source: ropedia-ai/xperience-10m, its toolkit github.com/Ropedia/HOMIE-toolkit; terms on the dataset's page. Layout: one
folder per recording with ``annotation.hdf5`` beside ``stereo_left.mp4`` (frame i ↔ row i). Used here:
``hand_mocap/{left,right}_joints_3d`` (T, 21, 3) in the camera's frame, optionally ``…_joints_3d_confidence``;
``slam/{quat_wxyz (T, 4), trans_xyz (T, 3)}`` world → body and ``calibration/cam01/T_c0_b`` (4, 4) body → camera, so
that camera → world is ``inv(T_c0_b · T_w2b)``; ``slam/frame_names`` (T); ``video/length_sec``; ``caption``, JSON with
``segments`` of ``Sub Task`` and ``Current Action`` [{label, start_frame(_name), end_frame(_name)}]. Frame references
are picture names, ``frame_000123`` or small numbers from 1, or device times (nearest). The dataset itself was not
to be had here; the layout is the toolkit's and its users'.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.data.action_job import option
from qwen_vla_core.data.hands import hdf5
from qwen_vla_core.data.hands.convert import add_arguments as add_shared
from qwen_vla_core.data.hands.convert import convert_hands
from qwen_vla_core.data.hands.track import SIDES, HandRecording, HandTrack, track_points
from qwen_vla_core.data.source_frames import VideoFrames, stored_size, video_facts
from qwen_vla_core.errors import UserError

FILE, VIDEO, FPS = "annotation.hdf5", "stereo_left.mp4", 20.0
WORDS = ("action", "subtask", "task")
_DEVICE_TIME = 100_000_000  # references from here on are times, not numbers of frames (toolkit)


@dataclass(frozen=True)
class Item:
    """One recording's folder."""

    name: str
    path: str


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is a folder somewhere above the recordings."""
    add_shared(parser)
    parser.add_argument(
        "--confidence", type=float, help="a hand below this is not tracked, where stored (default: 0.5)"
    )
    parser.add_argument("--words", choices=WORDS, default="action", help="which words instruct (default: action)")


def items(src: Path, options: Any = None) -> list[Item]:
    """Every recording below a folder, or the folder itself."""
    found = sorted(src.rglob(FILE))
    return [Item(path.parent.relative_to(src).as_posix(), str(path.parent)) for path in found]


def read(item: Item, options: Any) -> HandRecording:
    """One recording.

    Raises:
        UserError: a file is damaged, a dataset is missing or has other dimensions.
    """
    path = Path(item.path) / FILE
    with hdf5.opened(path) as file:
        camera, valid = _camera(file, path)
        total = len(camera)
        hands = {
            side: _hand(file, path, side, camera, valid, float(option(options, "confidence", 0.5))) for side in SIDES
        }
        names = [hdf5.text(name) for name in file["slam/frame_names"][...]] if "slam/frame_names" in file else []
        seconds = hdf5.array(file, path, "video/length_sec", (), required=False)
        caption = hdf5.text(file["caption"][()]) if "caption" in file else ""
    fps, frames = (total / float(seconds) if seconds else FPS), None
    video = Path(item.path) / VIDEO
    if not option(options, "no_pictures", False):
        facts = video_facts(video)
        if facts.frames and facts.frames < total:
            raise UserError(f"{video}: {facts.frames} frames for {total} rows; copy both files again")
        fps = facts.fps
        frames = VideoFrames(
            str(video), tuple(range(total)), stored_size(facts.size, int(option(options, "height", 224)))
        )
    texts = _texts(caption, names, total, str(option(options, "words", "action")), path)
    return HandRecording(item.name, str(path), fps, camera, valid, hands, texts, frames)


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """See ``convert_hands``. Recordings of another rate than the first are dropped, with this reason."""
    found, size, rate = items(Path(src)), None, FPS
    if found:
        first = read(found[0], options)
        size, rate = (first.frames.size if first.frames else None), first.fps
    source = {
        "name": "xperience",
        "licence": "see ropedia-ai/xperience-10m",
        "layout": "Xperience-10M annotation.hdf5 + stereo_left.mp4",
        "path": str(src),
    }
    return convert_hands(Path(out), read, found, (rate, size), source, options, workers, progress)


def _camera(file: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(T, 4, 4) camera → world, and where it is known."""
    turn = hdf5.array(file, path, "slam/quat_wxyz", (None, 4))
    assert turn is not None
    place = hdf5.array(file, path, "slam/trans_xyz", (len(turn), 3))
    mount = hdf5.array(file, path, "calibration/cam01/T_c0_b", (4, 4))
    assert place is not None and mount is not None
    valid = np.isfinite(turn).all(axis=1) & np.isfinite(place).all(axis=1) & (np.linalg.norm(turn, axis=1) > 0.5)
    body = np.tile(np.eye(4), (len(turn), 1, 1))
    known = Rotation.from_quat(np.roll(np.where(valid[:, None], turn, [1.0, 0, 0, 0]), -1, axis=1))
    body[:, :3, :3], body[:, :3, 3] = known.as_matrix(), np.where(valid[:, None], place, 0.0)
    return np.linalg.inv(mount @ body), valid


def _hand(file: Any, path: Path, side: str, camera: np.ndarray, valid: np.ndarray, least: float) -> HandTrack:
    name, total = f"hand_mocap/{side}_joints_3d", len(camera)
    points = hdf5.array(file, path, name, (total, 21, 3))
    assert points is not None
    tracked = np.isfinite(points).all(axis=(1, 2)) & (np.abs(points).sum(axis=(1, 2)) > 0)
    confidence = hdf5.array(file, path, f"{name}_confidence", (total,), required=False)
    if confidence is not None:
        tracked &= confidence >= least
    world = np.einsum("tij,tpj->tpi", camera[:, :3, :3], np.nan_to_num(points)) + camera[:, None, :3, 3]
    return track_points(world, side, tracked & valid)


def _texts(caption: str, names: Sequence[str], total: int, words: str, path: Path) -> list[str]:
    """The instruction of every step."""
    if not caption:
        return [""] * total
    try:
        told = json.loads(caption)
        if words == "task":
            return [str(told["config"]["Main Task"])] * total
        frame_of = _References(names, total)
        texts = [""] * total
        for segment in told["segments"]:
            if words == "subtask":
                parts = [(segment.get("Sub Task", ""), segment.get("start_frame"), segment.get("end_frame"))]
            else:
                parts = [
                    (
                        action.get("label", ""),
                        action.get("start_frame_name") or action.get("start_frame"),
                        action.get("end_frame_name") or action.get("end_frame"),
                    )
                    for action in segment.get("Current Action", [])
                ]
            for text, first, last in parts:
                start, end = frame_of(first), frame_of(last)
                if str(text).strip().upper() not in ("", "N/A") and start is not None and end is not None:
                    low, high = min(start, end), max(start, end)
                    texts[low : high + 1] = [str(text)] * (high + 1 - low)
        return texts
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: dataset 'caption' is not the JSON of this layout ({error})") from None


class _References:
    """Frame references of captions → row numbers, as the toolkit resolves them."""

    def __init__(self, names: Sequence[str], total: int) -> None:
        self.total = total
        self.rows = {name: row for row, name in enumerate(names)} | {Path(n).stem: row for row, n in enumerate(names)}
        times = {int(stem): row for name, row in self.rows.items() if (stem := Path(name).stem).isdigit()}
        self.times = np.array(sorted(times), np.int64)
        self.rows_of_times = [times[int(time)] for time in self.times]

    def __call__(self, reference: Any) -> int | None:
        text = str(reference if reference is not None else "").strip()
        for name in (text, Path(text).stem):
            if name in self.rows:
                return self.rows[name]
        numbered = re.search(r"frame_(\d+)", text)
        digits = numbered[1] if numbered else Path(text).stem
        if not digits.isdigit():
            return None
        number = int(digits)
        if number >= _DEVICE_TIME and not numbered:
            return self.rows_of_times[int(np.abs(self.times - number).argmin())] if len(self.times) else None
        return min(max(number - 1, 0), self.total - 1)
