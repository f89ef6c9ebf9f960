"""The experts do their tasks, gently, and do not depend on luck."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.sim.demos import check_expert
from qwen_vla_core.sim.experts import ScriptedExpert, gripper_rotation, interpolate
from qwen_vla_core.sim.ik import solve_ik
from qwen_vla_core.sim.tasks import Task, phrase
from qwen_vla_core.sim.worlds.aloha import AlohaWorld

UNSEEN = 3_000_000


@pytest.mark.parametrize(("task", "seconds"), [("pick", 4.0), ("transfer", 8.0)])
def test_expert_succeeds_on_seeds_nobody_tuned_for(task: str, seconds: float) -> None:
    world = AlohaWorld(tasks=(task,))
    lines = check_expert(world, "aloha", range(UNSEEN, UNSEEN + 12))
    assert sum(line["success"] for line in lines) >= 11, [line for line in lines if not line["success"]]
    assert np.median([line["seconds"] for line in lines]) < seconds


def test_expert_takes_the_cube_that_was_named(world: AlohaWorld) -> None:
    for seed in range(UNSEEN, UNSEEN + 3):
        world.reset(seed)
        for cube in world.scene_state().cubes:
            world.reset(seed, phrase(Task("pick", cube.colour)))
            expert = ScriptedExpert(world)
            while not world.success() and world.time_s < 6:
                for command in interpolate(world.command(), expert.action(), 5):
                    world.step(command)
            assert world.lifted_cube() == cube.colour


def test_expert_recovers_from_a_hand_that_opens(world: AlohaWorld) -> None:
    world.reset(UNSEEN, "pick up the green cube")
    expert = ScriptedExpert(world)
    dropped = False
    while not (dropped and world.success()) and world.time_s < 10:
        action = expert.action()
        if not dropped and world.cube_position("green")[2] > 0.045:
            action[[6, 13]] = 1.0
            dropped = True
        for command in interpolate(world.command(), action, 5):
            world.step(command)
    assert dropped and world.success()


def test_expert_moves_within_the_robots_limits_and_keeps_the_idle_arm_still(world: AlohaWorld) -> None:
    world.reset(UNSEEN + 1, "pick up the blue cube")
    expert, start = ScriptedExpert(world), world.command()
    commands = [start]
    while not world.success() and world.time_s < 6:
        for command in interpolate(world.command(), expert.action(), 5):
            world.step(command)
            commands.append(command)
    speed = np.abs(np.diff(commands, axis=0)).max(0) * world.control_hz
    assert speed[[*range(6), *range(7, 13)]].max() <= 2.5
    assert speed[[6, 13]].max() <= 5.0 + 1e-9
    idle = slice(7, 14) if world.arm == "left" else slice(0, 7)
    np.testing.assert_array_equal(np.array(commands)[:, idle], np.tile(start[idle], (len(commands), 1)))


def test_ik_reaches_a_pose_the_arm_can_take(world: AlohaWorld) -> None:
    import mujoco

    world.reset(0)
    scratch, dofs, site = mujoco.MjData(world.model), world.arm_dofs("left"), world.pinch_site["left"]
    goal, rotation = np.array([-0.12, 0.45, 0.05]), gripper_rotation(0.0, 0.5 * np.pi, 0.0)
    seed = np.array([0, 0.2, 0.6, 0, 0.9, 0])
    scratch.qpos[dofs] = solve_ik(world.model, scratch, site, dofs, goal, rotation, seed)
    mujoco.mj_kinematics(world.model, scratch)
    np.testing.assert_allclose(scratch.site_xpos[site], goal, atol=1e-3)
    np.testing.assert_allclose(scratch.site_xmat[site].reshape(3, 3), rotation, atol=1e-2)
