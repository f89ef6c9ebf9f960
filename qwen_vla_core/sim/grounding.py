"""Dense questions about a picture, answered from the simulator's own state (or from a stored snapshot of it).

Tiny backbones only learn to see when they are asked often and precisely [X]: where a named cube lies on a grid, which
arm is nearer, what a gripper does. Nothing here needs the simulator, so questions are made afresh at training time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.sim.state import EGO, ONLY_ARM, CubeState, PlaceState, SceneState

QuestionAnswer = tuple[str, str]
OPEN_FROM = 0.85  # opening fraction
CLOSED_TO = 0.15
HIGH = 0.07  # metres above the table from which a cube counts as lifted


@dataclass(frozen=True)
class Grid:
    """Cells over a whole picture; rows count from the top and columns from the left, both from 0."""

    rows: int = 12
    columns: int = 16

    def cell(self, pixel: tuple[float, float]) -> tuple[int, int]:
        """(row, column) of a (u, v) in 0..1."""
        return min(int(pixel[1] * self.rows), self.rows - 1), min(int(pixel[0] * self.columns), self.columns - 1)

    def name(self, pixel: tuple[float, float]) -> str:
        """``row r column c``."""
        row, column = self.cell(pixel)
        return f"row {row} column {column}"


def questions(
    scene: SceneState,
    rng: np.random.Generator,
    *,
    grid: Grid | None = None,
    count: int | None = None,
    views: Sequence[str] | None = None,
) -> list[QuestionAnswer]:
    """Question and answer pairs about one moment, all true and all answerable from the pictures.

    A cube hidden from a view is not asked for there. Where two wordings exist, ``rng`` chooses.

    Args:
        scene: the moment.
        rng: chooses wording, order and, with ``count``, which questions.
        grid: of the positions; 12 × 16 by default.
        count: keep at most this many.
        views: the pictures that are shown; only what they answer is asked. None = all of them.
    """
    grid = grid or Grid()
    if views is not None:
        scene = scene.seen_in(views)
    pairs: list[QuestionAnswer] = []
    for cube in scene.cubes:
        pairs += _about_cube(scene, cube, grid, rng)
    for place in scene.places:
        pairs += _about_place(scene, place, grid)
    pairs += _about_table(scene)
    if scene.belt:
        pairs.append(("which way does the belt move?", scene.belt))
    for gripper in scene.grippers:
        pairs += _about_gripper(scene, gripper.arm, grid)
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in (order if count is None else order[:count])]


def asked_for(scene: SceneState, colour: str) -> SceneState:
    """The same moment, had the instruction named the cube of ``colour`` (one of those on the table)."""
    cube = scene.cube(colour)
    if cube is None:
        raise ValueError(f"no {colour} cube in this scene")
    return replace(scene, target=colour, arm=cube.nearer_arm)


def intention(scene: SceneState, *, grid: Grid | None = None) -> str:
    """What the instruction means here: the arm that is to act, and where the named cube is, if the ego view shows it.

    Where there is only one arm, nothing is said of it, a cube that is not shown is ``held`` or ``hidden``, and the
    place it is to be put on follows, or the side that a belt runs to. As the first answer after a policy prompt it
    makes the end of the prompt know the target, which is what the action decoder reads. Without it a tiny policy
    reaches for any cube [O].
    """
    target, grid = scene.cube(scene.target), grid or Grid()
    shown = target is not None and EGO in target.visible
    words = [] if scene.arm == ONLY_ARM else [scene.arm]
    if target is not None and shown:
        words.append(grid.name(target.pixels[EGO]))
    elif scene.arm == ONLY_ARM:
        words.append("held" if target is not None and target.held_by else "hidden")
    words += [f"{place.name} {grid.name(place.pixels[EGO])}" for place in scene.places if EGO in place.visible]
    words += [f"belt {scene.belt}"] if scene.belt else []
    return " ".join(words)


def cube_cells(
    scene: SceneState, view: str, grid: Grid, names: Sequence[str] = COLOURS
) -> tuple[np.ndarray, np.ndarray]:
    """Which cells of a picture hold which cubes: dense supervision for a vision tower.

    Args:
        scene: the moment.
        view: the picture.
        grid: its cells.
        names: colours of cubes, and names of places where they are wanted too (``plate``).

    Returns:
        occupied (rows * columns, names) float32 of 0 and 1, in the order of ``names``, and the objects' places inside
        their cells (rows * columns, names, 2) float32 in 0..1 (right, down), zero where there is none. Hidden ones
        are not there.
    """
    occupied = np.zeros((grid.rows * grid.columns, len(names)), np.float32)
    inside = np.zeros((*occupied.shape, 2), np.float32)
    things = [(cube.colour, cube) for cube in scene.cubes] + [(place.name, place) for place in scene.places]
    for name, thing in things:
        if name in names and view in thing.visible:
            u, v = thing.pixels[view]
            row, column = grid.cell((u, v))
            at = row * grid.columns + column, names.index(name)
            occupied[at] = 1.0
            inside[at] = u * grid.columns - column, v * grid.rows - row
    return occupied, inside


def _pick(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _about_cube(scene: SceneState, cube: CubeState, grid: Grid, rng: np.random.Generator) -> list[QuestionAnswer]:
    colour, pairs = cube.colour, []
    if "ego" in cube.visible:
        where = grid.name(cube.pixels["ego"])
        pairs += [
            (_pick(rng, f"where is the {colour} cube?", f"find the {colour} cube"), where),
            (f"which cube is at {where}?", _at(scene, where, grid)),
        ]
        if cube.nearer_arm != ONLY_ARM:
            pairs.append((f"which arm is nearer to the {colour} cube?", cube.nearer_arm))
        others = [other for other in scene.cubes if other is not cube and "ego" in other.visible]
        for other in others:
            left = cube.pixels["ego"][0] < other.pixels["ego"][0]
            pairs.append((f"is the {colour} cube left or right of the {other.colour} cube?", _side(left)))
    pairs += _in_other_views(f"{colour} cube", cube, grid)
    if cube.visible:
        pairs.append((f"is the {colour} cube lifted?", _yes(cube.position[2] > HIGH)))
    return pairs


def _in_other_views(name: str, thing: CubeState | PlaceState, grid: Grid) -> list[QuestionAnswer]:
    """Where every picture but the ego view shows it, each called by its name: cam_left_wrist is the left wrist view."""
    called = {view: view.removeprefix("cam_").replace("_", " ") for view in thing.visible if view != EGO}
    return [(f"where is the {name} in the {words} view?", grid.name(thing.pixels[v])) for v, words in called.items()]


def _about_place(scene: SceneState, place: PlaceState, grid: Grid) -> list[QuestionAnswer]:
    """Where it is, what lies on it; the latter only while nothing that could lie on it is hidden."""
    pairs = _in_other_views(place.name, place, grid)
    if EGO in place.visible:
        pairs.append((f"where is the {place.name}?", grid.name(place.pixels[EGO])))
    if place.visible:
        pairs += [
            (f"is the {cube.colour} cube on the {place.name}?", _yes(cube.colour in place.holds))
            for cube in scene.cubes
            if cube.visible
        ]
        if all(cube.visible for cube in scene.cubes):
            pairs.append((f"what is on the {place.name}?", " ".join(place.holds) or "nothing"))
    return pairs


def _at(scene: SceneState, where: str, grid: Grid) -> str:
    """Colours of all cubes seen in a cell, in the fixed order: cells may be coarse enough for two."""
    seen = (scene.cube(colour) for colour in COLOURS)
    return " ".join(c.colour for c in seen if c and "ego" in c.visible and grid.name(c.pixels["ego"]) == where)


def _about_table(scene: SceneState) -> list[QuestionAnswer]:
    """Which cubes there are; asked only while every one of them is to be seen in some view."""
    if not all(cube.visible for cube in scene.cubes):
        return []
    present = [colour for colour in COLOURS if scene.cube(colour)]
    pairs = [("which cubes are there?", " ".join(present)), ("how many cubes are there?", str(len(present)))]
    pairs += [(f"is there a {colour} cube?", _yes(colour in present)) for colour in COLOURS]
    return pairs


def _about_gripper(scene: SceneState, arm: str, grid: Grid) -> list[QuestionAnswer]:
    gripper = scene.gripper(arm)
    name = "gripper" if arm == ONLY_ARM else f"{arm} gripper"
    held = [cube.colour for cube in scene.cubes if arm in cube.held_by]
    pairs = [
        (f"is the {name} holding a cube?", _yes(bool(held))),
        (f"what is the {name} holding?", held[0] if held else "nothing"),
    ]
    if gripper.pixel is not None:
        pairs.append((f"where is the {name}?", grid.name(gripper.pixel)))
    if gripper.opening > OPEN_FROM:
        pairs.append((f"is the {name} open or closed?", "open"))
    elif gripper.opening < CLOSED_TO or held:
        pairs.append((f"is the {name} open or closed?", "closed"))
    return pairs


def _side(left: bool) -> str:
    return "left" if left else "right"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
