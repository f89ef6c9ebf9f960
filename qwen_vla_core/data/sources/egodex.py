"""EgoDex: 829 hours of people at tables, seen and tracked by a headset (Apple Vision Pro, ARKit).

Source: arXiv 2505.11709, github.com/apple/ml-egodex; CC BY-NC-ND. Layout, as its own loader reads it:
``partN/<task>/<i>.hdf5`` beside ``<i>.mp4`` (1080p, 30 Hz, frame i ↔ pose i). Datasets: ``camera/intrinsic`` (3, 3),
``transforms/<joint>`` (T, 4, 4) joint → ARKit's resting world for ``camera`` and 68 joints, ``confidences/<joint>``
(T,) in 0 … 1, missing in older files. The camera's axes are OpenCV's (the official viewer projects with K directly).
Words are attributes: ``llm_description``; for ``llm_type == 'reversible'`` ``which_llm_description`` says whether
``llm_description`` or ``llm_description2`` happened; old files have ``description`` only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.action_job import option
from qwen_vla_core.data.hands import hdf5
from qwen_vla_core.data.hands.convert import add_arguments as add_shared
from qwen_vla_core.data.hands.convert import convert_hands
from qwen_vla_core.data.hands.track import HandRecording, HandTrack, track_points
from qwen_vla_core.data.source_frames import Size, VideoFrames, stored_size, video_facts
from qwen_vla_core.errors import UserError

FPS = 30.0
_FINGER = ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
# ARKit's joints in the order of `points`: the wrist, then four of each finger.
JOINTS = (
    "Hand",
    *(f"{finger}{part}" for finger in ("Thumb", *(f"{n}Finger" for n in ("Index", "Middle", "Ring", "Little")))
      for part in _FINGER),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One pair of files; ``name`` is the HDF5 file below SRC."""

    name: str
    path: str


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is a folder somewhere above the HDF5 files."""
    add_shared(parser)
    parser.add_argument(
        "--confidence", type=float, help="a hand below this in any of its joints is not tracked (default: 0.5)"
    )


def items(src: Path, options: Any = None) -> list[Item]:
    """Every recording below a folder."""
    return [Item(path.relative_to(src).as_posix(), str(path)) for path in sorted(src.rglob("*.hdf5"))]


def read(item: Item, options: Any) -> HandRecording:
    """One recording.

    Raises:
        UserError: a file is damaged, a dataset is missing or has other dimensions.
    """
    path, least = Path(item.path), float(option(options, "confidence", 0.5))
    with hdf5.opened(path) as file:
        camera = hdf5.array(file, path, "transforms/camera", (None, 4, 4))
        assert camera is not None
        hands = {side: _hand(file, path, side, len(camera), least) for side in ("left", "right")}
        words = _words(file.attrs)
    frames, video = None, path.with_suffix(".mp4")
    if not option(options, "no_pictures", False):
        facts = video_facts(video)
        if facts.frames and facts.frames < len(camera):
            raise UserError(f"{video}: {facts.frames} frames for {len(camera)} poses; copy both files again")
        frames = VideoFrames(str(video), tuple(range(len(camera))), _size(facts.size, options))
    return HandRecording(
        name=item.name,
        where=item.path,
        fps=FPS,
        camera=camera,
        camera_valid=hdf5.rigid(camera),
        hands=hands,
        texts=[words] * len(camera),
        frames=frames,
    )


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """See ``convert_hands``."""
    found = items(Path(src))
    size = None
    if found and not option(options, "no_pictures", False):
        size = _size(video_facts(Path(found[0].path).with_suffix(".mp4")).size, options)
    source = {"name": "egodex", "licence": "CC BY-NC-ND 4.0", "layout": "EgoDex HDF5 + MP4", "path": str(src)}
    return convert_hands(Path(out), read, found, (FPS, size), source, options, workers, progress)


def _hand(file: Any, path: Path, side: str, total: int, least: float) -> HandTrack:
    points, tracked = np.zeros((total, len(JOINTS), 3)), np.ones(total, bool)
    for i, joint in enumerate(JOINTS):
        transform = hdf5.array(file, path, f"transforms/{side}{joint}", (total, 4, 4))
        assert transform is not None
        points[:, i] = transform[:, :3, 3]
        confidence = hdf5.array(file, path, f"confidences/{side}{joint}", (total,), required=False)
        if confidence is not None:
            tracked &= confidence >= least
    return track_points(points, side, tracked)


def _words(attributes: Any) -> str:
    if hdf5.text(attributes.get("llm_type")) == "reversible" and hdf5.text(
        attributes.get("which_llm_description")
    ) == "2":  # fmt: skip
        return hdf5.text(attributes.get("llm_description2"))
    return hdf5.text(attributes.get("llm_description")) or hdf5.text(attributes.get("description"))


def _size(size: Size, options: Any) -> Size:
    return stored_size(size, int(option(options, "height", 224)))
