"""Videos to caption: files, or the episodes of a LeRobot dataset; and their frames at even times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_vla_core.errors import UserError

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


class VideoError(Exception):
    """A video that cannot be read; the message says why."""


@dataclass(frozen=True)
class Video:
    """One thing to caption.

    Attributes:
        key: name in the output, unique; may hold folders.
        path: the file, or the dataset's folder.
        episode: number in the dataset; -1 for a file.
        view: camera of the dataset; empty for a file.
    """

    key: str
    path: Path
    episode: int = -1
    view: str = ""


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: (n, height, width, 3) uint8 RGB.
        times: n seconds from the beginning, to a tenth, rising.
        task: what the video is recorded as; empty if unknown.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    task: str = ""


def find_videos(src: Path, view: str | None = None) -> list[Video]:
    """What there is to caption below a path, in the order of names.

    Args:
        src: a video, a folder with videos at any depth, or a LeRobot dataset.
        view: camera of a LeRobot dataset; None = its first.

    Raises:
        UserError: nothing there.
    """
    if src.is_file():
        return [Video(src.name, src)]
    if not src.is_dir():
        raise UserError(f"{src}: no such video or folder")
    if (src / "meta/info.json").is_file():
        from qwen_vla_core.data.lerobot import open_dataset

        dataset = open_dataset(src)
        views = list(dataset.views)
        if not views or (view is not None and view not in views):
            has = f"it has {', '.join(views)}" if views else "it has no pictures"
            raise UserError(f"--camera {view}: {src} has no such view; {has}")
        chosen = view or views[0]
        return [Video(f"episode_{n:06d}-{chosen}", src, n, chosen) for n in range(len(dataset.lengths))]
    found = sorted(path for path in src.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{src}: holds no video ({', '.join(SUFFIXES)})")
    return [Video(path.relative_to(src).as_posix(), path) for path in found]


def even_times(duration_s: float, fps: float, most: int) -> tuple[float, ...]:
    """Times of frames: ``fps`` a second, fewer if that were more than ``most``; distinct tenths of a second."""
    duration_s = max(0.0, duration_s)
    count = int(duration_s * fps + 1e-6) + 1
    spread = np.arange(count) / fps if count <= most else np.linspace(0.0, duration_s, most)
    return tuple(dict.fromkeys(int(time * 10 + 1e-6) / 10 for time in spread))


def load_clip(video: Video, fps: float, most: int) -> Clip:
    """The frames of a video at even times.

    Raises:
        VideoError: it is no video, is damaged or cut short.
    """
    if video.episode >= 0:
        from qwen_vla_core.data.lerobot import open_dataset

        dataset = open_dataset(video.path)
        steps = int(dataset.lengths[video.episode])
        times = even_times((steps - 1) / dataset.fps, fps, most)
        chosen = [min(steps - 1, round(time * dataset.fps)) for time in times]
        rows = dataset.rows(video.episode)
        tasks = list(dict.fromkeys(str(dataset.tasks[int(task)]) for task in rows.task))
        return Clip(dataset.frames(video.episode, video.view, chosen), times, ", then ".join(tasks))
    return _from_file(video.path, fps, most)


def _from_file(path: Path, fps: float, most: int) -> Clip:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            step = 1 / float(stream.average_rate or 25)
            if stream.duration is not None and stream.time_base is not None:
                duration = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                duration = container.duration / av.time_base
            else:
                raise VideoError("does not say how long it is; remux it")
            last = max(0.0, duration - step)
            times = even_times(last, fps, most)
            begin = float((stream.start_time or 0) * (stream.time_base or 0))
            frames: list[np.ndarray] = []
            reached = -1.0
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                reached = float(frame.time) - begin
                while len(frames) < len(times) and reached >= times[len(frames)] - step / 2 - 1e-6:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == len(times):
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"cannot be decoded ({error.strerror or error})") from None
    if len(frames) < len(times):
        raise VideoError(f"is cut short: {max(reached, 0):.1f} of {duration:.1f} s could be decoded")
    return Clip(np.stack(frames), times)


def thin(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` things, evenly, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def windows(count: int, size: int) -> list[Sequence[int]]:
    """Neighbouring ranges of at most ``size`` of ``count`` things, of nearly the same length."""
    parts = -(-count // size)
    bounds = np.linspace(0, count, parts + 1).round().astype(int)
    return [range(int(a), int(b)) for a, b in itertools.pairwise(bounds)]
