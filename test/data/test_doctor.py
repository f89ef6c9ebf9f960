"""Every finding of the doctor on a dataset that has exactly this fault, and none on a healthy one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from memory_dataset import CHANNELS, FPS, MemoryDataset, contract, episode, healthy, robot, single_arm_contract

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.doctor.case import examine_all
from qwen_vla_core.data.doctor.checks import close_pairs
from qwen_vla_core.data.doctor.config import Thresholds, load_thresholds
from qwen_vla_core.data.doctor.diagnose import Diagnosis, diagnose
from qwen_vla_core.data.doctor.facts import EpisodeFacts
from qwen_vla_core.data.doctor.findings import Finding
from qwen_vla_core.data.doctor.language import contradict, moves_gripper, named_arms
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError

ARM, GRIPPERS = [0, 1, 3, 4], [2, 5]


def examined(
    dataset: MemoryDataset, of: Embodiment | None = None, pictures: int | None = 0, workers: int = 1
) -> Diagnosis:
    case = examine_all(dataset, of or robot(), Thresholds(), pictures, workers=workers, progress=False)
    return diagnose(case)


def only(dataset: MemoryDataset, code: str, severity: str, of: Embodiment | None = None) -> Finding:
    """The one finding of a dataset."""
    diagnosis = examined(dataset, of)
    assert [(each.code, each.severity) for each in diagnosis.findings] == [(code, severity)]
    assert diagnosis.errors == (severity == "error")
    json.dumps(diagnosis.to_json(), allow_nan=False)
    return diagnosis.findings[0]


def one_of(dataset: MemoryDataset, code: str) -> Finding:
    """The finding of a code, among others."""
    (found,) = [each for each in examined(dataset).findings if each.code == code]
    return found


def change(dataset: MemoryDataset, episode: int, **changes: Any) -> MemoryDataset:
    dataset.episodes[episode] = dataclasses.replace(dataset.episodes[episode], **changes)
    return dataset


def each(dataset: MemoryDataset, edit: Callable[[EpisodeRows], dict[str, Any]]) -> MemoryDataset:
    for i, rows in enumerate(dataset.episodes):
        change(dataset, i, **edit(rows))
    return dataset


def scaled(columns: list[int], factor: float, offset: float = 0.0) -> Callable[[EpisodeRows], dict[str, Any]]:
    def edit(rows: EpisodeRows) -> dict[str, Any]:
        state, action = rows.state.copy(), rows.action.copy()
        state[:, columns] = state[:, columns] * factor + offset
        action[:, columns] = action[:, columns] * factor + offset
        return {"state": state, "action": action}

    return edit


@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_dataset_has_no_findings(seed: int) -> None:
    dataset = healthy(6, seed)
    diagnosis = examined(dataset)
    assert diagnosis.findings == ()
    assert diagnosis.looked == diagnosis.summary()["steps"] == dataset.lengths.sum()
    assert diagnosis.summary()["hours"] == pytest.approx(dataset.lengths.sum() / FPS / 3600)
    assert [c.name for c in diagnosis.statistics["action"]] == list(CHANNELS)


def test_pictures_can_be_sampled_or_left_alone() -> None:
    assert examined(healthy(2), pictures=5).looked == 10
    assert examined(healthy(2), pictures=None).looked == 0


def test_workers_do_not_matter() -> None:
    dataset = healthy(4)
    dataset.episodes[1].action[3, 0] = 9
    assert examined(dataset, workers=2).to_json() == examined(dataset).to_json()


def test_not_finite() -> None:
    dataset = healthy()
    dataset.episodes[2].action[7, 4] = np.nan
    dataset.episodes[2].action[9, 4] = np.inf
    found = only(dataset, "not_finite", "error")
    assert "2 values of action not finite (NaN or infinite), in right_elbow" in found.message
    assert (found.places[0].episode, found.places[0].rows) == (2, (7, 8))


def test_near_constant() -> None:
    diagnosis = examined(each(healthy(), scaled([1], 0.0, 0.3)))
    assert [(f.code, f.side, f.channels) for f in diagnosis.findings] == [
        ("near_constant", "state", ("left_elbow",)),
        ("near_constant", "action", ("left_elbow",)),
    ]
    assert diagnosis.errors == 0

    def rarely(rows: EpisodeRows) -> dict[str, Any]:
        action = rows.action.copy()
        action[:, 1] = 0.2
        action[10, 1] = 0.75
        return {"action": action}

    dataset = each(healthy(3, steps=200), rarely)
    assert "left_elbow move, but in less than 2 %" in one_of(dataset, "near_constant").message


def test_action_is_state() -> None:
    found = only(each(healthy(), lambda rows: {"action": rows.state.copy()}), "action_is_state", "error")
    assert found.numbers["share"] == 1 and found.total == 6
    shifted = each(healthy(), lambda rows: {"action": np.concatenate([rows.state[1:], rows.state[-1:]])})
    assert examined(shifted).findings == ()


def test_idle() -> None:
    def wait(rows: EpisodeRows) -> dict[str, Any]:
        action = np.concatenate([rows.action, np.repeat(rows.action[-1:], 40, axis=0)])
        noise = np.random.default_rng(0).normal(0, 0.002, (40, 6)).astype(np.float32)
        state = np.concatenate([rows.state, rows.state[-1:] + noise])
        length = len(action)
        return {
            "action": action,
            "state": state,
            "timestamp": np.arange(length) / FPS,
            "task": np.full(length, rows.task[0]),
            "perturbed": np.zeros(length, bool),
        }

    dataset = each(healthy(), wait)
    for pictures in dataset.pictures:
        pictures["ego"] = np.concatenate([pictures["ego"], np.repeat(pictures["ego"][-1:], 40, axis=0)])
    found = only(dataset, "idle", "warning")
    assert found.numbers["share"] == pytest.approx(6 * 40 / sum(dataset.lengths), abs=0.02)
    assert found.numbers["longest_s"] == pytest.approx(4.0, abs=0.2)

    one = change(healthy(), 1, action=np.repeat(healthy().episodes[1].action[:1], 52, axis=0))
    assert one_of(one, "idle").numbers["idle_episodes"] == 1


def test_clipped_gripper() -> None:
    def clip(rows: EpisodeRows) -> dict[str, Any]:
        state = rows.state.copy()
        state[:, 2] = np.clip(state[:, 2] * 3 - 1, 0, 1)
        return {"state": state}

    found = only(each(healthy(), clip), "clipped_gripper", "warning")
    assert found.channels == ("left_gripper",) and found.side == "state"
    assert found.numbers["at_lower"] + found.numbers["at_upper"] > 0.2

    def switch(rows: EpisodeRows) -> dict[str, Any]:
        action = rows.action.copy()
        action[:, 2] = np.repeat([1, 0], [20, len(action) - 20])
        return {"action": action, "perturbed": np.isin(np.arange(len(action)), (19, 20))}

    assert only(each(healthy(), switch), "clipped_gripper", "info").side == "action"


@pytest.mark.parametrize(
    ("columns", "factor", "offset", "unit"),
    [
        (ARM, 180 / np.pi, 0, "degrees, not rad"),
        (GRIPPERS, 100, 0, "percent or bytes, not fraction"),
        (GRIPPERS, 255, 0, "bytes, not fraction"),
        (GRIPPERS, 0.014, 0.044, "metres of finger opening, not fraction"),
    ],
)
def test_wrong_units(columns: list[int], factor: float, offset: float, unit: str) -> None:
    diagnosis = examined(each(healthy(), scaled(columns, factor, offset)))
    assert [(f.code, f.severity, f.side) for f in diagnosis.findings] == [
        ("wrong_units", "error", "state"),
        ("wrong_units", "error", "action"),
    ]
    assert unit in diagnosis.findings[0].message
    assert diagnosis.findings[1].channels == tuple(CHANNELS[i] for i in columns)


@pytest.mark.parametrize(("factor", "unit"), [(1000, "millimetres"), (100, "centimetres")])
def test_wrong_units_without_limits(factor: float, unit: str) -> None:
    channels = ("x", "y", "z", "rx", "ry", "rz")
    own = single_arm_contract("absolute_eef", "eef_pose", "m,axis_angle", channels)
    dataset = dataclasses.replace(each(healthy(), scaled([0, 1, 2], factor)), contract=own)
    diagnosis = diagnose(examine_all(dataset, None, Thresholds(), None, 1, progress=False))
    assert {f.code for f in diagnosis.findings} == {"wrong_units"}
    assert all(f.channels == ("x", "y", "z") and unit in f.message for f in diagnosis.findings)


def test_out_of_limits() -> None:
    dataset = healthy()
    rows = dataset.episodes[3]
    action = rows.action.copy()
    action[:, 0] = np.linspace(0, 2.5, len(action))
    state = rows.state.copy()
    state[:, 0] = action[:, 0] - 0.02
    diagnosis = examined(change(dataset, 3, action=action, state=state))
    assert [(f.code, f.severity, f.side) for f in diagnosis.findings] == [
        ("out_of_limits", "error", "action"),
        ("out_of_limits", "warning", "state"),
    ]
    assert "left_shoulder = 2.5 with limits -2 … 2" in diagnosis.findings[0].message
    assert diagnosis.findings[0].places[0].rows == (len(action) - 1, len(action))


def test_velocity() -> None:
    dataset = healthy()
    action = dataset.episodes[1].action
    action[20, 3] = np.clip(action[19, 3] + (1.2 if action[19, 3] < 0 else -1.2), -2, 2)
    found = only(dataset, "velocity", "warning")
    assert found.channels == ("right_shoulder",) and found.places[0].episode == 1
    assert found.places[0].rows in ((20, 21), (21, 22))
    pushed = np.isin(np.arange(len(action)), (19, 20))
    assert examined(change(dataset, 1, perturbed=pushed)).findings == ()


def test_time_not_increasing() -> None:
    dataset = healthy()
    time = dataset.episodes[0].timestamp.copy()
    time[[10, 11]] = time[[11, 10]]
    found = only(change(dataset, 0, timestamp=time), "time_not_increasing", "error")
    assert found.places[0].rows == (11, 12)


def test_time_gaps() -> None:
    dataset = healthy()
    time = dataset.episodes[4].timestamp.copy()
    time[30:] += 0.7
    found = only(change(dataset, 4, timestamp=time), "time_gaps", "warning")
    assert found.places[0].rows == (29, 31) and found.numbers["longest_s"] == pytest.approx(0.8)


def test_wrong_rate() -> None:
    found = only(each(healthy(), lambda rows: {"timestamp": rows.timestamp / 3}), "wrong_rate", "error")
    assert found.numbers == {"measured_hz": pytest.approx(30), "stated_hz": 10}
    slow = dataclasses.replace(each(healthy(), lambda rows: {"timestamp": rows.timestamp * 2}), fps=5.0)
    assert "its prompt would say 10 Hz" in only(slow, "wrong_rate", "error").message


def test_missing_frames() -> None:
    dataset = healthy()
    dataset.broken[2, "ego"] = "videos/ego.mp4: cut short after 12 of 54 frames"
    found = only(dataset, "missing_frames", "error")
    assert "cut short after 12" in found.message and found.places[0].view == "ego"
    short = healthy()
    short.frames = lambda e, view, steps: short.pictures[e][view][steps[0] : min(steps[-1] + 1, 40)]  # type: ignore[method-assign]
    assert only(short, "missing_frames", "error").total == 6


@pytest.mark.parametrize(("level", "words"), [(0, "black"), (130, "one even colour")])
def test_blank_frames(level: int, words: str) -> None:
    dataset = healthy()
    dataset.pictures[1]["ego"][8:11] = level
    found = only(dataset, "blank_frames", "error")
    assert f"3 of {found.numbers['looked']} pictures are {words}" in found.message
    assert (found.places[0].episode, found.places[0].rows) == (1, (8, 11))


def test_frozen_frames() -> None:
    dataset = healthy()
    dataset.pictures[5]["ego"][20:45] = dataset.pictures[5]["ego"][20]
    found = only(dataset, "frozen_frames", "warning")
    assert (found.places[0].episode, found.places[0].rows) == (5, (20, 45))
    noisy = healthy()
    noise = np.random.default_rng(0).integers(-3, 4, (25, 48, 48, 3))  # as an encoder makes it
    noisy.pictures[5]["ego"][20:45] = np.clip(noisy.pictures[5]["ego"][20] + noise, 0, 255)
    assert only(noisy, "frozen_frames", "warning").places[0].rows == (20, 45)


def test_duplicate_rows() -> None:
    dataset = healthy()
    dataset.episodes.append(dataset.episodes[2])
    dataset.pictures.append(dataset.pictures[2])
    found = only(dataset, "duplicate_rows", "warning")
    assert found.places[0].episode == 6 and found.numbers["groups"] == [[2, 6]]


def test_duplicate_frames() -> None:
    dataset = healthy()
    rows, _ = episode(np.random.default_rng(9), int(dataset.lengths[3]), task=1)
    noise = np.random.default_rng(0).integers(-2, 3, dataset.pictures[3]["ego"].shape)
    copied = np.clip(dataset.pictures[3]["ego"] + noise, 0, 255).astype(np.uint8)
    dataset.episodes.append(rows)
    dataset.pictures.append({"ego": copied})
    found = only(dataset, "duplicate_frames", "error")
    assert found.numbers["pairs"] == [[3, 6]]


def test_close_pairs_are_all_and_only_those() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 12, (60, 256), np.uint8)
    levels[41] = np.clip(levels[7].astype(int) + rng.integers(-2, 3, 256), 0, 255)
    levels[50] = levels[41]
    far = np.abs(levels[:, None].astype(int) - levels[None]).max(axis=2)
    expected = [(i, j) for i in range(60) for j in range(i + 1, 60) if far[i, j] <= 2]
    assert close_pairs(levels, 2.0) == expected and (7, 41) in expected and (41, 50) in expected


def test_contradicting_instructions() -> None:
    dataset = healthy()
    dataset.tasks = ("move the left cup", "bring both grippers together", "move the right cup")
    dataset.episodes.append(dataclasses.replace(dataset.episodes[0], task=np.full(50, 2)))
    dataset.pictures.append(dataset.pictures[0])
    found = only(dataset, "contradicting_instructions", "error")
    assert [place.episode for place in found.places] == [0, 6]
    assert "'move the left cup' and 'move the right cup'" in found.message


def test_empty_instruction() -> None:
    dataset = healthy()
    dataset.tasks = ("  ", "bring both grippers together")
    assert only(dataset, "empty_instruction", "error").total == 3


def still(columns: list[int]) -> Callable[[EpisodeRows], dict[str, Any]]:
    def edit(rows: EpisodeRows) -> dict[str, Any]:
        action = rows.action.copy()
        action[:, columns] = action[:1, columns]
        return {"action": action}

    return edit


@pytest.mark.parametrize(
    ("instruction", "columns", "reason"),
    [
        ("wave with the left arm", [0, 1, 2], "names the left arm, but only the right one moves"),
        ("Reach out, right hand first", [3, 4, 5], "names the right arm, but only the left one moves"),
        ("close the gripper", GRIPPERS, "opens or closes, but none moves"),
        ("opening the left gripper", [2], "opens or closes, but none moves"),
        ("grasp the cup", GRIPPERS, "says to grasp something, but no gripper moves"),
    ],
)
def test_instruction_is_not_the_motion(instruction: str, columns: list[int], reason: str) -> None:
    dataset = healthy()
    dataset.tasks = (*dataset.tasks, instruction)
    change(dataset, 2, task=np.full(54, 2), **still(columns)(dataset.episodes[2]))
    found = only(dataset, "instruction_motion", "warning")
    assert reason in found.message and found.places[0].episode == 2
    assert examined(change(dataset, 2, action=healthy().episodes[2].action)).findings == ()


def test_instruction_is_judged_per_subtask() -> None:
    dataset = healthy()
    dataset.tasks = (*dataset.tasks, "close the left gripper", "lift the cube")
    action = dataset.episodes[0].action.copy()
    action[25:, [2, 5]] = action[25, [2, 5]]
    task = np.repeat([2, 3], 25)
    assert examined(change(dataset, 0, action=action, task=task)).findings == ()
    found = only(change(dataset, 0, task=task[::-1].copy()), "instruction_motion", "warning")
    assert found.places[0].rows == (25, 50)


def test_unreadable_rows_zero_length_and_unknown_task() -> None:
    dataset = healthy()
    dataset.broken[1] = "data/file-000.parquet: cut short in row group 1"
    assert "cut short in row group 1" in only(dataset, "unreadable_rows", "error").message

    none = np.zeros((0, 6), np.float32)
    empty = EpisodeRows(none, none, np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))
    dataset = healthy()
    dataset.episodes.append(empty)
    dataset.pictures.append({})
    assert only(dataset, "zero_length", "error").places[0].episode == 6

    found = only(change(healthy(), 3, task=np.full(56, 5)), "unknown_task", "error")
    assert found.places[0].episode == 3


def test_wrong_dimensions() -> None:
    narrow = change(healthy(), 2, action=healthy().episodes[2].action[:, :5])
    assert "action has shape (54, 5), but the contract names 6" in only(narrow, "unreadable_rows", "error").message

    own = contract()
    fewer = dataclasses.replace(own, action=own.action[:3])
    dataset = dataclasses.replace(each(healthy(), lambda rows: {"action": rows.action[:, :5]}), contract=fewer)
    found = only(dataset, "dimensions", "error")
    assert "action has 5 channels, pair has 6 (missing: right_gripper)" in found.message
    swapped = dataclasses.replace(own, state=(own.state[2], own.state[3], own.state[0], own.state[1]))
    moved = each(healthy(), lambda rows: {"state": rows.state[:, [3, 4, 5, 0, 1, 2]]})
    found = only(dataclasses.replace(moved, contract=swapped), "dimensions", "error")
    assert "the same channels in another order" in found.message


def test_another_convention_and_missing_views() -> None:
    relative = dataclasses.replace(healthy(), contract=contract(convention="relative_joint"))
    assert "are relative_joint, pair expects absolute_joint" in only(relative, "convention", "error").message
    blind = healthy()
    blind.pictures = [{"wrist": pictures["ego"]} for pictures in blind.pictures]
    assert "no pictures of ego; the dataset has wrist" in only(blind, "missing_views", "error").message


def test_facts_survive_json() -> None:
    dataset = healthy(2)
    dataset.episodes[0].action[3, 0] = 9
    dataset.episodes[0].state[3, 0] = np.nan
    dataset.pictures[1]["ego"][5:40] = 0
    for facts in examined(dataset).case.facts:
        assert EpisodeFacts.from_json(json.loads(json.dumps(facts.to_json(), allow_nan=False))) == facts


def test_words() -> None:
    assert named_arms("use the Left arm") == {"left"} == named_arms("with your left robotic gripper")
    assert named_arms("open the left drawer") == set() == named_arms("turn right, then pick up the hand towel")
    assert named_arms("from the left hand to the right hand") == {"left", "right"}
    assert moves_gripper("Closes its gripper") and moves_gripper("release the fingers")
    assert not moves_gripper("open the drawer") and not moves_gripper("close the door. Lift the gripper")
    assert contradict("put the red cup left", "put the blue cup left")
    assert not contradict("put the red cup left", "take the cup")
    assert not contradict("pick up the cube", "pick up the cube")


def test_thresholds_come_from_yaml_and_flags(tmp_path: Any) -> None:
    file = tmp_path / "doctor.yaml"
    file.write_text("idle_share: 0.9\nshortest: 4\n")
    assert load_thresholds(file, {"idle_rate": 0.5, "no_motion": None}) == Thresholds(
        idle_share=0.9, shortest=4, idle_rate=0.5
    )
    file.write_text("idle_shar: 0.9\n")
    with pytest.raises(UserError, match=r"doctor.yaml:1: idle_shar: unknown key; fix: did you mean 'idle_share'"):
        load_thresholds(file)
    with pytest.raises(UserError, match=r"--idle-share 3: must be at least 0, at most 1"):
        load_thresholds(None, {"idle_share": 3})
