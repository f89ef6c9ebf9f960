"""Small LeRobot datasets whose every frame tells episode and step by its colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import memory_dataset
import numpy as np

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotWriter

SIZE = (32, 32)
FPS = memory_dataset.FPS
TASKS = ("pick up the red cube", 'räume 把红色方块 🤖 weg\u2028und "quoted"')
EXTRAS = {"perturbed": "bool", "scene": "string"}


def contract(**changes: Any) -> Any:
    return memory_dataset.contract(**changes)


def rows(episode: int, length: int, tasks: Sequence[int] | None = None) -> EpisodeRows:
    rng = np.random.default_rng(episode)
    return EpisodeRows(
        state=rng.normal(size=(length, 6)).astype(np.float32),
        action=rng.normal(size=(length, 6)).astype(np.float32),
        timestamp=np.arange(length) / FPS,
        task=np.full(length, episode % 2, np.int64) if tasks is None else np.array(tasks),
        perturbed=np.arange(length) == 2,
        extra={"scene": [f'{{"episode": {episode}, "step": {step}, "ä": "✓"}}' for step in range(length)]},
    )


def picture(episode: int, step: int) -> np.ndarray:
    """Left half says the episode, right half the step, in grey levels 8 apart."""
    frame = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    frame[:, : SIZE[0] // 2], frame[:, SIZE[0] // 2 :] = 20 + 8 * (episode % 28), 20 + 8 * (step % 28)
    return frame


def shown(frame: np.ndarray) -> tuple[int, int]:
    """(episode, step), modulo 28, that a picture tells."""
    left, right = frame[:, 4:12].mean(), frame[:, 20:28].mean()
    return round((left - 20) / 8), round((right - 20) / 8)


def frames(episode: int, length: int) -> np.ndarray:
    return np.stack([picture(episode, step) for step in range(length)])


def begin(path: Path, **options: Any) -> LeRobotWriter:
    given = {"family": "manipulation", "views": {"ego": SIZE}, "extras": EXTRAS, "source": {"name": "made up"}}
    return LeRobotWriter(path, options.pop("contract", contract()), **{**given, **options})


def add(writer: LeRobotWriter, episode: int, length: int, **changes: Any) -> int:
    return writer.add_episode(
        changes.get("rows", rows(episode, length)),
        changes.get("tasks", TASKS),
        changes.get("frames", {"ego": frames(episode, length)}),
        {"item": episode},
    )


def write(path: Path, lengths: Sequence[int] = (5, 8, 4), **options: Any) -> Path:
    with begin(path, **options) as writer:
        for episode, length in enumerate(lengths):
            add(writer, episode, length)
    return path


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def write_foreign_video(
    path: Path, pictures: Iterable[np.ndarray], rate: int | Fraction, codec: str, options: dict[str, str]
) -> None:
    """As other writers do it: B-frames, long GOPs, AV1.

    In a thread that ends with the call: SVT-AV1, run as root, gives the thread that opens it the highest real-time
    priority and leaves it there; everything started later would inherit it and starve the machine.
    """

    def encode() -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    with ThreadPoolExecutor(1) as thread:
        thread.submit(encode).result()
