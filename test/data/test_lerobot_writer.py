"""What is written comes back, in both versions; what cannot be right is refused with one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import lerobot_support as support
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_support import EXTRAS, SIZE, TASKS, add, begin, rows, shown, tree, write

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import Feature, LeRobotDataset, LeRobotWriter
from qwen_vla_core.data.lerobot.layout import VIDEO_SECONDS
from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.errors import UserError

LENGTHS = (5, 8, 4)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_everything_comes_back_as_it_was(tmp_path: Path, version: Any) -> None:
    dataset = copy.deepcopy(LeRobotDataset(write(tmp_path / "d", LENGTHS, version=version)))  # as sent to a worker
    assert dataset.lengths.tolist() == list(LENGTHS) and dataset.fps == 10 and list(dataset.tasks) == list(TASKS)
    assert dataset.name == "d" and dataset.family == "manipulation" and list(dataset.views) == ["ego"]
    assert dataset.contract == support.contract() and dataset.source == {"name": "made up"}
    assert [info["item"] for info in dataset.infos] == [0, 1, 2]
    for episode in (2, 0, 1):
        given, read = rows(episode, LENGTHS[episode]), dataset.rows(episode)
        for name in ("state", "action", "perturbed"):
            np.testing.assert_array_equal(getattr(read, name), getattr(given, name))
            assert getattr(read, name).dtype == getattr(given, name).dtype
        np.testing.assert_allclose(read.timestamp, given.timestamp, atol=1e-6)
        assert [dataset.tasks[i] for i in read.task] == [TASKS[i] for i in given.task]
        assert read.extra == given.extra
        steps = [LENGTHS[episode] - 1, 0, 2]
        assert [shown(f) for f in dataset.frames(episode, "ego", steps)] == [(episode, step) for step in steps]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_statistics_are_those_of_the_rows(tmp_path: Path, version: Any) -> None:
    path = write(tmp_path / "d", LENGTHS, version=version)
    stats = json.loads((path / "meta/stats.json").read_text())
    actions = np.concatenate([rows(e, n).action for e, n in enumerate(LENGTHS)]).astype(float)
    for key, value in (("mean", actions.mean(0)), ("std", actions.std(0)), ("min", actions.min(0))):
        np.testing.assert_allclose(stats["action"][key], value, rtol=1e-6)
    for key, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_allclose(stats["action"][key], np.quantile(actions, q, axis=0), atol=2e-3)
    assert stats["action"]["count"] == [17] and stats["index"]["max"] == [16] and stats["task_index"]["max"] == [1]
    assert np.shape(stats["observation.images.ego"]["mean"]) == (3, 1, 1)
    assert 0 < stats["observation.images.ego"]["mean"][0][0][0] < 1 and "scene" not in stats
    if version == "v3.0":
        table = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet")
        episode = {name: table[name][1].as_py() for name in table.column_names}
        assert episode["dataset_from_index"] == 5 and episode["dataset_to_index"] == 13
        assert episode["videos/observation.images.ego/from_timestamp"] == pytest.approx(0.5)
        one = {key: episode[f"stats/action/{key}"] for key in ("mean", "q99", "count")}
    else:
        lines = (path / "meta/episodes_stats.jsonl").read_text().splitlines()
        one = json.loads(lines[1])["stats"]["action"]
    second = rows(1, 8).action.astype(float)
    np.testing.assert_allclose(one["mean"], second.mean(0))
    np.testing.assert_allclose(one["q99"], np.quantile(second, 0.99, axis=0))
    assert one["count"] == [8]


def test_files_end_at_their_limits_and_frames_stay_right(tmp_path: Path) -> None:
    """By bytes of rows; every file is followed by the next one, and every episode finds its frames."""
    dataset = LeRobotDataset(write(tmp_path / "d", (5, 8, 4, 6, 7), data_mb=0.012))
    files = sorted((tmp_path / "d/data").rglob("*.parquet"))
    assert len(files) == len(list((tmp_path / "d/videos").rglob("*.mp4"))) > 1
    for episode, length in enumerate((5, 8, 4, 6, 7)):
        found = [shown(f) for f in dataset.frames(episode, "ego", range(length))]
        assert found == [(episode, step) for step in range(length)]
        np.testing.assert_array_equal(dataset.rows(episode).action, rows(episode, length).action)


def test_a_video_file_stays_short_enough_for_lerobots_float32_times(tmp_path: Path) -> None:
    slow = support.contract(frequency_hz=0.01)
    with begin(tmp_path / "d", contract=slow) as writer:
        for episode in range(3):
            numbers = dataclasses.replace(rows(episode, 6), timestamp=np.arange(6) * 100.0)
            add(writer, episode, 6, rows=numbers)
    starts = LeRobotDataset(tmp_path / "d").table.videos["observation.images.ego"].start_s
    assert len(list((tmp_path / "d/videos").rglob("*.mp4"))) == 3 and starts.max() + 600 <= VIDEO_SECONDS


def _stage(stager: Any, episode: int) -> Any:
    return stager.stage(rows(episode, 5), TASKS, {"ego": support.frames(episode, 5)}, {"item": episode})


def test_workers_give_the_files_of_one_process(tmp_path: Path) -> None:
    import functools

    for workers in (1, 2):
        with begin(tmp_path / str(workers)) as writer:
            for staged in map_episodes(functools.partial(_stage, writer.stager), range(4), workers, progress=False):
                writer.add_staged(staged)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_several_tasks_in_an_episode_and_scalar_and_table_features(tmp_path: Path) -> None:
    extras = {"hand": Feature("float32", (2, 3)), "grip": "int64", "recorded_timestamp": "float64"}
    given = dataclasses.replace(
        rows(0, 4, tasks=[1, 1, 0, 0]),
        timestamp=np.array([0.0, 0.1, 0.25, 0.9]),
        perturbed=np.zeros(4, bool),
        extra={"hand": np.arange(24, dtype=np.float32).reshape(4, 2, 3), "grip": np.arange(4)},
    )
    with begin(tmp_path / "d", extras=extras) as writer:
        add(writer, 0, 4, rows=given)
    dataset = LeRobotDataset(tmp_path / "d")
    read = dataset.rows(0)
    assert [dataset.tasks[i] for i in read.task] == [TASKS[1], TASKS[1], TASKS[0], TASKS[0]]
    np.testing.assert_array_equal(read.timestamp, given.timestamp)
    np.testing.assert_array_equal(read.extra["hand"], given.extra["hand"])
    np.testing.assert_array_equal(read.extra["grip"], np.arange(4))


def test_data_without_pictures_and_without_state(tmp_path: Path) -> None:
    bare = support.contract(views=(), state=())
    with begin(tmp_path / "d", contract=bare, views=None, extras=None) as writer:
        numbers = dataclasses.replace(rows(0, 4), perturbed=np.zeros(4, bool))
        add(writer, 0, 4, rows=numbers, frames=None)
    dataset = LeRobotDataset(tmp_path / "d")
    assert dataset.views == () and dataset.rows(0).state.shape == (4, 0)
    np.testing.assert_array_equal(dataset.rows(0).action, numbers.action)
    assert dataset.info["video_path"] is None and not (tmp_path / "d/videos").exists()


def test_clips_are_copied_without_encoding_again(tmp_path: Path) -> None:
    source = LeRobotDataset(write(tmp_path / "a", LENGTHS), decoder="pyav")
    with begin(tmp_path / "b") as writer:
        for episode in (2, 1):
            add(writer, episode, LENGTHS[episode], frames={"ego": source.clip(episode, "ego")})
    copy = LeRobotDataset(tmp_path / "b", decoder="pyav")
    for new, old in ((0, 2), (1, 1)):
        steps = range(LENGTHS[old])
        np.testing.assert_array_equal(copy.frames(new, "ego", steps), source.frames(old, "ego", steps))


def test_a_clip_that_begins_between_keyframes_is_encoded_again(tmp_path: Path) -> None:
    source = LeRobotDataset(write(tmp_path / "a", (9,)))
    part = dataclasses.replace(source.clip(0, "ego"), first=3, count=4)
    with begin(tmp_path / "b") as writer:
        add(writer, 0, 4, frames={"ego": part})
    found = LeRobotDataset(tmp_path / "b").frames(0, "ego", range(4))
    assert [shown(frame) for frame in found] == [(0, step) for step in range(3, 7)]


def with_nan(numbers: EpisodeRows) -> EpisodeRows:
    action = numbers.action.copy()
    action[3, 2] = np.nan
    return dataclasses.replace(numbers, action=action)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": rows(0, 0)}, "has no rows"),
        ({"rows": with_nan(rows(0, 5))}, "row 3: 'action' channel 'left_gripper' is nan"),
        ({"rows": dataclasses.replace(rows(0, 5), action=np.zeros((5, 7), np.float32))}, r"\(5, 7\), must be \(5, 6\)"),
        ({"rows": dataclasses.replace(rows(0, 5), state=np.zeros((4, 6), np.float32))}, r"\(4, 6\), must be \(5, 6\)"),
        ({"rows": dataclasses.replace(rows(0, 5), task=np.array([0, 0, 2, 0, 0]))}, r"task numbers \[0, 2\]"),
        ({"rows": dataclasses.replace(rows(0, 5), extra={})}, "has no 'scene'"),
        ({"rows": dataclasses.replace(rows(0, 5), timestamp=np.array([0, 0.1, 0.2, 0.35, 0.4]))}, "row 3: its time"),
        ({"rows": dataclasses.replace(rows(0, 5), timestamp=np.full(5, np.nan))}, "row 0: its time nan"),
        ({"frames": {"ego": support.frames(0, 4)}}, "observation.images.ego has 4 frames for 5 rows"),
        ({"frames": {}}, r"has pictures of \[\]"),
        ({"frames": {"ego": np.zeros((5, 16, 16, 3), np.uint8)}}, r"observation.images.ego: frame 0: is uint8"),
    ],
)
def test_episodes_that_cannot_be_right_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with begin(tmp_path / "d") as writer:
        add(writer, 0, 5)
        with pytest.raises(UserError, match=said) as caught:
            add(writer, 1, 5, **change)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        add(writer, 2, 6)
    assert LeRobotDataset(tmp_path / "d").lengths.tolist() == [5, 6]  # good output is kept, bad leaves nothing


def test_perturbed_steps_need_their_feature(tmp_path: Path) -> None:
    with begin(tmp_path / "d", extras={"scene": "string"}) as writer, pytest.raises(UserError, match="'perturbed'"):
        add(writer, 0, 5)
    assert not (tmp_path / "d").exists()  # nothing was written, nothing stays


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "cooking"}, "family 'cooking'"),
        ({"views": {"side": SIZE}}, "view 'side'"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        begin(tmp_path / "d", **options)


def test_a_dataset_is_never_written_over(tmp_path: Path) -> None:
    before = tree(write(tmp_path / "d", LENGTHS))
    with pytest.raises(UserError, match="holds a dataset already"):
        begin(tmp_path / "d")
    with pytest.raises(UserError, match="another family"):
        begin(tmp_path / "d", family="human", resume=True)
    with pytest.raises(UserError, match="another codebase_version"):
        begin(tmp_path / "d", version="v2.1", resume=True)
    with pytest.raises(UserError, match="another features"):
        begin(tmp_path / "d", extras={**EXTRAS, "more": "int64"}, resume=True)
    assert {k: v for k, v in tree(tmp_path / "d").items() if not k.startswith(".staging")} == before


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = begin(tmp_path / "d")
    with pytest.raises(UserError, match="another process is writing"):
        begin(tmp_path / "d", resume=True)
    assert isinstance(first, LeRobotWriter)
    first.close()
