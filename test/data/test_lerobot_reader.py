"""Datasets of other origin are read as they are; damaged ones are named with file and row."""

from __future__ import annotations

import copy
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
from lerobot_support import rows, shown, tree, write

from qwen_vla_core.data.contract import CONTRACT_FILE
from qwen_vla_core.data.lerobot import LeRobotDataset, find_dataset, hub, open_dataset
from qwen_vla_core.errors import UserError

LENGTHS = (5, 8, 4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of one dataset in each version, made once."""
    path = tmp_path_factory.mktemp("d")
    return {version: tree(write(path / version, LENGTHS, version=version)) for version in ("v3.0", "v2.1")}


def put(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def v3(tmp_path: Path, written: dict[str, dict[str, bytes]]) -> Path:
    return put(tmp_path / "v3", written["v3.0"])


@pytest.fixture
def v2(tmp_path: Path, written: dict[str, dict[str, bytes]]) -> Path:
    return put(tmp_path / "v2", written["v2.1"])


@pytest.fixture
def robot(tmp_path: Path) -> str:
    path = tmp_path / "pair.yaml"
    path.write_text(memory_dataset.ROBOT_YAML)
    return str(path)


def edit_info(path: Path, change: Any) -> None:
    info = json.loads((path / "meta/info.json").read_text())
    change(info)
    (path / "meta/info.json").write_text(json.dumps(info))


def rename(path: Path, old: str, new: str) -> None:
    """A view under another name, everywhere in a v2.1 dataset."""

    def change(info: dict[str, Any]) -> None:
        info["features"] = {new if key == old else key: value for key, value in info["features"].items()}

    edit_info(path, change)
    (path / "videos/chunk-000" / old).rename(path / "videos/chunk-000" / new)


def test_a_dataset_without_our_sidecar_needs_an_embodiment(v2: Path, robot: str) -> None:
    (v2 / CONTRACT_FILE).unlink()
    with pytest.raises(UserError, match=r"--embodiment FILE"):
        open_dataset(v2)
    dataset = open_dataset(v2, embodiment=robot, family="synthetic")
    assert dataset.family == "synthetic" and dataset.contract == support.contract()
    np.testing.assert_array_equal(dataset.rows(1).action, rows(1, 8).action)


def test_views_under_other_names_are_mapped(v2: Path) -> None:
    rename(v2, "observation.images.ego", "observation.image")
    with pytest.raises(UserError, match=r"--view ego=observation\.image"):
        open_dataset(v2)
    with pytest.raises(UserError, match=r"has no pictures 'observation\.top'"):
        open_dataset(v2, views={"ego": "observation.top"})
    with pytest.raises(UserError, match="'side' is not a view"):
        open_dataset(v2, views={"side": "observation.image"})
    dataset = open_dataset(v2, views={"ego": "observation.image"})
    assert [shown(f) for f in dataset.frames(1, "ego", [7, 0])] == [(1, 7), (1, 0)]


def test_another_robots_dimensions_are_refused(v2: Path) -> None:
    contract = support.contract()
    fewer = support.contract(action=contract.action[:1])
    with pytest.raises(UserError, match=r"'action' has shape \[6\], but Pair has 2 channels"):
        LeRobotDataset(v2, fewer)


def test_several_episodes_in_one_row_group_and_open_lists(v3: Path) -> None:
    """As lerobot's own converter writes them, through pandas."""
    path = v3 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names}
    for name in ("action", "observation.state"):
        columns[name] = pa.array(table[name].to_pylist(), pa.list_(pa.float32()))
    pq.write_table(pa.table(columns), path)
    dataset = LeRobotDataset(v3)
    for episode in (1, 0, 2):
        np.testing.assert_array_equal(dataset.rows(episode).action, rows(episode, LENGTHS[episode]).action)


def test_pictures_inside_the_rows(v2: Path) -> None:
    """LeRobot's ``image`` features: PNG bytes in the parquet file."""
    for episode, length in enumerate(LENGTHS):
        path = v2 / f"data/chunk-000/episode_{episode:06d}.parquet"
        table = pq.read_table(path)
        pictures = [
            {"bytes": cv2.imencode(".png", frame)[1].tobytes(), "path": None}
            for frame in support.frames(episode, length)
        ]
        pq.write_table(table.append_column("observation.images.ego", pa.array(pictures)), path)
    edit_info(v2, lambda info: info["features"]["observation.images.ego"].update(dtype="image"))
    dataset = LeRobotDataset(v2)
    np.testing.assert_array_equal(dataset.frames(1, "ego", [6, 0]), support.frames(1, 8)[[6, 0]])
    assert dataset.rows(1).extra.keys() == {"scene"} and not dataset.is_video("ego")


def test_av1_as_lerobot_encodes_it(v2: Path) -> None:
    path = v2 / "videos/chunk-000/observation.images.ego/episode_000001.mp4"
    support.write_foreign_video(path, support.frames(1, 8), 10, "libsvtav1", {"g": "2", "crf": "30"})
    found = LeRobotDataset(v2).frames(1, "ego", range(8))
    assert [shown(frame) for frame in found] == [(1, step) for step in range(8)]


def test_the_hash_follows_the_rows_and_nothing_else(v3: Path, tmp_path: Path) -> None:
    hashed = LeRobotDataset(v3).content_hash()
    moved = put(tmp_path / "elsewhere", tree(v3))
    (moved / "meta/stats.json").unlink()
    assert LeRobotDataset(moved).content_hash() == hashed
    path = moved / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    action = table["action"].to_pylist()
    action[3][0] += 1e-4
    changed = table.set_column(table.column_names.index("action"), "action", pa.array(action, table["action"].type))
    pq.write_table(changed, path, compression="zstd")
    assert LeRobotDataset(moved).content_hash() != hashed


def test_a_reader_can_be_sent_to_another_process_with_files_open(v3: Path) -> None:
    dataset = LeRobotDataset(v3)
    first = dataset.frames(1, "ego", [2]), dataset.rows(1).action
    sent = copy.deepcopy(dataset)
    np.testing.assert_array_equal(sent.frames(1, "ego", [2]), first[0])
    np.testing.assert_array_equal(sent.rows(1).action, first[1])


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def damage_rows(path: Path, row: int, **columns: Any) -> None:
    table = pq.read_table(path)
    for name, value in columns.items():
        values = table[name].to_pylist()
        values[row] = value
        kind = pa.list_(pa.float32()) if isinstance(value, list) else table[name].type
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(table, path)


DATA, VIDEO = "data/chunk-000/file-000.parquet", "videos/observation.images.ego/chunk-000/file-000.mp4"


def read_all(path: Path) -> None:
    dataset = LeRobotDataset(path)
    for episode, length in enumerate(dataset.lengths):
        dataset.rows(episode)
        dataset.frames(episode, "ego", range(int(length)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: cut(d / DATA), r"file-000\.parquet: cannot be read"),
        (lambda d: (d / DATA).unlink(), r"file-000\.parquet: cannot be read"),
        (lambda d: damage_rows(d / DATA, 7, action=[1.0] * 5), r"file-000\.parquet: row 7: 'action' has 5 values"),
        (lambda d: damage_rows(d / DATA, 6, action=None), r"file-000\.parquet: row 6: 'action' is empty"),
        (lambda d: damage_rows(d / DATA, 9, task_index=5), r"file-000\.parquet: row 9 has task 5, but .* holds 2"),
        (lambda d: damage_rows(d / DATA, 9, episode_index=2), r"file-000\.parquet: row 9 does not belong to episode 1"),
        (
            lambda d: pq.write_table(pq.read_table(d / DATA).slice(0, 15), d / DATA),
            r"has 15 rows, episode 2 needs rows 13",
        ),
        (lambda d: pq.write_table(pq.read_table(d / DATA).drop(["action"]), d / DATA), r"no column 'action'"),
        (lambda d: cut(d / VIDEO), r"file-000\.mp4: cannot be read as a video"),
        (lambda d: (d / VIDEO).unlink(), r"file-000\.mp4: cannot be read as a video"),
        (lambda d: (d / "meta/info.json").write_text("{"), r"info\.json: damaged"),
        (lambda d: (d / "meta/info.json").unlink(), r"not a LeRobot dataset \(no meta/info\.json\)"),
        (lambda d: edit_info(d, lambda i: i.update(codebase_version="v1.6")), r"version 'v1\.6'"),
        (lambda d: cut(d / "meta/tasks.parquet"), r"tasks\.parquet: cannot be read"),
        (lambda d: cut(d / "meta/episodes/chunk-000/file-000.parquet"), r"file-000\.parquet: cannot be read"),
        (lambda d: (d / "meta/episodes/chunk-000/file-000.parquet").unlink(), r"no table of episodes"),
        (lambda d: (d / CONTRACT_FILE).write_text("[]"), r"qwen_vla\.json: damaged"),
        (lambda d: (d / CONTRACT_FILE).write_text('{"contract": {}}'), r"qwen_vla\.json: damaged contract"),
    ],
)
def test_damaged_v3_datasets_are_one_line_with_file_and_row(v3: Path, damage: Any, said: str) -> None:
    read_all(v3)
    damage(v3)
    with pytest.raises(UserError, match=said) as caught:
        read_all(v3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: cut(d / "meta/episodes.jsonl", 0.9), r"episodes\.jsonl:3: damaged line"),
        (lambda d: (d / "meta/episodes.jsonl").write_text('{"episode_index": 1, "length": 3}'), "episode 0 is missing"),
        (lambda d: (d / "meta/tasks.jsonl").write_text('{"task": "x"}\n'), r"tasks\.jsonl:1: damaged line"),
        (lambda d: (d / "meta/tasks.jsonl").write_text('{"task_index": 3, "task": "x"}\n'), r"are not 0 to 0"),
        (lambda d: (d / "meta/tasks.jsonl").unlink(), r"tasks\.jsonl: cannot be read"),
        (lambda d: cut(d / "data/chunk-000/episode_000001.parquet"), r"episode_000001\.parquet: cannot be read"),
        (
            lambda d: (d / "videos/chunk-000/observation.images.ego/episode_000001.mp4").write_bytes(
                (d / "videos/chunk-000/observation.images.ego/episode_000000.mp4").read_bytes()
            ),
            r"episode_000001\.mp4: has 5 frames, episode 1 needs up to frame 7",
        ),
    ],
)
def test_damaged_v2_datasets_are_one_line_with_file_and_row(v2: Path, damage: Any, said: str) -> None:
    read_all(v2)
    damage(v2)
    with pytest.raises(UserError, match=said) as caught:
        read_all(v2)
    assert "\n" not in str(caught.value)


def test_not_a_number_is_read_as_it_is_for_the_doctor_to_find(v3: Path) -> None:
    values = rows(1, 8).action[2].tolist()
    damage_rows(v3 / DATA, 7, action=[float("nan"), *values[1:]])
    assert np.isnan(LeRobotDataset(v3).rows(1).action[2, 0])


def test_an_episode_without_rows_is_read_as_such(v2: Path) -> None:
    path = v2 / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    lines = (v2 / "meta/episodes.jsonl").read_text().split("\n")
    (v2 / "meta/episodes.jsonl").write_text(
        "\n".join([lines[0], lines[1].replace('"length": 8', '"length": 0'), lines[2]])
    )
    dataset = LeRobotDataset(v2)
    assert dataset.lengths.tolist() == [5, 0, 4] and len(dataset.rows(1)) == 0


def test_local_folders_win_over_the_hub(v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own function is replaced: no test needs a network."""
    asked = []

    def download(name: str, repo_type: str, revision: str | None) -> str:
        asked.append((name, repo_type, revision))
        return str(v3)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "owner/here", tree(v3))
    assert find_dataset("owner/here") == Path("owner/here") and asked == []
    assert open_dataset("owner/there@v3.0").lengths.tolist() == list(LENGTHS)
    assert asked == [("owner/there", "dataset", "v3.0")]


def test_neither_folder_nor_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"owner/none: no such folder, and the hub did not give it") as caught:
        open_dataset("owner/none")
    assert "\n" not in str(caught.value) and "no route" in str(caught.value)
    with pytest.raises(UserError, match="not a hub name"):
        open_dataset("/no/such/folder")
    assert hub.find_dataset(".") == Path()
