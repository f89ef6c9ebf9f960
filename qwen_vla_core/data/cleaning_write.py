"""The cleaned copy: kept episodes in their order, pictures copied without encoding where the files allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.cleaning import REPORT, Drop
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.doctor.case import Case
from qwen_vla_core.data.lerobot import EpisodeStager, Feature, LeRobotDataset, LeRobotWriter, Staged
from qwen_vla_core.data.lerobot.layout import PERTURBED, RECORDED_TIME
from qwen_vla_core.data.lerobot.staging import GRID_TOLERANCE_S
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.pseudo_actions import pseudo_actions
from qwen_vla_core.data.video import Clip
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

SOURCE_EPISODE = "source_episode"


@dataclass(frozen=True)
class CopyJob:
    """What every worker needs to copy an episode.

    Attributes:
        dataset: the source.
        contract: of the copy.
        make_actions: whether actions are made from the states.
        stager: writes episodes beside the copy.
    """

    dataset: LeRobotDataset
    contract: DataContract
    make_actions: bool
    stager: EpisodeStager


def write_cleaned(
    case: Case,
    drops: Sequence[Drop],
    out: Path,
    contract: DataContract,
    make_actions: bool,
    report: dict[str, Any],
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes or goes on with a cleaned copy, and its report.

    Args:
        case: of the source.
        drops: what is left out.
        out: folder of the copy.
        contract: of the copy.
        make_actions: whether actions are made from the states.
        report: kept as ``meta/cleaning.json``.
        workers: processes; None is all cores.
        progress: show a bar on stderr.

    Raises:
        UserError: nothing is left, the folder holds something else, or the disk refuses.
    """
    dataset = case.dataset
    assert isinstance(dataset, LeRobotDataset)
    gone = {drop.episode for drop in drops}
    kept = [episode for episode in range(len(dataset.lengths)) if episode not in gone]
    if not kept:
        first = f"; the first reason: episode {drops[0].episode}: {drops[0].detail}" if drops else ""
        raise UserError(
            f"{dataset.path}: nothing is left of {len(dataset.lengths)} episodes{first}; nothing was written"
        )
    sizes = {view: dataset.frames(kept[0], view, [0]).shape for view in dataset.views}
    with LeRobotWriter(
        out,
        contract,
        family=dataset.family,
        views={view: (shape[2], shape[1]) for view, shape in sizes.items()},
        source={**dataset.source, "cleaned_from": {"name": dataset.name, "content_hash": report["content_hash"]}},
        extras=_extras(case, dataset, kept[0]),
        resume=True,
    ) as writer:
        done = [info.get(SOURCE_EPISODE) for info in writer.infos]
        if done != kept[: len(done)]:
            raise UserError(f"{out}: holds other episodes than this cleaning keeps; write to another folder")
        job = CopyJob(dataset, contract, make_actions, writer.stager)
        for staged in map_episodes(partial(_copy, job), kept[len(done) :], workers, False, progress, "copy"):
            writer.add_staged(staged)
    atomic_write_json(out / REPORT, report)


def _extras(case: Case, dataset: LeRobotDataset, episode: int) -> dict[str, str | Feature]:
    """Columns of the copy besides state and action: those of the source, and the clock where it is not even."""
    extras: dict[str, str | Feature] = {}
    for name in dataset.rows(episode).extra:
        about = dataset.features[name]
        names = about.get("names")
        named = tuple(map(str, names)) if isinstance(names, list) else None
        extras[name] = Feature(about["dtype"], tuple(about["shape"]), named)
    if PERTURBED in dataset.features:
        extras[PERTURBED] = "bool"
    uneven = any(facts.off_grid_s > GRID_TOLERANCE_S for facts in case.facts)
    if RECORDED_TIME in dataset.features or uneven:
        extras[RECORDED_TIME] = "float64"
    return extras


def _copy(job: CopyJob, episode: int) -> Staged:
    dataset = job.dataset
    rows = dataset.rows(episode)
    if job.make_actions:
        rows = pseudo_actions(rows, job.contract)
    used, task = np.unique(rows.task, return_inverse=True)
    frames: dict[str, Any] = {view: _pictures(dataset, episode, view, len(rows)) for view in dataset.views}
    info = {**dataset.infos[episode], SOURCE_EPISODE: episode}
    return job.stager.stage(replace(rows, task=task.astype(np.int64)), [dataset.tasks[i] for i in used], frames, info)


def _pictures(dataset: LeRobotDataset, episode: int, view: str, count: int) -> Any:
    """Part of a video file where the pictures lie in one, else the pictures."""
    if dataset.is_video(view):
        clip = dataset.clip(episode, view)
        return Clip(clip.path, clip.first, count)
    return dataset.frames(episode, view, range(count))
