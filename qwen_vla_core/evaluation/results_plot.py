"""Axes of the same name in two panels: ours on the left, the paper's on the right, never in one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.results_page import Beside
from qwen_vla_core.files import atomic_write_bytes

COLOURS = ("#1f6fb4", "#c4561a", "#2f8f4e", "#8a55a8")
PAPER = "#5a5a5a"
SPREAD = 0.6  # of a row: how far several results of ours lie apart


def plot(lines: Sequence[Beside], path: Path) -> None:
    """Writes the picture.

    Args:
        lines: of ``results_page.compare``; those without a world of ours are left out.
        path: .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [line for line in lines if line.why_not]
    checkpoints = list(dict.fromkeys(checkpoint for line in rows for checkpoint, _, _ in line.ours))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(checkpoints)}
    figure, (ours, theirs) = plt.subplots(1, 2, sharey=True, figsize=(10.5, 0.42 * len(rows) + 1.6), dpi=110)
    for number, line in enumerate(rows):
        count = len(line.ours)
        for i, (checkpoint, _, value) in enumerate(line.ours):
            y = number + (SPREAD * (i / (count - 1) - 0.5) if count > 1 else 0.0)
            _point(ours, value, y, colours[checkpoint])
        if not line.ours:
            ours.text(2, number, "not measured", va="center", fontsize=8, color="#999999")
        theirs.barh(number, line.paper, height=0.5, color=PAPER)
        theirs.text(line.paper + 1.5, number, f"{line.paper:.1f}", va="center", fontsize=8, color=PAPER)
    labels = [f"{line.axis}, {line.metric}" if line.metric != "success" else line.axis for line in rows]
    ours.set_yticks(range(len(rows)), labels, fontsize=8)
    ours.set_ylim(len(rows) - 0.4, -0.6)
    for axes, title in (
        (ours, "ours: small models in embedded worlds\n(% of episodes, 95 % interval)"),
        (theirs, "paper: Qwen-VLA-Instruct, its robots and benchmarks\n(%, as published)"),
    ):
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlim(0, 108)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _benchmark_names(theirs, rows)
    for name, colour in colours.items():
        ours.plot([], [], "o", color=colour, markersize=5, label=name)
    if colours:
        ours.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.05), ncols=4, frameon=False)
    theirs.text(0, len(rows) + 0.7, "not comparable: see the page for what differs", fontsize=8, color="#777777")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    atomic_write_bytes(path, buffer.getvalue())


def _point(axes: Any, value: Rate | float, y: float, colour: str) -> None:
    if isinstance(value, Rate):
        low, high = value.interval
        axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.4, alpha=0.7)
        axes.plot(100 * value.value, y, "o", color=colour, markersize=4)
    else:
        axes.plot(value, y, "D", color=colour, markersize=4)


def _benchmark_names(axes: Any, rows: Sequence[Beside]) -> None:
    """Each published benchmark's name to the right of its rows, with a line above the first."""
    for number, line in enumerate(rows):
        if number == 0 or rows[number - 1].benchmark != line.benchmark:
            if number:
                for each in axes.figure.axes:
                    each.axhline(number - 0.5, color="#aaaaaa", linewidth=0.8)
            axes.text(110, number, line.benchmark, fontsize=8, va="center", color="#333333")
