"""LeRobot itself opens what we write, and we open what it writes; ``LEROBOT_PYTHON`` is an interpreter that has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import lerobot_support as support
import memory_dataset
import numpy as np
import pytest
from lerobot_support import rows, write

from qwen_vla_core.data.lerobot import LeRobotDataset, open_dataset

LEROBOT = os.environ.get("LEROBOT_PYTHON", "")
SCRIPT = Path(__file__).with_name("check_with_lerobot.py")
BACKENDS = os.environ.get("LEROBOT_BACKENDS", "pyav").split(",")
LENGTHS = (5, 8, 4)
pytestmark = pytest.mark.skipif(not LEROBOT, reason="LEROBOT_PYTHON names no interpreter that can import lerobot")


def lerobot(*arguments: object) -> None:
    done = subprocess.run([LEROBOT, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_lerobot_agrees(path: Path, read: Any) -> None:
    """Frames, numbers, tasks, lengths: what lerobot's own loader gave against what ours gives."""
    dataset = LeRobotDataset(path, decoder="pyav")
    given = [dataset.rows(episode) for episode in range(len(dataset))]
    np.testing.assert_array_equal(read["lengths"], dataset.lengths)
    for ours, theirs in (("action", "action"), ("state", "observation.state")):
        np.testing.assert_array_equal(read[theirs], np.concatenate([getattr(r, ours) for r in given]))
    np.testing.assert_array_equal(read["timestamp"], np.concatenate([r.timestamp for r in given]).astype(np.float32))
    np.testing.assert_array_equal(read["perturbed"].ravel(), np.concatenate([r.perturbed for r in given]))
    assert read["task"].tolist() == [dataset.tasks[i] for r in given for i in r.task]
    assert read["scene"].tolist() == [text for r in given for text in r.extra["scene"]]
    assert set(read["tasks"]) == set(dataset.tasks) and read["fps"] == dataset.fps
    frames = np.concatenate([dataset.frames(e, "ego", range(n)) for e, n in enumerate(dataset.lengths)])
    np.testing.assert_array_equal(read["observation.images.ego"], frames)
    for key in ("mean", "std", "min", "max", "count", "q01", "q10", "q50", "q90", "q99"):
        assert np.isfinite(read[f"stats:action:{key}"]).all()
        assert f"stats:observation.images.ego:{key}" in read


@pytest.mark.parametrize("backend", BACKENDS)
def test_lerobot_reads_our_v3(tmp_path: Path, backend: str) -> None:
    write(tmp_path / "d", LENGTHS, data_mb=0.012)
    lerobot("read", tmp_path / "d", tmp_path / "read.npz", "--backend", backend)
    assert_lerobot_agrees(tmp_path / "d", np.load(tmp_path / "read.npz"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lerobots_converter_takes_our_v2(tmp_path: Path, backend: str) -> None:
    """lerobot 0.4 reads v2.1 only through its converter; the result is read by its loader and by ours."""
    write(tmp_path / "d", LENGTHS, version="v2.1")
    shutil.copytree(tmp_path / "d", tmp_path / "c")
    lerobot("convert", tmp_path / "c")
    lerobot("read", tmp_path / "c", tmp_path / "read.npz", "--backend", backend)
    assert_lerobot_agrees(tmp_path / "d", np.load(tmp_path / "read.npz"))
    shutil.copytree(tmp_path / "d/meta", tmp_path / "sidecar")
    shutil.copy(tmp_path / "sidecar/qwen_vla.json", tmp_path / "c/meta/qwen_vla.json")
    ours, theirs = LeRobotDataset(tmp_path / "d", decoder="pyav"), LeRobotDataset(tmp_path / "c", decoder="pyav")
    assert [info["item"] for info in theirs.infos] == [0, 1, 2]
    for episode, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(ours.rows(episode).action, theirs.rows(episode).action)
        steps = range(length)
        np.testing.assert_array_equal(ours.frames(episode, "ego", steps), theirs.frames(episode, "ego", steps))


@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
def test_we_read_what_lerobot_records(tmp_path: Path, codec: str) -> None:
    # Grey levels far apart: lerobot's default CRF of 30 would not tell small steps from none.
    pictures = [
        np.full((n, 64, 96, 3), 0, np.uint8) + (20 + 29 * np.arange(n, dtype=np.uint8))[:, None, None, None]
        for n in LENGTHS
    ]
    given = [rows(episode, length) for episode, length in enumerate(LENGTHS)]
    tasks = ["räume 把红色 weg", "b", "räume 把红色 weg"]
    np.savez(
        tmp_path / "in.npz",
        state=np.concatenate([r.state for r in given]),
        action=np.concatenate([r.action for r in given]),
        ego=np.concatenate(pictures),
        lengths=LENGTHS,
        tasks=tasks,
        names=json.dumps(support.contract().action_channels),
        fps=10,
        vcodec=codec,
    )
    lerobot("write", tmp_path / "d", tmp_path / "in.npz")
    (tmp_path / "pair.yaml").write_text(memory_dataset.ROBOT_YAML)
    dataset = open_dataset(tmp_path / "d", embodiment=tmp_path / "pair.yaml", decoder="pyav")
    assert dataset.lengths.tolist() == list(LENGTHS)
    lerobot("read", tmp_path / "d", tmp_path / "read.npz", "--backend", BACKENDS[0])
    theirs = np.load(tmp_path / "read.npz")["observation.images.ego"]
    for episode, length in enumerate(LENGTHS):
        read = dataset.rows(episode)
        np.testing.assert_array_equal(read.action, given[episode].action)
        np.testing.assert_array_equal(read.state, given[episode].state)
        assert {dataset.tasks[i] for i in read.task} == {tasks[episode]}
        frames = dataset.frames(episode, "ego", range(length))
        assert np.round((frames.mean((1, 2, 3)) - 20) / 29).tolist() == list(range(length))
        start = sum(LENGTHS[:episode])
        difference = np.abs(theirs[start : start + length].astype(int) - frames)
        assert difference.max() <= 1  # decoders of other builds may round AV1's colours otherwise
