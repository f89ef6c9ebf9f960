"""The written corpus: the same whatever the workers, resumable, honest in its report, fussy about its flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.data.t2a import generate as module
from qwen_vla_core.data.t2a.checks import check
from qwen_vla_core.data.t2a.corpus import BLOCK, Block, Job, make_block
from qwen_vla_core.data.t2a.generate import generate, shares
from qwen_vla_core.data.t2a.robots import ARMS
from qwen_vla_core.data.t2a.scenes import TEMPLATES, Spec
from qwen_vla_core.errors import UserError

ROBOTS = ("ur5e", "xarm7")


def contents(root: Path) -> list[tuple[str, np.ndarray, str]]:
    """Text, rows and notes of every episode."""
    dataset = LeRobotDataset(root)
    found = []
    for i, info in enumerate(dataset.infos):
        rows = dataset.rows(i)
        assert (rows.task == rows.task[0]).all() and not rows.perturbed.any()
        np.testing.assert_allclose(rows.timestamp, np.arange(len(rows)) / 50, atol=1e-4)
        table = np.concatenate([rows.state[:1], rows.action])
        np.testing.assert_array_equal(rows.state[1:], rows.action[:-1])
        found.append((dataset.tasks[int(rows.task[0])], table, json.dumps(info, sort_keys=True)))
    return found


def assert_same(one: Path, two: Path) -> None:
    for a, b in zip(contents(one), contents(two), strict=True):
        assert a[0] == b[0] and a[2] == b[2]
        np.testing.assert_array_equal(a[1], b[1])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("t2a")
    generate(out, 130, ROBOTS, TEMPLATES, 7, workers=1)
    yield out


def test_every_episode_on_disk_is_one_good_trajectory(corpus: Path) -> None:
    for robot in ROBOTS:
        dataset = LeRobotDataset(corpus / robot)
        arm = ARMS[robot]
        assert len(dataset) == 65 and dataset.family == "t2a" and dataset.fps == 50 and not dataset.views
        assert dataset.contract.action_channels == arm.channels
        assert dataset.contract.prompt.robot_tag == arm.tag
        for i, info in enumerate(dataset.infos):
            rows, spec = dataset.rows(i), Spec.from_json(info["spec"])
            assert check(arm, spec, rows.state, rows.action) == []
            assert spec.template == TEMPLATES[i % 6] == info["template"]
            assert info["phases"][-1][2] == len(rows) == dataset.lengths[i]
            actions, valid = rows.chunk(0, dataset.contract.horizon)  # the whole motion is one chunk
            assert valid.sum() == len(rows) and np.array_equal(actions[: len(rows)], rows.action)


def test_workers_do_not_change_the_corpus(corpus: Path, tmp_path: Path) -> None:
    generate(tmp_path, 130, ROBOTS, TEMPLATES, 7, workers=2)
    for robot in ROBOTS:
        assert_same(corpus / robot, tmp_path / robot)


def test_more_of_the_same_corpus_keeps_what_is_there(corpus: Path, tmp_path: Path) -> None:
    first = generate(tmp_path, 20, ROBOTS, TEMPLATES, 7, workers=1)
    assert [report.episodes for report in first.values()] == [10, 10]
    told: list[int] = []
    then = generate(tmp_path, 130, ROBOTS, TEMPLATES, 7, workers=1, progress=told.append)
    assert told[0] == 20 and sum(told) == 130
    assert [(report.before, report.episodes) for report in then.values()] == [(10, 65)] * 2
    for robot in ROBOTS:
        assert_same(corpus / robot, tmp_path / robot)
    stamp = (tmp_path / "ur5e/meta/info.json").stat().st_mtime_ns
    again = generate(tmp_path, 130, ROBOTS, TEMPLATES, 7, workers=1)
    assert all(report.episodes == report.before == 65 and not report.tally.kept for report in again.values())
    assert (tmp_path / "ur5e/meta/info.json").stat().st_mtime_ns == stamp


def test_a_run_that_is_stopped_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Job] = []

    def stops(job: Job) -> Block:
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make_block(job)

    monkeypatch.setattr(module, "make_block", stops)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, 130, ROBOTS, TEMPLATES, 7, workers=1)
    monkeypatch.undo()
    reports = generate(tmp_path, 130, ROBOTS, TEMPLATES, 7, workers=1)
    assert reports["ur5e"].before == BLOCK
    for robot in ROBOTS:
        assert_same(corpus / robot, tmp_path / robot)


def test_other_settings_are_refused_in_the_same_folder(corpus: Path) -> None:
    for seed, templates, key in ((8, TEMPLATES, "seed"), (7, ("pick",), "templates")):
        with pytest.raises(UserError, match=f"ur5e.*{key}"):
            generate(corpus, 140, ROBOTS, templates, seed, workers=1)  # type: ignore[arg-type]
    assert len(LeRobotDataset(corpus / "ur5e")) == 65


def test_a_damaged_sidecar_gives_one_clear_line(tmp_path: Path) -> None:
    generate(tmp_path, 2, ("ur5e",), TEMPLATES, 7, workers=1)
    (tmp_path / "ur5e/meta/qwen_vla.json").write_text("{")
    with pytest.raises(UserError, match=r"qwen_vla\.json.*damaged"):
        generate(tmp_path, 4, ("ur5e",), TEMPLATES, 7, workers=1)


def test_the_reading_back_notices_a_corpus_that_was_changed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    generate(tmp_path, 6, ("ur5e",), TEMPLATES, 7, workers=1)
    file = next((tmp_path / "ur5e/data").rglob("*.parquet"))
    table = pq.read_table(file)
    action = table["action"].to_pylist()
    action[10][1] += 0.2
    column = table.schema.get_field_index("action")
    field = table.schema.field("action")
    pq.write_table(table.set_column(column, field, pa.array(action, field.type)), file)
    report = generate(tmp_path, 6, ("ur5e",), TEMPLATES, 7, workers=1)["ur5e"]
    assert report.read_back == 6 and report.passed == 5 and sum(report.faults.values()) >= 1


def test_trajectories_are_shared_out_evenly() -> None:
    assert shares(5, ("a", "b", "c")) == {"a": 2, "b": 2, "c": 1}
    assert sum(shares(5000, tuple(ARMS)).values()) == 5000


def test_the_command_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "out", tmp_path / "paths.png"
    flags = ["data", "t2a", "--out", str(out), "--count", "4", "--robots", "xarm6", "--templates", "reach", "wipe"]
    assert main([*flags, "--workers", "1", "--plot", str(picture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    line = report["robots"]["xarm6"]
    assert report["new"] == line["episodes"] == line["read_back"] == line["read_back_passed"] == 4
    assert line["templates"] == {"reach": 2, "wipe": 2} and line["drawn"] >= BLOCK
    assert 0 <= line["redrawn_share"] < 1 and 0 < line["check_passed_share"] <= 1
    assert report["cpu_ms_per_trajectory"] > 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert main([*flags, "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "xarm6" in text and "4/4" in text and "0 new trajectories" in text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--count", "0"], "--count 0"),
        (["--workers", "0"], "--workers 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--robots", "puma"], "--robots puma"),
        (["--robots", "ur5e", "ur5e"], "twice"),
        (["--templates", "dance"], "--templates dance"),
        (["--plot", "paths.jpg"], "--plot paths.jpg"),
    ],
)
def test_wrong_flags_give_one_clear_line(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "t2a", "--out", str(tmp_path / "out"), *flags]) != 0
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
