"""From a draw to a sample: read, decode, cut the chunk, make it relative, resize, jitter. Runs in every worker."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from qwen_vla_core.actions.conventions import RelativePart, relative_parts, to_relative
from qwen_vla_core.actions.rest import rest, stay
from qwen_vla_core.data.contract import TEXT_FAMILIES
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.frame_cache import ByteCache, FrameCache, Size, jitter
from qwen_vla_core.data.mixture import Dataset, Draw, OpenSource, SampleForm, Source, open_form
from qwen_vla_core.data.samples import ActionSample, Sample, TextDataset, TextSample
from qwen_vla_core.data.scene_questions import SceneQuestions
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demonstration import SCENE
from qwen_vla_core.sim.scenes import read_scene

OTHER_ROBOT = "another robot"  # what an instruction means where the prompt speaks of a robot that is not to be seen
_TOLD = 0x7015D  # keeps the draw of a prompt apart from those of jitter and noise
_MEANING = "meaning"  # of the instruction, per step: in place of the scenes it was read from


@dataclass(frozen=True)
class SampleOptions:
    """What samples look like, and what is remembered while making them.

    Attributes:
        frames: pictures per view: the current one and those before it.
        frame_stride: steps between them.
        size: (width, height) that frames are brought to by area averaging; None leaves them as stored.
        jitter: strength of the photometric jitter; 0 is none, see ``frame_cache.jitter``.
        cache_mb: decoded frames that each worker keeps.
        rows_cache_mb: numbers of episodes that each worker keeps.
    """

    frames: int = 1
    frame_stride: int = 1
    size: Size | None = None
    jitter: float = 0.0
    cache_mb: float = 128.0
    rows_cache_mb: float = 128.0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frame_stride < 1:
            raise UserError(f"loader: frames {self.frames} and frame_stride {self.frame_stride} must be at least 1")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"loader: size {list(self.size)} is no picture; give [width, height] in px")
        if min(self.jitter, self.cache_mb, self.rows_cache_mb) < 0:
            raise UserError("loader: jitter, cache_mb and rows_cache_mb cannot be negative")


@dataclass(frozen=True)
class SourceReference:
    """How a worker opens a source of the mixture for itself."""

    path: Path
    family: str
    requested: str | None
    embodiment: str
    form: SampleForm = dataclasses.field(default_factory=SampleForm)

    @classmethod
    def of(cls, source: Source) -> SourceReference:
        """Everything of a source but its open files."""
        return cls(source.path, source.family, source.requested, source.embodiment, source.form)


class SampleMaker:
    """Makes samples of a mixture's sources, which it opens when they are first drawn."""

    def __init__(
        self,
        sources: Sequence[SourceReference],
        open_with: OpenSource,
        options: SampleOptions,
        opened: Mapping[int, Dataset] | None = None,
    ) -> None:
        """
        Args:
            sources: of the mixture, in its order.
            open_with: opens one.
            options: what samples look like.
            opened: sources that are open already.
        """
        self.sources, self.options = sources, options
        self._robots = sorted({source.embodiment for source in sources if source.family not in TEXT_FAMILIES})
        self._open_with = open_with
        self._opened = dict(opened or {})
        self._parts: dict[int, tuple[RelativePart, ...]] = {}
        self._frames = FrameCache(int(options.cache_mb * 1e6), options.size)
        self._rows: ByteCache[EpisodeRows] = ByteCache(int(options.rows_cache_mb * 1e6))

    def make(self, draw: Draw) -> Sample:
        """The sample of a draw; its arrays may be shared with the caches and are not to be written to.

        Raises:
            UserError: a file is missing or damaged, or an action is not finite or no rotation; names the dataset.
        """
        dataset = self._dataset(draw.source)
        if self.sources[draw.source].family in TEXT_FAMILIES:
            return self._conversation(draw, cast(TextDataset, dataset))
        return self._window(draw, cast(ActionDataset, dataset))

    def _dataset(self, number: int) -> Dataset:
        if number not in self._opened:
            source = self.sources[number]
            self._opened[number] = open_form(source.path, source.family, source.requested, source.form, self._open_with)
        return self._opened[number]

    def _conversation(self, draw: Draw, dataset: TextDataset) -> TextSample:
        source = self.sources[draw.source]
        if not isinstance(dataset, SceneQuestions):
            return dataclasses.replace(dataset.sample(draw.t), family=source.family)
        asked = dataset.asked(draw.t)
        # As the policy sees them: as many frames, as large, as much jitter; a request is then its very prompt.
        data = dataset.demonstrations
        images = self._images(draw.source, data, asked.episode, asked.t, asked.views, draw.seed)
        return TextSample(images, asked.turns, source.family, dataset.name, draw.t)

    def _window(self, draw: Draw, dataset: ActionDataset) -> ActionSample:
        source, contract, t = self.sources[draw.source], dataset.contract, draw.t
        key, form = (draw.source, draw.episode), source.form
        rows = self._rows.through(key, lambda: self._read(draw, dataset), _row_bytes)
        horizon = len(rows) - t if form.whole else contract.horizon
        actions, mask = rows.chunk(t, horizon, hold_at_end=form.hold_at_end)
        if form.hold_at_end and t + horizon > len(rows):
            columns, still = rest(contract.action)
            actions[len(rows) - t :, columns] = still
        if not (np.isfinite(actions).all() and np.isfinite(rows.state[t]).all()):
            raise UserError(
                f"{source.path}: episode {draw.episode}, step {t}: an action or a state is not finite; see "
                "`qwen-vla data doctor`"
            )
        turns = (("", rows.extra[_MEANING][t]),) if form.intention else ()
        told = self._told(draw)
        if told is not None:
            still_c = stay(contract.action, contract.state_channels, rows.state[t])
            if still_c is None:
                raise UserError(
                    f"{source.path}: other_prompt: an action channel has no measured state of its name, so staying in "
                    "place has no target; remove the key"
                )
            actions = np.repeat(still_c[None], horizon, 0)
            mask = np.ones(horizon, bool)
            turns = (("", OTHER_ROBOT),) if turns else ()
        parts = self._relative_parts(draw.source, dataset)
        if parts:
            try:
                actions = to_relative(parts, actions, rows.state[t]).astype(np.float32)
            except ValueError as error:
                raise UserError(f"{source.path}: episode {draw.episode}, step {t}: {error}") from None
        return ActionSample(
            images={} if form.whole else self._images(draw.source, dataset, draw.episode, t, contract.views, draw.seed),
            state=rows.state[t],
            instruction=dataset.tasks[int(rows.task[t])],
            actions_hc=actions,
            step_mask_h=mask,
            embodiment=source.embodiment,
            family=source.family,
            dataset=dataset.name,
            episode=draw.episode,
            t=t,
            seed=draw.seed,
            turns=turns,
            told=told,
        )

    def _told(self, draw: Draw) -> str | None:
        """Another robot of the mixture, for ``other_prompt`` of a source's samples."""
        source = self.sources[draw.source]
        if not source.form.other_prompt:
            return None
        rng = np.random.default_rng([draw.seed, _TOLD])
        others = [name for name in self._robots if name != source.embodiment]
        if rng.random() >= source.form.other_prompt or not others:
            return None
        return others[int(rng.integers(len(others)))]

    def _read(self, draw: Draw, dataset: ActionDataset) -> EpisodeRows:
        """An episode's numbers without its extra columns, which no sample shows and which may be larger than the rest.

        Where meanings are wanted they take the scenes' place: a fortieth of their size.
        """
        rows = dataset.rows(draw.episode)
        extra: dict[str, list[str]] = {}
        source = self.sources[draw.source]
        if source.form.intention:
            meanings = extra.setdefault(_MEANING, [])
            for t, stored in enumerate(rows.extra[SCENE]):
                try:
                    meanings.append(read_scene(stored).intention())
                except UserError as error:
                    raise UserError(f"{source.path}: episode {draw.episode}, step {t}: {error}") from None
        return dataclasses.replace(rows, extra=extra)

    def _relative_parts(self, number: int, dataset: ActionDataset) -> tuple[RelativePart, ...]:
        if number not in self._parts:
            contract = dataset.contract
            try:
                self._parts[number] = relative_parts(contract.convention, contract.action, contract.state)
            except UserError as error:
                raise UserError(f"{self.sources[number].path}: {error}") from None
        return self._parts[number]

    def _images(
        self, source: int, dataset: ActionDataset, episode: int, t: int, views: Sequence[str], seed: int
    ) -> dict[str, np.ndarray]:
        options = self.options
        # Before the first frame there is only the first frame, as for a robot that has just been started.
        steps = [max(0, t - back * options.frame_stride) for back in reversed(range(options.frames))]
        images = {view: self._frames.frames(source, dataset, episode, view, steps) for view in views}
        if options.jitter:
            rng = np.random.default_rng(seed)
            images = {view: jitter(frames, rng, options.jitter) for view, frames in images.items()}
        return images


def _row_bytes(rows: EpisodeRows) -> int:
    """What an episode's numbers take in memory."""
    numbers = sum(a.nbytes for a in (rows.state, rows.action, rows.timestamp, rows.task, rows.perturbed))
    return numbers + sum(map(sys.getsizeof, rows.extra.get(_MEANING, ())))
