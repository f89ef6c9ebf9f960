"""The WidowX expert: reliable, inside the robot's limits, needs its lead on the belt; questions about a plate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.evaluation.closed_loop import run_episode
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.sim.demos import NoiseConfig, check_expert, record
from qwen_vla_core.sim.grounding import Grid, cube_cells, intention, questions
from qwen_vla_core.sim.randomize import COLOURS, RandomizationConfig
from qwen_vla_core.sim.state import SceneState
from qwen_vla_core.sim.worlds.widowx import WidowXWorld
from qwen_vla_core.sim.worlds.widowx_expert import ExpertConfig, PlateAndBeltExpert

UNSEEN = 3_000_000
ROBOT = load_embodiment("widowx")


@pytest.fixture(scope="module")
def arm() -> Iterator[WidowXWorld]:
    world = WidowXWorld()
    yield world
    world.close()


def work(world: WidowXWorld, config: ExpertConfig | None = None, limit_s: float = 12.0) -> np.ndarray:
    """Lets the expert work; returns its actions."""
    expert, actions = PlateAndBeltExpert(world, config), []
    while not world.success() and world.time_s < limit_s:
        actions.append(expert.action())
        for command in world.play(actions[-1]):
            world.step(command)
    return np.array(actions)


@pytest.mark.parametrize("task", ["place", "belt"])
def test_expert_succeeds_on_seeds_nobody_tuned_for_and_keeps_the_limits(task: str) -> None:
    world = WidowXWorld(tasks=(task,))
    lines = check_expert(world, "widowx", range(UNSEEN, UNSEEN + 20))
    assert sum(line["success"] for line in lines) >= 19, [line for line in lines if not line["success"]]
    assert all(line["chosen"] in line["instruction"] for line in lines if line["success"])
    lower, upper = (np.concatenate([getattr(g.limits, side) for g in ROBOT.actions]) for side in ("lower", "upper"))
    for seed in range(5):
        world.reset(UNSEEN + seed)
        actions = work(world)
        assert (actions >= lower - 1e-9).all() and (actions <= upper + 1e-9).all()


def test_only_a_lead_catches_what_moves() -> None:
    world, caught = WidowXWorld(tasks=("belt",)), {True: 0, False: 0}
    for lead in caught:
        for seed in range(6):
            world.reset(seed)
            work(world, ExpertConfig(lead=lead), 4.0)
            caught[lead] += world.success()
    assert caught[True] == 6 and caught[False] <= 1


def test_expert_recovers_from_a_hand_that_opens(arm: WidowXWorld) -> None:
    arm.reset(UNSEEN, "put the green cube on the plate")
    expert, dropped = PlateAndBeltExpert(arm), False
    while not arm.success() and arm.time_s < 10:
        action = expert.action()
        if not dropped and arm.cube_position("green")[2] > 0.07:
            action[6], dropped = 1.0, True
        for command in arm.play(action):
            arm.step(command)
    assert dropped and arm.success()


def test_pushed_demonstrations_recover_and_say_where_they_were_pushed(arm: WidowXWorld) -> None:
    made = [record(arm, "widowx", seed, noise=1.0, pushes=NoiseConfig(start=0.4)) for seed in range(4)]
    assert all(m.rows.perturbed is not None and m.rows.perturbed.any() for m in made)
    assert sum(m.success for m in made) >= 3
    assert made[0].images["cam_wrist"].shape[1:] == (96, 128, 3) and made[0].rows.action.shape[1] == 7


class ExpertPolicy:
    """The expert as a policy: one real action, then stand still."""

    def __init__(self, world: WidowXWorld) -> None:
        self.world = world

    def predict(self, observation: Observation) -> ActionChunk:
        if self.world.time_s == 0:
            self.expert = PlateAndBeltExpert(self.world)
        actions = np.zeros((ROBOT.control.horizon, 7))
        actions[0] = self.expert.action()
        actions[:, 6] = actions[0, 6]
        return ActionChunk(actions, ROBOT.channels, observation.stamp_ns, ROBOT.period_s)


def test_displacements_survive_the_loop_and_the_robots_own_control_law() -> None:
    world = WidowXWorld(tasks=("place",), randomize=RandomizationConfig(camera=False))
    policy = ExpertPolicy(world)
    for seed in range(2):
        assert run_episode(world, policy, seed=seed, execute_steps=1, timeout_s=10).success
        timing = Timing(latency_s=0.0, replan_s=0.2, blend_s=0.0)
        assert run_episode_in_time(world, policy, ROBOT, seed=seed, timing=timing, timeout_s=10).success


def test_answers_about_the_plate_follow_what_happens(arm: WidowXWorld) -> None:
    arm.reset(1, "put the red cube on the plate")
    before = dict(questions(arm.scene_state(), np.random.default_rng(0)))
    assert before["what is on the plate?"] == "nothing" and before["is the red cube on the plate?"] == "no"
    assert before["is the gripper open or closed?"] == "open" and before["where is the gripper?"].startswith("row")
    assert not any("arm" in question for question in before)
    work(arm)
    after = dict(questions(arm.scene_state(), np.random.default_rng(0)))
    assert after["is the red cube on the plate?"] == "yes"
    scene = arm.scene_state()
    assert SceneState.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene and scene.places[0].holds == ("red",)


def test_the_plate_is_where_its_answer_says(arm: WidowXWorld) -> None:
    for seed in range(4):
        arm.reset(seed, "put the blue cube on the plate")
        plate, geoms = arm.scene_state().places[0], arm._plate_geoms
        shown = arm.render("ego", 320, 240).copy()
        arm.model.geom_rgba[geoms, :3] = (1, 0, 1)
        painted = arm.render("ego", 320, 240)
        v, u = np.nonzero(np.abs(painted.astype(int) - shown).sum(axis=2) > 60)
        np.testing.assert_allclose(plate.pixels["ego"], [u.mean() / 320, v.mean() / 240], atol=0.02)
        assert "ego" in plate.visible


def test_intention_names_cube_and_plate_without_an_arm(arm: WidowXWorld) -> None:
    arm.reset(3, "put the red cube on the plate")
    scene, grid = arm.scene_state(), Grid(6, 8)
    cube, plate = scene.cube("red"), scene.places[0]
    assert cube is not None
    assert intention(scene, grid=grid) == f"{grid.name(cube.pixels['ego'])} plate {grid.name(plate.pixels['ego'])}"
    assert intention(scene.seen_in(("cam_wrist",))) == "hidden"
    names = (*COLOURS, "plate")
    occupied, _ = cube_cells(scene, "ego", grid, names)
    row, column = grid.cell(plate.pixels["ego"])
    assert occupied.shape == (48, 4) and occupied[row * 8 + column, 3] == 1 and occupied[:, 3].sum() == 1
    assert np.array_equal(occupied[:, :3], cube_cells(scene, "ego", grid)[0])


def test_commands_work_for_this_embodiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--embodiment", "widowx", "--task"]
    assert main(["sim", "expert", *chosen, "all", "--episodes", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["tasks"]
    assert {name: line["successes"] for name, line in report.items()} == {"place": 2, "belt": 2}
    assert main(["sim", "demos", *chosen, "place", "--episodes", "1", "--out", str(tmp_path / "d"), "--json"]) == 0
    assert main(["sim", "render", *chosen, "belt", "--expert", "--out", str(tmp_path / "p.png")]) == 0
    assert cv2.imread(str(tmp_path / "p.png")).std() > 10
    assert main(["sim", "expert", *chosen, "pick"]) == 2
    assert "use one of place, belt, all" in capsys.readouterr().err
