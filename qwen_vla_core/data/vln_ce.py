"""Episodes of vision-and-language navigation in continuous environments (VLN-CE), for R2R and RxR alike.

Layout (github.com/jacobkrantz/VLN-CE): ``<split>.json.gz`` = {``episodes``: [{``episode_id``, ``trajectory_id``,
``scene_id``, ``start_position`` [x, y, z], ``start_rotation`` [x, y, z, w], ``goals`` [{position, radius}],
``reference_path`` [[x, y, z]], ``instruction`` {``instruction_text``, …}}]} and ``<split>_gt.json.gz`` =
{episode_id: {``actions`` [0 stop, 1 forward, 2 left, 3 right, 4 up, 5 down], ``locations`` [[x, y, z]],
``forward_steps``}}. The corpora hold no pictures; a simulator with Matterport3D renders them. ``--frames`` names where
they lie, one per action (seen before it) and one at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from qwen_vla_core.data.action_job import Episode, Outcome, limited, option, write_dataset
from qwen_vla_core.data.action_job import add_arguments as add_shared
from qwen_vla_core.data.source_frames import FileFrames, Size, first_size, stored_size
from qwen_vla_core.data.waypoints import (
    Walk,
    heading,
    navigation_contract,
    planar,
    rows_of,
    sample_times,
    walk_along,
    walk_of_actions,
)
from qwen_vla_core.errors import UserError

VIEW = "ego"
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Item:
    """One episode of the file and its recorded walk."""

    name: str
    where: str
    episode: Mapping[str, Any]
    recorded: Mapping[str, Any] | None


@dataclass(frozen=True)
class Pace:
    """How a walk gets its clock.

    Attributes:
        turn_rad: one turn of the corpus.
        speed: metres per second.
        turn_rate: radians per second.
        frames: pattern of the picture folders; empty without pictures.
        size: of stored pictures.
        min_steps: shortest walk, in samples.
    """

    turn_rad: float
    speed: float
    turn_rate: float
    frames: str
    size: Size | None
    min_steps: int


def add_arguments(parser: argparse._ActionsContainer, turn_deg: float) -> None:
    """Arguments that R2R and RxR share."""
    add_shared(parser)
    parser.add_argument("--gt", type=Path, help="recorded walks (default: SRC with _gt before .json)")
    parser.add_argument(
        "--path",
        choices=("recorded", "reference"),
        default="recorded",
        help="the simulator's recorded walk, or straight lines along reference_path (default: recorded)",
    )
    parser.add_argument("--speed", type=float, default=0.5, help="walking speed, m/s (default: 0.5)")
    parser.add_argument(
        "--turn-rate", type=float, default=2 * turn_deg, help=f"turning rate, degrees/s (default: {2 * turn_deg:g})"
    )
    parser.add_argument(
        "--frames",
        help="picture folder of an episode as a pattern, e.g. 'images/{scene}_r2r_{episode:0>6}/rgb'; fields: scene, "
        "episode, trajectory (default: no pictures)",
    )


def convert_walks(
    src: Path,
    out: Path,
    options: Any,
    workers: int,
    progress: bool,
    *,
    turn_deg: float,
    source: Mapping[str, Any],
    about: Callable[[Mapping[str, Any]], dict[str, Any]],
    wanted: Callable[[Mapping[str, Any]], bool] = lambda episode: True,
) -> dict[str, Any]:
    """Converts a file of episodes.

    Args:
        src: ``<split>.json`` or ``.json.gz``.
        out: folder to write.
        options: arguments.
        workers: processes.
        progress: show a bar.
        turn_deg: one turn of the corpus, degrees.
        source: provenance.
        about: episode → what is noted with it (module level).
        wanted: whether an episode is asked for.

    Raises:
        UserError: a file is missing or damaged, an option makes no sense; otherwise as ``write_dataset``.
    """
    recorded = None
    if str(option(options, "path", "recorded")) == "recorded":
        recorded = read_json(Path(option(options, "gt", _gt_of(src))))
    episodes = read_json(src).get("episodes")
    if not isinstance(episodes, list):
        raise UserError(f"{src}: has no list 'episodes'; is this a VLN-CE file?")
    items = []
    for number, episode in enumerate(episodes):
        if not isinstance(episode, dict) or "episode_id" not in episode:
            raise UserError(f"{src}: episodes[{number}]: has no 'episode_id'")
        if wanted(episode):
            name, walk = str(episode["episode_id"]), None
            if recorded is not None:
                walk = recorded.get(name, {})
            items.append(Item(name, f"{src}: episodes[{number}] (episode_id {name})", episode, walk))
    pattern = "" if option(options, "no_pictures", False) else str(option(options, "frames", "") or "")
    speed, turn_rate = float(option(options, "speed", 0.5)), float(option(options, "turn_rate", 2 * turn_deg))
    if not (speed > 0 and turn_rate > 0 and math.isfinite(speed + turn_rate)):
        raise UserError(f"--speed {speed:g}, --turn-rate {turn_rate:g}: both must be positive")
    chosen = limited(items, options, str(src))
    size = _size(chosen, pattern, options) if pattern else None
    pace = Pace(
        math.radians(turn_deg), speed, math.radians(turn_rate), pattern, size, int(option(options, "min_steps", 8))
    )
    views = {VIEW: size} if size else {}
    return write_dataset(
        Path(out),
        navigation_contract("Habitat agent", tuple(views)),
        partial(read_walk, pace, about),
        chosen,
        family="navigation",
        views=views,
        source={
            **source,
            "episodes": src.name,
            "speed_m_s": speed,
            "turn_rate_deg_s": turn_rate,
            "stop": "the last pose is repeated for a whole chunk: zero waypoints, valid",
        },
        options=options,
        workers=workers,
        progress=progress,
        extras={"scene": "string"},
    )


def read_walk(pace: Pace, about: Callable[[Mapping[str, Any]], dict[str, Any]], item: Item) -> Outcome:
    """One episode, or the reason why not.

    Raises:
        UserError: a key is missing, of another type or not finite; names file and record.
    """
    episode = item.episode
    scene = PurePosixPath(_get(item, "scene_id", str)).stem
    text = " ".join(str(_get(item, "instruction", dict).get("instruction_text", "")).split())
    if not text:
        return Outcome(item.name, dropped=((item.name, "has no instruction"),))
    try:
        walk = _walk(pace, item)
    except ValueError as error:
        return Outcome(item.name, dropped=((item.name, f"no usable walk: {error}"),))
    times = sample_times(walk)
    if len(times) - 1 < pace.min_steps:
        reason = f"walks for {walk.seconds:.1f} s, {len(times) - 1} samples, fewer than {pace.min_steps}"
        return Outcome(item.name, dropped=((item.name, reason),))
    rows, sample = rows_of(walk.at(times))
    rows = type(rows)(**{**vars(rows), "extra": {"scene": [scene] * len(rows)}})
    frames = {}
    if pace.size is not None:
        pictures = _pictures(_folder(pace.frames, item))
        if len(pictures) != len(walk.times):
            reason = f"{len(pictures)} pictures for {len(walk.times)} poses"
            return Outcome(item.name, dropped=((item.name, reason),))
        chosen = walk.corner_at(times)[sample]
        frames[VIEW] = FileFrames(tuple(str(pictures[corner]) for corner in chosen), pace.size)
    info = {"source": item.name, "scene": scene, "trajectory": episode.get("trajectory_id"), **about(episode)}
    return Outcome(item.name, (Episode(item.name, rows, (text,), frames, info),))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, gzipped or not.

    Raises:
        UserError: it is missing, cut short or no JSON object.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        hint = "; use --path reference to do without" if "_gt" in path.name else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or cut short ({' '.join(str(error).split())}); copy it again") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object")
    return value


def _walk(pace: Pace, item: Item) -> Walk:
    start = _points(item, item.episode, "start_position", flat=True)[0]
    turn = _get(item, "start_rotation", list)
    if len(turn) != 4 or not all(isinstance(value, (int, float)) for value in turn):
        raise UserError(f"{item.where}: 'start_rotation' is no [x, y, z, w]")
    course = heading(turn)
    if item.recorded is None:
        points = np.concatenate([start[None], _points(item, item.episode, "reference_path")])
        return walk_along(points, course, pace.speed, pace.turn_rate)
    if not item.recorded:
        raise ValueError("is not among the recorded walks")
    actions = item.recorded.get("actions")
    if not isinstance(actions, list) or not all(isinstance(action, int) for action in actions):
        raise UserError(f"{item.where}: its recorded 'actions' are no list of numbers")
    places = _points(item, item.recorded, "locations")
    return walk_of_actions(start, course, actions, places, pace.turn_rad, pace.speed, pace.turn_rate)


def _get(item: Item, key: str, kind: type) -> Any:
    value = item.episode.get(key)
    if not isinstance(value, kind):
        raise UserError(f"{item.where}: '{key}' is missing or no {kind.__name__}")
    return value


def _points(item: Item, entry: Mapping[str, Any], key: str, flat: bool = False) -> np.ndarray:
    """(n, 2) planar points of a list of [x, y, z]."""
    try:
        values = np.array([entry[key]] if flat else entry[key], np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 2 or values.shape[1] != 3 or not len(values):
        raise UserError(f"{item.where}: '{key}' is no list of [x, y, z]")
    if not np.isfinite(values).all():
        raise UserError(f"{item.where}: '{key}' is not finite")
    return planar(values)


def _gt_of(src: Path) -> Path:
    stem, dot, suffix = src.name.partition(".")
    return src.with_name(f"{stem}_gt{dot}{suffix}")


def _folder(pattern: str, item: Item) -> Path:
    fields = {
        "scene": PurePosixPath(str(item.episode.get("scene_id"))).stem,
        "episode": item.name,
        "trajectory": str(item.episode.get("trajectory_id")),
    }
    try:
        return Path(pattern.format(**fields))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--frames {pattern}: {error}; its fields are {', '.join(fields)}") from None


def _pictures(folder: Path) -> list[Path]:
    """Pictures of a folder, in order of their numbers."""
    if not folder.is_dir():
        raise UserError(f"--frames: no folder {folder}")
    found = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES]
    return sorted(found, key=lambda path: (len(path.stem), path.stem))


def _size(items: Any, pattern: str, options: Any) -> Size:
    pictures = _pictures(_folder(pattern, items[0]))
    first = [pictures[0].read_bytes()] if pictures else []
    return stored_size(first_size(first, str(_folder(pattern, items[0]))), int(option(options, "height", 224)))
