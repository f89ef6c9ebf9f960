"""Recorded episodes → a LeRobot dataset, and so back into training: as they went, or the parts a person corrected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotDataset, LeRobotWriter
from qwen_vla_core.embodiment.spec import BASE_KINDS, Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import Rollout
from qwen_vla_ros.rollouts.episode import Episode
from qwen_vla_ros.rollouts.rows import Keep, Rows, Segment, pictures_of, rows_of

INTERVENTION = "is_intervention"  # LeRobot's own name for a step that a person commanded [X]
Size = tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        episodes: written; one recording may give several, or none.
        steps: in all of them; human_steps: of these, those a person commanded.
        outcomes: outcome → episodes written.
        left_out: reason → steps.
        skipped: recording → why it gave nothing.
    """

    episodes: int
    steps: int
    human_steps: int
    outcomes: dict[str, int]
    left_out: dict[str, int]
    skipped: dict[str, str]


def export(
    rollouts: Sequence[Rollout],
    path: str | Path,
    *,
    keep: Keep = "all",
    size: Size | None = None,
    family: str = "",
    resume: bool = False,
    shortest: int = 5,
    progress: Callable[[Rollout], None] = lambda rollout: None,
) -> Exported:
    """Writes recordings of one robot as a LeRobot v3 dataset.

    Args:
        rollouts: in the order wanted.
        path: of the dataset.
        keep: all steps, or those that a person, or the policy, commanded.
        size: (width, height) of the stored pictures; None: as recorded.
        family: of the training mixture; empty: navigation for a robot that only drives, else manipulation.
        resume: go on with what is there; recordings that are in it are left alone.
        shortest: fewer steps in a row are left out.
        progress: told before each recording.

    Raises:
        UserError: the robots differ in what a policy learns, or the dataset cannot be written.
    """
    if not rollouts:
        raise UserError("nothing to export: no rollout was named, or the filters leave none")
    with Episode(rollouts[0]) as first:
        robot = first.robot
        sizes = {camera.view: size or _even(_recorded_size(first, camera.view)) for camera in robot.cameras}
    family = family or ("navigation" if {group.kind for group in robot.actions} <= BASE_KINDS else "manipulation")
    source = {"name": "recorded rollouts", "embodiment_hash": robot.hash, "kept": keep}
    left_out: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    skipped: dict[str, str] = {}
    steps = human = written = 0
    places: dict[int, Segment] = {}
    writer = LeRobotWriter(
        path,
        DataContract.of(robot),
        family=family,
        views=sizes,
        source=source,
        extras={INTERVENTION: "bool"},
        resume=resume,
    )
    with writer:
        known = {info.get("rollout") for info in writer.infos}
        for rollout in rollouts:
            progress(rollout)
            if rollout.name in known:
                skipped[rollout.name] = "is in the dataset already"
                continue
            with Episode(rollout) as episode:
                _check_same(robot, episode)
                try:
                    rows = rows_of(episode, keep, shortest)
                except UserError as error:
                    skipped[rollout.name] = str(error)
                    continue
                left_out += rows.left_out
                if not rows.segments:
                    common = rows.left_out.most_common(1)
                    skipped[rollout.name] = common[0][0] if common else "shorter than one step"
                for number, segment in enumerate(rows.segments):
                    places[_write(writer, episode, rows, number, segment, sizes)] = segment
                    written, steps, human = written + 1, steps + len(segment), human + int(segment.human.sum())
                    outcomes[rollout.outcome] += 1
    _read_back(path, places)
    return Exported(written, steps, human, dict(outcomes), dict(left_out), skipped)


def _check_same(robot: Embodiment, episode: Episode) -> None:
    if episode.robot.policy_hash != robot.policy_hash:
        raise UserError(
            f"{episode.rollout.name}: was recorded with another '{episode.robot.name}' than the first "
            f"({episode.robot.policy_hash[:12]}, {robot.policy_hash[:12]}); export each to a dataset of its own"
        )


def _write(
    writer: LeRobotWriter, episode: Episode, rows: Rows, number: int, segment: Segment, sizes: dict[str, Size]
) -> int:
    """Adds one segment; returns its number in the dataset."""
    rollout, period_s = episode.rollout, episode.robot.period_s
    values = EpisodeRows(
        state=segment.state.astype(np.float32),
        action=segment.action.astype(np.float32),
        timestamp=np.arange(len(segment)) * period_s,
        task=segment.task,
        perturbed=np.zeros(len(segment), bool),
        extra={INTERVENTION: segment.human},
    )
    frames = {view: _frames(episode, view, arrivals, sizes[view]) for view, arrivals in segment.pictures.items()}
    info: dict[str, Any] = {
        "rollout": rollout.name,
        "segment": number,
        "first_s": round((int(segment.stamps_ns[0]) - episode.start_ns) * 1e-9, 3),
        "outcome": rollout.outcome,
        "reason": rollout.reason,
        "note": rollout.note,
        "judged_by": rollout.judged_by,
        "seed": rollout.seed,
        "checkpoint": rollout.checkpoint_id or rollout.checkpoint,
        "simulated": rollout.simulated,
        "started": rollout.started,
        "human_steps": int(segment.human.sum()),
    }
    return writer.add_episode(values, rows.instructions, frames, info)


def _read_back(path: str | Path, places: dict[int, Segment]) -> None:
    """Reads what was written as training will: every number, and the first and the last picture of every view.

    Raises:
        UserError: it is not what was written.
    """
    if not places:
        return
    dataset = LeRobotDataset(path)
    for number, segment in places.items():
        rows = dataset.rows(number)
        same = np.array_equal(rows.state, segment.state.astype(np.float32))
        same = same and np.array_equal(rows.action, segment.action.astype(np.float32))
        same = same and np.array_equal(rows.extra[INTERVENTION], segment.human)
        if not same:
            raise UserError(f"{path}: episode {number} reads back other values than were written; report this")
        for view in dataset.views:
            dataset.frames(number, view, [0, len(segment) - 1])


def _frames(episode: Episode, view: str, arrivals: np.ndarray, size: Size) -> Iterator[np.ndarray]:
    for pixels in pictures_of(episode, view, arrivals):
        if pixels.shape[1::-1] == size:
            yield np.ascontiguousarray(pixels)
        elif _even(pixels.shape[1::-1]) == size:
            yield np.ascontiguousarray(pixels[: size[1], : size[0]])
        else:
            yield np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def _recorded_size(episode: Episode, view: str) -> Size:
    """(width, height) of a view's first picture.

    Raises:
        UserError: there is none.
    """
    camera = next(camera for camera in episode.robot.cameras if camera.view == view)
    topic = episode.topic(camera.topic)
    if topic is not None and episode.bag.topics[topic].count:
        _, _, data = next(iter(episode.bag.messages([topic])))
        height, width = episode.picture(topic, camera, data).shape[:2]
        return width, height
    raise UserError(f"{episode.rollout.name}: has no picture of {view} on {camera.topic}")


def _even(size: tuple[int, ...]) -> Size:
    """Videos have even sides; the last odd row or column is cut off."""
    return size[0] - size[0] % 2, size[1] - size[1] % 2
