"""The picture of a dry run: every channel's command and rate against its limits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes
from qwen_vla_core.runtime.rehearsal import Rehearsal

FAR = 8.0  # limits further away than so many times the motion are named, not drawn: the motion would be a flat line


def plot_rehearsal(run: Rehearsal, path: Path) -> None:
    """Draws ``run``; one row per channel, values on the left, rates on the right.

    Raises:
        UserError: not a .png, matplotlib is missing, or nothing was played.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: must end in .png")
    if not len(run.times_s):
        raise UserError(f"nothing to draw: the control loop ended at once ({run.mode}: {run.reason})")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("drawing needs matplotlib: pip install 'qwen_vla_ros[train]'") from None
    robot = run.robot
    rows = [(group, i, channel) for group in robot.actions for i, channel in enumerate(group.channels)]
    figure = Figure(figsize=(11, 1.45 * len(rows) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    rates_tc = run.rates_tc
    for column, (group, i, channel) in enumerate(rows):
        left, right = axes[column]
        left.plot(run.times_s, run.planned_tc[:, column], color="tab:gray", linewidth=2.5, alpha=0.5, label="planned")
        left.plot(run.times_s, run.measured_tc[:, column], color="tab:green", linewidth=1, label="mock")
        left.plot(run.times_s, run.command_tc[:, column], color="tab:blue", linewidth=1, label="command")
        _limits(left, run.command_tc[:, column], group.limits.lower[i], group.limits.upper[i])
        left.set_ylabel(f"{channel}\n{group.unit}", fontsize=7)
        right.plot(run.times_s, rates_tc[:, column], color="tab:blue", linewidth=1)
        _limits(right, rates_tc[:, column], -group.limits.velocity[i], group.limits.velocity[i])
        right.set_ylabel("per second", fontsize=7)
        for axis in (left, right):
            axis.axvline(run.sine_s, color="black", linewidth=0.5, linestyle=":")
            axis.tick_params(labelsize=6)
    axes[0][0].legend(loc="upper left", fontsize=6, ncols=3)
    axes[0][0].set_title("command and limits (dashed)", fontsize=9)
    axes[0][1].set_title("rate of the command and velocity limits", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("s", fontsize=7)
    figure.suptitle(f"{robot.name}: dry run, standing still, then a small sine from {run.sine_s:g} s", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    try:
        atomic_write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; fix: name a writable file") from None


def _limits(axis: Any, values: np.ndarray, lower: float, upper: float) -> None:
    span = max(float(np.ptp(values)), 1e-6)
    near = [limit for limit in (lower, upper) if min(abs(values - limit)) <= FAR * span]
    for limit in near:
        axis.axhline(limit, color="tab:red", linewidth=0.8, linestyle="--")
    if len(near) < 2:
        text = f"limits {lower:g} … {upper:g}"
        axis.text(0.995, 0.04, text, transform=axis.transAxes, ha="right", fontsize=6, color="tab:red")
