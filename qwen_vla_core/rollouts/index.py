"""Recorded episodes as rows: what lies below a folder of rollouts, how each ended, and how to judge one afterwards.

An episode is a folder ``<run>/episode_003`` with a bag and ``episode.json``. One that was never closed lies below
``<run>/.partial``: being recorded right now, or left behind by a recorder that was killed or could not write.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

SIDECAR = "episode.json"
PARTIAL = ".partial"
OUTCOMES = ("success", "partial", "failure", "aborted")
UNFINISHED = "unfinished"
_EPISODE = re.compile(r"episode_(\d+)")


@dataclass(frozen=True)
class Rollout:
    """One recorded episode, as its ``episode.json`` tells it.

    Attributes:
        folder: that holds the bag.
        run: name of the run's folder, such as ``20250131_002``.
        number: of the episode in its run.
        instruction: what the robot was asked first.
        outcome: success, partial, failure, aborted; unfinished: nobody has closed the bag.
        reason: why it ended so, one line; empty: nobody said.
        note: what people noted.
        seconds: length; None where it is not known.
        seed: of the simulated scene; None on a robot.
        checkpoint: name the recorder was given; checkpoint_id: name and weights as the policy reported them.
        embodiment: the robot's name.
        simulated: whether a simulator or a mock stood in for the robot.
        size: bytes on disk.
        messages: in the bag; 0 where it is not known.
        lost: topic → messages that were published and never arrived.
        started: when, ISO 8601 in UTC; empty: not known.
        judged_by: ``operator``, ``simulator``, ``recorder`` or whoever labelled it.
        partial: the bag was never closed; ``rollouts repair`` makes it whole.
        recording: a recorder is writing it now.
        problem: why ``episode.json`` could not be read; empty: it could.
    """

    folder: Path
    run: str
    number: int
    instruction: str = ""
    outcome: str = UNFINISHED
    reason: str = ""
    note: str = ""
    seconds: float | None = None
    seed: int | None = None
    checkpoint: str = ""
    checkpoint_id: str = ""
    embodiment: str = ""
    simulated: bool = False
    size: int = 0
    messages: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    started: str = ""
    judged_by: str = ""
    partial: bool = False
    recording: bool = False
    problem: str = ""

    @property
    def name(self) -> str:
        """How people call it: ``20250131_002/episode_003``."""
        return f"{self.run}/episode_{self.number:03d}"

    @property
    def bag(self) -> Path:
        """The MCAP file; it may be missing."""
        return self.folder / f"{self.folder.name}.mcap"

    @property
    def readable(self) -> bool:
        """Whether there is a bag to read, whole or not."""
        return self.bag.is_file()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, in the order of the attributes."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"name": self.name, **values, "folder": str(self.folder), "lost": dict(self.lost)}


def find_rollouts(root: str | Path) -> list[Rollout]:
    """Every episode below a folder of runs, or of one run, in the order of runs and numbers.

    Args:
        root: ``rollouts``, one run's folder, or one episode's.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of rollouts; name one with --rollouts, or record with `qwen-vla up`")
    if _EPISODE.fullmatch(root.resolve().name):
        return [read_rollout(root)]
    patterns = ("episode_*", f"{PARTIAL}/episode_*", "*/episode_*", f"*/{PARTIAL}/episode_*")
    folders = {
        path
        for pattern in patterns
        for path in root.glob(pattern)
        if path.is_dir()
        and _EPISODE.fullmatch(path.name)
        and (path / SIDECAR).exists() | bool(list(path.glob("*.mcap")))
    }
    return sorted(map(read_rollout, folders), key=lambda rollout: (rollout.run, rollout.number, rollout.partial))


def find_rollout(name: str, root: str | Path = "rollouts") -> Rollout:
    """The episode that a person means.

    Args:
        name: its folder; ``RUN/episode_003`` or ``RUN/3`` below ``root``; a run with one episode; or ``last``: the
            newest that nobody is writing.
        root: folder of runs.

    Raises:
        UserError: there is none, or several.
    """
    path = Path(name).expanduser()
    if path.is_dir() and _EPISODE.fullmatch(path.resolve().name):
        return read_rollout(path)
    known = find_rollouts(path if path.is_dir() else root)
    if name == "last":
        known = [rollout for rollout in known if not rollout.recording]
        if known:
            return max(known, key=lambda rollout: (rollout.started, rollout.run, rollout.number))
    elif not path.is_dir():
        run, _, episode = name.strip("/").rpartition("/")
        known = [
            rollout
            for rollout in known
            if (rollout.run == run and episode in (str(rollout.number), f"episode_{rollout.number:03d}"))
            or (not run and rollout.run == episode)
        ]
    if len(known) == 1:
        return known[0]
    if not known:
        raise UserError(f"{name}: no such rollout below {root}; `qwen-vla rollouts list` shows their names")
    raise UserError(f"{name}: {len(known)} rollouts, {known[0].name} … {known[-1].name}; name one of them")


def read_rollout(folder: str | Path) -> Rollout:
    """The row of one episode; a missing or damaged ``episode.json`` becomes its ``problem``."""
    folder = Path(folder)
    place = folder.resolve()
    partial = place.parent.name == PARTIAL
    run = (place.parent.parent if partial else place.parent).name
    matched = _EPISODE.fullmatch(place.name)
    known: dict[str, Any] = {"folder": folder, "run": run, "number": int(matched[1]) if matched else 0}
    known |= {"partial": partial, "recording": partial and _is_written(folder), "size": _size(folder)}
    try:
        about = read_about(folder)
    except UserError as error:
        return Rollout(**known, problem=str(error))
    outcome = about.get("outcome")
    try:
        return Rollout(
            **known,
            instruction=str(about.get("instruction") or ""),
            outcome=outcome if outcome in OUTCOMES else UNFINISHED,
            reason=str(about.get("reason") or ""),
            note=str(about.get("note") or ""),
            seconds=None if about.get("seconds") is None else float(about["seconds"]),
            seed=None if about.get("seed") is None else int(about["seed"]),
            checkpoint=str(about.get("checkpoint") or ""),
            checkpoint_id=str(about.get("checkpoint_id") or ""),
            embodiment=str(about.get("embodiment") or ""),
            simulated=bool(about.get("simulated")),
            messages=int(about.get("messages") or 0),
            lost={str(topic): int(count) for topic, count in dict(about.get("lost") or {}).items()},
            started=str(about.get("started") or ""),
            judged_by=str(about.get("judged_by") or ""),
        )
    except (TypeError, ValueError) as error:
        return Rollout(**known, problem=f"{folder / SIDECAR}: damaged ({error})")


def read_about(folder: str | Path) -> dict[str, Any]:
    """The whole ``episode.json`` of an episode.

    Raises:
        UserError: it is missing or no JSON object.
    """
    file = Path(folder) / SIDECAR
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{file}: holds no JSON object")
    return about


def label(
    rollout: Rollout, outcome: str | None = None, note: str | None = None, reason: str | None = None, by: str = "person"
) -> Rollout:
    """Judges an episode after it was recorded; what was said before is kept under ``earlier``.

    The file is replaced whole: whoever reads it meanwhile sees the old or the new judgement.

    Args:
        rollout: which.
        outcome: success, partial, failure or aborted; None: as it is.
        note: takes the place of the note; None: as it is.
        reason: the same for the reason.
        by: who judges.

    Returns:
        its new row.

    Raises:
        UserError: the outcome is unknown, the episode is being recorded, or its file cannot be read or written.
    """
    if outcome is not None and outcome not in OUTCOMES:
        raise UserError(f"outcome '{outcome}': use one of {', '.join(OUTCOMES)}")
    if rollout.recording:
        raise UserError(f"{rollout.name}: is being recorded; end it first (services qwen_vla/episode_…)")
    about = read_about(rollout.folder)
    given = {"outcome": outcome, "note": note, "reason": reason}
    changed = {key: value for key, value in given.items() if value is not None and value != about.get(key)}
    if changed:
        before = {key: about.get(key) for key in ("outcome", "reason", "note", "judged_by")}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about["earlier"] = [*about.get("earlier", []), {**before, "until": now}]
        about.update(changed)
        if outcome is not None:
            about["judged_by"] = by
        try:
            atomic_write_json(rollout.folder / SIDECAR, about)
        except OSError as error:
            raise UserError(f"{rollout.folder / SIDECAR}: cannot be written ({error.strerror})") from None
    return read_rollout(rollout.folder)


def _is_written(folder: Path) -> bool:
    """Whether a recorder holds the bag: it locks the file it writes, and the kernel unlocks it when it dies."""
    try:
        with (folder / f"{folder.name}.mcap").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    except OSError:  # moved away meanwhile
        return 0
