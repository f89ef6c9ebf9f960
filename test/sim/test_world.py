"""What the ALOHA world promises: repeatable, honest, and fussy about what it is given."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.experts import ScriptedExpert, interpolate
from qwen_vla_core.sim.randomize import COLOURS, NO_RANDOMIZATION, RandomizationConfig, sample_cubes
from qwen_vla_core.sim.registry import make_world
from qwen_vla_core.sim.worlds.aloha import AlohaWorld


def drive(world: AlohaWorld, limit_s: float = 8.0) -> list[np.ndarray]:
    """Lets the expert work; returns every command it gave."""
    expert, commands = ScriptedExpert(world), []
    while not world.success() and world.time_s < limit_s:
        for command in interpolate(world.command(), expert.action(), 5):
            world.step(command)
            commands.append(command)
    return commands


def test_same_seed_gives_bit_identical_states_and_pictures(world: AlohaWorld) -> None:
    def episode(w: AlohaWorld) -> tuple[np.ndarray, np.ndarray, str]:
        w.reset(11)
        for i in range(20):
            w.step(w.command() + 0.01 * np.sin(i))
        return w.data.qpos.copy(), np.stack([w.render(view, 64, 48) for view in w.views]), w.instruction

    first = episode(world)
    world.reset(12)
    world.render("ego", 64, 48)
    again = episode(world)
    other_world = AlohaWorld()
    fresh = episode(other_world)
    other_world.close()
    for other in (again, fresh):
        assert np.array_equal(first[0], other[0])
        assert np.array_equal(first[1], other[1])
        assert first[2] == other[2]


def test_different_seeds_give_different_scenes(world: AlohaWorld) -> None:
    pictures, states = [], []
    for seed in (1, 2):
        world.reset(seed)
        pictures.append(world.render("ego", 64, 48).copy())
        states.append(world.state())
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(states[0], states[1])


def test_every_view_shows_something_of_its_own(world: AlohaWorld) -> None:
    world.reset(3)
    pictures = {view: world.render(view, 128, 96).copy() for view in world.views}
    for picture in pictures.values():
        assert picture.shape == (96, 128, 3) and picture.dtype == np.uint8
        assert picture.std() > 15
    names = list(pictures)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(pictures[a].astype(int) - pictures[b].astype(int)).mean() > 10
    with pytest.raises(ValueError, match="nowhere"):
        world.render("nowhere", 64, 48)


def test_state_and_command_are_canonical(world: AlohaWorld) -> None:
    world.reset(4)
    assert world.channels[6] == "left_gripper" and world.channels[13] == "right_gripper" and len(world.channels) == 14
    np.testing.assert_allclose(world.state(), world.command(), atol=1e-9)
    assert world.state()[6] == pytest.approx(1.0)
    closed = world.command()
    closed[[6, 13]] = 0.0
    for _ in range(60):
        world.step(closed)
    assert np.abs(world.state()[[6, 13]]).max() < 0.05
    np.testing.assert_allclose(world.state(), closed, atol=0.05)


@pytest.mark.parametrize("bad", [np.zeros(13), np.zeros((14, 1)), np.zeros((1, 14))])
def test_wrongly_shaped_actions_are_refused(world: AlohaWorld, bad: np.ndarray) -> None:
    world.reset(0)
    with pytest.raises(ValueError, match="shape"):
        world.step(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused_by_channel_and_move_nothing(world: AlohaWorld, value: float) -> None:
    world.reset(0)
    before, action = world.data.qpos.copy(), world.command()
    action[8] = value
    with pytest.raises(ValueError, match="right_shoulder"):
        world.step(action)
    assert np.array_equal(world.data.qpos, before) and world.time_s == 0


def test_reset_forgets_the_episode_before(world: AlohaWorld) -> None:
    world.reset(5, "pick up the red cube")
    drive(world)
    assert world.success() and world.lifted_cube() == "red" and world.time_s > 0
    world.reset(5, "pick up the red cube")
    assert not world.success() and world.lifted_cube() is None and world.time_s == 0
    assert not any(cube.touched_by for cube in world.scene_state().cubes)


def test_the_scene_does_not_depend_on_the_instruction(world: AlohaWorld) -> None:
    world.reset(6)
    here = [cube.colour for cube in world.scene_state().cubes]
    scenes = []
    for colour in here[:2]:
        world.reset(6, f"pick up the {colour} cube")
        scenes.append((world.data.qpos.copy(), world.render("ego", 64, 48).copy()))
    assert np.array_equal(scenes[0][0], scenes[1][0]) and np.array_equal(scenes[0][1], scenes[1][1])


def test_a_named_cube_is_always_there(world: AlohaWorld) -> None:
    for seed in range(12):
        for colour in COLOURS:
            world.reset(seed, f"pick up the {colour} cube")
            colours = [cube.colour for cube in world.scene_state().cubes]
            assert colour in colours and len(colours) == len(set(colours)) >= 2


def test_lifting_the_other_cube_is_seen_and_is_no_success(world: AlohaWorld) -> None:
    world.reset(6)
    asked, other = (cube.colour for cube in world.scene_state().cubes[:2])
    world.reset(6, f"pick up the {other} cube")
    commands = drive(world)
    assert world.success() and world.lifted_cube() == other
    world.reset(6, f"pick up the {asked} cube")
    for command in commands:
        world.step(command)
    assert world.lifted_cube() == other and not world.success()


def test_doing_nothing_is_no_success(world: AlohaWorld) -> None:
    world.reset(7)
    for _ in range(50):
        world.step(world.command())
    assert not world.success() and world.lifted_cube() is None


def test_cubes_keep_apart_and_inside_reach() -> None:
    config = RandomizationConfig()
    for seed in range(200):
        cubes = sample_cubes(config, np.random.default_rng(seed), (0.05, 0.19), (0.39, 0.61))
        assert len(cubes) in (2, 3) and len({cube.colour for cube in cubes}) == len(cubes)
        places = np.array([cube.xy for cube in cubes])
        assert (np.abs(places[:, 0]) >= 0.05).all() and (np.abs(places[:, 0]) <= 0.19).all()
        for i, place in enumerate(places):
            assert all(np.linalg.norm(place - other) >= config.min_gap for other in places[:i])


def test_every_kind_of_randomization_can_be_switched_off() -> None:
    world = AlohaWorld(randomize=NO_RANDOMIZATION)
    seen = []
    for seed in (1, 2):
        world.reset(seed, "pick up the red cube")
        seen.append((world.data.qpos.copy(), np.stack([world.render(view, 64, 48) for view in world.views])))
    world.close()
    assert np.array_equal(seen[0][0], seen[1][0]) and np.array_equal(seen[0][1], seen[1][1])


def test_unknown_world_and_missing_assets_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"simulation\.world.*aloha"):
        make_world("moon")
    with pytest.raises(UserError, match=r"simulation\.world"):
        make_world(None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gym_aloha" else find(name, *a))
    with pytest.raises(UserError, match=r"pip install 'qwen_vla_ros\[sim\]'"):
        make_world("aloha")
