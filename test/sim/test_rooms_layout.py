"""Scenes: repeatable, passable, and offering what they promise."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from qwen_vla_core.sim.worlds.rooms_layout import (
    APART,
    ROBOT_RADIUS,
    Layout,
    LayoutConfig,
    Wall,
    blocked_by_wall,
    distance_to_line,
    draw_layout,
    offers,
    wrap,
)
from qwen_vla_core.sim.worlds.rooms_ways import CELL, occupancy, shortest

SEEDS = range(25)


@pytest.fixture(scope="module")
def scenes() -> list[Layout]:
    return [draw_layout(seed)[0] for seed in SEEDS]


def test_a_seed_is_a_scene(scenes: list[Layout]) -> None:
    assert [draw_layout(seed)[0] for seed in list(SEEDS)[:5]] == scenes[:5]
    assert len(set(scenes)) == len(scenes)
    assert {len(scene.rooms) for scene in scenes} == {2, 3}


def test_landmarks_stand_apart_inside_rooms_and_have_names_of_their_own(scenes: list[Layout]) -> None:
    for scene in scenes:
        names = [place.name for place in (*scene.landmarks, *scene.doorways)]
        assert len(set(names)) == len(names)
        for one, two in combinations(scene.landmarks, 2):
            assert math.dist(one.centre, two.centre) >= APART
        for landmark in scene.landmarks:
            x0, y0, x1, y1 = scene.rooms[scene.room_of(landmark.centre)]
            (x, y), r = landmark.centre, landmark.radius
            assert min(x - x0, x1 - x, y - y0, y1 - y) >= r + 2 * ROBOT_RADIUS - 0.01
            assert all(math.dist(landmark.centre, door.centre) >= 1.3 for door in scene.doorways)


def test_all_of_a_scene_can_be_reached_from_its_start(scenes: list[Layout]) -> None:
    for scene in scenes:
        grid = occupancy(scene, ROBOT_RADIUS + 0.1)
        away = grid.distances([grid.nearest_free(scene.start[:2])])
        assert grid.free[grid.cell_of(scene.start[:2])]
        assert np.isfinite(away[grid.free]).mean() > 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_every_kind_of_task_is_offered_for_two_goals(seed: int) -> None:
    scene, tasks = draw_layout(seed)
    assert tasks == offers(scene)
    for kind in ("goto", "past", "through"):
        vias = {task.via for task in tasks if task.name == kind}
        assert any(len({t.goal for t in tasks if (t.name, t.via) == (kind, via)}) >= 2 for via in vias)
    for task in tasks:
        way = shortest(scene, occupancy(scene, ROBOT_RADIUS), task)
        goal = scene.landmark(task.goal)
        assert goal is not None and math.dist(way[-1], goal.centre) <= 0.7 + 1e-9
        if task.name == "past":
            via = scene.landmark(str(task.via))
            assert via is not None and min(math.dist(p, via.centre) for p in way) <= 1.0 + CELL
        if task.name == "through":
            door = scene.doorway(str(task.via))
            assert door is not None and scene.room_of(scene.start[:2]) != scene.room_of(goal.centre)
            assert min(distance_to_line(p, *door.ends) for p in way) <= CELL


def test_ranges_are_followed() -> None:
    config = LayoutConfig(width=(9.0, 9.0), depth=(6.0, 6.0), door=(1.3, 1.3), third_room=0.0, landmarks=(3, 3))
    for seed in range(3):
        scene, _ = draw_layout(seed, config)
        assert len(scene.rooms) == 2 and scene.doorways[0].width == 1.3
        assert max(room[2] for room in scene.rooms) == 4.5 and scene.rooms[0][3] == 3.0
        assert sum(scene.room_of(landmark.centre) == 0 for landmark in scene.landmarks) == 3


def test_walls_block_lines_and_gaps_do_not() -> None:
    walls = (Wall(0.0, -2.0, 0.1, -0.5), Wall(0.0, 0.5, 0.1, 2.0))
    assert blocked_by_wall((-1.0, 1.0), (1.0, 1.0), walls)
    assert not blocked_by_wall((-1.0, 0.0), (1.0, 0.0), walls)
    assert blocked_by_wall((-1.0, 0.4), (1.0, 0.4), walls, margin=0.2)
    assert not blocked_by_wall((-1.0, 1.0), (-0.1, 1.0), walls)
    assert blocked_by_wall((0.05, -3.0), (0.05, -1.0), walls)  # along the wall itself
    assert blocked_by_wall((-1.0, -1.5), (1.0, 0.4), walls) and not blocked_by_wall((-1.0, -0.5), (1.0, 0.4), walls)


def test_angles_and_distances() -> None:
    assert wrap(3 * math.pi / 2) == pytest.approx(-math.pi / 2) and wrap(0.3 - 4 * math.pi) == pytest.approx(0.3)
    assert distance_to_line((1.0, 1.0), (0.0, 0.0), (2.0, 0.0)) == pytest.approx(1.0)
    assert distance_to_line((3.0, 0.0), (0.0, 0.0), (2.0, 0.0)) == pytest.approx(1.0)
