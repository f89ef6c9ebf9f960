"""``qwen-vla data stats|doctor|clean`` on LeRobot datasets on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_dataset import CHANNELS, ROBOT_YAML, MemoryDataset, contract, healthy

from qwen_vla_core.cli import main
from qwen_vla_core.data.lerobot import LeRobotDataset, LeRobotWriter

WORK = ("--workers", "1", "--json")


def write(path: Path, dataset: MemoryDataset, **changes: Any) -> Path:
    extras = {"scene": "string", "perturbed": "bool"} | changes.pop("extras", {})
    with LeRobotWriter(
        path, dataset.contract, family="manipulation", views={"ego": (48, 48)}, extras=extras, source={"licence": "CC0"}
    ) as writer:
        for i, (rows, pictures) in enumerate(zip(dataset.episodes, dataset.pictures, strict=True)):
            named = dataclasses.replace(rows, extra={"scene": [f"scene {i}"] * len(rows)})
            writer.add_episode(named, dataset.tasks, pictures, {"seed": i})
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy dataset, written once; tests that break it copy it first."""
    return write(tmp_path_factory.mktemp("source") / "pair", healthy(4, steps=24))


@pytest.fixture
def robot_yaml(tmp_path: Path) -> str:
    file = tmp_path / "pair.yaml"
    file.write_text(ROBOT_YAML)
    return str(file)


def spoil(path: Path, column: str, row: int, value: Any) -> None:
    """Overwrites one cell (or one channel, as (channel, value)) in the rows of a dataset."""
    (file,) = path.glob("data/*/*.parquet")
    table = pq.read_table(file)
    cells = table[column].to_pylist()
    if isinstance(value, tuple):
        cells[row][value[0]] = value[1]
    else:
        cells[row] = value
    spoiled = table.set_column(
        table.column_names.index(column), table.schema.field(column), pa.array(cells, table.schema.field(column).type)
    )
    pq.write_table(spoiled, file)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    code = main(["data", *words])
    out, error = capsys.readouterr()
    return code, json.loads(out) if "--json" in words and out else out, error


def test_stats_are_cached_and_printed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("stats", str(source), *WORK)
    code, first, _ = run(capsys, *words)
    assert code == 0 and first["datasets"][0]["cached"] is False and first["datasets"][0]["steps"] == 108
    _, second, _ = run(capsys, *words)
    assert second["datasets"][0] == first["datasets"][0] | {"cached": True}
    assert [c["name"] for c in second["datasets"][0]["action"]] == list(CHANNELS)
    assert len(list((tmp_path / "cache/qwen_vla/stats").iterdir())) == 1
    code, text, _ = run(capsys, "stats", str(source), str(source), "--workers", "1", "--cache", str(tmp_path / "own"))
    assert code == 0 and text.count("from the cache") == 1 and text.count("computed") == 1 and "left_elbow" in text
    run(capsys, "stats", str(source), "--no-cache", "--workers", "1")
    assert len(list((tmp_path / "cache/qwen_vla/stats").iterdir())) == 1


def test_stats_name_file_and_row_of_nan(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    spoil(broken, "action", 30, (4, float("nan")))
    code, _, error = run(capsys, "stats", str(broken), "--no-cache", "--workers", "1")
    assert code == 2 and error.count("\n") == 1
    assert "broken: episode 1, row 6, action channel 'right_elbow' is nan" in error


def test_doctor_of_a_healthy_dataset(
    source: Path, robot_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "doctor.html"
    words = ("doctor", str(source), "--embodiment", robot_yaml)
    code, found, _ = run(capsys, *words, "--html", str(page), *WORK)
    assert code == 0 and found["findings"] == [] and found["pictures_looked_at"] == 108
    assert "Nothing was found" in page.read_text()
    code, text, _ = run(capsys, *words, "--workers", "1", "--frames", "0")
    assert code == 0 and "nothing found" in text and "0 pictures looked at" in text
    code, found, _ = run(capsys, "doctor", str(source), "--frames", "3", *WORK)
    assert code == 0 and found["embodiment"] is None and found["pictures_looked_at"] == 12


def test_doctor_of_a_faulty_one(
    source: Path, robot_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    spoil(broken, "action", 30, (4, float("nan")))
    words = ("doctor", str(broken), "--embodiment", robot_yaml, "--workers", "1")
    code, text, _ = run(capsys, *words)
    assert code == 1 and "error    not_finite" in text and "at: episode 1 row 6" in text
    assert "fix:" in text and text.endswith("1 error, 0 warnings\n")
    (video,) = broken.glob("videos/*/*/*.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    code, found, _ = run(capsys, *words, "--json")
    assert code == 1 and [f["code"] for f in found["findings"]] == ["not_finite", "missing_frames"]
    assert "file-000.mp4" in found["findings"][1]["message"]
    code, found, _ = run(capsys, *words, "--json", "--html", str(tmp_path / "page.html"), "--idle-rate", "10")
    assert [f["code"] for f in found["findings"]] == ["not_finite", "missing_frames", "idle"]
    (rows,) = broken.glob("data/*/*.parquet")
    rows.write_bytes(rows.read_bytes()[:200])
    code, found, _ = run(capsys, *words, "--json")
    assert code == 1 and "file-000.parquet: cannot be read" in found["findings"][0]["message"]
    (broken / "meta/info.json").write_text("{")
    code, found, _ = run(capsys, *words, "--json")
    assert code == 1 and [f["code"] for f in found["findings"]] == ["cannot_open"]
    code, _, error = run(capsys, *words, "--html", str(tmp_path))
    assert code == 2 and "is a folder; name a file in it" in error
    code, _, error = run(capsys, "doctor", str(tmp_path / "nowhere"))
    assert code == 2 and "no such folder" in error


def same(a: LeRobotDataset, i: int, b: LeRobotDataset, j: int) -> None:
    """Rows, instruction, notes and pictures of an episode survived copying; pictures bit for bit."""
    left, right = a.rows(i), b.rows(j)
    assert np.array_equal(left.state, right.state) and np.array_equal(left.action, right.action)
    assert np.allclose(left.timestamp, right.timestamp) and np.array_equal(left.perturbed, right.perturbed)
    assert left.extra["scene"] == right.extra["scene"]
    assert [a.tasks[t] for t in left.task] == [b.tasks[t] for t in right.task]
    steps = range(len(left))
    assert np.array_equal(a.frames(i, "ego", steps), b.frames(j, "ego", steps))
    assert b.infos[j] == {"seed": i, "source_episode": i}


def test_clean_copies_what_is_good(
    source: Path, robot_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    spoil(broken, "action", 30, (4, float("nan")))
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    out = tmp_path / "clean"
    words = ("clean", str(broken), str(out), "--embodiment", robot_yaml)
    code, plan, _ = run(capsys, *words, "--dry-run", *WORK)
    assert code == 0 and not out.exists() and plan["kept"] == 3
    code, text, _ = run(capsys, *words, "--workers", "1")
    assert code == 0 and "kept 3 of 4 episodes, 82 of 108 steps" in text
    assert "1 × not_finite" in text and "episode 1: not_finite: action right_elbow row 6" in text
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before
    copy, original = LeRobotDataset(out), LeRobotDataset(broken)
    assert copy.source["licence"] == "CC0" and copy.source["cleaned_from"]["name"] == "broken"
    for j, i in enumerate((0, 2, 3)):
        same(original, i, copy, j)
    report = json.loads((out / "meta/cleaning.json").read_text())
    assert report["dropped"] == plan["dropped"] and report["out"] == str(out)
    assert not list(tmp_path.glob(".*.jsonl"))
    hashed = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    assert run(capsys, *words, *WORK)[0] == 0  # again: nothing to do
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == hashed
    code, _, error = run(
        capsys, *words, "--length-episodes", "3", "--length-factor", "1", "--length-deviations", "0.5", *WORK
    )
    assert code == 2 and "holds other episodes than this cleaning keeps" in error


def test_clean_goes_on_after_a_crash(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "clean"
    added = LeRobotWriter.add_staged

    def die(self: LeRobotWriter, staged: Any) -> int:
        if self.episodes == 2:
            raise KeyboardInterrupt
        return added(self, staged)

    monkeypatch.setattr(LeRobotWriter, "add_staged", die)
    assert run(capsys, "clean", str(source), str(out), *WORK)[0] == 130
    assert (tmp_path / ".clean.examined.jsonl").is_file()
    taken: list[int] = []
    monkeypatch.setattr(LeRobotWriter, "add_staged", lambda self, staged: (taken.append(1), added(self, staged))[1])
    assert run(capsys, "clean", str(source), str(out), *WORK)[0] == 0
    assert len(taken) == 2
    copy, original = LeRobotDataset(out), LeRobotDataset(source)
    assert len(copy) == 4 and not copy.unfinished
    for i in range(4):
        same(original, i, copy, i)


def without_actions(path: Path) -> None:
    """Takes the actions out of a dataset, as one recorded without commands has none."""
    info = json.loads((path / "meta/info.json").read_text())
    del info["features"]["action"]
    (path / "meta/info.json").write_text(json.dumps(info))
    (path / "meta/qwen_vla.json").unlink()
    for file in path.glob("data/*/*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["action"]), file)


def test_clean_makes_actions_where_there_are_none(
    source: Path, robot_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Path(shutil.copytree(source, tmp_path / "silent"))
    without_actions(silent)
    out = tmp_path / "clean"
    code, found, _ = run(capsys, "clean", str(silent), str(out), "--embodiment", robot_yaml, *WORK)
    assert code == 0 and found["pseudo_actions"] is True and found["kept"] == 4
    copy, original = LeRobotDataset(out), LeRobotDataset(source)
    for episode in range(4):
        rows, states = copy.rows(episode), original.rows(episode).state
        assert np.array_equal(rows.action, states[1:]) and np.array_equal(rows.state, states[:-1])
        assert len(copy.frames(episode, "ego", range(len(rows)))) == len(states) - 1
    assert copy.contract.action_channels == CHANNELS
    code, found, _ = run(capsys, "doctor", str(out), "--embodiment", robot_yaml, *WORK)
    assert found["findings"] == []


def test_clean_keeps_uneven_times_and_says_when_nothing_is_left(
    tmp_path: Path, robot_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = healthy(2, steps=24)
    late = dataset.episodes[0].timestamp.copy()
    late[10:] += 0.031
    dataset.episodes[0] = dataclasses.replace(dataset.episodes[0], timestamp=late)
    source = write(tmp_path / "source", dataset, extras={"recorded_timestamp": "float64"})
    out = tmp_path / "clean"
    assert run(capsys, "clean", str(source), str(out), *WORK)[0] == 0
    assert np.array_equal(LeRobotDataset(out).rows(0).timestamp, late)
    nothing = tmp_path / "nothing"
    code, _, error = run(capsys, "clean", str(source), str(nothing), "--no-motion", "50", *WORK)
    assert code == 2 and "nothing is left of 2 episodes; the first reason: episode 0" in error
    assert not nothing.exists()
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, "clean", str(source), str(tmp_path / "file/clean"), *WORK)
    assert code == 2 and "cannot be written" in error
    code, _, error = run(capsys, "clean", str(source), str(source), *WORK)
    assert code == 2 and "OUT is SRC" in error


def test_views_of_other_names(
    source: Path, robot_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Path(shutil.copytree(source, tmp_path / "foreign"))
    (foreign / "meta/qwen_vla.json").unlink()
    info = json.loads((foreign / "meta/info.json").read_text())
    top = {("observation.images.top" if k.endswith("ego") else k): v for k, v in info["features"].items()}
    (foreign / "meta/info.json").write_text(json.dumps(info | {"features": top}))
    (foreign / "videos/observation.images.ego").rename(foreign / "videos/observation.images.top")
    (episodes,) = foreign.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(episodes)
    pq.write_table(table.rename_columns([n.replace("images.ego", "images.top") for n in table.column_names]), episodes)
    words = ("doctor", str(foreign), "--embodiment", robot_yaml, *WORK)
    code, found, _ = run(capsys, *words, "--view", "ego=observation.images.top")
    assert code == 0 and found["pictures_looked_at"] == 108
    code, _, error = run(capsys, *words, "--view", "ego")
    assert code == 1 or "VIEW=FEATURE" in error
    assert contract().views == ("ego",)
