"""Everything that is known after all episodes were examined: what the checks judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.doctor.channels import Channel, Side, channels_of
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.doctor.examine import Examination, Sketches, examine
from qwen_vla_core.data.doctor.facts import EpisodeFacts, Hit
from qwen_vla_core.data.doctor.findings import Place
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.embodiment.spec import Embodiment

SIDES: tuple[Side, ...] = ("state", "action")


@dataclass(frozen=True)
class Case:
    """One dataset, examined.

    Attributes:
        work: what was examined and how.
        facts: one per episode.
        sketches: side → one per channel, of all finite values.
        robot: whose limits count; None judges by units alone.
    """

    work: Examination
    facts: Sequence[EpisodeFacts]
    sketches: Sketches
    robot: Embodiment | None

    @property
    def dataset(self) -> ActionDataset:
        """The dataset."""
        return self.work.dataset

    @property
    def contract(self) -> DataContract:
        """Its contract."""
        return self.work.dataset.contract

    @property
    def thresholds(self) -> Thresholds:
        """When something counts."""
        return self.work.thresholds

    def channels(self, side: Side) -> Iterator[tuple[Channel, QuantileSketch]]:
        """Channels of a side that have values, with their sketches."""
        for channel, sketch in zip(self.work.channels(side), self.sketches[side], strict=True):
            if sketch.count:
                yield channel, sketch

    def instruction(self, task: int) -> str:
        """Text of a task index; empty for one that the dataset does not have."""
        return self.dataset.tasks[task] if 0 <= task < len(self.dataset.tasks) else ""


def examine_all(
    dataset: ActionDataset,
    robot: Embodiment | None,
    thresholds: Thresholds,
    pictures: int | None,
    workers: int | None = None,
    ray: bool = False,
    progress: bool = True,
) -> Case:
    """Examines every episode.

    Args:
        dataset: must survive pickling when there are several workers or Ray.
        robot: whose limits count; None judges by units alone.
        thresholds: when something counts.
        pictures: pictures to look at per episode and view; 0 is all, None none.
        workers: processes; None is all cores.
        ray: work as a Ray Data job.
        progress: show a bar on stderr.
    """
    work = examination(dataset, robot, thresholds, pictures)
    sketches: Sketches = {side: [QuantileSketch() for _ in work.channels(side)] for side in SIDES}
    facts = []
    episodes = range(len(dataset.lengths))
    for of_episode, counted in map_episodes(partial(examine, work), episodes, workers, ray, progress, "examine"):
        facts.append(of_episode)
        for side in SIDES:
            for total, sketch in zip(sketches[side], counted[side], strict=True):
                total.merge(sketch)
    return Case(work, facts, sketches, robot)


def examination(
    dataset: ActionDataset, robot: Embodiment | None, thresholds: Thresholds, pictures: int | None
) -> Examination:
    """What to examine, with the channels that the contract and the robot give."""
    state, action = (channels_of(dataset.contract, robot, side) for side in SIDES)
    return Examination(dataset, state, action, thresholds, pictures)


def places_of(hits: Sequence[tuple[int, Hit]], channels: Sequence[Channel]) -> list[Place]:
    """Places of (episode, hit), each at the row of its worst value."""
    return [
        Place(
            episode,
            (hit.worst, hit.worst + 1),
            note=f"{channels[hit.column].name}"
            + ("" if hit.value is None else f" = {hit.value:.4g}")
            + (f", {hit.rows} rows" if hit.rows > 1 else ""),
        )
        for episode, hit in hits
    ]
