"""Demonstrations split into subtasks at grasp and release events, each with its own instruction [P].

SRC is a LeRobot dataset with a gripper channel: what ``qwen-vla sim demos`` writes (its scenes name the things), or any
other (``--thing`` names what is grasped). Frames and numbers stay as they are, videos are copied packet by packet; only
the instruction of each step changes. An episode in which nothing is grasped keeps its own.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vla_core.data.contract import FAMILIES, DataContract
from qwen_vla_core.data.lerobot.hub import find_dataset
from qwen_vla_core.data.lerobot.layout import ACTION, DEFAULT_FEATURES, STATE, Feature, view_feature
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.lerobot.staging import EpisodeStager, Staged
from qwen_vla_core.data.lerobot.writer import LeRobotWriter
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.subtasks import grippers, split, with_subtasks
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError

FROM, SUBTASKS, SCENE = "from_episode", "subtasks", "scene"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """What the scenes do not tell, and which family the result belongs to."""
    parser.add_argument("--embodiment", help="robot (name or YAML), for a dataset that does not say what it holds")
    parser.add_argument("--thing", default="the object", help="what is grasped, without scenes (default: the object)")
    parser.add_argument("--family", choices=FAMILIES, default="synthetic", help="of the result (default: synthetic)")


def convert(src: Path, out: Path, options: Any, workers: int, progress: bool) -> dict[str, Any]:
    """Writes every readable episode with its subtasks.

    Raises:
        UserError: SRC is no dataset, has no gripper, or OUT cannot be written.
    """
    embodiment = getattr(options, "embodiment", None)
    contract = DataContract.of(load_embodiment(embodiment)) if embodiment else None
    dataset = LeRobotDataset(find_dataset(src), contract)
    grippers(dataset.contract)  # before anything is written
    features = dataset.info["features"]
    sizes = {}
    for view in dataset.views:
        if not dataset.is_video(view):
            raise UserError(f"{dataset.path}: view '{view}' holds single pictures; convert it --from lerobot first")
        height, width = features[view_feature(view)]["shape"][:2]
        sizes[view] = (int(width), int(height))
    extras = {
        name: Feature(str(feature["dtype"]), tuple(feature["shape"]))
        for name, feature in features.items()
        if name not in (*DEFAULT_FEATURES, STATE, ACTION) and feature["dtype"] not in ("video", "image")
    }
    source = {**dataset.source, "name": "sim_subtasks", "from": dataset.source.get("name", dataset.name)}
    dropped: list[dict[str, Any]] = []
    with LeRobotWriter(
        out,
        dataset.contract,
        family=getattr(options, "family", "synthetic"),
        views=sizes,
        version=getattr(options, "version", "v3.0"),
        source=source,
        extras=extras,
        resume=bool(getattr(options, "resume", False)),
    ) as writer:
        done = {entry.get(FROM) for entry in writer.infos}
        left = [episode for episode in range(len(dataset.lengths)) if episode not in done]
        thing = getattr(options, "thing", "the object")
        work = functools.partial(_split, writer.stager, dataset.path, contract, thing)
        for episode, staged in map_episodes(work, left, workers, False, progress, f"splitting {dataset.name}"):
            if isinstance(staged, Staged):
                writer.add_staged(staged)
            else:
                dropped.append({"item": episode, "reason": staged})
        infos = writer.infos
    kinds = Counter(kind for info in infos for kind, _, _ in info[SUBTASKS])
    return {
        "converted": len(infos),
        "dropped": dropped,
        "subtasks": sum(kinds.values()),
        "kinds": dict(kinds.most_common()),
        "unsplit": sum(not info[SUBTASKS] for info in infos),
    }


@functools.lru_cache(maxsize=1)
def _dataset(path: Path, contract: DataContract | None) -> LeRobotDataset:
    return LeRobotDataset(path, contract)


def _split(
    stager: EpisodeStager, path: Path, contract: DataContract | None, thing: str, episode: int
) -> tuple[int, Staged | str]:
    """In a worker: one episode staged, or why not."""
    dataset = _dataset(path, contract)
    noted: Mapping[str, Any] = dataset.infos[episode]
    try:
        rows = dataset.rows(episode)
        found = split(rows, grippers(dataset.contract), rows.extra.get(SCENE), thing=thing, seed=episode)
        tasks = list(dataset.tasks)
        if found:
            rows, tasks = with_subtasks(rows, found)
        clips = {view: dataset.clip(episode, view) for view in dataset.views}
        info = {**noted, FROM: episode, SUBTASKS: [[one.kind, one.start, one.stop] for one in found]}
        return episode, stager.stage(rows, tasks, clips, info)
    except UserError as error:
        if "disk" in str(error):
            raise
        return episode, str(error)
