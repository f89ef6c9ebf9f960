"""A picture of a training run, because people look at curves rather than at numbers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from qwen_vla_core.files import atomic_write_bytes


def plot_losses(log: Path, picture: Path) -> None:
    """Draws every loss of a ``log.jsonl``, one panel per stage, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A resumed run logs the steps after its last saved state a second time: the later row counts.
    logged = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed may leave half a line
            logged.append(json.loads(line))
    rows = list({(row["stage"], row["step"]): row for row in logged}.values())
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.5), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        of_stage = [row for row in rows if row["stage"] == stage]
        for key in sorted({key for row in of_stage for key in row} - {"stage", "step"}):
            axis.plot([row["step"] for row in of_stage], [row.get(key) for row in of_stage], label=key)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    atomic_write_bytes(picture, buffer.getvalue())
