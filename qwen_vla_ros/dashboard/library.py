"""The recorded episodes for the page: their list, labels given afterwards, and films. No ROS in here.

Nothing here happens in the event loop: folders are read in a thread, and a film, which means decoding a bag and
encoding a video, is made by a process of its own with a low priority, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import SIDECAR, Rollout, find_rollouts, label

FRESH_S = 1.0  # how long a list of rollouts is shown again before the folders are looked at again
SHOWN = 300  # the newest; more would only be scrolled past
FILMS = ".films"
MAX_FILMS_WAITING = 8
FIELDS = (
    "name", "instruction", "outcome", "reason", "note", "seconds", "seed", "checkpoint_id", "embodiment", "simulated",
    "size", "started", "judged_by", "partial", "recording", "problem",
)  # fmt: skip


class Library:
    """Rollouts below one folder. A name is only ever looked up in the list of what was found there.

    Args:
        root: folder of runs; it need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser()
        self._found: dict[str, Rollout] = {}
        self._found_at = -FRESH_S
        self._reading = asyncio.Lock()
        self._filming = asyncio.Lock()
        self._films: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[int, str]] = {}  # name → size of the bag then, what went wrong
        self._process: asyncio.subprocess.Process | None = None

    async def rows(self) -> list[dict[str, Any]]:
        """The newest first, as plain JSON."""
        found = await self._look()
        newest = sorted(found.values(), key=lambda r: (r.started, r.run, r.number), reverse=True)[:SHOWN]
        return [_row(rollout) for rollout in newest]

    async def label(self, name: str, outcome: str, note: str) -> dict[str, Any]:
        """Judges an episode afterwards; returns its new row.

        Raises:
            KeyError: there is none of this name. UserError: it cannot be judged.
        """
        rollout = (await self._look(fresh=True))[name]
        judged = await asyncio.to_thread(label, rollout, outcome, note or None, None, "operator")
        self._found_at = -FRESH_S
        return _row(judged)

    async def film(self, name: str) -> Path | None:
        """The film of an episode; None while it is being made, which the first question begins.

        Raises:
            KeyError: there is no episode of this name. UserError: there is nothing to film, or it failed.
        """
        found = await self._look()
        if name not in found:
            found = await self._look(fresh=True)
        rollout = found[name]
        if rollout.recording:
            raise UserError(f"{name} is being recorded: its film can be made when it has ended")
        path = film_path(rollout)
        if _is_newer(path, rollout.bag, rollout.folder / SIDECAR):  # the film shows the outcome, which may change
            return path
        failed = self._failed.get(name)
        if failed is not None and failed[0] == rollout.size:
            raise UserError(failed[1])
        if name not in self._films:
            if len(self._films) >= MAX_FILMS_WAITING:
                raise UserError(f"{MAX_FILMS_WAITING} films are being made already: wait for them")
            self._films[name] = asyncio.create_task(self._make(rollout, path))
        return None

    async def _make(self, rollout: Rollout, path: Path) -> None:
        try:
            async with self._filming:
                command = [sys.executable, "-m", "qwen_vla_ros.dashboard.filming", str(rollout.folder), str(path)]
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )
                _, told = await self._process.communicate()
                if self._process.returncode != 0:
                    lines = told.decode(errors="replace").strip().splitlines()
                    self._failed[rollout.name] = (rollout.size, lines[-1] if lines else "the film could not be made")
                self._process = None
        except OSError as error:
            self._failed[rollout.name] = (rollout.size, f"the film could not be made: {error}")
        finally:
            self._films.pop(rollout.name, None)

    async def close(self) -> None:
        """Ends what is being made."""
        for task in list(self._films.values()):
            task.cancel()
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _look(self, fresh: bool = False) -> dict[str, Rollout]:
        async with self._reading:
            if fresh or time.monotonic() - self._found_at > FRESH_S:
                found = await asyncio.to_thread(self._find)
                self._found = {rollout.name: rollout for rollout in found}
                self._found_at = time.monotonic()
            return self._found

    def _find(self) -> list[Rollout]:
        return find_rollouts(self._root) if self._root.is_dir() else []


def film_path(rollout: Rollout) -> Path:
    """Where its film is kept: in its run's folder, so that it goes when the run does."""
    run = rollout.folder.resolve().parent
    return (run.parent if rollout.partial else run) / FILMS / f"{rollout.folder.name}.mp4"


def _is_newer(film: Path, *sources: Path) -> bool:
    try:
        made = film.stat().st_mtime
    except OSError:
        return False
    return all(not source.exists() or source.stat().st_mtime <= made for source in sources)


def _row(rollout: Rollout) -> dict[str, Any]:
    values = rollout.to_json()
    return {key: values[key] for key in FIELDS} | {"run": rollout.run, "readable": rollout.readable}
