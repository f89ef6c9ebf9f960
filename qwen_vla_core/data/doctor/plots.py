"""Pictures for the report: one plot per finding and thumbnails of the frames it is about, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.doctor.case import Case
from qwen_vla_core.data.doctor.channels import Channel
from qwen_vla_core.data.doctor.examine import moving_side
from qwen_vla_core.data.doctor.findings import Finding, Place
from qwen_vla_core.data.sketch import QuantileSketch
from qwen_vla_core.errors import UserError

_BLUE, _ORANGE, _RED, _GREY = "#2f6f9f", "#d9822b", "#c23030", "#8a9ba8"
_CLOCK = ("time_not_increasing", "time_gaps", "wrong_rate")
_PICTURES = ("missing_frames", "blank_frames", "frozen_frames", "duplicate_frames")
_TWO = ("duplicate_rows", "contradicting_instructions")
_MOST_CHANNELS = 4
_THUMBNAILS, _THUMBNAIL_WIDTH = 6, 160


def plot(case: Case, finding: Finding) -> str:
    """A PNG data URI of the finding's first place; empty where there is nothing to draw."""
    if not finding.places:
        return ""
    place = finding.places[0]
    try:
        rows = case.dataset.rows(place.episode)
        if not len(rows.state):
            return ""
        if finding.code in _CLOCK:
            return _clock(case, place, rows)
        if finding.code in _TWO:
            return _two(case, finding, place, rows)
        if finding.code in _PICTURES or finding.code == "unknown_task":
            return ""
        return _channels(case, finding, place, rows)
    except UserError:  # the episode cannot be read, which is what the finding says
        return ""


def thumbnails(case: Case, finding: Finding) -> list[tuple[str, str]]:
    """(caption, JPEG data URI) of frames around the finding's first place."""
    if not finding.places or not case.dataset.views:
        return []
    place = finding.places[0]
    facts = case.facts[place.episode]
    if facts.error or not facts.length:
        return []
    view = place.view or case.dataset.views[0]
    first, stop = place.rows or (0, facts.length)
    around = 2 if stop - first <= _THUMBNAILS else 0
    first, stop = max(first - around, 0), min(stop + around, facts.length)
    steps = np.unique(np.linspace(first, stop - 1, _THUMBNAILS).round().astype(int)).tolist()
    episodes = [place.episode]
    if finding.code == "duplicate_frames":
        episodes = list(finding.numbers["pairs"][0])
    shown: list[tuple[str, str]] = []
    for episode in episodes:
        try:
            frames = case.dataset.frames(episode, view, steps)
        except UserError:
            return shown
        for step, frame in zip(steps, frames, strict=False):
            shown.append((f"episode {episode}, row {step}, {view}", _jpeg(frame)))
    return shown


def sparkline(sketch: QuantileSketch, width: int = 120, height: int = 22, bars: int = 40) -> str:
    """Inline SVG histogram of a channel between its smallest and largest value."""
    span = sketch.maximum - sketch.minimum
    centres = (sketch.keys + 0.5) * sketch.width
    bins = np.clip((centres - sketch.minimum) / span * bars, 0, bars - 1).astype(int) if span > 0 else sketch.keys * 0
    counts = np.bincount(bins, weights=sketch.counts, minlength=bars)
    heights = np.sqrt(counts / counts.max()) * height  # square root: rare values stay visible
    step = width / bars
    rects = "".join(
        f'<rect x="{i * step:.1f}" y="{height - h:.1f}" width="{step - 0.5:.1f}" height="{h:.1f}"/>'
        for i, h in enumerate(heights)
        if h > 0
    )
    label = escape(f"histogram from {sketch.minimum:.4g} to {sketch.maximum:.4g}")
    return f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" fill="{_BLUE}">{rects}</svg>'


def _jpeg(frame: np.ndarray) -> str:
    height, width = frame.shape[:2]
    size = (_THUMBNAIL_WIDTH, max(round(height * _THUMBNAIL_WIDTH / width), 1))
    smooth = cv2.INTER_AREA if width > _THUMBNAIL_WIDTH else cv2.INTER_NEAREST
    small = cv2.resize(np.ascontiguousarray(frame), size, interpolation=smooth)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(panels, 1, figsize=(8, 0.9 + 1.35 * panels), sharex=True, squeeze=False)
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes[:, 0]


def _png(figure: Any) -> str:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=96)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _chosen(case: Case, finding: Finding, rows: EpisodeRows) -> tuple[str, list[Channel]]:
    """Side and channels to draw: those of the finding, else those that move most."""
    side = finding.side or moving_side(case.work)
    channels = case.work.action if side == "action" else case.work.state
    named = [channel for channel in channels if channel.name in finding.channels]
    if finding.code == "instruction_motion":
        named = [channel for channel in channels if channel.kind == "gripper"]
    if not named:
        values = rows.action if side == "action" else rows.state
        span = [float(np.ptp(values[:, channel.column])) / channel.scale for channel in channels]
        named = [channels[i] for i in np.argsort(span)[::-1]]
    return side, named[:_MOST_CHANNELS]


def _channels(case: Case, finding: Finding, place: Place, rows: EpisodeRows) -> str:
    """Lines of the channels in one episode, with limits and the rows in question."""
    side, channels = _chosen(case, finding, rows)
    if not channels:
        return ""
    both = {"state": rows.state, "action": rows.action}
    columns = {
        s: {c.name: c.column for c in cs} for s, cs in (("state", case.work.state), ("action", case.work.action))
    }
    figure, axes = _figure(len(channels))
    for axis, channel in zip(axes, channels, strict=True):
        for name, style in (("state", {"color": _GREY, "lw": 2.4}), ("action", {"color": _BLUE, "lw": 1.2})):
            if channel.name in columns[name] and (name == side or finding.code in ("action_is_state", "idle")):
                values = both[name][:, columns[name][channel.name]].astype(np.float64)
                axis.plot(np.where(np.isfinite(values), values, np.nan), label=name, **style)
                for row in np.flatnonzero(~np.isfinite(values)):
                    axis.axvline(row, color=_RED, lw=1.2)
        low, high = axis.get_ylim()
        for limit in (channel.lower, channel.upper):
            if limit is not None and finding.code in ("out_of_limits", "clipped_gripper", "wrong_units"):
                axis.axhline(limit, color=_ORANGE, ls="--", lw=1)
                low, high = min(low, limit), max(high, limit)
        axis.set_ylim(low, high)
        if place.rows and place.rows != (0, len(rows)):
            axis.axvspan(place.rows[0] - 0.5, place.rows[1] - 0.5, color=_RED, alpha=0.15)
        axis.set_ylabel(f"{channel.name}\n{channel.unit}", fontsize=8)
    axes[0].legend(fontsize=7, loc="upper right", frameon=False)
    axes[0].set_title(f"episode {place.episode}, {side}", fontsize=9, loc="left")
    axes[-1].set_xlabel("row", fontsize=8)
    return _png(figure)


def _clock(case: Case, place: Place, rows: EpisodeRows) -> str:
    figure, (axis,) = _figure(1)
    axis.plot(np.arange(1, len(rows.timestamp)), np.diff(rows.timestamp), color=_BLUE, lw=1.2, marker=".", ms=3)
    axis.axhline(1 / case.dataset.fps, color=_ORANGE, ls="--", lw=1)
    if place.rows:
        axis.axvspan(place.rows[0] - 0.5, place.rows[1] - 0.5, color=_RED, alpha=0.15)
    axis.set_title(f"episode {place.episode}: seconds since the row before; dashed: 1/fps", fontsize=9, loc="left")
    axis.set_xlabel("row", fontsize=8)
    return _png(figure)


def _two(case: Case, finding: Finding, place: Place, rows: EpisodeRows) -> str:
    """The same channel of two episodes, one over the other."""
    same = case.facts[place.episode].digest
    other = next((f.episode for f in case.facts if f.digest == same and f.episode != place.episode), None)
    if other is None:
        return ""
    side, channels = _chosen(case, finding, rows)
    figure, axes = _figure(min(len(channels), 2))
    for axis, channel in zip(axes, channels, strict=False):
        for episode, style in (
            (place.episode, {"color": _GREY, "lw": 3}),
            (other, {"color": _BLUE, "lw": 1, "ls": "--"}),
        ):
            of = case.dataset.rows(episode)
            axis.plot(
                (of.action if side == "action" else of.state)[:, channel.column], label=f"episode {episode}", **style
            )
        axis.set_ylabel(f"{channel.name}\n{channel.unit}", fontsize=8)
    axes[0].legend(fontsize=7, loc="upper right", frameon=False)
    axes[-1].set_xlabel("row", fontsize=8)
    return _png(figure)
