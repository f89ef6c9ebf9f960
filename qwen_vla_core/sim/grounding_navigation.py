"""Dense questions about what a mobile base sees, answered from the simulator's state or from a stored snapshot of it.

The counterpart of ``grounding.py`` for rooms: same grid, same rules. Only what the picture shows is asked for, so every
answer can be learned. Nothing here needs the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen_vla_core.sim.grounding import Grid, QuestionAnswer
from qwen_vla_core.sim.navigation_state import NavigationState, PlaceState
from qwen_vla_core.sim.navigation_tasks import COLOURS, DOORWAYS, LANDMARKS, SHAPES

EGO = "ego"
STRAIGHT = math.radians(8)  # bearings up to this are straight ahead
FAR_OUT = math.radians(28)  # and from this on far to a side
NEAR, FAR = 1.3, 3.0  # metres: distance buckets
FREE = 1.5  # metres of clearance that count as a free way
CLASSES: tuple[str, ...] = (*LANDMARKS, *DOORWAYS)  # of ``place_cells``


def questions(
    scene: NavigationState | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    grid: Grid | None = None,
    count: int | None = None,
    views: Sequence[str] | None = None,
) -> list[QuestionAnswer]:
    """Question and answer pairs about one moment, all true and all answerable from the pictures.

    Args:
        scene: the moment, or its stored form.
        rng: chooses wording, order and, with ``count``, which questions.
        grid: of the positions; 12 × 16 by default.
        count: keep at most this many.
        views: the pictures that are shown; only what they answer is asked. None = all of them.
    """
    grid = grid or Grid()
    if not isinstance(scene, NavigationState):
        scene = NavigationState.from_dict(scene)
    if views is not None:
        scene = scene.seen_in(views)
        if EGO not in views:
            return []
    seen = [place for place in scene.places if EGO in place.visible]
    pairs: list[QuestionAnswer] = []
    for place in seen:
        pairs += _about_place(place, seen, grid, rng)
    pairs += _about_view(scene, seen, rng)
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in (order if count is None else order[:count])]


def asked_for(scene: NavigationState, goal: str) -> NavigationState:
    """The same moment, had the instruction been to go to another landmark of the scene.

    Raises:
        ValueError: the scene does not have it.
    """
    if scene.place(goal) is None:
        raise ValueError(f"no {goal} in this scene")
    return replace(scene, task="goto", goal=goal, via=None, passed=True, near_goal=False)


def intention(scene: NavigationState, *, grid: Grid | None = None) -> str:
    """What the instruction means here: what to drive to now, on which side it is, where the picture shows it; or stop.

    As the first answer after a policy prompt it makes the end of the prompt know the target, which is what the action
    decoder reads [O].
    """
    if scene.passed and scene.near_goal:
        return "stop"
    place = scene.place(scene.next)
    assert place is not None
    if EGO not in place.visible:
        return f"{scene.next} not in sight"
    return f"{scene.next} {direction(place)} {(grid or Grid()).name(place.pixels[EGO])}"


def direction(place: PlaceState) -> str:
    """Where something is, as seen from the base: ahead, left, far left, right, far right."""
    bearing = math.atan2(place.left, place.ahead)
    if abs(bearing) <= STRAIGHT:
        return "ahead"
    return ("far " if abs(bearing) >= FAR_OUT else "") + ("left" if bearing > 0 else "right")


def distance(place: PlaceState) -> str:
    """How far something is: near, middle or far."""
    away = math.hypot(place.ahead, place.left)
    return "near" if away < NEAR else "far" if away >= FAR else "middle"


def place_cells(scene: NavigationState, view: str, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Which cells of a picture hold which landmarks and doorways: dense supervision for a vision tower.

    Returns:
        occupied (rows * columns, classes) float32 of 0 and 1, in the order of ``CLASSES``, and the places inside their
        cells (rows * columns, classes, 2) float32 in 0..1 (right, down), zero where there is none. What is hidden is
        not there.
    """
    occupied = np.zeros((grid.rows * grid.columns, len(CLASSES)), np.float32)
    inside = np.zeros((*occupied.shape, 2), np.float32)
    for place in scene.places:
        if view in place.visible:
            u, v = place.pixels[view]
            row, column = grid.cell((u, v))
            at = row * grid.columns + column, CLASSES.index(place.name)
            occupied[at] = 1.0
            inside[at] = u * grid.columns - column, v * grid.rows - row
    return occupied, inside


def _pick(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _about_place(
    place: PlaceState, seen: Sequence[PlaceState], grid: Grid, rng: np.random.Generator
) -> list[QuestionAnswer]:
    name, where = place.name, grid.name(place.pixels[EGO])
    here = [other.name for other in seen if grid.name(other.pixels[EGO]) == where]
    pairs = [
        (_pick(rng, f"where is the {name}?", f"find the {name}"), where),
        (_pick(rng, f"which direction is the {name}?", f"which way to the {name}?"), direction(place)),
        (f"how far is the {name}?", distance(place)),
        (f"what is at {where}?", ", ".join(sorted(here, key=CLASSES.index))),
    ]
    others = [other for other in seen if other is not place]
    if others:  # one of them: all pairs would drown the other questions
        other = others[int(rng.integers(len(others)))]
        left = place.pixels[EGO][0] < other.pixels[EGO][0]
        pairs.append((f"is the {name} left or right of the {other.name}?", "left" if left else "right"))
        nearer = math.hypot(place.ahead, place.left) < math.hypot(other.ahead, other.left)
        pairs.append((f"is the {name} nearer than the {other.name}?", _yes(nearer)))
    return pairs


def _about_view(scene: NavigationState, seen: Sequence[PlaceState], rng: np.random.Generator) -> list[QuestionAnswer]:
    """What there is in the picture, from left to right, what there is not, and whether the way is free."""
    in_order = sorted(seen, key=lambda place: place.pixels[EGO][0])
    names = {place.name for place in seen}
    listed = ", ".join(place.name for place in in_order) or "nothing"
    pairs = [("what is to be seen from left to right?", listed)]
    hidden = {place.name for place in scene.places} - names  # may show a corner that does not count as seen
    absent = [name for name in CLASSES if name not in names and name not in hidden]
    wanted = [*names, absent[int(rng.integers(len(absent)))]]
    pairs += [(f"is there a {name}?", _yes(name in names)) for name in sorted(wanted, key=CLASSES.index)]
    shown = [*in_order, *(place for place in scene.places if place.name in hidden and EGO in place.pixels)]
    for colour in COLOURS:
        shapes = [place.name.split()[1] for place in shown if place.name.startswith(colour)]
        if len(shapes) == 1 and f"{colour} {shapes[0]}" in names:
            pairs.append((f"what is {colour}?", shapes[0]))
    for shape in SHAPES:
        colours = [place.name.split()[0] for place in shown if place.name.endswith(shape)]
        if len(colours) == 1 and f"{colours[0]} {shape}" in names:
            pairs.append((f"which colour is the {shape}?", colours[0]))
    left, ahead, right = scene.clearance
    pairs.append(("is the way ahead free?", _yes(ahead > FREE)))
    if abs(left - right) > 0.5:
        pairs.append(("is there more room to the left or to the right?", "left" if left > right else "right"))
    return pairs


def _yes(value: bool) -> str:
    return "yes" if value else "no"
