"""What the WidowX world promises: displacements that add up, limits that hold, an honest judge."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.domain import DomainConfig
from qwen_vla_core.sim.randomize import COLOURS, NO_RANDOMIZATION
from qwen_vla_core.sim.registry import make_expert, make_world
from qwen_vla_core.sim.worlds import widowx
from qwen_vla_core.sim.worlds.objects import CLUTTER, CLUTTER_GAP
from qwen_vla_core.sim.worlds.widowx import AREA, ARM, PLATE_RADIUS, PLATE_TOP, WidowXWorld

STILL = np.array([0.0] * 6 + [1.0])


@pytest.fixture(scope="module")
def arm() -> Iterator[WidowXWorld]:
    world = WidowXWorld()
    yield world
    world.close()


def act(world: WidowXWorld, action: np.ndarray, times: int = 1) -> None:
    """Carries out an action, ``times`` periods long."""
    for _ in range(times):
        for command in world.play(action):
            world.step(command)


def work(world: WidowXWorld, limit_s: float = 12.0) -> list[np.ndarray]:
    """Lets the expert work; returns its actions."""
    expert, actions = make_expert("widowx", world), []
    while not world.success() and world.time_s < limit_s:
        actions.append(expert.action())
        act(world, actions[-1])
    return actions


@pytest.mark.parametrize("instruction", ["put the red cube on the plate", "catch the red cube on the belt"])
def test_same_seed_gives_bit_identical_states_and_pictures(arm: WidowXWorld, instruction: str) -> None:
    def episode(world: WidowXWorld) -> tuple[np.ndarray, np.ndarray]:
        world.reset(11, instruction)
        for i in range(15):
            world.step(np.array([0.03, 0.02 * np.sin(i), -0.05, 0.1, 0, 0.2, 0.5]))
        return world.data.qpos.copy(), np.stack([world.render(view, 64, 48) for view in world.views])

    first = episode(arm)
    arm.reset(12, "put the blue cube on the plate")
    arm.render("ego", 64, 48)
    other = WidowXWorld()
    for again in (episode(arm), episode(other)):
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    other.close()


def test_channels_and_rates_are_those_of_the_embodiment(arm: WidowXWorld) -> None:
    robot = load_embodiment("widowx")
    assert arm.channels == robot.channels and arm.state_channels == robot.state_channels and arm.views == robot.views
    assert arm.decision_s == pytest.approx(robot.period_s)
    assert arm.held_c.tolist() == [group.kind == "eef_delta" for group in robot.actions for _ in group.channels]
    arm.reset(0)
    assert arm.state().shape == (10,) and arm.state()[6] == pytest.approx(1.0)
    assert arm.state()[7:] == pytest.approx(arm.tool_target()[0], abs=5e-3)


@pytest.mark.parametrize("axis", range(3))
def test_a_displacement_moves_the_hand_by_itself_and_no_further(arm: WidowXWorld, axis: int) -> None:
    arm.reset(1, "put the red cube on the plate")
    act(arm, STILL, 2)
    start, action = arm.pinch(ARM).copy(), STILL.copy()
    action[axis] = 0.03
    act(arm, action, 2)
    act(arm, STILL, 3)
    moved = arm.pinch(ARM) - start
    assert moved[axis] == pytest.approx(0.06, abs=0.002)
    assert np.abs(np.delete(moved, axis)).max() < 0.002


def test_turns_are_about_the_base_axes_and_leave_the_tool_point_where_it_is(arm: WidowXWorld) -> None:
    for axis in range(3):
        arm.reset(1, "put the red cube on the plate")
        act(arm, STILL, 2)
        position = arm.pinch(ARM).copy()
        before = arm.data.site_xmat[arm.tool].reshape(3, 3).copy()
        action = STILL.copy()
        action[3 + axis] = 0.2
        act(arm, action)
        act(arm, STILL, 3)
        turned = Rotation.from_matrix(arm.data.site_xmat[arm.tool].reshape(3, 3) @ before.T).as_rotvec()
        np.testing.assert_allclose(turned, 0.2 * np.eye(3)[axis], atol=0.02)
        assert np.linalg.norm(arm.pinch(ARM) - position) < 0.003


def test_doing_nothing_stays_and_is_no_success(arm: WidowXWorld) -> None:
    arm.reset(2)
    start = arm.pinch(ARM).copy()
    act(arm, STILL, 15)
    assert np.linalg.norm(arm.pinch(ARM) - start) < 0.002 and not arm.success() and arm.chosen() is None


@pytest.mark.parametrize(
    "action", [[9, 0, 0, 0, 0, 0, 1], [0, 0, -9, 0, 0, 0, 1], [-9, 9, 9, 9, -9, 9, -5], [0, 0, 0, 0, 9, 0, 7]]
)
def test_no_action_leaves_the_limits_and_what_is_out_of_reach_does_not_wind_up(
    arm: WidowXWorld, action: list[float]
) -> None:
    arm.reset(3, "put the red cube on the plate")
    low, high = arm.model.jnt_range[:6].T
    for _ in range(75):
        before = arm._joints.copy()
        arm.step(np.array(action, dtype=float))
        assert np.isfinite(arm.data.qpos).all()
        assert (arm._joints >= low - 1e-9).all() and (arm._joints <= high + 1e-9).all()
        lead = np.abs(arm._joints - arm.data.qpos[:6])
        assert lead.max() < 1.5 * widowx.LEAD  # the arm swings a little
        fastest = np.abs(arm._joints - before).max() * arm.control_hz
        assert fastest < widowx.JOINT_SPEED + widowx.LEAD * arm.control_hz
        assert (arm.tool_target()[0] >= widowx.REACH_LOW - 0.004).all()
    assert np.linalg.norm(arm.tool_target()[0] - arm.pinch(ARM)) < 0.12
    back = STILL.copy()
    back[2] = 0.05
    height = arm.tool_target()[0][2]
    act(arm, back, 2)
    assert arm.tool_target()[0][2] > min(height + 0.02, 0.35)


def test_wrong_actions_are_refused_by_channel(arm: WidowXWorld) -> None:
    arm.reset(0)
    with pytest.raises(ValueError, match="shape"):
        arm.step(np.zeros(6))
    bad = STILL.copy()
    bad[2] = np.nan
    with pytest.raises(ValueError, match="dz"):
        arm.step(bad)
    with pytest.raises(UserError, match=r"put the \{colour\} cube on the plate"):
        arm.reset(0, "pick up the red cube")


def test_the_scene_does_not_depend_on_the_colour_asked_for(arm: WidowXWorld) -> None:
    for form in ("put the {} cube on the plate", "catch the {} cube on the belt"):
        arm.reset(6, form.format("red"))
        scenes = []
        for colour in [cube.colour for cube in arm.scene_state().cubes][:2]:
            arm.reset(6, form.format(colour))
            assert arm.target == colour
            scenes.append((arm.data.qpos.copy(), arm.render("ego", 64, 48).copy()))
        assert np.array_equal(scenes[0][0], scenes[1][0]) and np.array_equal(scenes[0][1], scenes[1][1])


def test_a_named_cube_is_always_there_and_everything_keeps_apart(arm: WidowXWorld) -> None:
    for seed in range(40):
        colour = COLOURS[seed % 3]
        arm.reset(seed, f"put the {colour} cube on the plate")
        cubes = {cube.colour: np.array(cube.position[:2]) for cube in arm.scene_state().cubes}
        assert colour in cubes and len(cubes) in (2, 3)
        plate = arm.plate_position()[:2]
        for at in (*cubes.values(), plate):
            assert AREA[0] <= at[0] <= AREA[1] and AREA[2] <= at[1] <= AREA[3]
        places = list(cubes.values())
        assert all(np.linalg.norm(at - plate) > PLATE_RADIUS + 0.04 for at in places)
        assert all(np.linalg.norm(a - b) >= 0.11 for i, a in enumerate(places) for b in places[:i])


def test_every_kind_of_randomization_can_be_switched_off() -> None:
    world, seen = WidowXWorld(randomize=NO_RANDOMIZATION), []
    for seed in (1, 2):
        world.reset(seed, "put the red cube on the plate")
        seen.append((world.data.qpos.copy(), np.stack([world.render(view, 64, 48) for view in world.views])))
    world.close()
    assert np.array_equal(seen[0][0], seen[1][0]) and np.array_equal(seen[0][1], seen[1][1])


def drop(world: WidowXWorld, colour: str, offset: tuple[float, float]) -> None:
    """Lays a cube down beside the middle of the plate and waits."""
    at = world.model.joint(f"cube_{colour}").qposadr[0]
    plate = world.plate_position()
    world.data.qpos[at : at + 7] = (plate[0] + offset[0], plate[1] + offset[1], PLATE_TOP + 0.021, 1, 0, 0, 0)
    act(world, STILL, 3)


def test_lying_on_the_plate_is_success_and_lying_on_its_rim_or_beside_it_is_not(arm: WidowXWorld) -> None:
    for offset, expected in (((0.0, 0.0), True), ((0.03, 0.02), True), ((0.0, 0.062), False), ((0.0, 0.1), False)):
        arm.reset(5, "put the red cube on the plate")
        drop(arm, "red", offset)
        assert arm.success() is expected, offset
    arm.reset(5, "put the red cube on the plate")
    other = next(cube.colour for cube in arm.scene_state().cubes if cube.colour != "red")
    drop(arm, other, (0.0, 0.0))
    assert not arm.success() and arm.on_plate(other)


def test_success_needs_the_hand_to_let_go(arm: WidowXWorld) -> None:
    arm.reset(0, "put the red cube on the plate")
    expert, held_on_plate = make_expert("widowx", arm), 0
    while arm.time_s < 6:
        action = expert.action()
        if arm.on_plate("red"):
            action[:6], action[6] = 0.0, 0.0
            held_on_plate += 1
            assert not arm.success()
        act(arm, action)
    assert held_on_plate > 5 and arm.chosen() == "red" and not arm.success()


def test_putting_the_other_cube_on_the_plate_is_seen_and_is_no_success(arm: WidowXWorld) -> None:
    arm.reset(6, "put the red cube on the plate")
    other = arm.other_instruction()
    assert other is not None
    arm.reset(6, other)
    actions, colour = work(arm), arm.target
    assert (
        arm.success() and arm.chosen() == colour and arm.metrics() == {"named_cube_lifted": 1.0, "named_cube_lost": 0.0}
    )
    arm.reset(6, "put the red cube on the plate")
    for action in actions:
        act(arm, action)
    assert arm.chosen() == colour != "red" and arm.on_plate(colour)
    assert not arm.success() and arm.metrics()["named_cube_lifted"] == 0.0


def test_domain_randomisation_repeats_differs_and_keeps_clutter_out_of_the_way() -> None:
    world, counts, pictures = WidowXWorld(domain=DomainConfig()), set(), []
    for seed in (*range(12), 0):
        world.reset(seed, "put the green cube on the plate")
        placed = world.domain_drawn["distractors"]
        counts.add(len(placed))
        assert set(placed) <= set(CLUTTER)
        for x, y, _ in placed.values():
            assert all(np.hypot(x - c.position[0], y - c.position[1]) >= CLUTTER_GAP for c in world.scene_state().cubes)
            assert np.hypot(*(np.array([x, y]) - world.plate_position()[:2])) > PLATE_RADIUS + 0.04
        pictures.append(world.render("ego", 64, 48).copy())
    assert counts == {0, 1, 2, 3} and np.array_equal(pictures[0], pictures[-1])
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).mean() > 15
    work(world)
    assert world.success()
    world.close()
    plain = WidowXWorld(domain=DomainConfig(distractors=(0, 0)))
    plain.reset(3, "catch the red cube on the belt")
    assert plain.domain_drawn["distractors"] == {} and all(plain.data.body(name).xpos[2] < -1 for name in CLUTTER)


def test_missing_meshes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rtbdata" else find(name, *a))
    with pytest.raises(UserError, match=r"rtb-data: pip install 'qwen_vla_ros\[sim\]'"):
        make_world("widowx")
