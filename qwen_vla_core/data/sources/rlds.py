"""RLDS corpora as Open X-Embodiment publishes them: a TFDS folder of TFRecord shards, read without TensorFlow.

Layout (github.com/google-research/rlds, github.com/google-deepmind/open_x_embodiment, tensorflow.org/datasets):
``<name>/<version>/{dataset_info.json, features.json, <name>-<split>.tfrecord-00000-of-000NN}``. One record is one
episode: a ``tf.train.Example`` whose columns are flattened paths such as ``steps/observation/image_0`` (T encoded
pictures), ``steps/action`` (T·d floats) or ``steps/language_instruction`` (T texts); bool and integers are int64, all
floats float32. What the columns mean says a mapping, see ``rlds_mapping``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data import tfrecord
from qwen_vla_core.data.action_job import Episode, Outcome, limited, option, task_runs, write_dataset
from qwen_vla_core.data.action_job import add_arguments as add_shared
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.rlds_mapping import GroupSpec, RldsMapping, load_mapping, mapping_for
from qwen_vla_core.data.source_frames import EncodedFrames, Size, first_size, stored_size
from qwen_vla_core.errors import UserError

_OPEN, _CLOSED = 0.95, 0.05  # a gripper between the two is on its way [X]


@dataclass(frozen=True)
class Item:
    """One record."""

    name: str
    record: tfrecord.Record


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """SRC is the folder with ``features.json``, or one above it."""
    add_shared(parser)
    parser.add_argument("--mapping", help="shipped name or YAML of the columns (default: by the dataset's name)")
    parser.add_argument("--split", default="train", help="split to convert (default: train)")


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """One episode per record; see ``write_dataset`` for result and errors."""
    folder = _folder(Path(src))
    info, shapes = _read_json(folder / "dataset_info.json"), feature_shapes(folder / "features.json")
    given = option(options, "mapping")
    mapping = load_mapping(given) if given else mapping_for(str(info.get("name")))
    _check_features(mapping, shapes, folder / "features.json")
    split = str(option(options, "split", "train"))
    items = limited(_items(folder, info, split), options, str(folder))
    views = {} if option(options, "no_pictures", False) else _views(mapping, items[0], options)
    work = partial(read_episode, mapping, shapes, views, int(option(options, "min_steps", 8)))
    source = {
        "name": str(info.get("name")),
        "version": str(info.get("version")),
        "split": split,
        "layout": "RLDS (TFDS TFRecord shards)",
        "mapping": Path(mapping.file).name,
        "licence": mapping.licence or "see the corpus",
    }
    return write_dataset(
        Path(out), mapping.contract, work, items, family="manipulation", views=views, source=source, options=options,
        workers=workers, progress=progress,
    )  # fmt: skip


def read_episode(
    mapping: RldsMapping, shapes: Mapping[str, tuple[int, ...]], views: Mapping[str, Size], min_steps: int, item: Item
) -> Outcome:
    """One record → one episode, or the reason why not.

    Raises:
        UserError: the record is damaged, a column is missing or has other dimensions, or a number is not finite.
    """
    columns, where = tfrecord.read(item.record), item.record.where
    total = _steps(columns, where)
    first, end = mapping.skip_first, total if mapping.keep_last else total - 1
    if end - first < min_steps:
        return Outcome(item.name, dropped=((item.name, f"{max(end - first, 0)} usable steps, fewer than {min_steps}"),))
    texts = _instruction(columns, mapping.instruction, total, where)
    if not all(texts[first:end]):
        return Outcome(item.name, dropped=((item.name, "has no instruction"),))
    task, tasks = task_runs(texts[first:end])
    numbers = {
        side: _side(columns, groups, shapes, total, where)[first:end]
        for side, groups in (("state", mapping.state), ("action", mapping.action))
    }
    rows = EpisodeRows(
        state=numbers["state"],
        action=numbers["action"],
        timestamp=np.arange(end - first) / mapping.frequency_hz,
        task=task,
        perturbed=np.zeros(end - first, bool),
    )
    keys = {view.view: view.key for view in mapping.views}
    frames = {
        view: EncodedFrames(tuple(_pictures(columns, keys[view], total, where)[first:end]), size, f"{where}: {view}")
        for view, size in views.items()
    }
    info = {"source": Path(item.record.path).name, "record": item.record.number}
    return Outcome(item.name, (Episode(item.name, rows, tasks, frames, info),))


def feature_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Feature below ``steps/`` → shape of one step, from ``features.json``.

    Raises:
        UserError: the file is not readable, or describes no RLDS episodes.
    """
    tree = _read_json(path)
    try:
        steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: describes no 'steps'; is this an RLDS dataset?") from None
    shapes: dict[str, tuple[int, ...]] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        if "featuresDict" in node:
            for name, child in node["featuresDict"]["features"].items():
                walk(child, f"{prefix}/{name}" if prefix else name)
            return
        kind: Mapping[str, Any] = next((node[key] for key in ("tensor", "image", "text") if key in node), {})
        shapes[prefix] = tuple(int(size) for size in kind.get("shape", {}).get("dimensions", ()))

    try:
        walk(steps, "")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged feature description; copy it again") from None
    return shapes


def _folder(src: Path) -> Path:
    if (src / "features.json").is_file():
        return src
    found = sorted(path.parent for path in src.glob("*/features.json")) if src.is_dir() else []
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found)
    raise UserError(f"{src}: " + (f"has versions {names}; name one of them" if found else "holds no features.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object")
    return value


def _items(folder: Path, info: Mapping[str, Any], split: str) -> list[Item]:
    splits = {str(entry.get("name")): entry for entry in info.get("splits", [])}
    if split not in splits:
        raise UserError(f"--split {split}: {folder} has {', '.join(splits) or 'no splits'}")
    counts = [int(count) for count in splits[split].get("shardLengths", [])]
    shards = sorted(folder.glob(f"*-{split}.tfrecord-*-of-*"))
    if len(shards) != len(counts):
        raise UserError(f"{folder}: {len(shards)} shards of {split}, dataset_info.json names {len(counts)}; copy again")
    items = []
    for shard, count in zip(shards, counts, strict=True):
        found = [Item(f"{shard.name}#{record.number}", record) for record in tfrecord.records(shard)]
        if len(found) != count:
            raise UserError(f"{shard}: {len(found)} records, dataset_info.json names {count}; copy the file again")
        items += found
    return items


def _check_features(mapping: RldsMapping, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for group in (*mapping.state, *mapping.action):
        width = 0
        for part in group.source:
            if part.key not in shapes:
                raise UserError(f"{mapping.file}: group '{group.name}': {path} has no '{part.key}'; {_nearest(shapes)}")
            size = int(np.prod(shapes[part.key], dtype=int))
            start, end = part.columns or (0, size)
            if end > size:
                raise UserError(
                    f"{mapping.file}: '{part.key}' has {size} values, columns [{start}, {end}] do not exist"
                )
            width += end - start
        if width != len(group.channels):
            raise UserError(f"{mapping.file}: group '{group.name}' has {len(group.channels)} channels, {width} values")
    for view in mapping.views:
        if view.key not in shapes:
            raise UserError(f"{mapping.file}: view '{view.view}': {path} has no '{view.key}'; {_nearest(shapes)}")
    if not any(key in shapes for key in mapping.instruction):
        raise UserError(f"{mapping.file}: {path} has none of {', '.join(mapping.instruction)}")


def _nearest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"it has {', '.join(sorted(shapes))}"


def _views(mapping: RldsMapping, item: Item, options: Any) -> dict[str, Size]:
    columns, height = tfrecord.read(item.record), int(option(options, "height", 224))
    total, where = _steps(columns, item.record.where), item.record.where
    return {
        view.view: stored_size(first_size(_pictures(columns, view.key, total, where), f"{where}: {view.key}"), height)
        for view in mapping.views
    }


def _steps(columns: Mapping[str, tfrecord.Column], where: str) -> int:
    flags = columns.get("steps/is_first")
    if flags is None or len(flags) == 0:
        raise UserError(f"{where}: no steps; is this an RLDS episode?")
    return len(flags)


def _column(columns: Mapping[str, tfrecord.Column], key: str, where: str) -> tfrecord.Column:
    name = f"steps/{key}"
    if name in columns:
        return columns[name]
    if f"{name}/ragged_flat_values" in columns:
        raise UserError(f"{where}: '{key}' has steps of different lengths; map another feature")
    raise UserError(f"{where}: has no '{key}'")


def _pictures(columns: Mapping[str, tfrecord.Column], key: str, total: int, where: str) -> list[bytes]:
    column = _column(columns, key, where)
    if not isinstance(column, list) or len(column) != total:
        raise UserError(f"{where}: '{key}' has {len(column)} pictures for {total} steps")
    return column


def _instruction(columns: Mapping[str, tfrecord.Column], keys: tuple[str, ...], total: int, where: str) -> list[str]:
    """The instruction of every step: the first feature that has text there; empty where none has."""
    texts = [""] * total
    for key in keys:
        column = columns.get(f"steps/{key}")
        if column is None:
            continue
        if not isinstance(column, list) or len(column) != total:
            raise UserError(f"{where}: '{key}' is no text of {total} steps")
        try:
            found = [" ".join(text.decode("utf-8").split()) for text in column]
        except UnicodeDecodeError:
            raise UserError(f"{where}: '{key}' is not UTF-8") from None
        texts = [old or new for old, new in zip(texts, found, strict=True)]
    return texts


def _side(
    columns: Mapping[str, tfrecord.Column],
    groups: tuple[GroupSpec, ...],
    shapes: Mapping[str, tuple[int, ...]],
    total: int,
    where: str,
) -> np.ndarray:
    """(total, channels) float32 of all groups of a side."""
    parts = [np.zeros((total, 0), np.float32)]
    for group in groups:
        values = []
        for part in group.source:
            column, size = _column(columns, part.key, where), int(np.prod(shapes[part.key], dtype=int))
            if isinstance(column, list) or len(column) != total * size:
                raise UserError(
                    f"{where}: '{part.key}' has {len(column)} values, {total} steps of {size} need {total * size}"
                )
            start, end = part.columns or (0, size)
            values.append(np.asarray(column, np.float64).reshape(total, size)[:, start:end] * part.scale)
        block = np.concatenate(values, axis=1)
        if not np.isfinite(block).all():
            step = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise UserError(f"{where}, step {step}: group '{group.name}' is not finite")
        parts.append(_CHANGES[group.change](block).astype(np.float32))
    return np.concatenate(parts, axis=1)


def _binary(opening: np.ndarray) -> np.ndarray:
    """Opening fractions on their way become what they arrive at; a last one that arrives nowhere is rounded [X]."""
    result = np.round(np.clip(opening, 0.0, 1.0))
    for column in range(opening.shape[1]):
        arrived = result[-1, column]
        for step in reversed(range(len(opening))):
            value = opening[step, column]
            if value > _OPEN or value < _CLOSED:
                arrived = float(value > _OPEN)
            result[step, column] = arrived
    return result


def _from_closing(change: np.ndarray) -> np.ndarray:
    """+1 closes, −1 opens, 0 keeps → opening fraction; before the first command, the opposite of it holds [X]."""
    sign = np.where(change > 0.1, -1.0, np.where(change < -0.1, 1.0, 0.0))
    result = np.ones_like(sign)
    for column in range(sign.shape[1]):
        commands = np.flatnonzero(sign[:, column])
        held = -sign[commands[0], column] if len(commands) else 1.0
        for step in range(len(sign)):
            held = sign[step, column] or held
            result[step, column] = held
    return result / 2 + 0.5


_CHANGES = {
    "none": lambda values: values,
    "open_is_zero": lambda values: 1.0 - values,
    "binary": _binary,
    "closing": _from_closing,
}
