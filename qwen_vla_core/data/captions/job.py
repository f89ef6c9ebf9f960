"""Captions of many videos into one folder, video by video: resumable, every failure listed, ready to train on.

```
OUT/samples.jsonl  images/<video>/<time>.jpg  meta/qwen_vla.json      a dataset of the family ``captions``
OUT/captions/<video>.json      the caption of one video: written last, so its presence says that the video is done
OUT/captions/<video>.failed    why there is none
OUT/failures.jsonl             all of those
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from qwen_vla_core.data.boxes import RELATIVE
from qwen_vla_core.data.captions.captioner import Captioner, CaptionFailure
from qwen_vla_core.data.captions.script import DIMENSIONS, clock
from qwen_vla_core.data.captions.video import Clip, Video, VideoError, load_clip
from qwen_vla_core.data.contract import CONTRACT_FILE, CONTRACT_VERSION
from qwen_vla_core.data.llava import SAMPLES_FILE
from qwen_vla_core.data.llava_format import parse_record
from qwen_vla_core.data.llava_writer import Picture, markers
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_bytes, atomic_write_json, atomic_write_text

FAILURES_FILE = "failures.jsonl"
SETTINGS_FILE = "meta/caption_settings.json"
CAPTIONS = "captions"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        out: folder to write.
        fps: frames per second of the script.
        frames: at most so many per video.
        view: view name whose tokens wrap the frames in the training data.
        retry_failed: try videos again that are in the failure list.
    """

    out: Path
    fps: float = 2.0
    frames: int = 64
    view: str = "ego"
    retry_failed: bool = False


def caption_all(
    job: Job, captioner: Captioner, model: str, videos: list[Video], progress: bool = True
) -> dict[str, Any]:
    """Captions what is left of ``videos``.

    Returns:
        JSON summary: videos, captioned, failed with reasons, those done before, frames, generations.

    Raises:
        UserError: the folder was made with other settings, or cannot be written.
    """
    _agree(job, captioner, model)
    done, counts = 0, {"captioned": 0, "failed": 0, "generations": 0}
    try:
        with tqdm(videos, unit="video", desc="caption", disable=None if progress else True) as bar:
            for video in bar:
                record, failure = _paths(job.out, video)
                if record.is_file() or (failure.is_file() and not job.retry_failed):
                    done += 1
                    continue
                generations, good = _caption_one(job, captioner, model, video)
                counts["generations"] += generations
                counts["captioned" if good else "failed"] += 1
                bar.set_postfix(failed=counts["failed"], refresh=False)
    finally:
        total = assemble(job)
    return {"out": str(job.out), "videos": len(videos), "done_before": done, **counts, "dataset": total}


def _agree(job: Job, captioner: Captioner, model: str) -> None:
    settings = {
        "model": model,
        "fps": job.fps,
        "frames": job.frames,
        "view": job.view,
        "dimensions": list(DIMENSIONS),
        **dataclasses.asdict(captioner.settings),
    }
    file = job.out / SETTINGS_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise UserError(f"{job.out}: was begun with other settings ({', '.join(changed)}); use another folder")
    elif job.out.exists() and any(job.out.iterdir()):
        raise UserError(f"{job.out}: exists and holds something else; choose another folder")
    else:
        _write(lambda: atomic_write_json(file, settings), job.out)


def _paths(out: Path, video: Video) -> tuple[Path, Path]:
    """The caption's file and the failure's."""
    return out / CAPTIONS / f"{video.key}.json", out / CAPTIONS / f"{video.key}.failed"


def _caption_one(job: Job, captioner: Captioner, model: str, video: Video) -> tuple[int, bool]:
    """Captions one video; returns the number of generations and whether it worked."""
    record, failure = _paths(job.out, video)
    about = {"video": video.key, "source": str(video.path), "episode": video.episode if video.episode >= 0 else None}
    attempts: tuple[Any, ...] = ()
    try:
        clip = load_clip(video, job.fps, job.frames)
        caption = captioner.caption(clip, video.key)
    except VideoError as error:
        stage, reason = "read", str(error)
    except CaptionFailure as error:
        stage, reason, attempts = error.stage, str(error), error.attempts
    else:
        names = _save_frames(job.out, video.key, clip)
        value = {
            **about,
            "task": clip.task,
            "model": model,
            "frames": [{"time": time, "image": name} for time, name in zip(clip.times, names, strict=True)],
            "sketch": caption.sketch,
            "script": caption.script,
            "attempts": caption.attempts,
            "questions": [
                {"frames": list(seen), "question": question, "answer": answer}
                for seen, question, answer in caption.questions
            ],
        }
        _write(lambda: atomic_write_text(record, json.dumps(value, ensure_ascii=False, indent=1) + "\n"), job.out)
        failure.unlink(missing_ok=True)
        return sum(caption.attempts.values()), True
    listed = [dataclasses.asdict(attempt) for attempt in attempts]
    value = {**about, "stage": stage, "reason": reason, "attempts": listed}
    _write(lambda: atomic_write_text(failure, json.dumps(value, ensure_ascii=False) + "\n"), job.out)
    return len(attempts), False


def _write(action: Any, out: Path) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror}); make room and run the same again") from None


def _save_frames(out: Path, key: str, clip: Clip) -> list[str]:
    names = []
    for time, frame in zip(clip.times, clip.frames, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=92)
        names.append(f"images/{key}/{clock(time)}.jpg")
        _write(functools.partial(atomic_write_bytes, out / names[-1], buffer.getvalue()), out)
    return names


def _records(out: Path, suffix: str) -> Iterator[dict[str, Any]]:
    for path in sorted((out / CAPTIONS).rglob(f"*{suffix}")):
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove it and run the same again") from None
        yield value


def assemble(job: Job) -> dict[str, int]:
    """Writes the dataset and the failure list from the videos that are done; always consistent, whenever stopped."""
    lines, videos, frames = [], 0, 0
    for record in _records(job.out, ".json"):
        videos += 1
        frames += len(record["frames"])
        for number, asked in enumerate(record["questions"]):
            shown = [record["frames"][i] for i in asked["frames"]]
            tags = markers([Picture("", "", job.view)] * len(shown))
            answer = json.dumps(asked["answer"], ensure_ascii=False)
            times = ", ".join(clock(frame["time"]) for frame in shown)
            question = f"{tags}The frames were taken at {times} seconds. {asked['question']}"
            line = {
                "id": f"{record['video']}-{number}",
                "image": [frame["image"] for frame in shown],
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
                "task": "sketch" if number == 0 else "script",
                "times": [frame["time"] for frame in shown],
            }
            with contextlib.suppress(ValueError):  # a phrase that holds a model token stays out of the training data
                parse_record(line)
                lines.append(json.dumps(line, ensure_ascii=False))
    failures = [json.dumps(record, ensure_ascii=False) for record in _records(job.out, ".failed")]

    def write() -> None:
        atomic_write_text(job.out / FAILURES_FILE, "".join(f"{line}\n" for line in failures))
        atomic_write_text(job.out / SAMPLES_FILE, "".join(f"{line}\n" for line in lines))
        settings = json.loads((job.out / SETTINGS_FILE).read_text(encoding="utf-8"))
        about = {
            "version": CONTRACT_VERSION,
            "family": "captions",
            "contract": None,
            "format": "llava",
            "coordinates": {"convention": RELATIVE},
            "views": [job.view],
            "source": {"name": "captions", "licence": "that of the videos", **settings},
        }
        atomic_write_json(job.out / CONTRACT_FILE, about)

    _write(write, job.out)
    return {"videos": videos, "frames": frames, "samples": len(lines), "failures": len(failures)}
