"""The arithmetic of a mixture: how many samples of each family a batch holds, and how likely each sample is.

Nothing here knows files; ``mixture.py`` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.mixture_recipe import START_STEPS, Level

_MOST_TASKS = 20_000  # of one source; with more (T2A has one per episode) they are told apart only to balance them


class Quota:
    """How many samples of each family are in each batch: the rounded share, with the remainder carried on [O].

    Every batch holds ⌊share⌋ or ⌈share⌉ of a family; the rounded-up ones go to those that have the most outstanding.
    Whole-number arithmetic: the counts of step n do not depend on where a run was interrupted.
    """

    def __init__(self, weights: Sequence[float], batch_size: int) -> None:
        """
        Args:
            weights: of the families, as written in the recipe; they need not add up to anything.
            batch_size: samples per batch.
        """
        exact = [Fraction(str(float(weight))) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * scale) for weight in exact]
        self._total = sum(parts)
        self._base = [batch_size * part // self._total for part in parts]
        self._rest = [batch_size * part % self._total for part in parts]
        self._spare = batch_size - sum(self._base)
        self._restart()

    def _restart(self) -> None:
        self._step, self._credit = 0, [0] * len(self._base)

    def counts(self, step: int) -> tuple[int, ...]:
        """Samples of each family in batch ``step``; they add up to the batch size.

        Going on is cheap, going back replays from the beginning (a microsecond or two a step).
        """
        if step < self._step:
            self._restart()
        while self._step < step:
            self._advance()
        return self._advance()

    def _advance(self) -> tuple[int, ...]:
        self._step += 1
        for i, rest in enumerate(self._rest):
            self._credit[i] += rest
        counts = list(self._base)
        for i in sorted(range(len(counts)), key=lambda i: (-self._credit[i], i))[: self._spare]:
            counts[i] += 1
            self._credit[i] -= self._total
        return tuple(counts)


@dataclass(frozen=True)
class Runs:
    """Stretches of neighbouring samples that share a task; n of them.

    Attributes:
        episode: (n,) int64; -1 for conversations.
        start: (n,) int64 first step (or first conversation).
        length: (n,) int64 samples.
        task: (n,) int64 index into ``tasks``.
        tasks: instructions.
        start_share: share of the draws that is moved to the first ``START_STEPS`` of the stretch they fell into.
    """

    episode: np.ndarray
    start: np.ndarray
    length: np.ndarray
    task: np.ndarray
    tasks: Sequence[str]
    start_share: float = 0.0


def step_runs(dataset: ActionDataset) -> Runs:
    """Every step of a dataset is a sample; an instruction that changes inside an episode begins a new run.

    LeRobot's metadata name the tasks of every episode: only episodes with several have their rows read.
    """
    found: list[tuple[int, int, int, int]] = []
    named: Sequence[Sequence[str]] | None = getattr(getattr(dataset, "table", None), "tasks", None)
    numbers = {task: number for number, task in enumerate(dataset.tasks)} if named is not None else {}
    for episode in range(len(dataset.lengths)):
        if named is not None and len(named[episode]) == 1 and named[episode][0] in numbers:
            found.append((episode, 0, int(dataset.lengths[episode]), numbers[named[episode][0]]))
            continue
        task = dataset.rows(episode).task
        starts = np.flatnonzero(np.diff(task, prepend=task[:1] - 1))
        ends = np.append(starts[1:], len(task))
        found += [(episode, int(s), int(e - s), int(task[s])) for s, e in zip(starts, ends, strict=True)]
    episode_, start, length, task_ = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Runs(episode_, start, length, task_, dataset.tasks)


def episode_runs(dataset: ActionDataset) -> Runs:
    """Every episode is one sample that begins at its first step: whole sequences, as T2A has them [P]."""
    steps = step_runs(dataset)
    first = steps.start == 0
    ones = np.ones(int(first.sum()), np.int64)
    return Runs(steps.episode[first], steps.start[first], ones, steps.task[first], dataset.tasks)


def conversation_runs(count: int) -> Runs:
    """Every conversation is a sample."""
    return frame_runs(np.array([count]))


def frame_runs(lengths: np.ndarray) -> Runs:
    """Conversations about frames, numbered through all episodes; ``lengths`` (episodes,) says how many are of each."""
    length = np.asarray(lengths, dtype=np.int64)
    zeros = np.zeros_like(length)
    return Runs(zeros - 1, np.cumsum(length) - length, length, zeros, ("",))


@dataclass(frozen=True)
class Cell:
    """The samples of one task in one source: the finest thing that balancing tells apart.

    Attributes:
        source: position of the source in the mixture.
        embodiment: of the source; empty for conversations.
        task: the instruction; empty for conversations, and where there are too many to tell apart.
        weight: of the source.
        size: number of samples.
    """

    source: int
    embodiment: str
    task: str
    weight: float
    size: int


_KEYS: dict[Level, Callable[[Cell], object]] = {
    "dataset": lambda cell: cell.source,
    "embodiment": lambda cell: cell.embodiment,
    "task": lambda cell: cell.task,
}


def probabilities(cells: Sequence[Cell], balance: Sequence[Level], temperature: float | None) -> np.ndarray:
    """How likely a draw falls into each cell; adds up to 1.

    At every level the groups share the chance of their parent equally, or with size^(1/temperature); a source's weight
    multiplies. In the last group every sample is as likely as its source's weight says.
    """
    result = np.zeros(len(cells))
    pending: list[tuple[list[int], int, float]] = [(list(range(len(cells))), 0, 1.0)]
    while pending:
        members, depth, chance = pending.pop()
        if depth == len(balance):
            mass = np.array([cells[i].weight * cells[i].size for i in members])
            result[members] = chance * mass / mass.sum()
            continue
        groups: dict[object, list[int]] = {}
        for i in members:
            groups.setdefault(_KEYS[balance[depth]](cells[i]), []).append(i)
        sizes = np.array([sum(cells[i].size for i in group) for group in groups.values()], dtype=np.float64)
        masses = np.array([sum(cells[i].weight * cells[i].size for i in group) for group in groups.values()])
        share = masses / sizes * (sizes ** (1.0 / temperature) if temperature is not None else 1.0)
        for group, part in zip(groups.values(), share / share.sum(), strict=True):
            pending.append((group, depth + 1, chance * float(part)))
    return result


@dataclass(frozen=True)
class FamilySampler:
    """Draws samples of one family; m cells made of n runs.

    Attributes:
        cells: m cells.
        probability: (m,) float64.
        cell_end: (m,) int64 cumulative sizes.
        run_end: (n,) int64 cumulative lengths, runs in the order of their cells.
        run_source: (n,) int64.
        run_episode: (n,) int64.
        run_start: (n,) int64.
        run_start_share: (n,) float64, see ``Runs``.
    """

    cells: Sequence[Cell]
    probability: np.ndarray
    cell_end: np.ndarray
    run_end: np.ndarray
    run_source: np.ndarray
    run_episode: np.ndarray
    run_start: np.ndarray
    run_start_share: np.ndarray

    @classmethod
    def build(
        cls,
        sources: Sequence[tuple[int, str, float, Runs]],
        balance: Sequence[Level],
        temperature: float | None,
    ) -> FamilySampler:
        """
        Args:
            sources: position in the mixture, embodiment, weight and samples of each source; each with at least one.
            balance: levels, outermost first.
            temperature: see ``probabilities``.
        """
        cells: list[Cell] = []
        ordered: list[np.ndarray] = []  # per source: (4, runs) length, source, episode, start; by task
        early: list[np.ndarray] = []
        for source, embodiment, weight, runs in sources:
            if "task" not in balance and len(runs.tasks) > _MOST_TASKS:
                runs = dataclasses.replace(runs, task=np.zeros_like(runs.task), tasks=("",))
            order = np.argsort(runs.task, kind="stable")
            number = np.full(len(order), source)
            ordered.append(np.stack([runs.length[order], number, runs.episode[order], runs.start[order]]))
            early.append(np.full(len(order), runs.start_share))
            tasks, first = np.unique(runs.task[order], return_index=True)
            sizes = np.add.reduceat(runs.length[order], first)
            cells += [
                Cell(source, embodiment, runs.tasks[task], weight, int(size))
                for task, size in zip(tasks, sizes, strict=True)
            ]
        length, run_source, run_episode, run_start = np.concatenate(ordered, axis=1)
        return cls(
            cells=cells,
            probability=probabilities(cells, balance, temperature),
            cell_end=np.cumsum([cell.size for cell in cells]),
            run_end=np.cumsum(length),
            run_source=run_source,
            run_episode=run_episode,
            run_start=run_start,
            run_start_share=np.concatenate(early),
        )

    def draw(
        self, uniform_n2: np.ndarray, early_n2: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Samples for numbers in [0, 1).

        Args:
            uniform_n2: (n, 2): the first chooses a cell, the second a sample in it.
            early_n2: (n, 2): the first says whether the sample is moved to the beginning of its run, the second to
                which step there; None moves none.

        Returns:
            source, episode, step and cell, each (n,) int64.
        """
        edges = self._edges
        cell = np.minimum(np.searchsorted(edges, uniform_n2[:, 0] * edges[-1], side="right"), len(self.cells) - 1)
        begin = np.where(cell > 0, self.cell_end[cell - 1], 0)
        size = self.cell_end[cell] - begin
        position = begin + np.minimum((uniform_n2[:, 1] * size).astype(np.int64), size - 1)
        run = np.searchsorted(self.run_end, position, side="right")
        before = np.where(run > 0, self.run_end[run - 1], 0)
        offset = position - before
        if early_n2 is not None:
            most = np.minimum(START_STEPS, self.run_end[run] - before)
            moved = np.minimum((early_n2[:, 1] * most).astype(np.int64), most - 1)
            offset = np.where(early_n2[:, 0] < self.run_start_share[run], moved, offset)
        return self.run_source[run], self.run_episode[run], self.run_start[run] + offset, cell

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum(self.probability)
