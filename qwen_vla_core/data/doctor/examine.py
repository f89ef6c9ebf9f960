"""What one episode shows, as small facts: the only pass over rows and pictures, shared by the doctor and by cleaning.

Examining is a pure function of one episode, so it runs anywhere (processes, Ray) and its results, plain JSON, can be
kept for resuming. Judging them needs all episodes and happens later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset, EpisodeRows
from qwen_vla_core.data.doctor.channels import RATE_KINDS, Channel, Side
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.doctor.facts import EpisodeFacts, Hit, Segment
from qwen_vla_core.data.doctor.looking import look
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.errors import UserError


@dataclass(frozen=True)
class Examination:
    """What to examine and how; the same for every episode.

    Attributes:
        dataset: must survive pickling when there are several workers.
        state: channels of its state.
        action: channels of its action.
        thresholds: when something counts.
        pictures: pictures to look at per episode and view; 0 is all, None none.
    """

    dataset: ActionDataset
    state: tuple[Channel, ...]
    action: tuple[Channel, ...]
    thresholds: Thresholds
    pictures: int | None

    def channels(self, side: Side) -> tuple[Channel, ...]:
        """Channels of a side."""
        return self.state if side == "state" else self.action


Sketches = dict[str, list[QuantileSketch]]


def examine(work: Examination, episode: int) -> tuple[EpisodeFacts, Sketches]:
    """Facts of one episode and the sketches of its finite values."""
    sketches: Sketches = {
        side: [QuantileSketch() for _ in channels]
        for side, channels in (("state", work.state), ("action", work.action))
    }
    length = int(work.dataset.lengths[episode])
    try:
        rows = work.dataset.rows(episode)
        _same_shape(work, rows)
    except UserError as error:
        return EpisodeFacts(episode, length, error=str(error)), sketches
    if not len(rows.state):
        return EpisodeFacts(episode, 0), sketches
    values: dict[str, np.ndarray] = {}
    not_finite: dict[str, list[Hit]] = {}
    for side, raw in (("state", rows.state), ("action", rows.action)):
        finite = np.isfinite(raw)
        not_finite[side] = _hits(~finite, np.where(finite, 0.0, np.inf))
        for column, sketch in enumerate(sketches[side]):
            sketch.add(raw[finite[:, column], column])
        values[side] = _filled(np.asarray(raw, np.float64), finite)
    place, step = _motion(work, values, moving_side(work))
    clock = _clock(rows.timestamp, work.thresholds)
    idle = step.max(axis=1, initial=0.0) * work.dataset.fps < work.thresholds.idle_rate
    views = []
    if work.pictures is not None:
        views = [
            look(work.dataset, episode, view, _seen_travel(work, values), work.thresholds, work.pictures)
            for view in work.dataset.views
        ]
    facts = EpisodeFacts(
        episode=episode,
        length=len(rows.state),
        digest=hashlib.sha256(_bytes(rows.state) + b"|" + _bytes(rows.action)).hexdigest(),
        not_finite={side: hits for side, hits in not_finite.items() if hits},
        outside=_outside(work, values),
        jumps=_jumps(work, values["action"], rows.perturbed),
        at_limit=_at_limit(work, values),
        same=_same(work, values),
        idle=int(idle.sum()),
        idle_run=_longest(idle),
        spread=float(place.std(axis=0).max(initial=0.0)),
        travel=float(step.sum(axis=0).max(initial=0.0)),
        backward=clock[0],
        gaps=clock[1],
        period_s=clock[2],
        off_grid_s=_off_grid(rows.timestamp, work.dataset.fps),
        unknown_tasks=np.flatnonzero((rows.task < 0) | (rows.task >= len(work.dataset.tasks)))[:20].tolist(),
        segments=_segments(work, place, rows.task),
        views=views,
    )
    return facts, sketches


def moving_side(work: Examination) -> Side:
    """Motion is judged by what was commanded, or measured where a dataset has no actions."""
    return "action" if work.action else "state"


def _same_shape(work: Examination, rows: EpisodeRows) -> None:
    for side, values, channels in (("state", rows.state, work.state), ("action", rows.action, work.action)):
        if values.ndim != 2 or values.shape[1] != len(channels):
            raise UserError(f"{side} has shape {values.shape}, but the contract names {len(channels)} channels")
        if len(values) != len(rows.timestamp):
            raise UserError(f"{len(values)} rows of {side}, but {len(rows.timestamp)} timestamps")


def _bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, np.float32).tobytes()


def _hits(wrong: np.ndarray, size: np.ndarray, shown: np.ndarray | None = None) -> list[Hit]:
    """Per column of (T, c) bool ``wrong``: how often, where first, and the row where ``size`` is largest."""
    found = []
    for column in np.flatnonzero(wrong.any(axis=0)):
        at = np.flatnonzero(wrong[:, column])
        worst = int(at[np.argmax(size[at, column])])
        value = None if shown is None else float(shown[worst, column])
        found.append(Hit(int(column), len(at), int(at[0]), worst, value))
    return found


def _filled(values: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Every non-finite number replaced by the last finite one (or the first), so that it makes no second finding."""
    rows = np.where(finite, np.arange(len(values))[:, None], -1)
    last = np.maximum.accumulate(rows, axis=0)
    first = np.argmax(finite, axis=0)
    source = np.where(last < 0, first, last)
    return np.where(finite.any(axis=0), np.take_along_axis(np.where(finite, values, 0.0), source, axis=0), 0.0)


def _motion(work: Examination, values: Mapping[str, np.ndarray], side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Places (T, c) and how far each step goes (T − 1, c), both in full scales."""
    channels, v = work.channels(side), values[side]
    scale = np.array([channel.scale for channel in channels])
    change = np.array([channel.is_change for channel in channels], bool)
    per_step = np.array([1.0 / work.dataset.fps if channel.kind in RATE_KINDS else 1.0 for channel in channels])
    scaled = v * per_step / scale
    place = np.where(change, np.cumsum(scaled, axis=0), scaled)
    step = np.abs(np.diff(place, axis=0))
    return place, step


def _seen_travel(work: Examination, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """(T,) how far the robot has moved up to each row, in full scales, as a camera must have seen it.

    Measured where there is a state. Grippers do not count: a small finger may move unseen, and a command to it may
    jump from open to closed within one row.
    """
    side: Side = "state" if work.state else "action"
    arms = [channel.column for channel in work.channels(side) if channel.kind != "gripper"]
    _, step = _motion(work, values, side)
    return np.concatenate([[0.0], np.cumsum(step[:, arms].max(axis=1, initial=0.0))])


def _outside(work: Examination, values: Mapping[str, np.ndarray]) -> dict[str, list[Hit]]:
    found = {}
    for side, margin in (("state", work.thresholds.state_margin), ("action", work.thresholds.action_margin)):
        channels = work.action if side == "action" else work.state
        lower = np.array([-np.inf if c.lower is None else c.lower for c in channels])
        upper = np.array([np.inf if c.upper is None else c.upper for c in channels])
        size = np.array([1.0 if c.upper is None or c.lower is None else c.upper - c.lower for c in channels])
        excess = np.maximum(lower - values[side], values[side] - upper) / np.where(size > 0, size, 1.0)
        if hits := _hits(excess > margin, excess, values[side]):
            found[side] = hits
    return found


def _jumps(work: Examination, action: np.ndarray, perturbed: np.ndarray) -> list[Hit]:
    """Steps faster than the velocity limit. A push moves the robot in between, so steps around one do not count."""
    limit = np.array([np.inf if c.velocity is None or c.is_change else c.velocity for c in work.action])
    speed = np.abs(np.diff(action, axis=0, prepend=action[:1])) * work.dataset.fps
    pushed = perturbed | np.concatenate([[False], perturbed[:-1]])
    wrong = (speed > limit * (1 + work.thresholds.velocity_margin)) & ~pushed[:, None]
    return _hits(wrong, speed / limit, speed)


def _at_limit(work: Examination, values: Mapping[str, np.ndarray]) -> dict[str, dict[int, tuple[int, int]]]:
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for side in ("state", "action"):
        for channel in work.action if side == "action" else work.state:
            if channel.kind != "gripper" or channel.lower is None or channel.upper is None:
                continue
            v = values[side][:, channel.column]
            near = [int((np.abs(v - limit) <= 1e-6 * channel.scale).sum()) for limit in (channel.lower, channel.upper)]
            found.setdefault(side, {})[channel.column] = (near[0], near[1])
    return found


def _same(work: Examination, values: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """How many action values equal the state at the same row, over channels that both sides share and that move."""
    measured = {channel.name: channel for channel in work.state}
    equal = compared = 0
    for channel in work.action:
        other = measured.get(channel.name)
        if other is None or channel.is_change or other.kind != channel.kind:
            continue
        a, s = values["action"][:, channel.column], values["state"][:, other.column]
        if np.ptp(s) > 0.01 * channel.scale:
            equal += int((np.abs(a - s) <= 1e-6 * channel.scale).sum())
            compared += len(a)
    return equal, compared


def _longest(flags: np.ndarray) -> tuple[int, int]:
    """First index of the longest run of True, and the index after it; (0, 0) without any."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    best = int(np.argmax(stops - starts))
    return int(starts[best]), int(stops[best])


def _clock(time: np.ndarray, limits: Thresholds) -> tuple[list[int], list[tuple[int, float]], float | None]:
    """Rows that go back in time, gaps, and the median period."""
    if len(time) < 2:
        return [], [], None
    steps = np.diff(np.asarray(time, np.float64))
    wrong = ~(steps > 0)  # also where the time is not a number
    period = float(np.median(steps[~wrong])) if (~wrong).any() else None
    beside = wrong | np.concatenate([wrong[1:], [False]]) | np.concatenate([[False], wrong[:-1]])
    longest = np.inf if period is None else limits.gap_periods * period
    gaps = np.flatnonzero((steps > longest) & ~beside)
    return (
        (np.flatnonzero(wrong) + 1)[:100].tolist(),
        [(int(row), float(steps[row])) for row in gaps[:100]],
        period,
    )


def _off_grid(time: np.ndarray, fps: float) -> float:
    off = np.abs(np.asarray(time, np.float64) - np.arange(len(time)) / fps)
    return float(np.nan_to_num(off, nan=1e9, posinf=1e9).max(initial=0.0))


def _segments(work: Examination, place: np.ndarray, task: np.ndarray) -> list[Segment]:
    channels: Sequence[Channel] = work.channels(moving_side(work))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(task)) + 1, [len(task)]])
    segments = []
    for start, stop in pairwise(starts):
        span = np.ptp(place[start:stop], axis=0)
        moved: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for channel in channels:
            kind = moved[channel.kind == "gripper"]
            kind[channel.arm] = max(kind.get(channel.arm, 0.0), float(span[channel.column]))
        segments.append(Segment(int(task[start]), int(start), int(stop), *moved))
    return segments
