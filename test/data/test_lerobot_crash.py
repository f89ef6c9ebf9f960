"""Killed at any write, a dataset keeps every complete episode; gone on with, it ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lerobot_support as support
import pytest
from lerobot_support import TASKS, add, begin, rows, shown, tree, write

from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.data.lerobot.staging import STAGING
from qwen_vla_core.errors import UserError

LENGTHS = (3, 4, 3, 5)
SMALL_MB = 0.008  # two episodes a file
KILLS = 16  # moments at which the writer is killed, spread over the whole run


class Killed(BaseException):
    """As ``kill -9``: nothing that follows reaches the disk."""


@contextlib.contextmanager
def killed_at(moment: int) -> Iterator[list[int]]:
    """Every call that changes the disk counts; from number ``moment`` on they raise and do nothing."""
    count = [0]
    patch = pytest.MonkeyPatch()

    def counted(
        function: Callable[..., Any], changes: Callable[..., bool] = lambda *a, **k: True
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if changes(*args, **kwargs):
                count[0] += 1
                if count[0] > moment:
                    raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "link")):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    patch.setattr(os, "fdopen", counted(os.fdopen))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(Path, "open", counted(Path.open, lambda self, mode="r", *a, **k: "w" in mode))
    patch.setattr(Path, "write_text", counted(Path.write_text))
    try:
        yield count
    finally:
        patch.undo()


def write_all(path: Path, version: Any, resume: bool) -> None:
    with begin(path, version=version, data_mb=SMALL_MB, resume=resume) as writer:
        for episode in range(writer.episodes, len(LENGTHS)):
            add(writer, episode, LENGTHS[episode])


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_killed_at_any_write_and_gone_on_with_gives_the_same_dataset(tmp_path: Path, version: Any) -> None:
    with killed_at(10**9) as count:
        write_all(tmp_path / "whole", version, False)
    whole, writes = tree(tmp_path / "whole"), count[0]
    assert writes > 50
    for moment in range(0, writes, max(1, writes // KILLS)):
        path = tmp_path / str(moment)
        with pytest.raises(Killed), killed_at(moment):
            write_all(path, version, False)
        if (path / "meta/info.json").exists():
            check_readable(path)
        write_all(path, version, (path / "meta/info.json").exists())
        assert tree(path) == whole, f"killed at write {moment} of {writes}"


def check_readable(path: Path) -> None:
    """What the tables of a killed dataset name is complete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = LeRobotDataset(path)
    for episode, length in enumerate(dataset.lengths):
        assert length == LENGTHS[episode]
        assert (dataset.rows(episode).action == rows(episode, LENGTHS[episode]).action).all()
        found = [shown(frame) for frame in dataset.frames(episode, "ego", range(int(length)))]
        assert found == [(episode, step) for step in range(int(length))]


def test_a_staged_episode_damaged_by_a_power_cut_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(Killed), begin(tmp_path / "d") as writer:
        for episode in range(3):
            add(writer, episode, 4)
        for name in sorted((tmp_path / "d" / STAGING).glob("episode-*"))[1].glob("*.mp4"):
            name.write_bytes(name.read_bytes()[:100])
        writer.abandon = lambda: None  # type: ignore[method-assign]  # the power is gone
        writer._lock.close()
        raise Killed
    with begin(tmp_path / "d", resume=True) as writer:
        assert [info["item"] for info in writer.infos] == [0]
        add(writer, 1, 4)
    assert LeRobotDataset(tmp_path / "d").lengths.tolist() == [4, 4]


def test_an_error_leaves_complete_episodes_readable_and_marked(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), begin(tmp_path / "d") as writer:
        add(writer, 0, 5)
        raise ZeroDivisionError
    with pytest.warns(UserWarning, match="is unfinished"):
        dataset = LeRobotDataset(tmp_path / "d")
    assert dataset.lengths.tolist() == [5] and dataset.unfinished
    with begin(tmp_path / "d", resume=True) as writer:
        assert writer.episodes == 1
        add(writer, 1, 6)
    dataset = LeRobotDataset(tmp_path / "d")
    assert dataset.lengths.tolist() == [5, 6] and not dataset.unfinished
    assert [shown(f) for f in dataset.frames(1, "ego", [0, 5])] == [(1, 0), (1, 5)]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_finished_dataset_grows(tmp_path: Path, version: Any) -> None:
    write(tmp_path / "d", (5, 8), version=version)
    before = {k: v for k, v in tree(tmp_path / "d").items() if not k.startswith("meta")}
    with begin(tmp_path / "d", version=version, resume=True) as writer:
        add(writer, 2, 4, tasks=[*TASKS, "a third task"], rows=rows(2, 4, tasks=[2, 2, 0, 0]))
    dataset = LeRobotDataset(tmp_path / "d")
    assert dataset.lengths.tolist() == [5, 8, 4] and list(dataset.tasks) == [*TASKS, "a third task"]
    assert dataset.rows(2).task.tolist() == [2, 2, 0, 0] and dataset.info["total_frames"] == 17
    assert [shown(f) for f in dataset.frames(2, "ego", range(4))] == [(2, step) for step in range(4)]
    assert all(tree(tmp_path / "d")[name] == data for name, data in before.items())  # good files are not touched


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import lerobot_support as support
from qwen_vla_core.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with support.begin(Path({path!r}), version={version!r}) as writer:
        for episode in range(3):
            support.add(writer, episode, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        {then}
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("then", ["support.add(writer, 3, 4)", "pass"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_full_disk_is_one_line_and_costs_no_episode(tmp_path: Path, version: str, then: str) -> None:
    """The system refuses to write more than a few hundred bytes: while staging, and while joining."""
    path = tmp_path / "d"
    code = FULL.format(here=str(Path(__file__).parent), path=str(path), version=version, limit=400, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "the disk is full" in done.stdout, done.stderr
    assert done.stderr == "" and str(path) in done.stdout
    with begin(path, version=version, resume=True) as writer:
        assert writer.episodes == 3
    dataset = LeRobotDataset(path)
    assert dataset.lengths.tolist() == [4, 4, 4]
    assert [shown(f) for f in dataset.frames(2, "ego", [0, 3])] == [(2, 0), (2, 3)]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        support.begin(tmp_path / "file" / "d")
