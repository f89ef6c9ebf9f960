"""Episodes are cut at grasps and releases, from numbers alone or with scene snapshots, and the words fit."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.subtasks import Gripper, grippers, split, with_subtasks
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

ONE = (Gripper("", 1, 1),)
TWO = (Gripper("left", 0, 0), Gripper("right", 1, 1))


def episode(*told: list[float], blocked: float | None = None, lag: int = 1) -> EpisodeRows:
    """Rows of grippers that follow their command one step later and stop at ``blocked``, if something is in between."""
    action = np.array(told, dtype=np.float32).T
    if len(told) == 1:
        action = np.column_stack([np.linspace(0, 1, len(action)), action]).astype(np.float32)
    state = np.concatenate([action[:1], action[:-lag]])
    if blocked is not None:
        state[:, -len(told) :] = np.maximum(state[:, -len(told) :], blocked)
    steps = len(action)
    return EpisodeRows(state, action, np.arange(steps) / 10, np.zeros(steps, np.int64), np.zeros(steps, bool))


def ramp(*parts: tuple[float, int]) -> list[float]:
    return [value for value, steps in parts for _ in range(steps)]


def kinds(found: list) -> list[tuple[str, int, int]]:
    return [(one.kind, one.start, one.stop) for one in found]


PICK_AND_PLACE = ramp((1, 8), (0.7, 1), (0.4, 1), (0.1, 12), (0.5, 1), (1, 7))


def test_a_blocked_gripper_is_a_grasp_and_opening_it_a_release() -> None:
    rows = episode(PICK_AND_PLACE, blocked=0.45)
    found = split(rows, ONE)
    # Told to close at 8; the fingers stand from 11 on; told to open at 22, open one step after 23.
    assert kinds(found) == [
        ("reach", 0, 8),
        ("grasp", 8, 11),
        ("lift", 11, 22),
        ("release", 22, 25),
        ("withdraw", 25, 30),
    ]
    assert all("the object" in one.instruction or one.kind == "withdraw" for one in found)
    assert not any("arm" in one.instruction for one in found if one.kind not in ("withdraw",))


def test_a_planned_gripper_that_meets_nothing_is_cut_by_its_command() -> None:
    found = split(episode(PICK_AND_PLACE), ONE)
    assert [one.kind for one in found] == ["reach", "grasp", "lift", "release", "withdraw"]
    assert found[1].start == 8 and found[3].start == 22


def test_two_grasps_give_two_reaches() -> None:
    again = ramp((1, 6), (0.1, 8), (1, 9), (0.1, 7))
    found = split(episode(again, blocked=0.5), ONE)
    assert [one.kind for one in found] == ["reach", "grasp", "lift", "release", "reach", "grasp", "lift"]


def test_nothing_grasped_means_no_subtasks() -> None:
    assert split(episode(ramp((1, 20))), ONE) == []
    assert split(episode(ramp((0.3, 20))), ONE) == []


def test_a_thing_passed_from_one_gripper_to_the_other_is_handed_over() -> None:
    giver = ramp((1, 5), (0, 15), (1, 10))
    taker = ramp((1, 16), (0, 14))
    rows = episode(giver, taker, blocked=0.4)
    found = split(rows, TWO, thing="the red cube")
    assert [(one.kind, one.arm) for one in found] == [
        ("reach", "left"),
        ("grasp", "left"),
        ("lift", "left"),
        ("hand over", "right"),
        ("release", "left"),
        ("withdraw", "left"),
    ]
    over, release = found[3], found[4]
    assert over.start == 16 and release.start == 20
    assert "right" in over.instruction and "left" in release.instruction and "red cube" in release.instruction


def scene(t: int, held: bool, height: float) -> str:
    cubes = [
        {"colour": "blue", "position": [0, 0, 0.02], "held_by": []},
        {"colour": "red", "position": [0, 0, height], "held_by": ["left"] if held else []},
    ]
    return json.dumps({"cubes": cubes, "step": t})


def test_scenes_name_the_thing_and_separate_lift_from_carry() -> None:
    told = ramp((1, 5), (0, 15))
    rows = episode(told, ramp((1, 20)), blocked=0.4)
    heights = [0.02] * 9 + [0.04, 0.06, 0.08] + [0.1] * 8
    scenes = [scene(t, t >= 7 and t != 12, heights[t]) for t in range(20)]  # the contact flickers once
    found = split(rows, TWO, scenes)
    assert kinds(found) == [("reach", 0, 5), ("grasp", 5, 7), ("lift", 7, 11), ("carry", 11, 20)]
    assert all("red cube" in one.instruction and one.arm == "left" for one in found)


def test_an_open_gripper_that_touches_is_no_grasp() -> None:
    rows = episode(ramp((1, 12), (0.5, 1), (0, 7)), ramp((1, 20)), blocked=0.4)
    scenes = [scene(t, t in (4, 5, 6) or t >= 14, 0.02) for t in range(20)]
    assert kinds(split(rows, TWO, scenes))[:2] == [("reach", 0, 12), ("grasp", 12, 14)]


def test_subtasks_cover_the_episode_and_become_its_tasks() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        told = np.repeat(rng.choice([0.0, 0.3, 1.0], 12), rng.integers(1, 6, 12)).tolist()
        rows = episode(told, blocked=float(rng.choice([0.0, 0.2, 0.5])))
        found = split(rows, ONE, seed=seed)
        assert [(one.kind, one.instruction) for one in found] == [
            (one.kind, one.instruction) for one in split(rows, ONE, seed=seed)
        ]
        if not found:
            continue
        assert found[0].start == 0 and found[-1].stop == len(rows)
        assert all(one.stop == two.start for one, two in pairwise(found))
        assert all(one.stop - one.start >= 2 for one in found[:-1]) and all(one.start < one.stop for one in found)
        new, texts = with_subtasks(rows, found)
        for one in found:
            assert all(texts[i] == one.instruction for i in new.task[one.start : one.stop])
        _, valid = new.chunk(0, len(rows))  # a label never reaches into the next subtask
        assert valid.sum() == np.flatnonzero(new.task != new.task[0]).min(initial=len(rows))
        np.testing.assert_array_equal(new.action, rows.action)


def test_wordings_differ_between_episodes_and_repeat_with_the_seed() -> None:
    rows = episode(PICK_AND_PLACE, blocked=0.45)
    texts = {tuple(one.instruction for one in split(rows, ONE, seed=seed)) for seed in range(20)}
    assert len(texts) > 10


def contract(*groups: ChannelGroup, state: tuple[ChannelGroup, ...] | None = None) -> DataContract:
    return DataContract(
        PromptSpec("Robot", "single arm"), 10.0, 8, "absolute_joint", (), groups if state is None else state, groups
    )


def test_grippers_are_found_in_the_contract() -> None:
    arm = ChannelGroup("left_arm", "joint_position", "rad", ("a", "b"))
    left = ChannelGroup("left_gripper", "gripper", "fraction", ("lg",))
    right = ChannelGroup("right_gripper", "gripper", "fraction", ("rg",))
    assert grippers(contract(arm, left, right)) == (Gripper("left", 2, 2), Gripper("right", 3, 3))
    assert grippers(contract(arm, left)) == (Gripper("", 2, 2),)
    with pytest.raises(UserError, match="no action group of kind 'gripper'"):
        grippers(contract(arm))
    with pytest.raises(UserError, match="lg"):
        grippers(contract(arm, left, state=(arm,)))


@pytest.mark.parametrize("bad", ["not json", "{}", '{"cubes": [{"colour": "red"}]}', "[]"])
def test_damaged_scenes_give_one_clear_line(bad: str) -> None:
    rows = episode(ramp((1, 3)), ramp((1, 3)))
    with pytest.raises(UserError, match="scene of step 1") as caught:
        split(rows, TWO, [scene(0, False, 0.02), bad, scene(2, False, 0.02)])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="2 snapshots for 3 steps"):
        split(rows, TWO, [scene(0, False, 0.02)] * 2)


def test_real_demonstrations_are_cut_as_the_world_saw_them() -> None:
    """Against the simulator: one hand-over per transfer, cut where its contacts say so."""
    import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

    pytest.importorskip("mujoco")
    from qwen_vla_core.sim.experts import ScriptedExpert, interpolate
    from qwen_vla_core.sim.worlds.aloha import AlohaWorld

    hands = (Gripper("left", 6, 6), Gripper("right", 13, 13))
    for task, wanted in (
        ("pick", {"reach", "grasp", "lift", "carry"}),
        ("transfer", {"grasp", "hand over", "withdraw"}),
    ):
        world = AlohaWorld(tasks=(task,))  # type: ignore[arg-type]
        for seed in (0, 2):
            world.reset(seed)
            expert, state, action, scenes = ScriptedExpert(world), [], [], []
            left = 5  # steps after success, as a demonstration has
            while left and world.time_s < 10:
                left = left - 1 if world.success() else 5
                state.append(world.state())
                scenes.append(world.scene_state().to_dict())
                action.append(expert.action())
                for command in interpolate(world.command(), action[-1], 5):
                    world.step(command)
            steps = len(state)
            rows = EpisodeRows(
                np.stack(state),
                np.stack(action),
                np.arange(steps) / 10,
                np.zeros(steps, np.int64),
                np.zeros(steps, bool),
            )
            found = split(rows, hands, scenes, seed=seed)
            assert world.success() and wanted <= {one.kind for one in found}
            thing = f"the {world.task.colour} cube"
            assert all(one.thing == thing for one in found)
            first = next(t for t, now in enumerate(scenes) if any(cube["held_by"] for cube in now["cubes"]))
            assert next(one for one in found if one.kind == "grasp").stop == first
            alone = split(rows, hands, seed=seed)  # and nearly so from the numbers alone
            assert abs(next(one for one in alone if one.kind == "grasp").stop - first) <= 2
