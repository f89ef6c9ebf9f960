"""Open loop: known errors of policies that know everything or nothing; frames, intervals and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from memory_dataset import MemoryDataset, healthy, robot
from tiny_support import awaken, tiny_policy

from qwen_vla_core.commands.eval_jobs.open_loop import describe
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.open_loop import choose_frames, compare, difference
from qwen_vla_core.model.policy import QwenVLA


@pytest.fixture(scope="module")
def data() -> MemoryDataset:
    return healthy(3, steps=12)


@pytest.fixture(scope="module")
def policy() -> QwenVLA:
    return awaken(tiny_policy(robot(), model_type="qwen3_vl"))


def test_frames_are_spread_over_episodes_and_the_same_for_the_same_seed() -> None:
    chosen = choose_frames([5, 50, 0, 9], 12, seed=1)
    assert chosen == choose_frames([5, 50, 0, 9], 12, seed=1) != choose_frames([5, 50, 0, 9], 12, seed=2)
    assert [sum(episode == e for episode, _ in chosen) for e in range(4)] == [4, 4, 0, 4]
    assert len(set(chosen)) == 12 and all(t < (5, 50, 0, 9)[e] for e, t in chosen)
    assert len(choose_frames([2, 3], 100, seed=0)) == 5
    for lengths, count in (([], 5), ([0, 0], 5), ([3], 0)):
        with pytest.raises(UserError, match="at least one frame"):
            choose_frames(lengths, count, seed=0)


def test_errors_of_staying_and_repeating_are_those_of_the_numbers(policy: QwenVLA, data: MemoryDataset) -> None:
    report = compare(policy, "pair", data, 1000)
    assert len(report["frames"]) == sum(data.lengths)
    span = 2.5  # the made-up quantiles are −1 and 1.5; the data lie inside
    for row in report["frames"]:
        rows, t = data.episodes[row["episode"]], row["t"]
        target = rows.action[t : t + 8]
        before = rows.action[t - 1] if t else rows.state[0]
        assert row["stay"] == pytest.approx(np.abs(rows.state[t] - target).mean() * 2 / span, abs=1e-6)
        assert row["repeat"] == pytest.approx(np.abs(before - target).mean() * 2 / span, abs=1e-6)
        assert row["stay_first"] == pytest.approx(np.abs(rows.state[t] - target[0]).mean() * 2 / span, abs=1e-6)
    mine = report["errors"]["policy"]
    assert mine["chunk"] == pytest.approx(np.mean([row["policy"] for row in report["frames"]]))
    assert mine["interval_95"][0] < mine["chunk"] < mine["interval_95"][1]
    assert np.mean(list(report["errors"]["stay"]["channels"].values())) == pytest.approx(
        np.mean([row["stay"] for row in report["frames"]]), rel=0.2
    )
    assert "repeat the last action" in describe(report) and "× stay where it is" in describe(report)


def test_answers_do_not_depend_on_the_batch_and_two_results_are_paired(policy: QwenVLA, data: MemoryDataset) -> None:
    one, many = (compare(policy, "pair", data, 9, batch_size=size) for size in (1, 5))
    assert [row["policy"] for row in one["frames"]] == pytest.approx(
        [row["policy"] for row in many["frames"]], abs=1e-4
    )
    mean, low, high = difference(one, many)
    assert mean == pytest.approx(0.0, abs=1e-4) and low <= mean <= high
    worse = {**many, "frames": [{**row, "policy": row["policy"] + 0.25} for row in many["frames"]]}
    assert difference(one, worse)[0] == pytest.approx(0.25, abs=1e-3)
    for other in (compare(policy, "pair", data, 9, seed=1), {**one, "content": "other data"}):
        with pytest.raises(UserError, match="not about the same frames"):
            difference(one, other)


def test_data_of_another_robot_are_refused_with_the_key(policy: QwenVLA, data: MemoryDataset) -> None:
    wrong = replace(data, contract=replace(data.contract, convention="delta_joint"))
    with pytest.raises(UserError, match=r"control\.convention are delta_joint"):
        compare(policy, "pair", wrong)
    blind = replace(data, pictures=[{} for _ in data.pictures])
    with pytest.raises(UserError, match="no pictures of view ego"):
        compare(policy, "pair", blind)
