"""Recordings of hands → a LeRobot dataset: usable stretches, 32 channels, everything left out listed with its reason.

Each corpus brings ``items(src, options)`` and a module-level ``read(item, options) -> HandRecording``; this module does
the rest, for converting and for fitting eigengrasps alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.action_job import Episode, Named, Outcome, limited, option, task_runs, write_dataset
from qwen_vla_core.data.action_job import add_arguments as add_shared
from qwen_vla_core.data.hands.eigengrasps import Eigengrasps, Moments, load
from qwen_vla_core.data.hands.points import POSE
from qwen_vla_core.data.hands.track import (
    GRASPS,
    HANDS,
    HandRecording,
    channels,
    contract_of,
    rows_of,
    sides_of,
    stretches,
)
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.source_frames import EncodedFrames, Frames, Size, VideoFrames
from qwen_vla_core.errors import UserError

VIEW = "ego"
Read = Callable[[Any, Any], HandRecording]


@dataclass(frozen=True)
class Kept:
    """What of the options the workers need; small, and the same for every item.

    Attributes:
        hands: ``both``, ``left`` or ``right``.
        min_steps: shortest episode.
        stride: every how many-th step is kept.
        size: of stored pictures; None without pictures.
    """

    hands: str
    min_steps: int
    stride: int
    size: Size | None


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Arguments that all converters of hands share."""
    add_shared(parser)
    parser.add_argument(
        "--eigengrasps", type=Path, help="JSON of `qwen-vla data hands fit`; its components become channels"
    )
    parser.add_argument(
        "--hands",
        choices=HANDS,
        default="both",
        help="stretches in which both hands are tracked (32 channels), or one (16) (default: both)",
    )
    parser.add_argument("--stride", type=int, default=1, help="keep every so many-th step (default: 1)")


def convert_hands(
    out: Path,
    read: Read,
    items: Sequence[Named],
    facts: tuple[float, Size | None],
    source: dict[str, Any],
    options: Any,
    workers: int,
    progress: bool,
    pose: str = "points",
) -> dict[str, Any]:
    """Converts a corpus.

    Args:
        out: folder to write.
        read: reads an item.
        items: of the corpus.
        facts: steps per second and stored picture size of the corpus.
        source: provenance.
        options: arguments.
        workers: processes.
        progress: show a bar.
        pose: how ``read`` makes finger poses.

    Returns:
        As ``write_dataset``, with ``residual_rms_rad`` and ``wrists_in_front``.

    Raises:
        UserError: no or other eigengrasps; otherwise as ``write_dataset``.
    """
    path = option(options, "eigengrasps")
    if path is None:
        raise UserError("--eigengrasps: name the file that `qwen-vla data hands fit` wrote for this kind of data")
    grasps = load(Path(path))
    if grasps.pose != pose:
        raise UserError(f"{path}: was fitted on '{grasps.pose}' poses, this corpus gives '{pose}'; see --fingers")
    if len(grasps.components) != GRASPS:
        raise UserError(f"{path}: has {len(grasps.components)} components, hands have {GRASPS} channels each")
    fps, size = facts
    kept = Kept(
        hands=str(option(options, "hands", "both")),
        min_steps=int(option(options, "min_steps", 8)),
        stride=int(option(options, "stride", 1)),
        size=None if option(options, "no_pictures", False) else size,
    )
    if kept.stride < 1:
        raise UserError(f"--stride {kept.stride}: must be at least 1")
    if kept.hands not in HANDS:
        raise UserError(f"--hands {kept.hands}: use one of {', '.join(HANDS)}")
    views: dict[str, Size] = {} if kept.size is None else {VIEW: kept.size}
    report = write_dataset(
        Path(out),
        contract_of(kept.hands, fps / kept.stride, tuple(views)),
        partial(_work, read, kept, grasps, options, fps),
        limited(items, options, str(source.get("path", out))),
        family="human",
        views=views,
        source={
            **source,
            "hands": kept.hands,
            "frame": "camera at the episode's first step (OpenCV axes)",
            "eigengrasps": {**grasps.to_json(), "hash": grasps.hash},
        },
        options=options,
        workers=workers,
        progress=progress,
    )
    figures = report.pop("figures")
    hands_seen = max(figures.get("hands", 0.0), 1.0)
    report["residual_rms_rad"] = float(np.sqrt(figures.get("squared_residual", 0.0) / (hands_seen * POSE)))
    report["wrists_in_front"] = figures.get("in_front", 0.0) / hands_seen
    return report


def _work(read: Read, kept: Kept, grasps: Eigengrasps, options: Any, fps: float, item: Named) -> Outcome:
    recording = read(item, options)
    if abs(recording.fps - fps) > 0.01 * fps:
        reason = f"runs at {recording.fps:g} Hz, the dataset at {fps:g} Hz"
        return Outcome(item.name, dropped=((item.name, reason),))
    texts = recording.instructions(kept.hands)
    valid = recording.valid(kept.hands)
    told = np.array([bool(text) for text in texts])
    dropped = [(item.name, reason) for reason in _reasons(recording, kept, valid, told)]
    episodes: list[Episode] = []
    figures = dict.fromkeys(("hands", "squared_residual", "in_front"), 0.0)
    for start, end in stretches(valid & told):
        steps = np.arange(start, end, kept.stride)
        if len(steps) - 1 < kept.min_steps:
            dropped.append((f"{item.name}[{start}:{end}]", f"tracked for {end - start} steps, too short"))
            continue
        values = channels(recording, kept.hands, grasps, start, end)[:: kept.stride]
        task, tasks = task_runs(texts[step] for step in steps)
        rows = rows_of(values, task, fps / kept.stride)
        frames: dict[str, Frames] = {}
        if kept.size is not None:
            if recording.frames is None:
                raise UserError(f"{recording.where}: has no pictures; use --no-pictures")
            frames[VIEW] = _cut(recording.frames, steps[:-1])
        name = f"{item.name}[{start}:{end}]"
        info = {"source": item.name, "first_step": start, "end_step": end, "stride": kept.stride}
        episodes.append(Episode(name, rows, tasks, frames, info))
        for side in sides_of(kept.hands):
            figures["hands"] += len(steps)
            figures["squared_residual"] += grasps.squared_residual(recording.hands[side].fingers[steps])
        in_front = values[:, [i for i, c in enumerate(_names(kept.hands)) if c.endswith("_wrist_z")]] > 0
        figures["in_front"] += int(in_front.sum())
    return Outcome(item.name, tuple(episodes), tuple(dropped), figures)


def _names(hands: str) -> tuple[str, ...]:
    return contract_of(hands, 1.0, ()).action_channels


def _reasons(recording: HandRecording, kept: Kept, valid: np.ndarray, told: np.ndarray) -> list[str]:
    """Why steps of a recording are missing, as counts."""
    reasons, total = [], len(recording)
    for side in sides_of(kept.hands):
        missing = int((~recording.hands[side].valid).sum())
        if missing:
            other = "; try --hands with the other side" if missing == total and kept.hands == "both" else ""
            reasons.append(f"{side} hand not tracked at {missing} of {total} steps{other}")
    if not recording.camera_valid.all():
        reasons.append(f"camera unknown at {int((~recording.camera_valid).sum())} of {total} steps")
    if (valid & ~told).any():
        reasons.append(f"no instruction at {int((valid & ~told).sum())} of {total} steps")
    return reasons


def _cut(frames: VideoFrames | EncodedFrames, steps: np.ndarray) -> Frames:
    if isinstance(frames, VideoFrames):
        return replace(frames, indices=tuple(frames.indices[step] for step in steps))
    return replace(frames, pictures=tuple(frames.pictures[step] for step in steps))


def gather(read: Read, items: Sequence[Named], options: Any, every: int, workers: int, progress: bool) -> Moments:
    """Moments of all tracked finger poses of a corpus, both hands.

    Raises:
        UserError: an item is damaged and ``options.skip_damaged`` is not set.
    """
    total = Moments.of(np.zeros((0, POSE)))
    skip = bool(option(options, "skip_damaged", False))
    for part in map_episodes(
        partial(_moments, read, options, every, skip),
        items,
        workers,
        ray=bool(option(options, "ray", False)),
        progress=progress,
        description="hands",
    ):
        total = total.merge(part)
    return total


def _moments(read: Read, options: Any, every: int, skip: bool, item: Any) -> Moments:
    try:
        recording = read(item, options)
    except UserError:
        if not skip:
            raise
        return Moments.of(np.zeros((0, POSE)))
    poses = [track.fingers[track.valid][::every] for track in recording.hands.values()]
    return Moments.of(np.concatenate(poses))
