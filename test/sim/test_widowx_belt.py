"""The belt before the WidowX: it carries by friction, has an end, differs between seeds, and is told of truly."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demos import NoiseConfig, check_expert, record
from qwen_vla_core.sim.domain import DomainConfig
from qwen_vla_core.sim.grounding import intention, questions
from qwen_vla_core.sim.randomize import COLOURS, NO_RANDOMIZATION
from qwen_vla_core.sim.scenes import read_scene
from qwen_vla_core.sim.state import SceneState
from qwen_vla_core.sim.worlds.objects import CLUTTER
from qwen_vla_core.sim.worlds.widowx import ARM, REACH_HIGH, WidowXWorld
from qwen_vla_core.sim.worlds.widowx_belt import ASIDE, BEGIN, END, GAP, KEEP_CLEAR, MIDDLE_X, SPEED
from qwen_vla_core.sim.worlds.widowx_expert import PlateAndBeltExpert

STILL = np.array([0.0] * 6 + [1.0])
UNSEEN = 4_000_000


@pytest.fixture(scope="module")
def arm() -> Iterator[WidowXWorld]:
    world = WidowXWorld(tasks=("belt",))
    yield world
    world.close()


def run(world: WidowXWorld, seconds: float) -> None:
    """Lets the time pass while the arm stands still."""
    for _ in range(round(seconds * world.control_hz)):
        world.step(STILL)


def velocity(world: WidowXWorld, colour: str) -> np.ndarray:
    """(3,) of a cube, m/s, as the physics has it."""
    at = world.model.joint(f"cube_{colour}").dofadr[0]
    return world.data.qvel[at : at + 3].copy()


def work(world: WidowXWorld) -> None:
    """Lets the expert finish the episode."""
    expert = PlateAndBeltExpert(world)
    while not world.ended() and world.time_s < world.limit_s:
        for command in world.play(expert.action()):
            world.step(command)


@pytest.mark.parametrize("speed", [0.08, SPEED])
def test_cubes_ride_at_the_belts_speed_without_slipping(speed: float) -> None:
    world, sides = WidowXWorld(tasks=("belt",), belt_speed=speed), set()
    for seed in range(5):
        world.reset(seed)
        before = {cube.colour: world.cube_position(cube.colour) for cube in world.scene_state().cubes}
        run(world, 1.0)
        for colour, start in before.items():
            moved = world.cube_position(colour) - start
            assert moved[1] == pytest.approx(-np.sign(start[1]) * speed, rel=0.02)
            assert np.abs(moved[[0, 2]]).max() < 0.002
        sides.add(float(np.sign(world.belt.velocity[1])))
    assert sides == {-1.0, 1.0}


def test_friction_carries_a_cube_that_was_stopped_and_none_is_ever_set_anywhere(arm: WidowXWorld) -> None:
    arm.reset(0)
    at = arm.model.joint(f"cube_{arm.target}").dofadr[0]
    arm.data.qvel[at : at + 6] = 0.0
    arm.step(STILL)
    assert 0.02 < abs(velocity(arm, arm.target)[1]) < SPEED  # at μ g it takes longer than a step
    position = arm.cube_position(arm.target)
    for _ in range(50):  # what a position gains is what its velocity says: no jumps
        arm.step(STILL)
        now = arm.cube_position(arm.target)
        assert np.linalg.norm(now - position) < 1.1 * SPEED / arm.control_hz
        position = now
    assert velocity(arm, arm.target) == pytest.approx(arm.belt.velocity, abs=0.02 * SPEED)


def test_a_cube_that_reaches_the_end_falls_off_and_ends_the_episode_as_a_failure(arm: WidowXWorld) -> None:
    arm.reset(1)
    start = arm.cube_position(arm.target)
    while not arm.ended():
        arm.step(STILL)
    left = arm.cube_position(arm.target)
    assert abs(left[1]) >= END > REACH_HIGH[1] and np.sign(left[1]) == -np.sign(start[1])
    assert arm.time_s == pytest.approx((abs(start[1]) + END) / SPEED, abs=0.1)
    assert not arm.success() and arm.metrics() == {"named_cube_lifted": 0.0, "named_cube_lost": 1.0}
    run(arm, 1.0)
    assert arm.cube_position(arm.target)[2] < -0.05 and abs(velocity(arm, arm.target)[1]) < SPEED  # in the tray


def test_a_cube_beside_the_belt_is_lost_even_if_it_is_lifted_from_there(arm: WidowXWorld) -> None:
    arm.reset(2)
    at = arm.model.joint(f"cube_{arm.target}").qposadr[0]
    arm.data.qpos[at] += 0.1
    run(arm, 0.4)
    assert arm.ended() and not arm.success()
    work(arm)
    assert not arm.success()


def test_another_cube_that_leaves_ends_nothing(arm: WidowXWorld) -> None:
    seed = next(s for s in range(50) if _named_is_last(arm, s))
    arm.reset(seed)
    first = min(arm.scene_state().cubes, key=lambda cube: abs(cube.position[1])).colour
    while abs(arm.cube_position(first)[1]) < END + 0.02:
        arm.step(STILL)
    assert first != arm.target and not arm.ended() and arm.metrics()["named_cube_lost"] == 0.0


def _named_is_last(world: WidowXWorld, seed: int) -> bool:
    world.reset(seed)
    cubes = world.scene_state().cubes
    return len(cubes) == 3 and max(cubes, key=lambda cube: abs(cube.position[1])).colour == world.target


def test_expert_catches_on_seeds_nobody_tuned_for(arm: WidowXWorld) -> None:
    lines = check_expert(arm, "widowx", range(UNSEEN, UNSEEN + 15))
    assert all(line["success"] for line in lines), [line for line in lines if not line["success"]]
    assert all(line["chosen"] in line["instruction"] for line in lines)
    assert {line["metrics"]["named_cube_lost"] for line in lines} == {0.0}


def test_expert_waits_for_a_cube_that_is_still_out_of_reach(arm: WidowXWorld) -> None:
    arm.reset(next(s for s in range(50) if _named_is_last(arm, s)))
    expert, furthest = PlateAndBeltExpert(arm), 0.0
    while not arm.ended():
        for command in arm.play(expert.action()):
            arm.step(command)
        furthest = max(furthest, abs(arm.pinch(ARM)[1]))
    assert arm.success() and furthest < 0.23


def test_scenes_repeat_per_seed_and_stay_inside_their_ranges(arm: WidowXWorld) -> None:
    counts, arrows = set(), set()
    for seed in range(30):
        arm.reset(seed, f"take the {COLOURS[seed % 3]} cube from the moving belt")
        scene, (x, side) = arm.scene_state(), arm.belt.course
        away = sorted(side * cube.position[1] for cube in scene.cubes)
        assert MIDDLE_X[0] <= x <= MIDDLE_X[1] and all(abs(c.position[0] - x) <= ASIDE for c in scene.cubes)
        assert away[0] >= 0.2 and away[-1] < BEGIN - 0.03 and scene.cube(COLOURS[seed % 3]) is not None
        assert all(GAP[0] <= gap <= GAP[1] for gap in np.diff(away))
        counts.add(len(away))
        arrows.add(round(abs(float(arm.data.mocap_pos[0, 1])), 4))
    assert counts == {2, 3} and len(arrows) > 20
    seen = []
    for _ in range(2):
        arm.reset(7)
        work(arm)
        seen.append((arm.instruction, arm.data.qpos.copy(), arm.render("ego", 64, 48).copy()))
        arm.reset(8)
    assert seen[0][0] == seen[1][0]
    assert np.array_equal(seen[0][1], seen[1][1]) and np.array_equal(seen[0][2], seen[1][2])


def test_randomisation_can_be_switched_off_and_widened() -> None:
    plain = WidowXWorld(tasks=("belt",), randomize=NO_RANDOMIZATION)
    scenes = []
    for seed in (1, 2):
        plain.reset(seed, "catch the red cube on the belt")
        scenes.append((plain.data.qpos.copy(), plain.render("ego", 64, 48).copy()))
    plain.close()
    assert all(np.array_equal(a, b) for a, b in zip(*scenes, strict=True))
    wide, cluttered = WidowXWorld(tasks=("belt",), domain=DomainConfig()), 0
    for seed in range(6):
        wide.reset(seed)
        for x, _, _ in wide.domain_drawn["distractors"].values():
            assert abs(x - wide.belt.course[0]) > 0.9 * KEEP_CLEAR
        cluttered += any(wide.data.body(name).xpos[2] > -1 for name in CLUTTER)
        work(wide)
        assert wide.success()
    wide.close()
    assert cluttered > 0


def test_other_instruction_is_another_cube_of_the_same_row(arm: WidowXWorld) -> None:
    arm.reset(3)
    target, rows = arm.target, arm.data.qpos.copy()
    other = arm.other_instruction()
    assert other is not None and target not in other
    arm.reset(3, other)
    assert arm.target != target and np.array_equal(arm.data.qpos, rows)
    work(arm)
    assert arm.success() and arm.chosen() == arm.target


def test_the_way_of_the_belt_is_told_as_the_picture_shows_it(arm: WidowXWorld) -> None:
    told = set()
    for seed in range(6):
        arm.reset(seed)
        scene = arm.scene_state()
        before = next(cube for cube in scene.cubes if "ego" in cube.visible)
        run(arm, 0.3)
        after = arm.scene_state().cube(before.colour)
        assert after is not None
        side = "right" if after.pixels["ego"][0] > before.pixels["ego"][0] else "left"
        answers = dict(questions(scene, np.random.default_rng(0)))
        assert scene.belt == answers["which way does the belt move?"] == side
        assert intention(scene).endswith(f"belt {side}")
        told.add(side)
        assert SceneState.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
        assert scene.seen_in(("cam_wrist",)).belt is None
        for words, meaning in read_scene(json.dumps(scene.to_dict())).requests(arm.instruction):
            assert words != arm.instruction and meaning.endswith(f"belt {side}")
    assert told == {"left", "right"}
    arm.reset(0, "put the red cube on the plate")
    assert "belt" not in arm.scene_state().to_dict() and "belt" not in intention(arm.scene_state())


def test_the_arrows_travel_with_the_belt_and_point_its_way(arm: WidowXWorld) -> None:
    for seed in range(6):
        arm.reset(seed)
        run(arm, 0.1)
        before = arm.data.mocap_pos[0, 1]
        run(arm, 0.1)
        step, ahead = arm.data.mocap_pos[0, 1] - before, np.sign(arm.belt.velocity[1])
        assert any(step == pytest.approx(ahead * (0.1 * SPEED - wrap), abs=1e-3) for wrap in (0.0, 0.06))
        assert arm.data.body("belt_arrows").xmat.reshape(3, 3)[1, 1] == pytest.approx(ahead)
    arm.reset(0, "put the red cube on the plate")
    arm.step(STILL)
    assert max(arm.data.body(name).xpos[2] for name in ("belt", "belt_arrows")) < -1 and not arm.belt.velocity.any()


def test_pushed_demonstrations_recover(arm: WidowXWorld) -> None:
    made = [record(arm, "widowx", seed, noise=1.0, pushes=NoiseConfig(start=0.3)) for seed in range(4)]
    assert all(m.rows.perturbed is not None and m.rows.perturbed.any() for m in made)
    assert sum(m.success for m in made) >= 3
    assert json.loads(made[0].rows.extra["scene"][0])["belt"] in ("left", "right")


@pytest.mark.parametrize("speed", [0.0, -0.1, 0.7])
def test_a_speed_the_arm_cannot_follow_is_refused(speed: float) -> None:
    with pytest.raises(UserError, match="belt_speed"):
        WidowXWorld(belt_speed=speed)
