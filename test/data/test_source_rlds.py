"""RLDS corpora in the layout of Open X-Embodiment, read with the shipped mappings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from action_support import SIZE, colour, options, picture, rlds

from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.rlds_mapping import load_mapping, shipped_mappings
from qwen_vla_core.data.sources.rlds import convert
from qwen_vla_core.errors import UserError

BRIDGE = {
    "action": (7,),
    "language_instruction": "text",
    "language_embedding": (512,),
    "observation/state": (7,),
    "observation/image_0": "image",
}
FRACTAL = {
    "action/world_vector": (3,),
    "action/rotation_delta": (3,),
    "action/gripper_closedness_action": (1,),
    "action/terminate_episode": (3,),
    "observation/base_pose_tool_reached": (7,),
    "observation/gripper_closed": (1,),
    "observation/natural_language_instruction": "text",
    "observation/image": "image",
}
DROID = {
    "action_dict/joint_position": (7,),
    "action_dict/gripper_position": (1,),
    "observation/joint_position": (7,),
    "observation/gripper_position": (1,),
    "observation/exterior_image_1_left": "image",
    "observation/wrist_image_left": "image",
    "language_instruction": "text",
    "language_instruction_2": "text",
    "language_instruction_3": "text",
}


def columns(shapes: dict[str, Any], total: int, seed: int, **given: Any) -> dict[str, Any]:
    """One episode's columns, with ``given`` in place of random ones (``/`` written as ``__``)."""
    rng = np.random.default_rng(seed)
    given = {key.replace("__", "/"): value for key, value in given.items()}
    first = np.zeros(total, np.int64)
    first[0] = 1
    result: dict[str, Any] = {"steps/is_first": first, "episode_metadata/file_path": [b"/x"]}
    for key, shape in shapes.items():
        if key in given:
            value = given[key]
        elif shape == "text":
            value = ["Räume den Becher  auf".encode()] * total
        elif shape == "image":
            value = [picture(step, total) for step in range(total)]
        else:
            value = rng.normal(0, 0.3, (total, *shape)).astype(np.float32)
        result[f"steps/{key}"] = value.reshape(-1) if isinstance(value, np.ndarray) else value
    return result


def test_bridge(tmp_path: Path) -> None:
    action = np.random.default_rng(1).normal(0, 0.01, (12, 7)).astype(np.float32)
    action[:, 6] = [1, 1, 1, 0.6, 0.4, 0, 0, 0, 0.5, 1, 1, 1]
    good = columns(BRIDGE, 12, 1, action=action)
    silent = columns(BRIDGE, 12, 2, language_instruction=[b""] * 12)
    short = columns(BRIDGE, 5, 3)
    src = rlds(tmp_path, "bridge_dataset", BRIDGE, [[good, silent], [short, columns(BRIDGE, 9, 4)]])
    report = convert(src.parent, tmp_path / "out", options(), 1, False)
    assert report["converted"] == 2
    assert {(d["item"].split("-of-")[1], d["reason"]) for d in report["dropped"]} == {
        ("00002#1", "has no instruction"),
        ("00002#0", "3 usable steps, fewer than 4"),
    }
    dataset = LeRobotDataset(tmp_path / "out")
    assert dataset.family == "manipulation" and dataset.fps == 5 and list(dataset.views) == ["ego"]
    rows = dataset.rows(0)
    assert len(rows) == 10  # without the first step, which means nothing here, and the last
    np.testing.assert_allclose(rows.action[:, :6], action[1:11, :6], atol=1e-7)
    # On its way, the gripper is taken for what it arrives at.
    assert rows.action[:, 6].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(rows.state, good["steps/observation/state"].reshape(12, 7)[1:11], atol=1e-7)
    assert dataset.tasks[rows.task[0]] == "Räume den Becher auf"
    pictures = dataset.frames(0, "ego", [0, 9])
    assert pictures.shape == (2, SIZE[1], SIZE[0], 3)
    assert [abs(int(p.mean()) - colour(step, 12)) < 6 for p, step in zip(pictures, (1, 10), strict=True)] == [True] * 2


def test_fractal_gripper_commands_become_an_opening(tmp_path: Path) -> None:
    change = np.array([0, 0, 1, 0, 0, -1, 0, 0], np.float32)
    closed = np.linspace(0, 1, 8, dtype=np.float32)
    episode = columns(
        FRACTAL, 8, 0, action__gripper_closedness_action=change[:, None], observation__gripper_closed=closed[:, None]
    )
    rlds(tmp_path, "fractal20220817_data", FRACTAL, [[episode]])
    convert(tmp_path / "fractal20220817_data", tmp_path / "out", options(no_pictures=True), 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    rows = dataset.rows(0)
    assert not dataset.views and dataset.fps == 3
    assert rows.action[:, 6].tolist() == [1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(rows.state[:, 7], 1 - closed[:7], atol=1e-6)
    np.testing.assert_allclose(rows.action[:, :3], episode["steps/action/world_vector"].reshape(8, 3)[:7], atol=1e-7)


def test_droid_takes_the_first_instruction_with_text(tmp_path: Path) -> None:
    episode = columns(DROID, 8, 0, language_instruction=[b""] * 8, language_instruction_2=[b"open the drawer"] * 8)
    rlds(tmp_path, "droid", DROID, [[episode]])
    convert(tmp_path / "droid", tmp_path / "out", options(), 2, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert list(dataset.tasks) == ["open the drawer"] and list(dataset.views) == ["ego", "cam_right_wrist"]
    closed = episode["steps/action_dict/gripper_position"][:7]
    np.testing.assert_allclose(dataset.rows(0).action[:, 7], 1 - closed, atol=1e-6)


def test_damage_names_file_and_record_and_can_be_skipped(tmp_path: Path) -> None:
    nan = columns(BRIDGE, 8, 1)
    nan["steps/action"][10] = np.nan
    wrong = columns(BRIDGE, 8, 2)
    wrong["steps/observation/state"] = wrong["steps/observation/state"][:-1]
    broken = columns(BRIDGE, 8, 3)
    broken["steps/observation/image_0"][4] = broken["steps/observation/image_0"][4][:200]
    src = rlds(tmp_path, "bridge_dataset", BRIDGE, [[columns(BRIDGE, 8, 0), nan, wrong, broken]])
    with pytest.raises(UserError, match="record 1, step 1: group 'arm' is not finite"):
        convert(src, tmp_path / "out", options(), 1, False)
    report = convert(src, tmp_path / "all", options(skip_damaged=True), 1, False)
    assert report["converted"] == 1 and len(report["dropped"]) == 3
    reasons = " ".join(entry["reason"] for entry in report["dropped"])
    assert "55 values, 8 steps of 7 need 56" in reasons and "damaged picture" in reasons and "step 3" in reasons
    # The good episode that was written before the error is kept, and marked as unfinished.
    assert (tmp_path / "out" / ".staging").is_dir()
    with pytest.warns(UserWarning, match="unfinished"):
        assert len(LeRobotDataset(tmp_path / "out")) == 1


def test_incomplete_folders(tmp_path: Path) -> None:
    src = rlds(tmp_path, "bridge_dataset", BRIDGE, [[columns(BRIDGE, 8, 0)] * 2, [columns(BRIDGE, 8, 1)]])
    shard = next(src.glob("*-00000-of-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="names 2; copy the file again"):
        convert(src, tmp_path / "out", options(), 1, False)
    shard.unlink()
    with pytest.raises(UserError, match="1 shards of train"):
        convert(src, tmp_path / "out", options(), 1, False)
    with pytest.raises(UserError, match="--split val"):
        convert(src, tmp_path / "out", options(split="val"), 1, False)
    (src / "features.json").write_text('{"featuresDict"')
    with pytest.raises(UserError, match=r"features\.json: not JSON"):
        convert(src, tmp_path / "out", options(), 1, False)
    with pytest.raises(UserError, match=r"holds no features\.json"):
        convert(tmp_path / "nothing", tmp_path / "out", options(), 1, False)
    assert not (tmp_path / "out").exists()


def test_mappings_say_line_key_and_fix(tmp_path: Path) -> None:
    text = shipped_mappings()["bridge"].read_text()
    assert set(shipped_mappings()) >= {"bridge", "fractal", "droid"}

    def problem(old: str, new: str) -> str:
        (tmp_path / "m.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError) as error:
            load_mapping(str(tmp_path / "m.yaml"))
        return str(error.value)

    assert "m.yaml:18: state[0].unit" in problem("m,euler_xyz", "metres")
    assert "did you mean 'frequency_hz'" in problem("frequency_hz", "frequenzy_hz")
    assert "action[1].change" in problem("change: binary", "change: sometimes")
    assert "columns: ends before it starts" in problem("[0, 6]", "[6, 6]")
    assert "needs a group of kind joint_delta" in problem("delta_eef", "delta_joint")
    with pytest.raises(UserError, match="did you mean 'bridge'"):
        load_mapping("brigde")


def test_a_mapping_must_fit_the_features(tmp_path: Path) -> None:
    src = rlds(tmp_path, "other", {**BRIDGE, "observation/state": (5,)}, [[columns(BRIDGE, 8, 0)]])
    with pytest.raises(UserError, match="no shipped mapping fits 'other'"):
        convert(src, tmp_path / "out", options(), 1, False)
    with pytest.raises(UserError, match="'observation/state' has 5 values"):
        convert(src, tmp_path / "out", options(mapping="bridge"), 1, False)
    with pytest.raises(UserError, match=r"has no 'observation/joint_position'; it has action, is_first"):
        convert(src, tmp_path / "out", options(mapping="droid"), 1, False)


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    shards = [[columns(BRIDGE, 8 + i, i) for i in range(4)]]
    src = rlds(tmp_path, "bridge_dataset", BRIDGE, shards)
    whole = convert(src, tmp_path / "whole", options(), 1, False)
    shard = next(src.glob("*-00000-of-*"))
    data = bytearray(shard.read_bytes())
    damaged = data.copy()
    damaged[-200] ^= 1  # in the last record's data
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match="record 3: checksum"):
        convert(src, tmp_path / "out", options(), 1, False)
    with pytest.raises(UserError, match="--resume"):
        convert(src, tmp_path / "out", options(), 1, False)
    with pytest.raises(UserError, match=r"other options \(options\)"):
        convert(src, tmp_path / "out", options(resume=True, height=48), 1, False)
    shard.write_bytes(data)
    again = convert(src, tmp_path / "out", options(resume=True), 1, False)
    assert again["resumed"] == 3 and again["converted"] == whole["converted"] == 4
    assert again["steps"] == whole["steps"]
    a, b = LeRobotDataset(tmp_path / "out"), LeRobotDataset(tmp_path / "whole")
    for episode in range(4):
        np.testing.assert_array_equal(a.rows(episode).action, b.rows(episode).action)
        np.testing.assert_array_equal(a.frames(episode, "ego", [0, 5]), b.frames(episode, "ego", [0, 5]))
    done = convert(src, tmp_path / "out", options(resume=True), 1, False)
    assert done["resumed"] == 4 and json.dumps(done["dropped"]) == "[]"
