"""The answers are true: checked against the pixels of rendered pictures, not against the code that wrote them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_vla_core.sim.experts import ScriptedExpert, interpolate
from qwen_vla_core.sim.grounding import Grid, cube_cells, intention, questions
from qwen_vla_core.sim.randomize import COLOURS, RandomizationConfig
from qwen_vla_core.sim.state import SceneState
from qwen_vla_core.sim.worlds.aloha import AlohaWorld

CHANNEL = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(scope="module")
def plain_world() -> AlohaWorld:
    """Grey table and steady light, so that colour alone finds a cube; cameras still jitter."""
    return AlohaWorld(randomize=RandomizationConfig(table=False, light=False))


def coloured_pixels(picture: np.ndarray, colour: str) -> np.ndarray:
    """(n, 2) rows and columns where one channel clearly outweighs the others."""
    values = picture.astype(int)
    others = [i for i in range(3) if i != CHANNEL[colour]]
    return np.argwhere(
        (values[..., CHANNEL[colour]] > 60) & (values[..., CHANNEL[colour]] > 1.8 * values[..., others].max(-1))
    )


@pytest.mark.parametrize("view", ["ego", "cam_left_wrist", "cam_right_wrist"])
def test_cube_pixels_match_the_rendered_picture(plain_world: AlohaWorld, view: str) -> None:
    checked = 0
    for seed in range(10):
        plain_world.reset(seed)
        picture = plain_world.render(view, 640, 480)
        for cube in plain_world.scene_state().cubes:
            if view not in cube.visible:
                continue
            found = coloured_pixels(picture, cube.colour)
            assert len(found) > 20, (seed, cube.colour)
            v, u = found.mean(0) / (480, 640)
            # A cube that another thing half hides has its visible part's centroid off its centre: within a cube's size.
            assert abs(u - cube.pixels[view][0]) < 0.03 and abs(v - cube.pixels[view][1]) < 0.04, (seed, cube.colour)
            checked += 1
    assert checked >= 8


def test_where_answers_name_the_cell_that_holds_the_cube(plain_world: AlohaWorld) -> None:
    grid = Grid(12, 16)
    for seed in range(6):
        plain_world.reset(seed)
        answers = dict(questions(plain_world.scene_state(), np.random.default_rng(seed), grid=grid))
        picture = plain_world.render("ego", 640, 480)
        for colour in COLOURS:
            answer = answers.get(f"where is the {colour} cube?") or answers.get(f"find the {colour} cube")
            found = coloured_pixels(picture, colour)
            if answer is None:
                assert len(found) < 20
                continue
            row, column = int(answer.split()[1]), int(answer.split()[3])
            v, u = found.mean(0) / (480, 640)
            assert abs(v * 12 - (row + 0.5)) < 1.0 and abs(u * 16 - (column + 0.5)) < 1.0
            assert colour in answers[f"which cube is at {answer}?"].split()


def test_table_answers_agree_with_the_colours_in_the_picture(plain_world: AlohaWorld) -> None:
    for seed in range(6):
        plain_world.reset(seed)
        answers = dict(questions(plain_world.scene_state(), np.random.default_rng(0)))
        picture = plain_world.render("ego", 640, 480)
        present = [colour for colour in COLOURS if len(coloured_pixels(picture, colour)) > 20]
        assert answers["which cubes are there?"].split() == present
        assert answers["how many cubes are there?"] == str(len(present))
        for colour in COLOURS:
            assert answers[f"is there a {colour} cube?"] == ("yes" if colour in present else "no")


def test_gripper_answers_follow_what_happens(plain_world: AlohaWorld) -> None:
    plain_world.reset(2, "pick up the red cube")
    arm = plain_world.arm
    other = "right" if arm == "left" else "left"
    before = dict(questions(plain_world.scene_state(), np.random.default_rng(0)))
    assert before[f"is the {arm} gripper holding a cube?"] == "no"
    assert before[f"is the {arm} gripper open or closed?"] == "open"
    assert before["which arm is nearer to the red cube?"] == arm
    expert = ScriptedExpert(plain_world)
    while not plain_world.success() and plain_world.time_s < 6:
        for command in interpolate(plain_world.command(), expert.action(), 5):
            plain_world.step(command)
    after = dict(questions(plain_world.scene_state(), np.random.default_rng(0)))
    assert after[f"what is the {arm} gripper holding?"] == "red"
    assert after[f"is the {arm} gripper open or closed?"] == "closed"
    assert after[f"what is the {other} gripper holding?"] == "nothing"
    assert after["is the red cube lifted?"] == "yes"


def test_stored_snapshots_give_the_same_questions(plain_world: AlohaWorld) -> None:
    plain_world.reset(8)
    scene = plain_world.scene_state()
    stored = SceneState.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert stored == scene
    assert questions(stored, np.random.default_rng(1)) == questions(scene, np.random.default_rng(1))
    assert len(questions(scene, np.random.default_rng(1), count=3)) == 3


def test_grid_covers_the_whole_picture() -> None:
    grid = Grid(12, 16)
    assert (
        grid.cell((0.0, 0.0)) == (0, 0)
        and grid.cell((0.9999, 0.9999)) == (11, 15)
        and grid.cell((1.0, 1.0)) == (11, 15)
    )
    assert grid.name((0.5, 0.5)) == "row 6 column 8"


def test_cells_hold_exactly_the_visible_cubes_where_they_are(plain_world: AlohaWorld) -> None:
    plain_world.reset(3)
    scene = plain_world.scene_state()
    grid = Grid(3, 4)
    occupied, inside = cube_cells(scene, "ego", grid)
    seen = [cube for cube in scene.cubes if "ego" in cube.visible]
    assert occupied.sum() == len(seen) > 0
    for cube in seen:
        (cell,) = np.flatnonzero(occupied[:, COLOURS.index(cube.colour)])
        row, column = divmod(int(cell), grid.columns)
        across, down = inside[cell, COLOURS.index(cube.colour)]
        place = (column + across) / grid.columns, (row + down) / grid.rows
        np.testing.assert_allclose(place, cube.pixels["ego"], atol=1e-6)


def test_intention_names_the_arm_and_the_place_of_the_named_cube(plain_world: AlohaWorld) -> None:
    plain_world.reset(3)
    for cube in plain_world.scene_state().cubes:
        plain_world.reset(3, f"pick up the {cube.colour} cube")
        scene = plain_world.scene_state()
        assert intention(scene) == f"{cube.nearer_arm} {Grid().name(cube.pixels['ego'])}"
        assert intention(scene.seen_in(())) == cube.nearer_arm
