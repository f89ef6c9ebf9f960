"""A picture of what the arms do: paths of the fingers by template, in space."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen_vla_core.data.t2a.kinematics import forward
from qwen_vla_core.data.t2a.robots import ARMS
from qwen_vla_core.data.t2a.scenes import TEMPLATES
from qwen_vla_core.files import atomic_write_bytes


def plot_paths(paths: Mapping[str, Mapping[str, Sequence[np.ndarray]]], picture: Path) -> None:
    """Draws finger paths into a PNG or SVG.

    Args:
        paths: robot → template → (T, n + 1) rows of some trajectories.
        picture: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    templates = [name for name in TEMPLATES if any(by.get(name) for by in paths.values())]
    columns = min(3, len(templates))
    lines = -(-len(templates) // columns)
    figure = plt.figure(figsize=(4.5 * columns, 4.2 * lines))
    for index, template in enumerate(templates):
        axis = figure.add_subplot(lines, columns, index + 1, projection="3d")
        for number, (robot, by) in enumerate(paths.items()):
            for rows in by.get(template, ()):
                place = forward(ARMS[robot], np.asarray(rows, dtype=np.float64)[:, :-1]).position
                axis.plot(*place.T, color=f"C{number}", linewidth=0.9, alpha=0.8)
                axis.scatter(*place[-1], color=f"C{number}", s=6)
        axis.set(title=template, xlabel="x [m]", ylabel="y [m]", zlabel="z [m]")
        axis.set_zlim(bottom=0)
        axis.set_box_aspect((1, 1, 0.7))
    handles = [plt.Line2D([], [], color=f"C{i}", label=ARMS[robot].tag) for i, robot in enumerate(paths)]
    figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), frameon=False)
    figure.subplots_adjust(left=0.02, right=0.96, top=0.95, bottom=0.1 if lines > 1 else 0.18, wspace=0.12, hspace=0.15)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture.suffix[1:], dpi=110)
    plt.close(figure)
    atomic_write_bytes(picture, buffer.getvalue())
