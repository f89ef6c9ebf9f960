"""The snapshots of every world through one door: true answers, other requests, cells, and what damaged ones say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from places_support import landmark

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim import grounding, grounding_navigation
from qwen_vla_core.sim.grounding import Grid
from qwen_vla_core.sim.navigation_state import NavigationState
from qwen_vla_core.sim.navigation_tasks import PARAPHRASES, parse_instruction
from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.sim.scenes import CLASSES, read_scene
from qwen_vla_core.sim.state import CubeState, GripperState, PlaceState, SceneState


def cube(colour: str, arm: str, ego: tuple[float, float], wrist: tuple[float, float] | None = None) -> CubeState:
    pixels = {"ego": ego} | ({"cam_wrist": wrist} if wrist else {})
    return CubeState(colour, (0.0, 0.5, 0.02), 0.0, (1.0, 0.0, 0.0), pixels, tuple(pixels), arm, (), ())


TWO_ARMS = SceneState(
    task="pick",
    target="red",
    arm="left",
    cubes=(cube("red", "left", (0.2, 0.3), (0.6, 0.7)), cube("blue", "right", (0.8, 0.6))),
    grippers=tuple(GripperState(arm, (0.0, 0.5, 0.2), 1.0, (0.5, 0.1)) for arm in ("left", "right")),
)
ONE_ARM = SceneState(
    task="place",
    target="red",
    arm="arm",
    cubes=(cube("red", "arm", (0.2, 0.3)), cube("green", "arm", (0.8, 0.6))),
    grippers=(GripperState("arm", (0.0, 0.5, 0.2), 1.0, (0.5, 0.1)),),
    places=(PlaceState("plate", (0.0, 0.4, 0.0), {"ego": (0.5, 0.9)}, ("ego",), ()),),
)


ROOMS = NavigationState(
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
        landmark("yellow box", 3.0, 0.0, (0.5, 0.5), hidden=True),
        landmark("green ball", -2.0, 0.0, None),
        landmark("green pillar", -3.0, 0.0, None),
        landmark("yellow doorway", 3.0, -0.2, (0.6, 0.4)),
    ),
    clearance=(2.5, 1.0, 0.8),
)
SAID = "drive by the blue pillar and go to the red ball"


@pytest.mark.parametrize("state", [TWO_ARMS, ONE_ARM, ROOMS])
def test_text_and_object_read_as_what_they_are(state: SceneState | NavigationState) -> None:
    scene = read_scene(json.dumps(state.to_dict()))
    assert scene == read_scene(state.to_dict()) and scene.state == state  # type: ignore[attr-defined]
    of = grounding if isinstance(state, SceneState) else grounding_navigation
    assert scene.intention() == of.intention(state)  # type: ignore[arg-type]
    expected = of.questions(state, np.random.default_rng(3), views=("ego",), count=5)  # type: ignore[arg-type]
    assert scene.questions(np.random.default_rng(3), ("ego",), 5) == expected


def test_where_questions_ask_for_things_in_one_picture() -> None:
    rng = np.random.default_rng(0)
    found = {answer for _, answer in read_scene(ONE_ARM.to_dict()).where_questions(rng, "ego")}
    assert found == {"row 3 column 3", "row 7 column 12", "row 10 column 8"}  # two cubes and the plate, no gripper
    assert read_scene(TWO_ARMS.to_dict()).where_questions(rng, "cam_wrist") == [
        ("where is the red cube in the wrist view?", "row 8 column 9")
    ]
    asked = read_scene(ROOMS.to_dict()).where_questions(rng, "ego")
    assert len(asked) == 4 and all(answer.startswith("row ") for _, answer in asked)
    assert not any("yellow box" in question or "green" in question for question, _ in asked)


def test_on_a_table_the_other_cubes_could_have_been_asked_for_in_the_same_words() -> None:
    scene = read_scene(TWO_ARMS.to_dict())
    assert scene.intention() == "left row 3 column 3"
    assert scene.requests("grab the red cube") == [("grab the blue cube", "right row 7 column 12")]
    assert scene.requests("grab the bored cube") == []  # "red" only inside a word
    one = read_scene(ONE_ARM.to_dict())
    assert one.requests("set the red cube down on the plate") == [
        ("set the green cube down on the plate", "row 7 column 12 plate row 10 column 8")
    ]


def test_in_rooms_every_landmark_in_sight_could_have_been_the_goal_and_something_else_the_way() -> None:
    requests = dict(read_scene(ROOMS.to_dict()).requests(SAID))
    assert requests == {
        "go to the blue pillar": "blue pillar left row 6 column 4",
        "go to the red ball": "red ball ahead row 6 column 8",  # straight there, not by the pillar
        "go to the red box": "red box far right row 7 column 14",
        "go to the green ball": "green ball not in sight",  # one such is enough, and nothing half hidden
        "drive by the red box and go to the red ball": "red box far right row 7 column 14",
    }
    doorway = dict(read_scene(replace(ROOMS, task="through", via="yellow doorway").to_dict()).requests("unheard of"))
    assert set(doorway) == {f"go to the {name}" for name in ("blue pillar", "red ball", "red box", "green ball")}


def test_what_has_been_passed_stays_passed_and_a_near_goal_means_stop() -> None:
    near = landmark("red box", 0.6, -0.3, (0.7, 0.8))
    state = replace(ROOMS, passed=True, places=(near, *(p for p in ROOMS.places if p.name != "red box")))
    requests = dict(read_scene(state.to_dict()).requests(SAID))
    assert requests["drive by the blue pillar and go to the red box"] == requests["go to the red box"] == "stop"
    assert requests["go to the red ball"] == "red ball ahead row 6 column 8"
    behind = landmark("red box", -0.6, -0.3, None)  # near, but the picture does not tell
    state = replace(state, places=(behind, *state.places[1:]))
    assert not any("red box" in said for said, _ in read_scene(state.to_dict()).requests(SAID))
    two = replace(state, places=(near, landmark("green box", 0.5, 0.0, (0.5, 0.8)), *ROOMS.places[:2]))
    requests = dict(read_scene(two.to_dict()).requests(SAID))  # a stop counts for the nearest one
    assert requests["go to the green box"] == "stop" and requests["go to the red box"].startswith("red box right")


def test_a_generator_chooses_among_the_wordings() -> None:
    scene = read_scene(replace(ROOMS, task="goto", via=None, passed=True).to_dict())
    said = {text for seed in range(20) for text, _ in scene.requests("go to the red ball", np.random.default_rng(seed))}
    assert {template.format(goal="red box") for template in PARAPHRASES["goto"]} <= said
    assert all(parse_instruction(text).goal != "red ball" for text in said)


@pytest.mark.parametrize(("state", "world"), [(TWO_ARMS, "cubes"), (ONE_ARM, "cubes and plate"), (ROOMS, "rooms")])
def test_cells_have_the_classes_of_all_worlds_and_say_which_apply(state: Any, world: str) -> None:
    scene, grid = read_scene(state.to_dict()), Grid(3, 4)
    occupied, inside = scene.cells("ego", grid)
    assert occupied.shape == (12, len(CLASSES)) and inside.shape == (12, len(CLASSES), 2)
    assert len(set(CLASSES)) == len(CLASSES) and occupied.dtype == inside.dtype == np.float32
    things = {
        "cubes": {"red cube": (0.2, 0.3), "blue cube": (0.8, 0.6)},
        "cubes and plate": {"red cube": (0.2, 0.3), "green cube": (0.8, 0.6), "plate": (0.5, 0.9)},
        "rooms": {p.name: p.pixels["ego"] for p in ROOMS.places if p.visible},
    }[world]
    assert occupied[:, : CLASSES.index("yellow doorway") + 1].sum() == len(things)
    for name, (u, v) in things.items():
        row, column = grid.cell((u, v))
        at = 4 * row + column, CLASSES.index(name)
        assert occupied[at] == 1
        np.testing.assert_allclose(inside[at], (4 * u - column, 3 * v - row), atol=1e-6)
    cubes = {f"{colour} cube" for colour in COLOURS}
    on_tables = cubes | {*COLOURS, "cube"}
    in_rooms = set(CLASSES) - cubes - {"plate", "cube"}
    expected = {"cubes": on_tables, "cubes and plate": on_tables | {"plate"}, "rooms": in_rooms}[world]
    assert {name for name, there in zip(CLASSES, scene.applies, strict=True) if there} == expected


def test_colours_and_shapes_are_where_their_things_are() -> None:
    occupied, inside = read_scene(ROOMS.to_dict()).cells("ego", Grid(2, 2))
    at = {name: occupied[:, CLASSES.index(name)].tolist() for name in ("red", "blue", "yellow", "ball", "box", "cube")}
    assert at == {
        "red": [0, 0, 0, 1],  # ball and box in one cell
        "blue": [0, 0, 1, 0],
        "yellow": [0, 1, 0, 0],  # the doorway; the box is hidden
        "ball": [0, 0, 0, 1],
        "box": [0, 0, 0, 1],
        "cube": [0, 0, 0, 0],
    }
    np.testing.assert_allclose(inside[3, CLASSES.index("box")], (0.8, 0.2), atol=1e-6)
    np.testing.assert_allclose(inside[3, CLASSES.index("red")], ((0.8 + 0.02) / 2, (0.2 + 0.1) / 2), atol=1e-6)
    assert (inside[occupied == 0] == 0).all()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "damaged scene .*JSONDecodeError"),
        ("[]", "no known world"),
        ("null", "damaged scene"),
        ({"weather": "fine"}, "no known world"),
        ({"cubes": [{}], "grippers": []}, "damaged scene .*KeyError"),
        ({**ROOMS.to_dict(), "wind": 3}, "damaged scene .*wind"),
        ({**ROOMS.to_dict(), "goal": "red moon"}, "there is no red moon"),
    ],
)
def test_damaged_snapshots_are_one_clear_line(stored: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_scene(stored)
    assert "\n" not in str(caught.value) and "qwen-vla sim demos" in str(caught.value)
