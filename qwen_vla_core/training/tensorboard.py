"""TensorBoard event files beside ``log.jsonl``: the same numbers, for those who watch many runs in a browser.

``tensorboard`` needs no TensorFlow, is part of the extra ``[train]``, and is imported only when it is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_vla_core.errors import UserError

FOLDER = "tensorboard"  # below a run's --out
LOSSES = ("loss", "action", "navigation", "text", "value_loss")
SKIPPED = ("stage", "step")


class TensorBoardLog:
    """Writes one run's events. A context manager, because events wait in memory until they are flushed."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """Starts an event file in ``folder``.

        Args:
            folder: e.g. ``OUT / FOLDER``; a resumed run adds a file beside the ones that are there.
            first_step: of a resumed run: TensorBoard forgets what earlier files say about this step and later ones.

        Raises:
            UserError: tensorboard is not installed.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ModuleNotFoundError:
            raise UserError(
                "tensorboard: true needs the tensorboard package: pip install 'qwen_vla_ros[train]', or turn it off"
            ) from None
        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        if first_step > 0:
            self._writer.add_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()

    def row(self, row: Mapping[str, Any]) -> None:
        """One row of ``log.jsonl``; what is no number in it is left out.

        Args:
            row: with ``step``, and, if the run has several stages, ``stage``, which becomes part of every name.
        """
        values = [
            self._summary.Value(tag=_tag(key, row.get("stage")), simple_value=float(value))
            for key, value in row.items()
            if key not in SKIPPED and isinstance(value, (int, float)) and math.isfinite(value)
        ]
        self._add(row, values)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """One row of ``evaluations.jsonl``: the success rate, every metric, and the film, which moves in the browser.

        Args:
            row: from ``evaluation.evaluate_checkpoint``, with ``step``.
        """
        world = "_".join(str(row[key]) for key in ("embodiment", "task") if row.get(key))
        numbers = {"success": row["success"]["rate"], **row.get("metrics", {})}
        values = [
            self._summary.Value(tag=_named(f"evaluation/{world}/{key}", row.get("stage")), simple_value=float(value))
            for key, value in numbers.items()
            if math.isfinite(value)
        ]
        film = row.get("film")
        if film is not None and Path(film).suffix == ".gif" and Path(film).is_file():
            data = Path(film).read_bytes()
            width, height = (int.from_bytes(data[i : i + 2], "little") for i in (6, 8))  # of the GIF's header
            image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            values.append(self._summary.Value(tag=_named(f"evaluation/{world}/film", row.get("stage")), image=image))
        self._add(row, values)

    def _add(self, row: Mapping[str, Any], values: list[Any]) -> None:
        event = self._event(wall_time=time.time(), step=int(row["step"]), summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()


def _tag(key: str, stage: str | None) -> str:
    """Groups of TensorBoard's page: losses, learning rates, the rest."""
    if key in LOSSES:
        return _named(f"loss/{key}", stage)
    if key.startswith("lr_"):
        return _named(f"learning_rate/{key.removeprefix('lr_')}", stage)
    return _named(f"training/{key}", stage)


def _named(tag: str, stage: str | None) -> str:
    return f"{tag}/{stage}" if stage else tag
