"""Quantiles of every channel of a dataset in one streaming pass, cached by content.

The answer depends on the data alone: the sketches are order-free and exact sums do not round, so one process, sixteen
or a Ray cluster give the same file, and the hash of the statistics in a checkpoint can be recomputed anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.actions.conventions import RelativePart, relative_parts, to_relative
from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

VERSION = 1
FRACTIONS = (0.01, 0.1, 0.5, 0.9, 0.99)  # LeRobot v3 keeps the same five
_SHARD = 32  # episodes per work item; fixed, because resuming and progress need not depend on the number of workers


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel; ``std`` is the population's.

    Attributes:
        name: of the channel.
        unit: of its group.
        count: values seen.
        min: smallest value.
        max: largest value.
        mean: exact.
        std: exact.
        q01: quantiles, within 0.025 % of the range.
        q10: as q01.
        q50: as q01.
        q90: as q01.
        q99: as q01.
    """

    name: str
    unit: str
    count: int
    min: float
    max: float
    mean: float
    std: float
    q01: float
    q10: float
    q50: float
    q90: float
    q99: float

    @classmethod
    def of(cls, name: str, unit: str, sketch: QuantileSketch) -> ChannelStatistics:
        """Summary of a sketch that has seen at least one value."""
        quantiles = map(float, sketch.quantile(FRACTIONS))
        return cls(name, unit, sketch.count, sketch.minimum, sketch.maximum, sketch.mean, sketch.std, *quantiles)


@dataclass(frozen=True)
class Statistics:
    """All channels of a dataset.

    Attributes:
        dataset: its name.
        content_hash: of the dataset the numbers were computed from.
        episodes: number of episodes.
        steps: number of rows.
        state: of the state channels.
        action: of the action channels as they are stored.
        chunk: of the action channels as the policy learns them where the convention is relative to the chunk's first
            frame: every valid step of every chunk. Empty for other conventions: there, it would be ``action``.
    """

    dataset: str
    content_hash: str
    episodes: int
    steps: int
    state: tuple[ChannelStatistics, ...]
    action: tuple[ChannelStatistics, ...]
    chunk: tuple[ChannelStatistics, ...] = ()

    @property
    def state_quantiles(self) -> Quantiles:
        """What normalises states."""
        return _quantiles(self.state)

    @property
    def action_quantiles(self) -> Quantiles:
        """What normalises actions as the policy learns them (relative ones where the convention says so)."""
        return _quantiles(self.chunk or self.action)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; undone by ``from_json``."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        """Reads what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not that, or of another version.
        """
        given = dict(value)
        if given.pop("version") != VERSION:
            raise ValueError("another version")
        for side in ("state", "action", "chunk"):
            given[side] = tuple(ChannelStatistics(**channel) for channel in given[side])
        return cls(**given)


def _quantiles(channels: Sequence[ChannelStatistics]) -> Quantiles:
    return Quantiles(
        tuple(channel.q01 for channel in channels),
        tuple(channel.q99 for channel in channels),
        tuple(channel.name for channel in channels),
    )


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/qwen_vla/stats``: not next to the dataset, whose folder may be read-only or shared."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen_vla" / "stats"


def dataset_statistics(
    dataset: ActionDataset,
    workers: int | None = None,
    progress: bool = True,
    cache: Path | None = None,
    ray: bool = False,
) -> Statistics:
    """Statistics of all rows of a dataset; pictures are not read.

    Args:
        dataset: must survive pickling when there are several workers or Ray.
        workers: processes; None is all cores.
        progress: show a bar on stderr.
        cache: folder of earlier results, looked up by content and contract; None computes always.
        ray: work as a Ray Data job.

    Raises:
        UserError: no rows, an unreadable episode, a value that is not finite (names file, episode, row and channel).
    """
    file = cache / f"{cache_key(dataset)}.json" if cache else None
    if file and (known := _read_cache(file)) is not None:
        return known
    if not int(np.sum(dataset.lengths)):
        raise UserError(f"{_place(dataset)}: has no rows, so there are no statistics; record or convert episodes first")
    contract = dataset.contract
    sides = _sides(contract)
    totals = {side: [QuantileSketch() for _ in names] for side, names in sides.items()}
    shards = [range(i, min(i + _SHARD, len(dataset.lengths))) for i in range(0, len(dataset.lengths), _SHARD)]
    # A local pool takes the shards; sketches of a shard, not rows, come back.
    work = partial(_sketch_shard, dataset)
    for shard in map_episodes(work, shards, workers, ray, progress, f"statistics of {dataset.name} (x{_SHARD})"):
        for side, sketches in shard.items():
            for total, sketch in zip(totals[side], sketches, strict=True):
                total.merge(sketch)
    summaries = {
        side: tuple(
            ChannelStatistics.of(name, unit, sketch)
            for (name, unit), sketch in zip(sides[side], totals[side], strict=True)
        )
        for side in sides
    }
    statistics = Statistics(
        dataset=dataset.name,
        content_hash=dataset.content_hash(),
        episodes=len(dataset.lengths),
        steps=int(np.sum(dataset.lengths)),
        **summaries,
    )
    if file:
        atomic_write_json(file, statistics.to_json())
    return statistics


def cache_key(dataset: ActionDataset) -> str:
    """Hash of everything the statistics depend on: content, channels, convention, horizon, and this code's version."""
    contract = dataset.contract.to_json()
    parts = {key: contract[key] for key in ("horizon", "convention", "state", "action")}
    text = json.dumps([VERSION, dataset.content_hash(), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def relative_chunks(
    rows: EpisodeRows, parts: Sequence[RelativePart], horizon: int, block: int = 256
) -> Iterator[np.ndarray]:
    """(n, c) float64 valid steps of all chunks of an episode, relative to each chunk's first frame, in blocks."""
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        chunks = [rows.chunk(t, horizon) for t in range(start, stop)]
        actions, valid = np.stack([chunk for chunk, _ in chunks]), np.stack([mask for _, mask in chunks])
        yield to_relative(parts, actions, rows.state[start:stop])[valid]


def _sides(contract: DataContract) -> dict[str, list[tuple[str, str]]]:
    """Side → (channel, unit) in column order; ``chunk`` only where the convention is relative."""
    sides = {
        "state": [(channel, group.unit) for group in contract.state for channel in group.channels],
        "action": [(channel, group.unit) for group in contract.action for channel in group.channels],
    }
    if relative_parts(contract.convention, contract.action, contract.state):
        sides["chunk"] = sides["action"]
    return sides


def _sketch_shard(dataset: ActionDataset, episodes: Sequence[int]) -> dict[str, list[QuantileSketch]]:
    contract = dataset.contract
    sides = _sides(contract)
    parts = relative_parts(contract.convention, contract.action, contract.state)
    sketches = {side: [QuantileSketch() for _ in names] for side, names in sides.items()}

    def count(side: str, values: Sequence[np.ndarray]) -> None:
        together = np.concatenate(values)
        for column, sketch in enumerate(sketches[side]):
            sketch.add(together[:, column])

    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    for episode in episodes:
        rows = dataset.rows(episode)
        for side, values, kept in (("state", rows.state, states), ("action", rows.action, actions)):
            _check(dataset, episode, side, values, [name for name, _ in sides[side]])
            kept.append(values)
        if parts and len(rows):
            count("chunk", list(relative_chunks(rows, parts, contract.horizon)))
    count("state", states)
    count("action", actions)
    return sketches


def _check(dataset: ActionDataset, episode: int, side: str, values: np.ndarray, names: Sequence[str]) -> None:
    """Refuses what would poison every statistic of a channel."""
    if values.ndim != 2 or values.shape[1] != len(names):
        raise UserError(
            f"{_place(dataset)}: episode {episode}: {side} has shape {values.shape}, but the contract names "
            f"{len(names)} channels; fix the contract or convert the corpus again"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise UserError(
            f"{_place(dataset)}: episode {episode}, row {row}, {side} channel '{names[column]}' is "
            f"{values[row, column]} ({len(bad)} such values in this episode); drop it with `qwen-vla data clean`"
        )


def _place(dataset: ActionDataset) -> str:
    return str(getattr(dataset, "path", dataset.name))


def _read_cache(file: Path) -> Statistics | None:
    """Earlier statistics; None where there are none or the file is damaged: a cache may always be computed again."""
    try:
        return Statistics.from_json(json.loads(file.read_text()))
    except (OSError, KeyError, TypeError, ValueError):
        return None
