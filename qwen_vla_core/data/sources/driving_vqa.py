"""Driving questions over six cameras and several moments: DriveLM-nuScenes and nuScenes-QA.

Layouts, told apart by their keys:
- DriveLM-nuScenes v1.0/v1.1 (github.com/OpenDriveLab/DriveLM; data CC BY-NC-SA 4.0): scene → ``key_frames`` →
  ``QA`` of perception, prediction, planning and behavior, and ``image_paths`` of six cameras. Objects are named by
  ``<c1,CAM_FRONT,1043.2,82.2>``, pixels of that camera's picture.
- nuScenes-QA (github.com/qiantianwen/NuScenes-QA; CC BY-NC-SA 4.0 as nuScenes): ``questions`` of ``sample_token``,
  ``question``, ``answer``, ``template_type``; its pictures come from nuScenes' tables ``v1.0-*/sample.json`` and
  ``sample_data.json`` (nuscenes.org, non-commercial).

Every camera's frames stand between its boundary tokens, the newest last; ``times`` holds seconds before the question's
moment. Places are rewritten into the backbone's convention with their form kept [O].
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_vla_core.data.json_source import Document, load, stream_array
from qwen_vla_core.data.llava_writer import Draft, Picture, write_dataset
from qwen_vla_core.data.vl_options import add_arguments as add_shared
from qwen_vla_core.data.vl_options import option, picture_folder
from qwen_vla_core.errors import UserError

# Clockwise from the front, as one would turn round [O].
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CATEGORIES = ("perception", "prediction", "planning", "behavior")
_STAMP = re.compile(r"__(\d{16})\.\w+$")  # microseconds in nuScenes' file names


@dataclass(frozen=True)
class Moment:
    """One key frame.

    Attributes:
        pictures: camera → file below the picture folder.
        time_s: seconds, on one clock per scene.
    """

    pictures: Mapping[str, str]
    time_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC is the annotation file; ``--images`` the nuScenes folder that holds ``samples/``."""
    add_shared(parser)
    parser.add_argument("--frames", type=int, default=1, help="key frames per camera, the last being now (default: 1)")
    parser.add_argument("--tables", type=Path, help="nuScenes-QA: folder of sample.json (default: v1.0-* in --images)")


def convert(src: Path, out: Path, options: Any, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """One conversation per question; see ``write_dataset`` for result and errors."""
    src = Path(src)
    document, root = load(src), picture_folder(options, src)
    frames = option(options, "frames", 1)
    if frames < 1:
        raise UserError(f"--frames {frames}: must be at least 1")
    files = [src]
    if isinstance(document.value, dict) and "questions" in document.value:
        tables = option(options, "tables") or _tables(root)
        files += [tables / "sample.json", tables / "sample_data.json"]
        drafts, layout = _nuscenes_qa(document, tables, root, frames), "nuScenes-QA"
    else:
        drafts, layout = _drivelm(document, root, frames), "DriveLM-nuScenes"
    source = {"name": "driving_vqa", "annotations": src.name, "layout": layout, "licence": "CC BY-NC-SA 4.0"}
    return write_dataset(
        Path(out), drafts, family="driving_vqa", source=source, files=files, options=options, workers=workers,
        progress=progress,
    )  # fmt: skip


def _show(root: Path, history: Sequence[Moment]) -> tuple[tuple[Picture, ...], str]:
    """The pictures of some moments, camera by camera, and a sentence about their times."""
    now = history[-1].time_s
    pictures = tuple(
        Picture(str(root / name), name, camera.lower(), round(moment.time_s - now, 3))
        for camera in CAMERAS
        for moment in history
        if (name := moment.pictures.get(camera))
    )
    if len(history) == 1:
        return pictures, ""
    earlier = ", ".join(f"{now - moment.time_s:.1f} s ago" for moment in history[:-1])
    return pictures, f"Each camera shows {len(history)} frames: {earlier} and now.\n"


def _drivelm(document: Document, root: Path, frames: int) -> list[Draft]:
    if not isinstance(document.value, dict):
        document.fail("expected scenes by their token, or 'questions'")
    drafts = []
    for scene, content in document.value.items():
        if not isinstance(content, dict):
            document.fail("expected an object with 'key_frames'", scene)
        keyed = document.get(content, dict, "key_frames", scene)
        moments = {token: _moment(document, frame, scene, token) for token, frame in keyed.items()}
        order = sorted(moments, key=lambda token: moments[token].time_s)
        for token, frame in keyed.items():
            place = order.index(token)
            history = [moments[t] for t in order[max(0, place + 1 - frames) : place + 1]]
            pictures, note = _show(root, history)
            missing = [camera for camera in CAMERAS if camera not in moments[token].pictures]
            problem = f"has no picture of {', '.join(missing)}" if missing else ""
            asked = document.get(frame, dict, "QA", scene, "key_frames", token)
            for category, pairs in asked.items():
                if category not in CATEGORIES or not isinstance(pairs, list):
                    known = ", ".join(CATEGORIES)
                    document.fail(f"expected a list under one of {known}", scene, "key_frames", token, "QA", category)
                for number, pair in enumerate(pairs):
                    at = (scene, "key_frames", token, "QA", category, number)
                    if not isinstance(pair, dict):
                        document.fail("expected an object with Q and A", *at)
                    question, answer = str(pair.get("Q") or "").strip(), str(pair.get("A") or "").strip()
                    empty = "its question is empty" if not question else "" if answer else "has no answer"
                    drafts.append(
                        Draft(
                            id=f"drivelm-{token}-{category}-{number}",
                            pictures=pictures,
                            turns=((note + question, answer),),
                            where=document.where(*at),
                            task=category,
                            problem=problem or empty,
                        )
                    )
    return drafts


def _moment(document: Document, frame: Any, scene: str, token: str) -> Moment:
    if not isinstance(frame, dict):
        document.fail("expected an object with 'QA' and 'image_paths'", scene, "key_frames", token)
    paths = document.get(frame, dict, "image_paths", scene, "key_frames", token)
    pictures, times = {}, []
    for camera, path in paths.items():
        # "../nuscenes/samples/CAM_FRONT/….jpg": only what follows the dataset's root is the same everywhere.
        parts = PurePosixPath(str(path)).parts
        pictures[camera] = "/".join(parts[parts.index("samples") :]) if "samples" in parts else str(path).lstrip("./")
        stamp = _STAMP.search(str(path))
        times.append(int(stamp[1]) * 1e-6 if stamp else 0.0)
    return Moment(pictures, min(times, default=0.0))


def _tables(root: Path) -> Path:
    found = sorted(path.parent for path in root.glob("v1.0-*/sample_data.json"))
    if len(found) != 1:
        what = "no nuScenes tables (v1.0-*/sample_data.json)" if not found else f"{len(found)} sets of nuScenes tables"
        raise UserError(f"{root}: holds {what}; name the folder of one with --tables")
    return found[0]


def _nuscenes_qa(document: Document, tables: Path, root: Path, frames: int) -> list[Draft]:
    questions = document.array("questions")
    asked = {document.get(entry, str, "sample_token", "questions", number) for number, entry in enumerate(questions)}
    before = {str(row.get("token")): str(row.get("prev") or "") for _, row in stream_array(tables / "sample.json")}
    chains: dict[str, list[str]] = {}
    for token in asked:
        chain = [token]
        while len(chain) < frames and before.get(chain[0]):
            chain.insert(0, before[chain[0]])
        chains[token] = chain
    wanted = {token for chain in chains.values() for token in chain}
    moments = _key_frames(tables / "sample_data.json", wanted)
    drafts = []
    for number, entry in enumerate(questions):
        at = ("questions", number)
        question, token = document.get(entry, str, "question", *at), entry["sample_token"]
        answer = str(entry.get("answer", "")).strip()
        problem = "" if answer else "has no answer"
        history = [moments[t] for t in chains[token] if t in moments]
        missing = [c for c in CAMERAS if token not in moments or c not in moments[token].pictures]
        if missing:
            problem = f"sample {token} has no key frame of {', '.join(missing)} in {tables.name}"
        pictures, note = _show(root, history) if not problem else ((), "")
        drafts.append(
            Draft(
                id=f"nuscenes-qa-{number}",
                pictures=pictures,
                turns=((note + question.strip(), answer),),
                where=document.where(*at),
                task=str(entry.get("template_type", "")),
                problem=problem,
            )
        )
    return drafts


def _key_frames(file: Path, wanted: set[str]) -> dict[str, Moment]:
    """sample token → its key frames, from a table of millions of rows read row by row."""
    found: dict[str, tuple[dict[str, str], list[float]]] = {}
    for line, row in stream_array(file):
        token = row.get("sample_token")
        if token not in wanted or not row.get("is_key_frame"):
            continue
        name, stamp = row.get("filename"), row.get("timestamp")
        if not isinstance(name, str) or not isinstance(stamp, int):
            raise UserError(f"{file}:{line}: a key frame needs 'filename' and 'timestamp'")
        camera = PurePosixPath(name).parent.name
        if camera in CAMERAS:
            pictures, times = found.setdefault(str(token), ({}, []))
            pictures[camera] = name
            times.append(stamp * 1e-6)
    return {token: Moment(pictures, min(times)) for token, (pictures, times) in found.items()}
