"""Worlds along one axis: what differs is what the axis names, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

pytest.importorskip("mujoco")

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim import navigation_tasks, tasks
from qwen_vla_core.sim.registry import make_expert, make_world
from qwen_vla_core.sim.worlds import shifted, shifted_rooms
from qwen_vla_core.sim.worlds.aloha import CUBE_X, CUBE_Y
from qwen_vla_core.sim.worlds.widowx import AREA

SEEDS = range(100_000, 100_012)
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Worlds by name and options, each built once."""
    kept: dict[tuple[Any, ...], Any] = {}

    def give(name: str, **options: Any) -> Any:
        key = (name, *sorted(options.items()))
        if key not in kept:
            kept[key] = make_world(name, **options)
        return kept[key]

    yield give
    for world in kept.values():
        world.close()


def scene(world: Any, seed: int) -> tuple[Any, ...]:
    world.reset(seed)
    return world.task.colour, {c: world.cube_position(c)[:2].round(6).tolist() for c in world._layout}


@pytest.mark.parametrize("shift", ["colour", "instance", "background", "instruction"])
def test_the_scene_of_a_seed_stays(make: Make, shift: str) -> None:
    plain, other = make("widowx", tasks=("place",)), make("widowx", tasks=("place",), shift=shift)
    for seed in SEEDS:
        assert scene(other, seed) == scene(plain, seed)
        assert np.allclose(other.plate_position(), plain.plate_position())
        same = shift in ("instance", "background") or (shift == "colour" and seed % 2 == 1)
        assert (other.instruction == plain.instruction) == same


def test_colour_names_what_it_paints(make: Make) -> None:
    world = make("aloha", tasks=("pick",), shift="colour")
    for seed in SEEDS:
        world.reset(seed)
        words = world.instruction.split()
        assert world.variant == ("others" if seed % 2 else "named") == world.about()["variant"]
        assert world.target in words
        assert (world.target in shifted.UNSEEN_COLOURS) == (seed % 2 == 0)
        painted = {c: tuple(world.model.geom_rgba[world._geom_of(c), :3].round(3)) for c in world._layout}
        asked, scene_before = world.instruction, painted
        other = world.other_instruction()
        world.reset(seed, other)  # the other cube, in the same colours
        assert world.instruction == other != asked and world.target in other.split()
        assert {c: tuple(world.model.geom_rgba[world._geom_of(c), :3].round(3)) for c in world._layout} == scene_before
        world.reset(seed, asked)
        assert world.instruction == asked


@pytest.mark.parametrize(("name", "task"), [("aloha", "pick"), ("widowx", "place")])
def test_position_is_outside_and_in_sight(make: Make, name: str, task: str) -> None:
    world = make(name, tasks=(task,), shift="position")
    for seed in SEEDS:
        world.reset(seed)
        for colour in world._layout:
            x, y, _ = world.cube_position(colour)
            trained = (
                abs(x) <= CUBE_X[1] and CUBE_Y[0] <= y <= CUBE_Y[1]
                if name == "aloha"
                else AREA[0] <= x <= AREA[1] and abs(y) <= AREA[3]
            )
            assert not trained
            assert world.pixel("ego", world.cube_position(colour)) is not None


def test_instance_has_another_shape_that_lies_on_the_table(make: Make) -> None:
    world, seen = make("aloha", tasks=("pick",), shift="instance"), set()
    for seed in range(100_000, 100_030):
        world.reset(seed)
        seen.add(world.variant)
        kind, size = shifted.UNSEEN_SHAPES[world.variant]
        geom = world._geom_of(world.task.colour)
        assert world.model.geom_type[geom] == kind and np.allclose(world.model.geom_size[geom], size)
        if seed < 100_006:
            start = world.cube_position(world.task.colour)
            for _ in range(25):
                world.step(world.command())
            assert np.abs(world.cube_position(world.task.colour) - start).max() < 0.002  # it neither falls nor sinks
    assert seen == set(shifted.UNSEEN_SHAPES)


def test_background_leaves_cubes_and_cameras(make: Make) -> None:
    plain, other = make("widowx", tasks=("place",)), make("widowx", tasks=("place",), shift="background")
    tables = set()
    for seed in SEEDS:
        plain.reset(seed), other.reset(seed)
        camera = [w.model.camera("ego").id for w in (plain, other)]
        assert np.allclose(plain.model.cam_pos[camera[0]], other.model.cam_pos[camera[1]])
        for colour in plain._layout:
            geoms = [w._geom_of(colour) for w in (plain, other)]
            assert np.allclose(plain.model.geom_rgba[geoms[0]], other.model.geom_rgba[geoms[1]])
            assert other.model.geom_matid[geoms[1]] == -1
        assert np.allclose(plain.data.qpos[:8], other.data.qpos[:8])
        tables.add(tuple(other.model.geom_rgba[other.model.geom("table_top").id, :3].round(3)))
    assert len(tables) == len(SEEDS) and np.ptp(np.array(sorted(tables)), axis=1).max() > 0.4  # colours, not greys


def known_sentences() -> set[str]:
    books = (tasks.TWO_ARMS, tasks.PLATE_AND_BELT)
    forms = {form for book in books for templates in book.paraphrases.values() for form in templates}
    return forms | {form for templates in navigation_tasks.PARAPHRASES.values() for form in templates}


def test_no_demonstration_used_these_sentences(make: Make) -> None:
    books = (shifted.UNSEEN_TWO_ARMS, shifted.UNSEEN_PLATE_AND_BELT)
    unseen = {form for book in books for templates in book.paraphrases.values() for form in templates}
    unseen |= {form for templates in shifted_rooms.UNSEEN.values() for form in templates}
    assert not unseen & known_sentences()
    assert {b.names for b in books} == {tasks.TWO_ARMS.names, tasks.PLATE_AND_BELT.names}
    world = make("aloha", tasks=("transfer",), shift="instruction")
    world.reset(100_001)
    asked = world.instruction
    with pytest.raises(UserError, match="does not know it"):
        world.reset(100_001, "pick up the red cube")
    world.reset(100_001, asked)
    assert world.task.name == "transfer" and world.instruction == asked


@pytest.mark.parametrize("shift", shifted_rooms.AXES)
def test_rooms_along_every_axis(make: Make, shift: str) -> None:
    plain, other = make("rooms"), make("rooms", shift=shift)
    for seed in range(100_000, 100_006):
        plain.reset(seed), other.reset(seed)
        same = other.layout == plain.layout and other.task == plain.task
        assert same == (shift != "layout")
        assert (other.instruction == plain.instruction) == (shift == "background" or (shift == "layout" and same))
        if shift == "layout":
            x0, y0, x1, y1 = np.array(other.layout.rooms).T
            assert x1.max() - x0.min() > 9.2 and y1.max() - y0.min() > 6.7
        if shift == "colour":
            assert other.target.split()[0] in shifted.UNSEEN_COLOURS and other.target.split()[0] != "yellow"
            assert other.target in other.instruction
        asked, second = other.instruction, other.other_instruction()
        assert second is not None and second != asked
        other.reset(seed, second)
        assert other.instruction == second
        other.reset(seed, asked)
        assert other.instruction == asked


@pytest.mark.parametrize(
    ("name", "shift", "task"),
    [
        ("aloha", "instance", "transfer"),
        ("aloha", "position", "pick"),
        ("widowx", "position", "place"),
        ("widowx", "instance", "belt"),
        ("rooms", "layout", "past"),
    ],
)
def test_the_expert_can_do_it(make: Make, name: str, shift: str, task: str) -> None:
    """One scene here; ``qwen-vla eval run --expert`` measures the share, which docs/evaluation.md reports."""
    world = make(name, tasks=(task,), shift=shift)
    world.reset(100_000)
    expert = make_expert(name, world)
    while not world.ended() and world.time_s < world.limit_s:
        for command in world.play(expert.action()):
            world.step(command)
    assert world.success() and world.chosen() == world.target


def test_an_axis_that_is_none_is_refused() -> None:
    for name in ("aloha", "rooms"):
        with pytest.raises(UserError, match="shift 'weather': use one of colour"):
            make_world(name, shift="weather")
