"""Drafts of conversations → a folder of LLaVA lines: pictures checked and linked, places re-expressed, work resumable.

Every converter of a vision-language corpus ends here. Drafts are worked on in parts; a finished part is a file, so a
conversion that was stopped goes on where it was. What cannot be used is listed with its reason in ``dropped.jsonl``,
never silently skipped; the source is only read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vla_core.data.boxes import PIXELS, Coordinates, Size, re_express
from qwen_vla_core.data.contract import CONTRACT_FILE, CONTRACT_VERSION
from qwen_vla_core.data.llava import SAMPLES_FILE, coordinates_of
from qwen_vla_core.data.llava_format import TAG, parse_record
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.pictures import PictureError, check_picture
from qwen_vla_core.data.vl_options import described_coordinates, option
from qwen_vla_core.embodiment.prompt import view_tokens
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json, atomic_write_text, fsync

DROPPED_FILE = "dropped.jsonl"
PARTS, STATE_FILE = "parts", "parts/state.json"
PART_SIZE = 256  # drafts; about a second of work, so that stopping loses little


@dataclass(frozen=True)
class Picture:
    """One picture of a draft.

    Attributes:
        path: source file.
        name: where it goes below ``images/``, with its suffix.
        view: camera whose boundary tokens wrap it; empty for a picture without one.
        time: seconds, the last frame being 0; None where there is one moment only.
    """

    path: str
    name: str
    view: str = ""
    time: float | None = None


@dataclass(frozen=True)
class Draft:
    """One conversation before its pictures were looked at.

    Attributes:
        id: of the line.
        pictures: frames of one view next to each other, oldest first.
        turns: (question, answer). Texts that already hold picture markers (``marked``) keep them.
        where: ``file:line: key`` in the source, for ``dropped.jsonl``.
        task: what balanced sampling may tell apart.
        marked: the texts bring their own markers.
        problem: known to be unusable, and why: goes straight to ``dropped.jsonl``.
        written: convention of the places in the texts, by default pixels of the pictures in the source.
        size: for which the places were annotated; the picture must have it.
    """

    id: str
    pictures: tuple[Picture, ...]
    turns: tuple[tuple[str, str], ...]
    where: str
    task: str = ""
    marked: bool = False
    problem: str = ""
    written: str = PIXELS
    size: Size | None = None


def write_dataset(
    out: Path,
    drafts: Sequence[Draft],
    *,
    family: str,
    source: Mapping[str, Any],
    files: Iterable[Path],
    options: Any,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes or finishes a dataset.

    Args:
        out: folder to write; goes on with an unfinished one of the same source and options.
        drafts: in the order of the source.
        family: of the mixture.
        source: provenance for the sidecar (name, licence, …).
        files: annotation files; they and the options say whether an unfinished folder is the same job.
        options: the arguments of ``vl_options.add_arguments``.
        workers: processes; None = all cores.
        progress: show a bar.

    Returns:
        JSON summary: ``converted`` (conversations), ``dropped`` (a list of item and reason), tasks with counts, parts
        that were there already.

    Raises:
        UserError: the folder holds something else, or this conversion but ``options.resume`` is False; or nothing at
            all could be converted.
    """
    described = described_coordinates(options)
    limit = option(options, "limit")
    if limit is not None:
        if limit < 1:
            raise UserError(f"--limit {limit}: must be at least 1")
        drafts = drafts[:limit]
    if not drafts:
        raise UserError(f"{source.get('annotations', 'the source')}: holds no conversation")
    state = {
        "source": dict(source),
        "family": family,
        "coordinates": described,
        "pictures": option(options, "pictures", "link"),
        "drafts": hashlib.sha256(repr(drafts).encode()).hexdigest(),
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    if option(options, "resume") is False and ((out / CONTRACT_FILE).is_file() or (out / STATE_FILE).is_file()):
        raise UserError(f"{out}: exists; add --resume to go on with it, or choose another folder")
    summary = _finished(out, state)
    if summary is not None:
        return summary
    done = _begin(out, state)
    parts = [_Part(number, tuple(drafts[at : at + PART_SIZE])) for number, at in _ranges(len(drafts))]
    work = functools.partial(_write_part, str(out), described, state["pictures"])
    left = [part for part in parts if part.number not in done]
    for _ in map_episodes(work, left, workers=workers, progress=progress, description="convert"):
        pass
    return _finish(out, state, len(parts), len(done))


@dataclass(frozen=True)
class _Part:
    number: int
    drafts: tuple[Draft, ...]


def _ranges(count: int) -> list[tuple[int, int]]:
    return [(number, at) for number, at in enumerate(range(0, count, PART_SIZE))]


def _finished(out: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a conversion that is done already."""
    sidecar = out / CONTRACT_FILE
    if not sidecar.is_file():
        return None
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{sidecar}: damaged ({error}); remove {out} and convert again") from None
    if about.get("state") != json.loads(json.dumps(state)):
        raise UserError(f"{out}: holds another conversion; choose another folder or remove this one")
    return {**about["summary"], "dropped": _dropped(out), "resumed": True}


def _begin(out: Path, state: Mapping[str, Any]) -> set[int]:
    """Makes the folder; returns the numbers of the parts that are there."""
    file = out / STATE_FILE
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(state)):
            raise UserError(f"{out}: holds an unfinished conversion of something else; remove it or choose another")
        return {int(part.stem) for part in (out / PARTS).glob("*.jsonl") if part.stem.isdigit()}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds something else; choose another folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    atomic_write_json(file, dict(state))
    return set()


def _write_part(out: str, described: Mapping[str, Any], how: str, part: _Part) -> int:
    """Works on one part; its lines are renamed into place last."""
    folder = Path(out)
    target = coordinates_of(described)
    lines, dropped = [], []
    sizes: dict[str, Size] = {}  # neighbouring drafts share pictures
    for draft in part.drafts:
        try:
            lines.append(json.dumps(_render(draft, folder, target, how, sizes), ensure_ascii=False))
        except (PictureError, ValueError) as error:
            dropped.append(json.dumps({"item": draft.where, "id": draft.id, "reason": str(error)}, ensure_ascii=False))
        except OSError as error:
            raise UserError(f"{folder}: cannot write ({error.strerror}); make room and run the same again") from None
    stem = folder / PARTS / f"{part.number:06d}"
    try:
        atomic_write_text(stem.with_suffix(".dropped"), "".join(f"{line}\n" for line in dropped))
        atomic_write_text(stem.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UserError(f"{folder}: cannot write ({error.strerror}); make room and run the same again") from None
    return len(lines)


def _render(draft: Draft, out: Path, target: Coordinates, how: str, sizes: dict[str, Size]) -> dict[str, Any]:
    """The line of a draft; raises why it cannot be one."""
    if draft.problem:
        raise ValueError(draft.problem)
    if not draft.marked and any(TAG in text for turn in draft.turns for text in turn):
        raise ValueError(f"a text holds the picture tag {TAG}")
    for picture in draft.pictures:
        if picture.path not in sizes:
            sizes[picture.path] = check_picture(Path(picture.path))
        width, height = sizes[picture.path]
        if draft.size is not None and draft.size != (width, height):
            raise ValueError(f"annotated for {draft.size[0]}×{draft.size[1]}, but the picture is {width}×{height}")
    by_view = {picture.view or str(number): sizes[picture.path] for number, picture in enumerate(draft.pictures)}
    talk = []
    for number, turn in enumerate(draft.turns):
        question, answer = (re_express(text.strip(), by_view, Coordinates(draft.written), target) for text in turn)
        if number == 0 and not draft.marked:
            question = markers(draft.pictures) + question
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    names = [f"images/{picture.name}" for picture in draft.pictures]
    line: dict[str, Any] = {"id": draft.id, "conversations": talk}
    if names:
        line = {"id": draft.id, "image": names[0] if len(names) == 1 else names, "conversations": talk}
    if draft.task:
        line["task"] = draft.task
    if draft.pictures and all(picture.time is not None for picture in draft.pictures):
        line["times"] = [picture.time for picture in draft.pictures]
    parse_record(line)
    for picture in draft.pictures:
        _place(Path(picture.path), out / "images" / picture.name, how)
    return line


def markers(pictures: Sequence[Picture]) -> str:
    """The tags that open a question: bare pictures line by line, views between their tokens."""
    text, open_view = "", ""
    for picture in pictures:
        if open_view and picture.view != open_view:
            text += view_tokens(open_view)[1] + "\n"
        if picture.view and picture.view != open_view:
            text += view_tokens(picture.view)[0]
        text += TAG if picture.view else f"{TAG}\n"
        open_view = picture.view
    return text + (view_tokens(open_view)[1] + "\n" if open_view else "")


def _place(source: Path, target: Path, how: str) -> None:
    """Puts a picture at its place, whole or not at all; a link costs no space, a copy survives the source."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        try:
            os.link(source.resolve(), target)
            return
        except FileExistsError:
            return  # another worker was faster
        except OSError:
            pass  # another file system, or one without links
    handle, temporary = tempfile.mkstemp(prefix=".", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, 1 << 20)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _finish(out: Path, state: Mapping[str, Any], parts: int, resumed: int) -> dict[str, Any]:
    """Joins the parts and writes the sidecar, whose presence says that all is there."""
    views: dict[str, None] = {}
    tasks: Counter[str] = Counter()
    samples = 0
    numbers = range(parts)
    with _joined(out / SAMPLES_FILE) as file:
        for number in numbers:
            with (out / PARTS / f"{number:06d}.jsonl").open(encoding="utf-8") as part:
                for line in part:
                    value = json.loads(line)
                    record = parse_record(value)
                    tagged = value["conversations"][0]["value"]
                    views.update((view, None) for view in record.views if f"<|{view}_start|>" in tagged)
                    tasks[record.task] += 1
                    samples += 1
                    file.write(line)
    with _joined(out / DROPPED_FILE) as file:
        for number in numbers:
            file.write((out / PARTS / f"{number:06d}.dropped").read_text(encoding="utf-8"))
    dropped = _dropped(out)
    if not samples:
        raise UserError(
            f"{dropped[0]['item']}: {dropped[0]['reason']}; nothing could be converted, "
            f"{out / DROPPED_FILE} lists all {len(dropped)}"
        )
    summary = {
        "family": state["family"],
        "converted": samples,
        "tasks": {task: count for task, count in tasks.most_common() if task},
        "resumed_parts": resumed,
    }
    about = {
        "version": CONTRACT_VERSION,
        "family": state["family"],
        "contract": None,
        "format": "llava",
        "coordinates": state["coordinates"],
        "views": list(views),
        "source": state["source"],
        "summary": summary,
        "state": state,
    }
    atomic_write_json(out / CONTRACT_FILE, about)
    shutil.rmtree(out / PARTS)
    return {**summary, "dropped": dropped}


def _dropped(out: Path) -> list[dict[str, str]]:
    with (out / DROPPED_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextlib.contextmanager
def _joined(path: Path) -> Any:
    """A text file that replaces ``path`` once it is complete."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); make room and run the same again") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
