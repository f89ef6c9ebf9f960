"""Episodes of an action corpus → a LeRobot dataset: in parallel, resumable, every dropped episode with its reason.

Every converter of an action corpus ends here. A source describes its episodes as small items and offers a function that
reads one; what it returns is written in the order of the items, so that the result does not depend on the number of
workers. ``convert_journal.jsonl`` says what was written, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.data.source_frames import Frames, Size
from qwen_vla_core.errors import UserError

if TYPE_CHECKING:
    from qwen_vla_core.data.lerobot.staging import EpisodeStager, Staged

T = TypeVar("T")
JOURNAL = "convert_journal.jsonl"
_NOT_THE_JOB = ("job", "run_job", "command", "run", "json", "workers", "resume", "src", "out", "ray", "progress")


@dataclass(frozen=True)
class Episode:
    """One episode before it is written.

    Attributes:
        name: for lists and errors.
        rows: its numbers; ``rows.task`` indexes into ``tasks``.
        tasks: instructions of this episode.
        frames: view → T pictures.
        info: JSON kept with the episode: where it comes from.
    """

    name: str
    rows: EpisodeRows
    tasks: tuple[str, ...]
    frames: Mapping[str, Frames]
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Attributes:
        item: its name.
        episodes: none, one, or several where an item falls into usable stretches.
        dropped: (what, reason) of everything that was left out.
        figures: numbers that are added up over the items for the report.
    """

    item: str
    episodes: tuple[Episode, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


class Named(Protocol):
    """An item of work."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Arguments that all converters of action corpora share."""
    parser.add_argument("--limit", type=int, help="only the first so many recordings")
    parser.add_argument(
        "--min-steps", type=int, default=8, help="shorter episodes are dropped, with their reason (default: 8)"
    )
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="list damaged recordings as dropped instead of stopping at the first",
    )
    parser.add_argument("--ray", action="store_true", help="work as a Ray Data job; all its nodes must see SRC and OUT")
    parser.add_argument(
        "--height", type=int, default=224, help="picture height; the width keeps the aspect; 0 = as is (default: 224)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="numbers and instructions only")


def option(options: Any, name: str, default: Any = None) -> Any:
    """An option that a caller from Python may have left out."""
    value = getattr(options, name, None)
    return default if value is None else value


def limited(items: Sequence[T], options: Any, where: str) -> Sequence[T]:
    """The items that ``--limit`` leaves.

    Raises:
        UserError: the limit is no count, or there is nothing at all.
    """
    limit = option(options, "limit")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be at least 1")
    if not items:
        raise UserError(f"{where}: holds no recordings in this layout")
    return items[:limit]


def write_dataset(
    out: Path,
    contract: DataContract,
    work: Callable[[N], Outcome],
    items: Sequence[N],
    *,
    family: str,
    views: Mapping[str, Size],
    source: Mapping[str, Any],
    options: Any,
    workers: int,
    progress: bool,
    extras: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes or goes on with a dataset; episodes are encoded by the workers and joined in the order of the items.

    Args:
        out: folder.
        contract: of the dataset; its views are those of ``views``.
        work: reads an item; module level, or a ``functools.partial`` of such a function.
        items: in the order of the source.
        family: of the mixture.
        views: view → (width, height) as stored.
        source: provenance for the sidecar: name, licence, layout, ….
        options: the arguments of ``add_arguments``.
        workers: processes.
        progress: show a bar.
        extras: further columns of the rows' ``extra``: name → dtype.

    Returns:
        ``converted``, ``steps``, ``dropped`` ([{item, reason}]), ``resumed`` items, and the sums of the figures.

    Raises:
        UserError: the folder holds another job, an item is damaged, or nothing at all could be converted.
    """
    from qwen_vla_core.data.lerobot.writer import LeRobotWriter

    contract = replace(contract, views=tuple(views))
    resume = bool(option(options, "resume", False))
    done = _Journal.open(out, _job(source, family, items, options), resume)
    with LeRobotWriter(
        out,
        contract,
        family=family,
        views=dict(views),
        version=option(options, "version", "v3.0"),
        source=dict(source),
        extras=extras,
        resume=resume,
    ) as writer:
        durable = writer.episodes
        done.keep(durable)
        resumed = len(done.lines)
        staging = partial(_stage, work, writer.stager, bool(option(options, "skip_damaged", False)))
        for outcome, staged in map_episodes(
            staging, items[resumed:], workers, bool(option(options, "ray", False)), progress, out.name
        ):
            first = done.add(outcome)
            for number, episode in enumerate(staged, first):
                if number < durable:  # of an item that was being written when the last run stopped
                    shutil.rmtree(episode.folder)
                else:
                    writer.add_staged(episode)
    return _report(done, resumed, out)


def _stage(
    work: Callable[[N], Outcome], stager: EpisodeStager, skip_damaged: bool, item: N
) -> tuple[Outcome, list[Staged]]:
    """One item in a worker: its episodes lie on disk when this returns, so that no picture travels."""
    staged: list[Staged] = []
    try:
        outcome = work(item)
        for episode in outcome.episodes:
            staged.append(stager.stage(episode.rows, episode.tasks, dict(episode.frames), dict(episode.info)))
        light = [replace(episode, frames={}) for episode in outcome.episodes]
        return replace(outcome, episodes=tuple(light)), staged
    except UserError as error:
        for episode_on_disk in staged:
            shutil.rmtree(episode_on_disk.folder)
        if not skip_damaged:
            raise
        return Outcome(item.name, dropped=((item.name, f"damaged: {error}"),)), []


def _job(source: Mapping[str, Any], family: str, items: Sequence[Named], options: Any) -> dict[str, Any]:
    given = {k: v for k, v in sorted(vars(options).items()) if k not in _NOT_THE_JOB and not callable(v)}
    told = json.loads(json.dumps(given, default=str))
    names = [item.name for item in items]
    ends = [names[0], names[-1]] if names else []
    meaning = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "source": source.get("name"),
        "provenance": meaning,
        "family": family,
        "items": len(names),
        "ends": ends,
        "options": told,
    }


@dataclass
class _Journal:
    """Lines of ``convert_journal.jsonl`` after the first, which says what the job is."""

    path: Path
    job: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def open(cls, out: Path, job: dict[str, Any], resume: bool) -> _Journal:
        path = out / JOURNAL
        if not resume and out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: exists; go on with --resume, or name a folder that does not")
        if not path.is_file():
            return cls(path, job, [])
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that was being written when the run stopped
                break
        if lines and lines[0] != job:
            different = sorted(key for key in job if lines[0].get(key) != job[key])
            raise UserError(
                f"{out}: was begun from other data or with other options ({', '.join(different)}); use another folder"
            )
        return cls(path, job, lines[1:])

    def keep(self, durable: int) -> None:
        """Forgets items whose episodes did not all reach the disk, and starts the file anew."""
        whole = 0
        for line in self.lines:
            if line["first"] + line["episodes"] > durable:
                break
            whole += 1
        self.lines = self.lines[:whole]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (self.job, *self.lines)), encoding="utf-8")
        temporary.replace(self.path)

    def add(self, outcome: Outcome) -> int:
        """Notes an item before its episodes are written; returns the number of its first episode."""
        last = self.lines[-1] if self.lines else {"first": 0, "episodes": 0}
        first = int(last["first"]) + int(last["episodes"])
        line = {
            "item": outcome.item,
            "first": first,
            "episodes": len(outcome.episodes),
            "steps": sum(len(episode.rows) for episode in outcome.episodes),
            "dropped": [list(pair) for pair in outcome.dropped],
            "figures": dict(outcome.figures),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        return first


def _report(journal: _Journal, resumed: int, out: Path) -> dict[str, Any]:
    lines = journal.lines
    dropped = [{"item": what, "reason": reason} for line in lines for what, reason in line["dropped"]]
    converted = sum(line["episodes"] for line in lines)
    if not converted:
        journal.path.unlink()
        with contextlib.suppress(OSError):
            out.rmdir()
        first = f"; the first reason: {dropped[0]['item']}: {dropped[0]['reason']}" if dropped else ""
        raise UserError(f"{out}: not one of {len(lines)} recordings could be used{first}")
    figures: dict[str, float] = {}
    for line in lines:
        for name, value in line["figures"].items():
            figures[name] = figures.get(name, 0.0) + value
    steps = sum(line["steps"] for line in lines)
    return {"converted": converted, "steps": steps, "dropped": dropped, "resumed": resumed, "figures": figures}


def task_runs(texts: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Instruction of every step → (T,) int64 numbers and the different instructions in order of appearance."""
    known: dict[str, int] = {}
    numbers = [known.setdefault(text, len(known)) for text in texts]
    return np.array(numbers, np.int64), tuple(known)
