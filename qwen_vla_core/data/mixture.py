"""Which samples make up a minibatch: a pure function of recipe, seed and step, so that a restart draws the same ones.

Every minibatch holds each family's share to within one sample [P: fixed ratio in every minibatch]; what rounding leaves
over is carried on, so that a family of 0.2 % comes as often as it should over time. Within a family a group is drawn at
each level of ``balance`` (embodiment, then task [P]), then a sample by size. Draws are independent of each other, with
replacement [O].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from qwen_vla_core.data.contract import TEXT_FAMILIES
from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.held_out import split
from qwen_vla_core.data.mixture_recipe import Ask, DatasetSpec, FamilySpec, MixtureRecipe
from qwen_vla_core.data.samples import TextDataset
from qwen_vla_core.data.sampling import (
    FamilySampler,
    Quota,
    Runs,
    conversation_runs,
    episode_runs,
    frame_runs,
    step_runs,
)
from qwen_vla_core.data.scene_questions import SceneQuestions
from qwen_vla_core.data.stored_scenes import check_scenes, check_views
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError

Dataset = ActionDataset | TextDataset
OpenSource = Callable[[Path, str, str | None], Dataset]  # path, family, embodiment → dataset; importable by name


@dataclass(frozen=True)
class SampleForm:
    """What one sample of a source is.

    Attributes:
        ask: what is asked about frames of demonstrations; None where the data are conversations or actions themselves.
        whole: one sample is one episode, and has no pictures [P: stage I].
        hold_at_end: steps beyond an episode's end mean staying where it ended.
        intention: what the instruction means in the picture is said after the prompt.
        other_prompt: share of the samples whose prompt speaks of another robot; they stay where they are.
        leave_out: last episodes that no sample is of.
    """

    ask: Ask | None = None
    whole: bool = False
    hold_at_end: bool = False
    intention: bool = False
    other_prompt: float = 0.0
    leave_out: int = 0

    @classmethod
    def of(cls, family: FamilySpec, spec: DatasetSpec) -> SampleForm:
        """As a recipe says."""
        return cls(spec.ask, family.whole_episodes, spec.hold_at_end, spec.intention, spec.other_prompt, spec.leave_out)


class Draw(NamedTuple):
    """One sample to be made.

    Attributes:
        source: position in ``Mixture.sources``.
        episode: of an action dataset; -1 for conversations.
        t: step of the episode, or number of the conversation.
        seed: of everything random about the sample.
    """

    source: int
    episode: int
    t: int
    seed: int


@dataclass(frozen=True)
class Source:
    """One named dataset of a recipe, opened.

    Attributes:
        path: where it lies.
        family: of the mixture, as the recipe says.
        requested: the recipe's ``embodiment``.
        embodiment: name of the robot; the same for all sources with the same contract, empty for conversations.
        weight: of each of its samples.
        form: of its samples.
        dataset: the data.
    """

    path: Path
    family: str
    requested: str | None
    embodiment: str
    weight: float
    form: SampleForm
    dataset: Dataset

    @property
    def conversations(self) -> TextDataset | None:
        """The data as conversations; None if it holds actions."""
        return cast(TextDataset, self.dataset) if self.family in TEXT_FAMILIES else None

    @property
    def actions(self) -> ActionDataset:
        """The data as episodes; only for families of actions."""
        assert self.family not in TEXT_FAMILIES
        return cast(ActionDataset, self.dataset)


def open_source(path: Path, family: str, embodiment: str | None) -> Dataset:
    """Opens the dataset at ``path``: conversations as LLaVA lines, actions as a LeRobot dataset."""
    if family in TEXT_FAMILIES:
        from qwen_vla_core.data.llava import LlavaDataset

        return LlavaDataset.open(path, family=family)
    from qwen_vla_core.data.lerobot import open_dataset

    return open_dataset(path, embodiment=embodiment)


def open_form(path: Path, family: str, embodiment: str | None, form: SampleForm, open_with: OpenSource) -> Dataset:
    """Opens the dataset at ``path`` as what it is to be used for; arguments as in ``open_source``.

    Raises:
        UserError: it is missing or damaged, or lacks the scenes or pictures that are needed.
    """
    if form.ask is None and not form.leave_out:
        return open_with(path, family, embodiment)
    data = cast(ActionDataset, open_with(path, family if form.ask is None else "synthetic", embodiment))
    learned, _ = split(data, form.leave_out)
    return learned if form.ask is None else SceneQuestions(learned, form.ask, family)


class Mixture:
    """An opened recipe; ``draws(step)`` says what a minibatch consists of."""

    def __init__(self, recipe: MixtureRecipe, open_with: OpenSource = open_source) -> None:
        """Opens every source and finds its tasks.

        Raises:
            UserError: a named source is missing, damaged, empty or lacks a view; with the recipe's file, line and key.
        """
        self.recipe, self.open_with = recipe, open_with
        opened: list[Source] = []
        per_family: list[list[tuple[int, Runs]]] = []
        for i, family in enumerate(recipe.families):
            per_family.append([])
            for j, spec in enumerate(family.datasets):
                source, runs = _open(recipe, family, spec, f"families[{i}].datasets[{j}]", open_with)
                per_family[-1].append((len(opened), runs))
                opened.append(source)
        self.sources = _with_embodiments(opened)
        self.samplers = tuple(
            FamilySampler.build(
                [(k, self.sources[k].embodiment, self.sources[k].weight, runs) for k, runs in members],
                family.balance,
                family.temperature,
            )
            for family, members in zip(recipe.families, per_family, strict=True)
        )
        self._quota = Quota(recipe.weights, recipe.batch_size)

    def draws(self, step: int) -> list[Draw]:
        """The samples of minibatch ``step``, family by family in the recipe's order."""
        return [draw for draw, _, _ in self.drawn(step)]

    def drawn(self, step: int) -> list[tuple[Draw, int, int]]:
        """``draws`` with the number of the family and of the cell that each came from."""
        rng = np.random.default_rng([self.recipe.seed, step])
        uniform = rng.random((self.recipe.batch_size, 2))
        seeds = rng.integers(2**63, size=self.recipe.batch_size)
        early = rng.random((self.recipe.batch_size, 2))
        result: list[tuple[Draw, int, int]] = []
        for number, (sampler, count) in enumerate(zip(self.samplers, self._quota.counts(step), strict=True)):
            part = slice(len(result), len(result) + count)
            columns = (*sampler.draw(uniform[part], early[part]), seeds[part])
            result += [
                (Draw(int(source), int(episode), int(t), int(seed)), number, int(cell))
                for source, episode, t, cell, seed in zip(*columns, strict=True)
            ]
        return result

    def sizes(self) -> list[int]:
        """Samples in each source."""
        sizes = [0] * len(self.sources)
        for sampler in self.samplers:
            for cell in sampler.cells:
                sizes[cell.source] += cell.size
        return sizes

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the recipe's choices and of the content of every source: equal where the samples are equal."""
        choices = dataclasses.asdict(dataclasses.replace(self.recipe, source="", lines=(), description=""))
        content = [source.dataset.content_hash() for source in self.sources]
        return hashlib.sha256(json.dumps([choices, content], sort_keys=True).encode()).hexdigest()


def _open(
    recipe: MixtureRecipe, family: FamilySpec, spec: DatasetSpec, key: str, open_with: OpenSource
) -> tuple[Source, Runs]:
    """One source and its samples."""
    path, where = recipe.folder(spec), recipe.where(f"{key}.path")
    if not path.exists():
        raise UserError(f"{where}: there is no dataset at {path}; correct the path or `root`, or leave the source out")
    try:
        form = SampleForm.of(family, spec)
        dataset = open_form(path, family.name, spec.embodiment, form, open_with)
        source = Source(path, family.name, spec.embodiment, "", spec.weight, form, dataset)
        runs = dataclasses.replace(_runs(source), start_share=spec.early)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not runs.length.sum():
        raise UserError(f"{where}: {path} holds no samples; leave the source out")
    return source, runs


def _runs(source: Source) -> Runs:
    conversations = source.conversations
    if isinstance(conversations, SceneQuestions):
        return frame_runs(conversations.demonstrations.lengths)
    if conversations is not None:
        return conversation_runs(len(conversations))
    data = source.actions
    if source.form.whole:
        return episode_runs(data)
    if source.form.intention:
        check_scenes(data)
    check_views(data, str(source.path))
    return step_runs(data)


def _with_embodiments(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Names each source's robot: as in the YAML, else by its tag; with a number where one tag has several contracts.

    Two datasets may share a robot and differ in rate, channels or convention: then they are not normalised alike and
    are balanced as two embodiments.
    """
    names = {s.requested: load_embodiment(s.requested).name for s in sources if s.requested is not None}
    contracts: dict[str, list[object]] = defaultdict(list)
    result = []
    for source in sources:
        if source.conversations is not None:
            result.append(source)
            continue
        contract = source.actions.contract
        tag = re.sub(r"[^a-z0-9]+", "_", contract.prompt.robot_tag.lower()).strip("_")
        name = names[source.requested] if source.requested is not None else tag or "robot"
        if contract not in contracts[name]:
            contracts[name].append(contract)
        number = contracts[name].index(contract)
        result.append(dataclasses.replace(source, embodiment=f"{name}_{number + 1}" if number else name))
    return tuple(result)
