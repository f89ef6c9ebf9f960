"""``qwen-vla data convert --from lerobot``: there and back again without a changed number or picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import lerobot_support as support
import memory_dataset
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_support import tree, write

from qwen_vla_core.cli import main
from qwen_vla_core.data.contract import CONTRACT_FILE
from qwen_vla_core.data.lerobot import LeRobotDataset

LENGTHS = (5, 8, 4)


def convert(capsys: pytest.CaptureFixture[str], src: Path, out: Path, *options: str) -> dict[str, Any]:
    code = main(["data", "convert", str(src), str(out), "--from", "lerobot", "--workers", "1", "--json", *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report: dict[str, Any] = json.loads(captured.out)
    return report


def assert_same(one: Path, two: Path) -> None:
    first, second = LeRobotDataset(one, decoder="pyav"), LeRobotDataset(two, decoder="pyav")
    assert first.lengths.tolist() == second.lengths.tolist()
    assert first.contract == second.contract and first.family == second.family
    for episode, length in enumerate(first.lengths):
        a, b = first.rows(episode), second.rows(episode)
        for name in ("state", "action", "timestamp", "perturbed"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.extra == b.extra
        assert [first.tasks[i] for i in a.task] == [second.tasks[i] for i in b.task]
        steps = range(int(length))
        np.testing.assert_array_equal(first.frames(episode, "ego", steps), second.frames(episode, "ego", steps))


@pytest.mark.parametrize(("here", "there"), [("v3.0", "v2.1"), ("v2.1", "v3.0"), ("v3.0", "v3.0")])
def test_every_version_into_every_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: Any, there: str
) -> None:
    source = write(tmp_path / "a", LENGTHS, version=here)
    before = tree(source)
    report = convert(capsys, source, tmp_path / "b", "--version", there)
    assert report["converted"] == 3 and report["dropped"] == [] and report["version"] == there
    assert json.loads((tmp_path / "b/convert_report.json").read_text()) == report
    assert_same(source, tmp_path / "b")
    infos = LeRobotDataset(tmp_path / "b").infos
    assert [(info["item"], info["from_episode"]) for info in infos] == [(0, 0), (1, 1), (2, 2)]
    assert tree(source) == before


def test_converted_rows_and_videos_are_those_of_a_direct_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a", LENGTHS, version="v2.1")
    direct = tree(write(tmp_path / "b", LENGTHS, version="v3.0"))
    convert(capsys, source, tmp_path / "c")
    converted = tree(tmp_path / "c")
    assert {k: v for k, v in converted.items() if k.startswith(("data", "videos"))} == {
        k: v for k, v in direct.items() if k.startswith(("data", "videos"))
    }


def test_an_embodiment_and_other_view_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", LENGTHS, version="v2.1")
    (source / CONTRACT_FILE).unlink()
    info = json.loads((source / "meta/info.json").read_text())
    features = info["features"]
    info["features"] = {"observation.image" if key.endswith("ego") else key: value for key, value in features.items()}
    (source / "meta/info.json").write_text(json.dumps(info))
    (source / "videos/chunk-000/observation.images.ego").rename(source / "videos/chunk-000/observation.image")
    robot = tmp_path / "pair.yaml"
    robot.write_text(memory_dataset.ROBOT_YAML)
    options = ["--embodiment", str(robot), "--family", "human", "--view", "ego=observation.image"]
    convert(capsys, source, tmp_path / "b", *options)
    dataset = LeRobotDataset(tmp_path / "b")
    assert dataset.family == "human" and dataset.contract == support.contract() and list(dataset.views) == ["ego"]
    assert support.shown(dataset.frames(1, "ego", [6])[0]) == (1, 6)


def test_unreadable_episodes_are_listed_and_the_others_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", LENGTHS, version="v2.1")
    broken = source / "videos/chunk-000/observation.images.ego/episode_000001.mp4"
    broken.write_bytes(broken.read_bytes()[:50])
    rows = source / "data/chunk-000/episode_000002.parquet"
    table = pq.read_table(rows)
    action = table["action"].to_pylist()
    action[2][4] = float("nan")
    column = pa.array(action, table["action"].type)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), rows)
    report = convert(capsys, source, tmp_path / "b")
    assert report["converted"] == 1 and [entry["item"] for entry in report["dropped"]] == [1, 2]
    assert "episode_000001.mp4" in report["dropped"][0]["reason"]
    assert report["dropped"][1]["reason"] == "row 2: 'action' channel 4 is nan"
    assert LeRobotDataset(tmp_path / "b").lengths.tolist() == [5]


def test_a_conversion_goes_on_with_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", LENGTHS)
    part = write(tmp_path / "part", LENGTHS[:2])
    convert(capsys, part, tmp_path / "b")
    files = {k: v for k, v in tree(tmp_path / "b").items() if k.startswith("videos")}
    assert convert(capsys, source, tmp_path / "b", "--resume")["converted"] == 3
    assert_same(source, tmp_path / "b")
    assert all(tree(tmp_path / "b")[name] == data for name, data in files.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{src}", "{out}", "--from", "nonsense"], "--from nonsense: no such source; use one of"),
        (["{src}", "{src}", "--from", "lerobot"], "holds a dataset already; use --resume"),
        (["{out}", "{src}", "--from", "lerobot"], "no such folder"),
        (["{src}", "{out}", "--from", "lerobot", "--view", "ego"], "--view ego: write VIEW=FEATURE"),
        (["{src}", "{out}", "--from", "lerobot", "--view", "ego=front"], "has no 'front'"),
        (["{src}", "{out}", "--from", "lerobot", "--workers", "0"], "--workers 0"),
        (["{src}", "{out}", "--from", "lerobot", "--embodiment", "aloha"], "has 14 channels"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    source = write(tmp_path / "a", (3,))
    places = {"src": str(source), "out": str(tmp_path / "b")}
    assert main(["data", "convert", *(word.format(**places) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_nothing_convertible_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", (3,), version="v2.1")
    (source / "data/chunk-000/episode_000000.parquet").write_bytes(b"")
    assert main(["data", "convert", str(source), str(tmp_path / "b"), "--from", "lerobot", "--workers", "1"]) == 2
    assert "nothing was converted" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_help_of_a_source_shows_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "convert", "--from", "lerobot", "--help"])
    assert "VIEW=FEATURE" in capsys.readouterr().out


def test_pictures_inside_the_rows_stay_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", (5,), version="v2.1")
    path = source / "data/chunk-000/episode_000000.parquet"
    pictures = [{"bytes": cv2.imencode(".png", frame)[1].tobytes(), "path": None} for frame in support.frames(0, 5)]
    pq.write_table(pq.read_table(path).append_column("observation.images.ego", pa.array(pictures)), path)
    info = json.loads((source / "meta/info.json").read_text())
    info["features"]["observation.images.ego"]["dtype"] = "image"
    (source / "meta/info.json").write_text(json.dumps(info))
    convert(capsys, source, tmp_path / "b")
    dataset = LeRobotDataset(tmp_path / "b")
    assert dataset.info["video_path"] is None and not dataset.is_video("ego")
    np.testing.assert_array_equal(dataset.frames(0, "ego", [4, 1]), support.frames(0, 5)[[4, 1]])
