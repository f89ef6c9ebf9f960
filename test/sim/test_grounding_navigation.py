"""Questions about what a base sees: true, answerable from the picture, and the same from a stored snapshot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from places_support import landmark

from qwen_vla_core.sim.grounding import Grid
from qwen_vla_core.sim.grounding_navigation import CLASSES, asked_for, intention, place_cells, questions
from qwen_vla_core.sim.navigation_expert import NavigationExpert
from qwen_vla_core.sim.navigation_state import NavigationState
from qwen_vla_core.sim.worlds.rooms import RoomsWorld

HUE = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(scope="module")
def world() -> Iterator[RoomsWorld]:
    shared = RoomsWorld()
    yield shared
    shared.close()


SCENE = NavigationState(
    task="past",
    goal="red ball",
    via="blue pillar",
    passed=False,
    stopped=False,
    near_goal=False,
    places=(
        landmark("blue pillar", 2.0, 0.6, (0.3, 0.5)),
        landmark("red ball", 4.0, -0.1, (0.51, 0.55)),
        landmark("red box", 1.0, -0.9, (0.9, 0.6)),
        landmark("green ball", -1.0, 0.0, None),
        landmark("yellow doorway", 3.0, -0.2, None),
    ),
    clearance=(2.5, 1.0, 0.8),
)


def all_answers(scene: NavigationState) -> dict[str, str]:
    return {q: a for seed in range(30) for q, a in questions(scene, np.random.default_rng(seed))}


def test_answers_of_a_made_up_moment() -> None:
    answers = all_answers(SCENE)
    assert answers["where is the blue pillar?"] == answers["find the blue pillar"] == "row 6 column 4"
    assert answers["which direction is the blue pillar?"] == "left"
    assert answers["which direction is the red ball?"] == "ahead"
    assert answers["which way to the red box?"] == "far right"
    assert answers["how far is the red box?"] == "middle" and answers["how far is the red ball?"] == "far"
    assert answers["is the red ball left or right of the blue pillar?"] == "right"
    assert answers["is the red box nearer than the blue pillar?"] == "yes"
    assert answers["what is to be seen from left to right?"] == "blue pillar, red ball, red box"
    assert answers["what is blue?"] == "pillar" and "what is red?" not in answers  # two things are red
    assert answers["which colour is the ball?"] == "red"  # the green one is behind
    assert answers["is there a red box?"] == "yes" and answers["what is at row 6 column 8?"] == "red ball"
    assert answers["is the way ahead free?"] == "no"
    assert answers["is there more room to the left or to the right?"] == "left"
    assert not any("yellow doorway" in q or "green ball" in q for q, a in answers.items() if a != "no")


def test_what_the_shown_pictures_do_not_show_is_not_asked() -> None:
    assert questions(SCENE, np.random.default_rng(0), views=()) == []
    assert len(questions(SCENE, np.random.default_rng(0), count=3)) == 3


def test_intention_follows_the_walk() -> None:
    assert intention(SCENE) == "blue pillar left row 6 column 4"
    after = NavigationState(**{**vars(SCENE), "passed": True})
    assert intention(after) == "red ball ahead row 6 column 8"
    assert intention(NavigationState(**{**vars(after), "near_goal": True})) == "stop"
    assert intention(asked_for(SCENE, "green ball")) == "green ball not in sight"
    with pytest.raises(ValueError, match="red pillar"):
        asked_for(SCENE, "red pillar")


def test_cells_hold_what_is_visible() -> None:
    grid = Grid()
    occupied, inside = place_cells(SCENE, "ego", grid)
    assert occupied.shape == (192, len(CLASSES)) and occupied.sum() == 3
    at = 6 * 16 + 8, CLASSES.index("red ball")
    assert occupied[at] == 1 and inside[at] == pytest.approx([0.51 * 16 - 8, 0.55 * 12 - 6], abs=1e-6)


def test_the_cell_of_the_answer_shows_the_colour(world: RoomsWorld) -> None:
    checked = 0
    for seed in range(12):
        world.reset(seed)
        picture = world.render("ego", 256, 192).astype(int)
        for spot in world.scene_state().places:
            colour = spot.name.split()[0]
            if spot.doorway or colour not in HUE or "ego" not in spot.visible:
                continue
            u, v = spot.pixels["ego"]
            pixel = picture[int(v * 192), int(u * 256)]
            assert int(np.argmax(pixel)) == HUE[colour] and pixel.max() > 1.5 * np.sort(pixel)[1], spot.name
            checked += 1
    assert checked > 15


def test_directions_are_those_of_the_plan(world: RoomsWorld) -> None:
    world.reset(3)
    x, y, heading = world.base.pose
    for spot in world.scene_state().places:
        found = world.layout.landmark(spot.name) or world.layout.doorway(spot.name)
        assert found is not None
        angle = heading + math.atan2(spot.left, spot.ahead)
        away = math.hypot(spot.left, spot.ahead)
        assert (x + away * math.cos(angle), y + away * math.sin(angle)) == pytest.approx(found.centre, abs=1e-9)


def test_a_snapshot_survives_json_and_answers_the_same(world: RoomsWorld) -> None:
    world.reset(6)
    expert, told = NavigationExpert(world), []
    while not world.ended() and world.time_s < world.limit_s:
        scene = world.scene_state()
        stored = json.loads(json.dumps(scene.to_dict()))
        assert world.read_scene(stored) == scene
        same = [world.questions(s, np.random.default_rng(1)) for s in (scene, stored)]
        assert same[0] == same[1] and len(same[0]) > 1
        told.append(world.intention(scene))
        for command in world.play(expert.action()):
            world.step(command)
    assert told[-1] == "stop" and world.success()
