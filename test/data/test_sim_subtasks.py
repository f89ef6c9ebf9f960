"""``data convert --from sim_subtasks``: other instructions, the same numbers and the same pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotDataset, LeRobotWriter
from qwen_vla_core.data.sources.sim_subtasks import convert
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

ARM = ChannelGroup("left_arm", "joint_position", "rad", ("left_joint",))
HAND = ChannelGroup("left_gripper", "gripper", "fraction", ("left_gripper",))
OTHER = ChannelGroup("right_gripper", "gripper", "fraction", ("right_gripper",))
WHOLE = "pick up the red cube"


def contract(*groups: ChannelGroup) -> DataContract:
    return DataContract(PromptSpec("Robot", "single arm"), 10.0, 8, "absolute_joint", ("ego",), groups, groups)


def demonstrations(root: Path, *groups: ChannelGroup, grasps: bool = True, scenes: bool = True) -> LeRobotDataset:
    """Two episodes of 20 steps: told to close at 5, held from 7 on, lifted from 10 on."""
    extras = {"perturbed": "bool", **({"scene": "string"} if scenes else {})}
    rng = np.random.default_rng(0)
    source = {"name": "sim_demos", "world": "aloha"}
    with LeRobotWriter(
        root, contract(*groups), family="synthetic", views={"ego": (32, 24)}, source=source, extras=extras
    ) as writer:
        for episode in range(2):
            told = np.ones((20, len(groups)), np.float32)
            told[:, 0] = np.linspace(0, 1, 20)
            if grasps:
                told[5:, 1] = 0.0
            state = np.concatenate([told[:1], told[:-1]])
            state[:, 1] = np.maximum(state[:, 1], 0.4)
            held = [["left"] if grasps and t >= 7 else [] for t in range(20)]
            height = [0.02 + 0.03 * max(0, t - 8) for t in range(20)]
            told_scenes = [
                json.dumps({"cubes": [{"colour": "red", "position": [0, 0, height[t]], "held_by": held[t]}]})
                for t in range(20)
            ]
            rows = EpisodeRows(
                state,
                told,
                np.arange(20) / 10,
                np.zeros(20, np.int64),
                np.arange(20) == 3,
                {"scene": told_scenes} if scenes else {},
            )
            frames = rng.integers(0, 256, (20, 24, 32, 3), dtype=np.uint8)
            writer.add_episode(rows, [WHOLE], {"ego": frames}, {"seed": 40 + episode})
    return LeRobotDataset(root)


def options(**given: object) -> Namespace:
    return Namespace(**{"version": "v3.0", "resume": False, "thing": "the object", **given})


def test_instructions_change_and_nothing_else(tmp_path: Path) -> None:
    before = demonstrations(tmp_path / "demos", ARM, HAND, OTHER)
    report = convert(tmp_path / "demos", tmp_path / "out", options(), 1, False)
    assert report["converted"] == 2 and report["dropped"] == [] and report["unsplit"] == 0
    assert report["kinds"] == {"reach": 2, "grasp": 2, "lift": 2, "carry": 2}
    after = LeRobotDataset(tmp_path / "out")
    assert after.family == "synthetic" and after.source == {
        "name": "sim_subtasks",
        "from": "sim_demos",
        "world": "aloha",
    }
    assert WHOLE not in after.tasks and all("red cube" in task for task in after.tasks)
    for episode in range(2):
        old, new = before.rows(episode), after.rows(episode)
        for name in ("state", "action", "perturbed", "timestamp"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
        assert old.extra["scene"] == new.extra["scene"]
        steps = list(range(20))
        np.testing.assert_array_equal(before.frames(episode, "ego", steps), after.frames(episode, "ego", steps))
        cuts = [0, *(np.flatnonzero(np.diff(new.task)) + 1).tolist()]
        assert cuts == [0, 5, 7, 10]
        info = after.infos[episode]
        assert info["seed"] == 40 + episode and [one[0] for one in info["subtasks"]] == [
            "reach",
            "grasp",
            "lift",
            "carry",
        ]


def test_numbers_alone_do_for_other_robots(tmp_path: Path) -> None:
    demonstrations(tmp_path / "demos", ARM, HAND, scenes=False)
    report = convert(tmp_path / "demos", tmp_path / "out", options(thing="the sponge"), 1, False)
    assert report["kinds"] == {"reach": 2, "grasp": 2, "lift": 2}
    assert any("the sponge" in task for task in LeRobotDataset(tmp_path / "out").tasks)


def test_episodes_without_a_grasp_keep_their_instruction(tmp_path: Path) -> None:
    demonstrations(tmp_path / "demos", ARM, HAND, grasps=False)
    report = convert(tmp_path / "demos", tmp_path / "out", options(), 1, False)
    assert report["unsplit"] == 2 and report["subtasks"] == 0
    assert list(LeRobotDataset(tmp_path / "out").tasks) == [WHOLE]


def test_a_second_run_goes_on_and_workers_do_not_matter(tmp_path: Path) -> None:
    demonstrations(tmp_path / "demos", ARM, HAND, OTHER)
    convert(tmp_path / "demos", tmp_path / "one", options(), 1, False)
    convert(tmp_path / "demos", tmp_path / "two", options(), 2, False)
    again = convert(tmp_path / "demos", tmp_path / "one", options(resume=True), 1, False)
    assert again["converted"] == 2
    one, two = LeRobotDataset(tmp_path / "one"), LeRobotDataset(tmp_path / "two")
    assert list(one.tasks) == list(two.tasks)
    for episode in range(2):
        np.testing.assert_array_equal(one.rows(episode).task, two.rows(episode).task)
    with pytest.raises(UserError, match="--resume"):
        convert(tmp_path / "demos", tmp_path / "one", options(), 1, False)


def test_what_cannot_be_split_is_said_before_anything_is_written(tmp_path: Path) -> None:
    demonstrations(tmp_path / "demos", ARM, ChannelGroup("more", "joint_position", "rad", ("b",)), grasps=False)
    with pytest.raises(UserError, match="gripper"):
        convert(tmp_path / "demos", tmp_path / "out", options(), 1, False)
    assert not (tmp_path / "out").exists()


def test_a_damaged_scene_drops_that_episode_with_its_reason(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    demonstrations(tmp_path / "demos", ARM, HAND, OTHER)
    file = next((tmp_path / "demos/data").rglob("*.parquet"))
    table = pq.read_table(file)
    scenes = table["scene"].to_pylist()
    scenes[25] = "{"
    at = table.schema.get_field_index("scene")
    pq.write_table(table.set_column(at, table.schema.field("scene"), pa.array(scenes)), file)
    report = convert(tmp_path / "demos", tmp_path / "out", options(), 1, False)
    assert report["converted"] == 1
    assert [(one["item"], one["reason"][:15]) for one in report["dropped"]] == [(1, "scene of step 5")]
