"""LeRobot datasets (any robot; huggingface.co/lerobot, licence as each dataset says): v2.0, v2.1 and v3.0 into either.

SRC is a folder or ``owner/dataset`` on the hub. Rows keep all their columns, videos are copied packet by packet (no
picture changes) and statistics are computed anew. With ``--embodiment`` the result says what its channels mean.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_vla_core.data.contract import CONTRACT_FILE, CONTRACT_VERSION, FAMILIES, DataContract
from qwen_vla_core.data.lerobot.files import LeRobotFiles
from qwen_vla_core.data.lerobot.hub import find_dataset
from qwen_vla_core.data.lerobot.layout import DEFAULT_FEATURES, IMAGES, Feature
from qwen_vla_core.data.lerobot.metadata import video_keys
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.lerobot.staging import DiskError, EpisodeStager, Staged
from qwen_vla_core.data.lerobot.writer import LeRobotWriter
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError

FROM = "from_episode"  # noted with every episode, so that a run that goes on knows what it has


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """What a dataset of other origin lacks."""
    parser.add_argument("--embodiment", help="robot (name or YAML) whose channels the columns are, by order")
    parser.add_argument("--family", choices=FAMILIES, default="manipulation", help="of the mixture, with --embodiment")
    parser.add_argument(
        "--view", action="append", default=[], metavar="VIEW=FEATURE", help="pictures of a view (repeat per view)"
    )


def convert(src: Path, out: Path, options: argparse.Namespace, workers: int, progress: bool) -> dict[str, Any]:
    """Copies every readable episode; the others are listed.

    Raises:
        UserError: SRC is no dataset, does not fit the embodiment, or OUT cannot be written.
    """
    files = LeRobotFiles(find_dataset(src))
    names = _view_names(options.view, files)
    sidecar = _sidecar(files, options, names)
    info = {**files.info, "features": {names.get(key, key): value for key, value in files.features.items()}}
    sizes = {}
    for key in video_keys(files.info):
        height, width = files.features[key]["shape"][:2]
        sizes[names.get(key, key)] = (int(width), int(height))
    dropped: list[dict[str, Any]] = []
    with LeRobotWriter.copy_of(out, info, options.version, sizes, sidecar, options.resume) as writer:
        done = {entry.get(FROM) for entry in writer.infos}
        left = [episode for episode in range(len(files.table)) if episode not in done]
        work = functools.partial(_copy, writer.stager, files.path, names)
        for episode, staged in map_episodes(work, left, workers, False, progress, f"converting {files.path.name}"):
            if isinstance(staged, Staged):
                writer.add_staged(staged)
            else:
                dropped.append({"item": episode, "reason": staged})
    return {
        "converted": writer.episodes,
        "dropped": dropped,
        "from_version": files.info["codebase_version"],
        "version": options.version,
    }


def _view_names(given: list[str], files: LeRobotFiles) -> dict[str, str]:
    """Feature here → feature there."""
    names = {}
    for pair in given:
        view, equals, feature = pair.partition("=")
        if not equals or not view:
            raise UserError(f"--view {pair}: write VIEW=FEATURE, for example ego=observation.image")
        if feature not in files.features:
            raise UserError(f"--view {pair}: {files.path} has no '{feature}'; it has {', '.join(files.features)}")
        names[feature] = IMAGES + view
    return names


def _sidecar(files: LeRobotFiles, options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any] | None:
    """``meta/qwen_vla.json`` of the copy: that of the source, or one made of the embodiment, checked against it."""
    if options.embodiment:
        contract = DataContract.of(load_embodiment(options.embodiment))
        views = {name.removeprefix(IMAGES): feature for feature, name in names.items()}
        LeRobotDataset(files.path, contract, views=views)
        source = {"name": "lerobot", "dataset": str(options.src)}
        return {
            "version": CONTRACT_VERSION,
            "family": options.family,
            "contract": contract.to_json(),
            "source": source,
        }
    path = files.path / CONTRACT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@functools.lru_cache(maxsize=1)
def _files(path: Path) -> LeRobotFiles:
    return LeRobotFiles(path)


def _copy(stager: EpisodeStager, path: Path, names: Mapping[str, str], episode: int) -> tuple[int, Staged | str]:
    """In a worker: one episode staged, or why not."""
    files = _files(path)
    try:
        table = files.episode_table(episode)
        if not len(table):
            return episode, "has no rows"
        columns = {
            names.get(name, name): _cast(table[name], files.features[name], name)
            for name in table.column_names
            if name in files.features and (name not in DEFAULT_FEATURES or name == "timestamp")
        }
        task = table["task_index"].to_numpy().astype(np.int64)
        clips = {names.get(key, key): files.clip(episode, key) for key in video_keys(files.info)}
    except UserError as error:
        return episode, str(error)
    noted = json.loads(files.table.infos[episode] or "{}")
    try:
        return episode, stager.stage_table(pa.table(columns), task, files.tasks, clips, {**noted, FROM: episode})
    except DiskError:
        raise
    except UserError as error:
        return episode, str(error)


def _cast(column: pa.ChunkedArray, header: Mapping[str, Any], name: str) -> pa.Array:
    """A column in the type that its header says; other writers leave lengths of lists open."""
    values = column.combine_chunks()
    if header["dtype"] == "image":
        return values
    feature = Feature(str(header["dtype"]), tuple(header["shape"]))
    if pa.types.is_nested(values.type) and feature.shape == (1,):
        values = values.flatten()
    try:
        values = values.cast(feature.arrow)
    except pa.ArrowException as error:
        raise UserError(f"'{name}' is not {feature.dtype} of shape {feature.shape} ({str(error)[:80]})") from None
    flat = values
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    if pa.types.is_floating(flat.type):
        numbers = flat.to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            row, channel = divmod(int(bad[0]), max(1, len(numbers) // max(1, len(column))))
            raise UserError(f"row {row}: '{name}' channel {channel} is {numbers[bad[0]]}")
    return values
