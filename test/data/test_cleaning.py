"""What cleaning drops and why, what it never drops, and the actions it makes from states."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from memory_dataset import CHANNELS, MemoryDataset, contract, episode, healthy, robot, single_arm_contract
from scipy.spatial.transform import Rotation

from qwen_vla_core.data.cleaning import REASONS, Drop, cleaned_contract, examine_resumably, judge, report
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.doctor.case import Case, examine_all
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.pseudo_actions import pseudo_actions
from qwen_vla_core.errors import UserError


def case_of(dataset: MemoryDataset, **thresholds: float) -> Case:
    return examine_all(dataset, robot(), Thresholds(**thresholds), 0, workers=1, progress=False)


def dropped(dataset: MemoryDataset, **thresholds: float) -> dict[int, str]:
    """episode → reason; details are checked to be there."""
    drops = judge(case_of(dataset, **thresholds))
    assert all(drop.detail for drop in drops)
    return {drop.episode: drop.reason for drop in drops}


def change(dataset: MemoryDataset, number: int, **changes: np.ndarray) -> MemoryDataset:
    dataset.episodes[number] = dataclasses.replace(dataset.episodes[number], **changes)
    return dataset


def add(dataset: MemoryDataset, rows: EpisodeRows, ego: np.ndarray) -> MemoryDataset:
    dataset.episodes.append(rows)
    dataset.pictures.append({"ego": ego})
    return dataset


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_dataset_keeps_everything(seed: int) -> None:
    assert dropped(healthy(10, seed)) == {}


def test_every_reason() -> None:
    dataset = healthy(16)
    dataset.tasks = (*dataset.tasks, "close the gripper", "")
    dataset.broken[0] = "data/file-000.parquet: cut short"
    columns = ("state", "action", "timestamp", "task", "perturbed")
    change(dataset, 1, **{name: getattr(dataset.episodes[1], name)[:1] for name in columns})
    dataset.episodes[2].action[4, 1] = np.nan
    change(dataset, 3, task=np.full(56, 9))
    dataset.broken[4, "ego"] = "videos/ego.mp4: cut short"
    dataset.pictures[5]["ego"][7] = 0
    dataset.pictures[6]["ego"][20:50] = dataset.pictures[6]["ego"][20]
    rows = dataset.episodes[7]
    noise = np.random.default_rng(0).normal(0, 0.001, rows.action.shape).astype(np.float32)
    change(dataset, 7, action=rows.action[:1] + noise)
    long_rows, long_pictures = episode(np.random.default_rng(5), 400)
    dataset.episodes[8], dataset.pictures[8] = long_rows, long_pictures
    still = dataset.episodes[9].action.copy()
    still[:, [2, 5]] = 0.5
    change(dataset, 9, action=still, task=np.full(68, 2))
    change(dataset, 10, task=np.full(70, 3))
    add(dataset, dataset.episodes[11], dataset.pictures[11]["ego"])
    assert dropped(dataset) == {
        0: "unreadable",
        1: "too_short",
        2: "not_finite",
        3: "unknown_task",
        4: "corrupted_frames",
        5: "corrupted_frames",
        6: "corrupted_frames",
        7: "no_motion",
        8: "abnormal_length",
        9: "mismatch",
        10: "mismatch",
        16: "duplicate",
    }
    assert set(dropped(dataset).values()) == set(REASONS)
    assert 16 not in dropped(dataset, drop_duplicates=False)
    assert 5 not in dropped(dataset, corrupted_share=0.1)


def test_contradicting_twins_both_go_and_other_words_stay() -> None:
    dataset = healthy(4)
    dataset.tasks = ("push the block", "move it", "pull the block", "shove the block")
    for task in (2, 3):
        twin = dataclasses.replace(dataset.episodes[0], task=np.full(50, task))
        add(dataset, twin, dataset.pictures[0]["ego"])
    drops = judge(case_of(dataset))
    assert drops == [
        Drop(0, "mismatch", "same motion as episode 4: 'pull the block'"),
        Drop(4, "mismatch", "same motion as episode 0: 'push the block'"),
    ]


def test_lengths_are_judged_among_their_like() -> None:
    rng = np.random.default_rng(1)
    made = [episode(rng, steps, task) for task, steps in [(0, 20)] * 9 + [(1, 120)] * 9 + [(0, 120)]]
    dataset = MemoryDataset([rows for rows, _ in made], [pictures for _, pictures in made])
    drops = judge(case_of(dataset))
    assert drops == [Drop(18, "abnormal_length", "120 rows, the median of its instruction is 20")]
    few = MemoryDataset(dataset.episodes[9:14] + dataset.episodes[18:], dataset.pictures[9:14] + dataset.pictures[18:])
    assert judge(case_of(few)) == []
    equal = MemoryDataset(dataset.episodes[:9], dataset.pictures[:9])
    add(equal, *(lambda made: (made[0], made[1]["ego"]))(episode(rng, 21, 0)))
    assert judge(case_of(equal)) == []


def test_report_lists_every_drop() -> None:
    dataset = healthy(3)
    dataset.episodes[1].action[4, 1] = np.nan
    case = case_of(dataset)
    text = json.dumps(report(case, judge(case), pseudo_actions=False), allow_nan=False)
    found = json.loads(text)
    assert found["kept"] == 2 and found["by_reason"] == {"not_finite": 1} and found["steps_dropped"] == 52
    assert found["dropped"] == [{"episode": 1, "reason": "not_finite", "detail": "action left_elbow row 4"}]
    assert found["thresholds"]["shortest"] == 2 and found["pseudo_actions"] is False


def test_examination_resumes(tmp_path: Path) -> None:
    dataset, notes = healthy(5), tmp_path / "deep" / "notes.jsonl"
    whole = examine_resumably(dataset, robot(), Thresholds(), 0, notes, workers=1, progress=False)
    lines = notes.read_text().splitlines()
    assert len(lines) == 6
    notes.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])  # killed in the middle of a line
    looked: list[int] = []
    rows = dataset.rows
    dataset.rows = lambda e: (looked.append(e), rows(e))[1]  # type: ignore[method-assign,func-returns-value]
    again = examine_resumably(dataset, robot(), Thresholds(), 0, notes, workers=1, progress=False)
    assert looked == [3, 4] and again.facts == whole.facts and judge(again) == []
    looked.clear()
    examine_resumably(dataset, robot(), Thresholds(), 0, notes, workers=1, progress=False)
    assert looked == []
    examine_resumably(dataset, robot(), Thresholds(frozen_travel=0.2), 0, notes, workers=1, progress=False)
    assert looked == [0, 1, 2, 3, 4]
    del dataset.rows
    with_workers = examine_resumably(dataset, robot(), Thresholds(), 0, None, workers=2, progress=False)
    assert with_workers.facts == whole.facts


def without_actions(rows: EpisodeRows) -> EpisodeRows:
    return dataclasses.replace(rows, action=np.zeros((len(rows), 0), np.float32), extra={"scene": ["a"] * len(rows)})


def test_absolute_pseudo_actions_are_the_next_state() -> None:
    own = contract(action=())
    made_contract = cleaned_contract(own, robot(), make_actions=True)
    assert made_contract.action_channels == CHANNELS and made_contract.convention == "absolute_joint"
    rows = without_actions(healthy(1).episodes[0])
    made = pseudo_actions(rows, made_contract)
    assert np.array_equal(made.action, rows.state[1:]) and np.array_equal(made.state, rows.state[:-1])
    assert len(made) == len(made.timestamp) == len(made.task) == len(made.perturbed) == len(made.extra["scene"]) == 49
    assert made.action.dtype == np.float32
    assert len(pseudo_actions(without_actions(healthy(1, steps=1).episodes[0]), made_contract)) == 0
    assert cleaned_contract(own, None, make_actions=False) is own


def test_joint_deltas_are_differences() -> None:
    own = single_arm_contract("delta_joint", "joint_delta", "rad", CHANNELS)
    rows = without_actions(healthy(1).episodes[0])
    made = pseudo_actions(rows, own)
    assert np.allclose(rows.state[0] + np.cumsum(made.action, axis=0), rows.state[1:], atol=1e-5)


@pytest.mark.parametrize("unit", ["m,axis_angle", "m,euler_xyz", "m"])
def test_pose_deltas_lead_to_the_next_pose(unit: str) -> None:
    rng = np.random.default_rng(0)
    turns = Rotation.from_rotvec(np.cumsum(rng.normal(0, 0.3, (30, 3)), axis=0))
    angles = {"m,axis_angle": turns.as_rotvec(), "m,euler_xyz": turns.as_euler("xyz"), "m": np.zeros((30, 0))}[unit]
    place = rng.normal(size=(30, 3))
    names = [f"c{i}" for i in range(3 + angles.shape[1])]
    own = single_arm_contract("delta_eef", "eef_delta", unit, names)
    rows = dataclasses.replace(
        without_actions(healthy(1, steps=30).episodes[0]),
        state=np.concatenate([place, angles], axis=1).astype(np.float32),
    )
    delta = pseudo_actions(rows, own).action.astype(np.float64)
    assert np.allclose(place[:-1] + delta[:, :3], place[1:], atol=1e-5)
    if unit != "m":
        read = Rotation.from_rotvec if unit == "m,axis_angle" else lambda v: Rotation.from_euler("xyz", v)
        assert ((read(delta[:, 3:]) * turns[:-1]) * turns[1:].inv()).magnitude().max() < 1e-5


def test_a_group_of_other_names_is_found_by_its_kind() -> None:
    own = single_arm_contract("delta_joint", "joint_delta", "rad", CHANNELS)
    other = (ChannelGroup("measured", "joint_position", "rad", tuple(f"q{i}" for i in range(6))),)
    renamed = dataclasses.replace(own, state=other)
    rows = without_actions(healthy(1).episodes[0])
    assert np.array_equal(pseudo_actions(rows, renamed).action, pseudo_actions(rows, own).action)


def test_what_cannot_be_made_is_named() -> None:
    own: DataContract = contract(action=())
    with pytest.raises(UserError, match="has no actions: give --embodiment"):
        cleaned_contract(own, None, make_actions=True)
    blind = dataclasses.replace(own, state=own.state[1:])
    with pytest.raises(UserError, match=r"action group 'left_arm' .* give the state a joint_position group in rad"):
        cleaned_contract(blind, robot(), make_actions=True)
