"""The worst episodes as small films inside the page: run again, since the same trial gives the same episode."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Evaluator, Row, Settings, film
from qwen_vla_core.evaluation.results import Result, weights_of
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION, Trial

FRAME_S = 0.1
LARGE, SMALL = (320, 240), (160, 120)  # width, height of the first view and of the others
CRF = 30  # of x264: a film of ten seconds takes some 100 kB


@dataclass(frozen=True)
class Film:
    """One filmed episode.

    Attributes:
        row: the trial as it is in the result file.
        source: ``data:video/mp4;base64,…``.
        same: whether the second run ended as the first.
    """

    row: Row
    source: str
    same: bool


def worst(result: Result, count: int) -> list[Row]:
    """Up to ``count`` failed trials: of each axis in turn the one that came least far, longest first among equals."""
    queues = []
    for axis in result.axes:
        failed = [row for row in result.of(axis) if not row["success"]]
        failed.sort(key=lambda row: (row["metrics"].get("progress", 0.0), -row["seconds"]))
        queues.append(failed)
    chosen: list[Row] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return chosen[:count]


def film_worst(result: Result, count: int, checkpoint: str | None = None) -> tuple[list[Film], str]:
    """Films, and why there are none.

    Args:
        result: whose trials are run again.
        count: at most so many.
        checkpoint: where the weights are now, if not where they were.
    """
    rows = worst(result, count)
    if not rows:
        return [], "" if count == 0 else "no trial failed"
    if result.header.get("ros"):
        return [], "trials in the ROS graph run in real time: no second run is the same; see the recorded rollouts"
    if importlib.util.find_spec("av") is None:
        return [], "no films: pip install 'qwen_vla_ros[data]'"
    try:
        evaluator = _evaluator(result, checkpoint)
    except UserError as error:
        return [], f"no films: {error}"
    films = []
    for row in tqdm(rows, desc=f"films of {result.path.stem}", disable=None, leave=False):
        trial = trial_of(evaluator, row)
        frames = film(evaluator, trial, FRAME_S, picture=mosaic)
        ended = bool(evaluator.world.success())
        source = "data:video/mp4;base64," + base64.b64encode(encode(frames, FRAME_S)).decode()
        films.append(Film(row, source, ended == bool(row["success"])))
    evaluator.close()
    return films, ""


def _evaluator(result: Result, checkpoint: str | None) -> Evaluator:
    stored = result.header["settings"]
    known = {field.name: stored[field.name] for field in fields(Settings) if field.name in stored}
    settings = Settings(**{**known, **({"checkpoint": checkpoint} if checkpoint else {}), "language": False})
    if not settings.expert:
        weights = result.header.get("weights")
        if weights is not None and weights_of(settings.checkpoint) != weights:
            raise UserError(f"the weights of {settings.checkpoint} are no longer those of the trials")
    return Evaluator(settings)


def trial_of(evaluator: Evaluator, row: Row) -> Trial:
    """The trial behind a row; its instruction is what the world drew, so it is left to the world again."""
    if row["axis"] == IN_DISTRIBUTION and row["task"] not in evaluator.suite.tasks:  # an older file
        return evaluator.suite.trials(1, row["seed"])[0]
    same = [
        trial
        for trial in evaluator.suite.trials(1, row["seed"])
        if (trial.axis, trial.task, trial.seed) == (row["axis"], row["task"], row["seed"])
    ]
    if not same:
        raise UserError(f"trial {row['key']}: the suite has none like it any more")
    return same[0]


def mosaic(world: Any) -> np.ndarray:
    """(240, 480 or 640, 3) RGB: the first view large, two more stacked beside it, or one as large as it."""
    import cv2

    first, *others = world.film_views
    size = LARGE if len(others) == 1 else SMALL

    def picture(view: str, size: tuple[int, int]) -> np.ndarray:
        width, height = size
        full = world.render(view, 3 * width // 2, 3 * height // 2)  # more would cost more than it shows
        return np.asarray(cv2.resize(full, size, interpolation=cv2.INTER_AREA))

    columns = [picture(first, LARGE)]
    side = [picture(view, size) for view in others]
    rows = LARGE[1] // size[1]
    for start in range(0, len(side), rows):
        column = side[start : start + rows]
        column += [np.zeros_like(column[0])] * (rows - len(column))
        columns.append(np.vstack(column))
    return np.hstack(columns)


def encode(frames: Sequence[Any], frame_s: float) -> bytes:
    """H.264 in MP4, as every browser plays it: even sides, 4:2:0."""
    import av

    height, width = (side - side % 2 for side in frames[0].shape[:2])
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=round(1 / frame_s), options={"crf": str(CRF), "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
