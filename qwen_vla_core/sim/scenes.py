"""One door to the stored snapshots of all worlds: what can be asked about a picture, and what requests mean in it.

Demonstrations keep one snapshot per frame as JSON text: ``SceneState`` of a table, or ``NavigationState`` of rooms.
Training asks both the same things, so nothing behind this door needs to know which robot it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim import grounding, grounding_navigation, navigation_tasks
from qwen_vla_core.sim.grounding import Grid, QuestionAnswer
from qwen_vla_core.sim.navigation_state import NavigationState, PlaceState
from qwen_vla_core.sim.navigation_tasks import NavigationTask, parse_instruction, phrase, reworded
from qwen_vla_core.sim.randomize import COLOURS
from qwen_vla_core.sim.state import EGO, SceneState
from qwen_vla_core.sim.worlds.rooms_ways import REACH

PLATE = "plate"
_ON_TABLES: tuple[str, ...] = (*COLOURS, PLATE)
_THINGS: tuple[str, ...] = (*(f"{colour} cube" for colour in COLOURS), PLATE, *grounding_navigation.CLASSES)
_ATTRIBUTES: tuple[str, ...] = (*navigation_tasks.COLOURS, "cube", *navigation_tasks.SHAPES, "doorway")
# Everything that a vision tower is asked to find, over all worlds: the columns of ``Scene.cells``. Colours and shapes
# are asked for by themselves too: each of them is seen far more often than any coloured shape, in several worlds [O].
CLASSES: tuple[str, ...] = (*_THINGS, *_ATTRIBUTES)
_HAS = np.array([[attribute in thing.split() for attribute in _ATTRIBUTES] for thing in _THINGS])
Request = tuple[str, str]  # an instruction, and what it means in this picture


class Scene(Protocol):
    """One moment of a demonstration."""

    def questions(
        self, rng: np.random.Generator, views: Sequence[str] | None = None, count: int | None = None
    ) -> list[QuestionAnswer]:
        """Question and answer pairs in random order, all true and answerable from the pictures.

        Args:
            rng: chooses wording, order and, with ``count``, which questions.
            views: the pictures that are shown; None = all of them.
            count: keep at most this many.
        """
        ...

    def where_questions(self, rng: np.random.Generator, view: str) -> list[QuestionAnswer]:
        """Only where things are in one picture, in random order; answers are ``row r column c``.

        Finding what is named is the step that a tiny model takes last when many kinds of questions compete [O].
        Grippers are left out: no instruction names one.
        """
        ...

    def intention(self) -> str:
        """What the instruction that was given means here: the first answer after a policy prompt."""
        ...

    def requests(self, instruction: str, rng: np.random.Generator | None = None) -> list[Request]:
        """Every *other* thing that could have been asked for in the same picture, with what it would mean here.

        Demonstrations only say what follows the instruction that was given, so they never show that words decide.
        Only what the picture can tell is among them; the list may be empty.

        Args:
            instruction: what was asked; its wording is kept where another thing fits into it.
            rng: chooses among wordings elsewhere; None takes the plain one.
        """
        ...

    def cells(self, view: str, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Which cells of a picture hold what: dense supervision for a vision tower.

        Returns:
            occupied (rows * columns, ``CLASSES``) float32 of 0 and 1, and places inside the cells
            (rows * columns, ``CLASSES``, 2) float32 in 0..1 (right, down), zero where there is none. Of several things
            that share a colour or shape and a cell it is their middle.
        """
        ...

    @property
    def applies(self) -> np.ndarray:
        """(``CLASSES``,) bool: what can occur in this world, and is therefore told to be absent where it is."""
        ...


def read_scene(stored: str | Mapping[str, Any]) -> Scene:
    """A snapshot of either kind.

    Args:
        stored: JSON text as demonstrations hold it, or the object in it.

    Raises:
        UserError: no JSON, neither kind, or damaged.
    """
    try:
        value = json.loads(stored) if isinstance(stored, str) else stored
        if "cubes" in value:
            return TableScene(SceneState.from_dict(value))
        if "clearance" in value:
            state = NavigationState.from_dict(value)
            missing = [name for name in (state.goal, state.via) if name is not None and state.place(name) is None]
            if missing:
                raise ValueError(f"there is no {missing[0]}, which the instruction names")
            return RoomScene(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"damaged scene ({type(error).__name__}: {error}); record demonstrations again with `qwen-vla sim demos`"
        ) from None
    raise UserError("a scene of no known world; record demonstrations with `qwen-vla sim demos`")


@dataclass(frozen=True)
class TableScene:
    """Cubes on a table, before one arm or two; a ``Scene``."""

    state: SceneState

    def questions(
        self, rng: np.random.Generator, views: Sequence[str] | None = None, count: int | None = None
    ) -> list[QuestionAnswer]:
        """See ``Scene``."""
        return grounding.questions(self.state, rng, views=views, count=count)

    def where_questions(self, rng: np.random.Generator, view: str) -> list[QuestionAnswer]:
        """See ``Scene``; cubes and plate."""
        return _only_places(self.questions, rng, view)

    def intention(self) -> str:
        """See ``Scene``."""
        return grounding.intention(self.state)

    def requests(self, instruction: str, rng: np.random.Generator | None = None) -> list[Request]:
        """See ``Scene``: the same sentence about each other cube; none if it does not name its cube by colour."""
        target = re.compile(rf"\b{re.escape(self.state.target)}\b")
        if not target.search(instruction):
            return []
        others = [cube.colour for cube in self.state.cubes if cube.colour != self.state.target]
        return [
            (target.sub(colour, instruction), grounding.intention(grounding.asked_for(self.state, colour)))
            for colour in others
        ]

    def cells(self, view: str, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """See ``Scene``."""
        return _spread(grounding.cube_cells(self.state, view, grid, _ON_TABLES), 0)

    @property
    def applies(self) -> np.ndarray:
        """See ``Scene``: cubes, and the plate where there is one."""
        plate = any(place.name == PLATE for place in self.state.places)
        return _possible([*range(len(COLOURS)), *([len(COLOURS)] if plate else [])])


@dataclass(frozen=True)
class RoomScene:
    """Landmarks and doorways before a mobile base; a ``Scene``."""

    state: NavigationState

    def questions(
        self, rng: np.random.Generator, views: Sequence[str] | None = None, count: int | None = None
    ) -> list[QuestionAnswer]:
        """See ``Scene``."""
        return grounding_navigation.questions(self.state, rng, views=views, count=count)

    def where_questions(self, rng: np.random.Generator, view: str) -> list[QuestionAnswer]:
        """See ``Scene``; landmarks and doorways."""
        return _only_places(self.questions, rng, view)

    def intention(self) -> str:
        """See ``Scene``."""
        return grounding_navigation.intention(self.state)

    def requests(self, instruction: str, rng: np.random.Generator | None = None) -> list[Request]:
        """See ``Scene``: to go straight to each landmark in sight and to one that is not; other things to pass first.

        What is hidden but might show a corner, and what is near but out of sight, is not asked for: the picture does
        not tell what that would mean. One landmark out of sight is enough, or they would be most of all requests.
        """
        found: list[Request] = []
        unseen: list[Request] = []
        for place in self._landmarks:
            goto = NavigationTask("goto", place.name)
            if goto == self._task:
                continue
            meaning = self._meaning(place)
            if EGO in place.visible:
                found.append((phrase(goto, rng), meaning))
            elif EGO not in place.pixels and _away(place) > REACH:
                unseen.append((phrase(goto, rng), meaning))
        return found + unseen[:1] + self._in_other_words(instruction)

    def cells(self, view: str, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """See ``Scene``."""
        return _spread(grounding_navigation.place_cells(self.state, view, grid), len(_ON_TABLES))

    @property
    def applies(self) -> np.ndarray:
        """See ``Scene``: landmarks and doorways."""
        return _possible(range(len(_ON_TABLES), len(_THINGS)))

    @property
    def _task(self) -> NavigationTask:
        return NavigationTask(self.state.task, self.state.goal, self.state.via)

    @property
    def _landmarks(self) -> list[PlaceState]:
        return [place for place in self.state.places if not place.doorway]

    def _meaning(self, goal: PlaceState) -> str:
        """What it means to go to ``goal``. As in the world, a stop counts for the nearest landmark within reach."""
        near = _away(goal) <= REACH and goal is min(self._landmarks, key=_away)
        asked = replace(grounding_navigation.asked_for(self.state, goal.name), near_goal=near)
        return grounding_navigation.intention(asked)

    def _in_other_words(self, instruction: str) -> list[Request]:
        """The sentence that was given, with another thing to pass first, or another goal once that has been passed."""
        own, state = self._task, self.state
        try:
            said = parse_instruction(instruction)
        except UserError:
            return []
        if own.via is None or said != own:
            return []
        seen = [place for place in state.places if EGO in place.visible and place.name not in (own.goal, own.via)]
        if state.passed:
            return [
                (reworded(own, instruction, replace(own, goal=place.name)), self._meaning(place))
                for place in seen
                if not place.doorway
            ]
        return [
            (
                reworded(own, instruction, replace(own, via=place.name)),
                grounding_navigation.intention(replace(state, via=place.name)),
            )
            for place in seen
            if place.doorway == (own.name == "through") and _away(place) > REACH  # nearer, it would count as passed
        ]


def _away(place: PlaceState) -> float:
    """Metres from the base."""
    return math.hypot(place.ahead, place.left)


def _only_places(
    questions: Callable[[np.random.Generator, Sequence[str]], list[QuestionAnswer]],
    rng: np.random.Generator,
    view: str,
) -> list[QuestionAnswer]:
    return [(q, a) for q, a in questions(rng, (view,)) if a.startswith("row ") and "gripper" not in q]


def _possible(things: Iterable[int]) -> np.ndarray:
    """(``CLASSES``,) bool: these things, and the colours and shapes that they have."""
    result = np.zeros(len(CLASSES), bool)
    result[list(things)] = True
    result[len(_THINGS) :] = result[: len(_THINGS)] @ _HAS
    return result


def _spread(found: tuple[np.ndarray, np.ndarray], first: int) -> tuple[np.ndarray, np.ndarray]:
    """The things of one world as columns of all, from ``first`` on, and their colours and shapes behind them."""
    occupied, inside = found
    every = np.zeros((len(occupied), len(CLASSES)), np.float32)
    where = np.zeros((*every.shape, 2), np.float32)
    columns = slice(first, first + occupied.shape[1])
    every[:, columns], where[:, columns] = occupied, inside
    has = _HAS[columns].astype(np.float32)
    count = occupied @ has
    every[:, len(_THINGS) :] = count > 0
    where[:, len(_THINGS) :] = np.einsum("ntd,ta->nad", inside, has) / np.maximum(count, 1)[..., None]
    return every, where
