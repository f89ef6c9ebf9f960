"""One picture of one or several training runs, because people look at curves rather than at numbers.

A column per stage; rows: loss terms, learning rates, gradient norm, throughput, and, where there are any, other numbers
(of reinforcement learning) and closed-loop success. Runs that share a stage lie over each other.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes
from qwen_vla_core.training.run_log import StageLog, read_runs

LOSSES = ("loss", "action", "navigation", "text", "value_loss")
RATES = ("lr_vision", "lr_language", "lr_decoder", "lr_value")
THROUGHPUT = ("samples_per_s", "tokens_per_s", "mfu")
IGNORED = ("stage", "step", "seconds")
SMOOTHING = 0.05  # the smooth line's window, as a share of the rows
STYLES = ("-", "--", ":", "-.")
MOST_LABELS = 8  # in one legend
# Okabe and Ito's colours: they stay apart for colour-blind eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def plot_runs(paths: Sequence[Path], picture: Path) -> None:
    """Draws everything that the runs at ``paths`` logged.

    Args:
        paths: run folders, folders of runs, or log files (see ``run_log.find_logs``).
        picture: .png, .svg or .pdf, replaced atomically.

    Raises:
        UserError: nothing to draw, another ending, or matplotlib is not installed.
    """
    kind = picture.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"--out {picture}: must end in .png, .svg or .pdf")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("drawing curves needs matplotlib: pip install 'qwen_vla_ros[train]'") from None
    logs = read_runs(paths)
    stages = list(dict.fromkeys(log.stage for log in logs))
    runs = list(dict.fromkeys(log.run for log in logs))
    panels = _panels(logs)
    figure = Figure(figsize=(max(4.6 * len(stages), 6.4), 2.5 * len(panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        of_stage = [log for log in logs if log.stage == stage]
        for row, (label, draw) in enumerate(panels):
            axis = axes[row][column]
            for log in of_stage:
                draw(axis, log, runs.index(log.run), runs)
            _finish(axis, label if column == 0 else "")
        axes[0][column].set_title(stage)
        axes[-1][column].set_xlabel("step")
    figure.suptitle(", ".join(runs))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=100)
    atomic_write_bytes(picture, buffer.getvalue())


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over at most ``window`` neighbours, shorter at both ends; gaps (NaN) do not count.

    Args:
        values: (n,) floats.
        window: number of values; 1 changes nothing.

    Returns:
        (n,) floats; NaN only where the whole window is.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    half = window // 2
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


Draw = Callable[[Any, StageLog, int, Sequence[str]], None]


def _panels(logs: Sequence[StageLog]) -> list[tuple[str, Draw]]:
    """(label, how to draw) of every row of the picture that has something to show."""
    keys = list(dict.fromkeys(key for log in logs for row in log.rows for key in row))
    numbers = [key for key in keys if key not in IGNORED and any(_number(r.get(key)) for log in logs for r in log.rows)]
    others = [key for key in numbers if key not in (*LOSSES, *RATES, *THROUGHPUT, "grad_norm")]
    groups: list[tuple[str, Sequence[str], bool]] = [
        ("loss", LOSSES, True),
        ("learning rate", RATES, True),
        ("gradient norm", ("grad_norm",), True),
        ("samples/s", ("samples_per_s",), False),
        ("tokens/s", ("tokens_per_s",), False),
        ("model FLOPs utilisation", ("mfu",), False),
        # What only other programs log goes to panels of its own kind: shares, and the rest.
        ("share", [key for key in others if key.endswith(("_rate", "_share", "success", "fraction"))], False),
    ]
    shares = groups[-1][1]
    groups.append(("other", [key for key in others if key not in shares], False))
    panels = [
        (label, _curves(tuple(key for key in wanted if key in numbers), logarithmic))
        for label, wanted, logarithmic in groups
        if set(wanted) & set(numbers)
    ]
    if any(log.evaluations for log in logs):
        panels.append(("closed-loop success", _success))
    return panels


def _curves(keys: Sequence[str], logarithmic: bool) -> Draw:
    def draw(axis: Any, log: StageLog, run: int, runs: Sequence[str]) -> None:
        steps = np.array([row["step"] for row in log.rows])
        for number, key in enumerate(keys):
            values = np.array([row[key] if _number(row.get(key)) else np.nan for row in log.rows], float)
            if logarithmic:
                values[values <= 0] = np.nan
            if not np.isfinite(values).any():
                continue
            # One run: a colour per term. Several: a colour per run, a line style per term.
            several = len(runs) > 1
            colour = COLOURS[(run if several else number) % len(COLOURS)]
            style = STYLES[number % len(STYLES)] if several else "-"
            label = f"{runs[run]}: {key}" if several else key
            window = max(1, round(SMOOTHING * len(values)))
            if window > 1 and not key.startswith("lr_"):
                axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.3)
                values = smooth(values, window)
            marker = "o" if np.isfinite(values).sum() == 1 else None
            axis.plot(steps, values, color=colour, linestyle=style, linewidth=1.4, label=label, marker=marker)
        if logarithmic and axis.lines:
            axis.set_yscale("log")

    return draw


def _success(axis: Any, log: StageLog, run: int, runs: Sequence[str]) -> None:
    """Success rate of every world with its 95 % interval."""
    worlds = list(dict.fromkeys((row.get("embodiment"), row.get("task")) for row in log.evaluations))
    for number, world in enumerate(worlds):
        rows = [row for row in log.evaluations if (row.get("embodiment"), row.get("task")) == world]
        steps = [row["step"] for row in rows]
        rates = np.array([row["success"]["rate"] for row in rows])
        low, high = np.array([row["success"]["interval_95"] for row in rows]).T
        name = " ".join(str(part) for part in world if part)
        several = len(runs) > 1
        axis.errorbar(
            steps,
            rates,
            yerr=np.stack([np.maximum(rates - low, 0.0), np.maximum(high - rates, 0.0)]),
            color=COLOURS[(run if several else number) % len(COLOURS)],
            linestyle=STYLES[number % len(STYLES)] if several else "-",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.6,
            capsize=2,
            label=f"{runs[run]}: {name}" if several else name,
        )
    axis.set_ylim(-0.03, 1.03)


def _finish(axis: Any, label: str) -> None:
    axis.grid(alpha=0.25)
    axis.set_ylabel(label)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > MOST_LABELS and all(": " in label for label in labels):
        handles, labels = _by_run_and_quantity(handles, labels)
    if labels:
        axis.legend(handles, labels, fontsize="x-small", loc="best", framealpha=0.7)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="0.6")


def _by_run_and_quantity(handles: Sequence[Any], labels: Sequence[str]) -> tuple[list[Any], list[str]]:
    """A colour for each run and a line for each quantity, instead of a line for each pair of them."""
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle  # an error bar is a tuple with its line first
        run, _, quantity = label.partition(": ")
        entries.setdefault(run, Line2D([], [], color=line.get_color(), linewidth=2.5))
        entries.setdefault(f" {quantity}", Line2D([], [], color="0.3", linestyle=line.get_linestyle(), linewidth=1.2))
    names = sorted(entries, key=lambda name: name.startswith(" "))  # runs first
    return [entries[name] for name in names], [name.strip() for name in names]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
