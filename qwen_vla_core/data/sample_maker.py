"""From a draw to a sample: read, decode, cut the chunk, make it relative, resize, jitter. Runs in every worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from qwen_vla_core.actions.conventions import RelativePart, relative_parts, to_relative
from qwen_vla_core.data.contract import TEXT_FAMILIES
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.frame_cache import ByteCache, FrameCache, Size, jitter
from qwen_vla_core.data.mixture import WHOLE_SEQUENCE_FAMILIES, Dataset, Draw, OpenSource, Source
from qwen_vla_core.data.samples import ActionSample, Sample, TextDataset, TextSample
from qwen_vla_core.errors import UserError


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

    @classmethod
    def of(cls, source: Source) -> SourceReference:
        """Everything of a source but its open files."""
        return cls(source.path, source.family, source.requested, source.embodiment)


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
            self._opened[number] = self._open_with(source.path, source.family, source.requested)
        return self._opened[number]

    def _conversation(self, draw: Draw, dataset: TextDataset) -> TextSample:
        source = self.sources[draw.source]
        return dataclasses.replace(dataset.sample(draw.t), family=source.family)

    def _window(self, draw: Draw, dataset: ActionDataset) -> ActionSample:
        source, contract, t = self.sources[draw.source], dataset.contract, draw.t
        rows = self._rows.through((draw.source, draw.episode), lambda: _bare(dataset.rows(draw.episode)), _row_bytes)
        whole = source.family in WHOLE_SEQUENCE_FAMILIES
        actions, mask = rows.chunk(t, len(rows) - t if whole else contract.horizon)
        if not (np.isfinite(actions).all() and np.isfinite(rows.state[t]).all()):
            raise UserError(
                f"{source.path}: episode {draw.episode}, step {t}: an action or a state is not finite; see "
                "`qwen-vla data doctor`"
            )
        parts = self._relative_parts(draw.source, dataset)
        if parts:
            try:
                actions = to_relative(parts, actions, rows.state[t]).astype(np.float32)
            except ValueError as error:
                raise UserError(f"{source.path}: episode {draw.episode}, step {t}: {error}") from None
        return ActionSample(
            images={} if whole else self._images(draw, dataset),
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
        )

    def _relative_parts(self, number: int, dataset: ActionDataset) -> tuple[RelativePart, ...]:
        if number not in self._parts:
            contract = dataset.contract
            try:
                self._parts[number] = relative_parts(contract.convention, contract.action, contract.state)
            except UserError as error:
                raise UserError(f"{self.sources[number].path}: {error}") from None
        return self._parts[number]

    def _images(self, draw: Draw, dataset: ActionDataset) -> dict[str, np.ndarray]:
        options = self.options
        # Before the first frame there is only the first frame, as for a robot that has just been started.
        steps = [max(0, draw.t - back * options.frame_stride) for back in reversed(range(options.frames))]
        images = {
            view: self._frames.frames(draw.source, dataset, draw.episode, view, steps)
            for view in dataset.contract.views
        }
        if options.jitter:
            rng = np.random.default_rng(draw.seed)
            images = {view: jitter(frames, rng, options.jitter) for view, frames in images.items()}
        return images


def _bare(rows: EpisodeRows) -> EpisodeRows:
    """Without the extra columns, which no sample shows and which may be larger than all the rest."""
    return dataclasses.replace(rows, extra={})


def _row_bytes(rows: EpisodeRows) -> int:
    """What an episode's numbers take in memory."""
    return sum(a.nbytes for a in (rows.state, rows.action, rows.timestamp, rows.task, rows.perturbed))
