"""The tabletop worlds away from what demonstrations showed: one axis at a time, everything else as in training.

The same seed gives the same scene as in the unshifted world, so an axis is compared with the training distribution
scene by scene (``position`` alone has to draw its own). The axes are those of the paper's real-robot test [P]; what
each of them means on our tables is our choice [O].
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.domain import DomainConfig
from qwen_vla_core.sim.randomize import COLOURS, CubeLayout, RandomizationConfig, choose_colours, lay_out
from qwen_vla_core.sim.tasks import TaskBook
from qwen_vla_core.sim.worlds.aloha import CUBE_X, CUBE_Y, AlohaWorld
from qwen_vla_core.sim.worlds.tabletop import TabletopWorld
from qwen_vla_core.sim.worlds.widowx import AREA, PLATE_RADIUS, WidowXWorld

AXES: tuple[str, ...] = ("colour", "instance", "position", "background", "instruction")

# word → hue, saturation, value: no demonstration shows or names them.
UNSEEN_COLOURS: dict[str, tuple[float, float, float]] = {
    "orange": (0.075, 0.95, 0.95),
    "yellow": (0.155, 0.90, 0.90),
    "cyan": (0.50, 0.85, 0.85),
    "purple": (0.77, 0.75, 0.65),
    "pink": (0.91, 0.50, 0.95),
}

_BOX, _CYLINDER = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER
# name → shape and its sizes in metres (half edges; radius and half height). Demonstrations show cubes of 4 cm alone.
UNSEEN_SHAPES: dict[str, tuple[mujoco.mjtGeom, tuple[float, float, float]]] = {
    "cylinder": (_CYLINDER, (0.020, 0.020, 0.0)),
    "tall cylinder": (_CYLINDER, (0.017, 0.028, 0.0)),
    "block": (_BOX, (0.014, 0.020, 0.020)),
    "tile": (_BOX, (0.020, 0.020, 0.014)),
    "small cube": (_BOX, (0.016, 0.016, 0.016)),
    "big cube": (_BOX, (0.023, 0.023, 0.023)),
}

# Surfaces and light alone: cameras and start pose as without, cubes and dynamics as built.
BACKGROUND = DomainConfig(
    light_position=0.5,
    light_strength=(0.35, 1.7),
    light_tint=0.35,
    ambient=(0.5, 1.6),
    table_rgb=(0.05, 0.95),
    floor_rgb=(0.05, 0.95),
    camera_shift=RandomizationConfig.camera_shift,
    camera_turn=RandomizationConfig.camera_turn,
    camera_fovy=RandomizationConfig.camera_fovy,
    cube_size=(1.0, 1.0),
    cube_mass=(1.0, 1.0),
    cube_friction=(1.0, 1.0),
    joint_damping=(0.0, 0.0),
    joint_friction=(1.0, 1.0),
    joint_gain=(1.0, 1.0),
    distractors=(0, 0),
    start_pose=RandomizationConfig.start_pose,
)

UNSEEN_TWO_ARMS = TaskBook(
    {
        "pick": (
            "get the {colour} cube off the table",
            "hold the {colour} cube up in the air",
            "I need the {colour} cube, raise it for me",
            "would you fetch the {colour} block",
        ),
        "transfer": (
            "give the {colour} cube to your other gripper",
            "swap hands with the {colour} cube",
            "let the second arm take over the {colour} cube",
        ),
    }
)
UNSEEN_PLATE_AND_BELT = TaskBook(
    {
        "place": (
            "bring the {colour} cube to the plate",
            "the {colour} cube belongs on the plate",
            "lay the {colour} block onto the dish",
            "I want the {colour} cube on that plate",
        ),
        "belt": (
            "get the {colour} cube from the conveyor",
            "snatch the {colour} cube as it passes by",
            "do not let the {colour} block get away",
        ),
    }
)


class ShiftedTable(TabletopWorld):
    """What both shifted tables do; mixed in before a world. ``shift`` is one of ``AXES``, or None for no shift."""

    unseen_book: TaskBook

    def __init__(self, *, shift: str | None = None, **options: Any) -> None:
        """
        Args:
            shift: the axis.
            options: of the world.

        Raises:
            UserError: there is no such axis.
        """
        if shift not in (None, *AXES):
            raise UserError(f"shift {shift!r}: use one of {', '.join(AXES)}")
        self.shift = shift
        self._words: dict[str, str] = {}
        self.variant = ""
        if shift == "background":
            options["domain"] = BACKGROUND
        super().__init__(**options)
        if shift == "instruction":
            self.book = self.unseen_book

    # --- life of an episode -----------------------------------------------------------------------------------------

    def reset(self, seed: int, instruction: str | None = None) -> None:
        """As ``TabletopWorld.reset``; an instruction is in the words that this scene is spoken of in.

        In ``colour`` the scene depends on the cube that the seed itself asks for, also when another is asked for.
        """
        self._words, self.variant = {}, ""
        super().reset(seed, None)
        if self.shift == "colour":
            self._rename(seed)
        if instruction is not None:
            super().reset(seed, self._plain(instruction))
        for colour, word in self._words.items():
            self.model.geom_rgba[self._geom_of(colour), :3] = shade(word, seed)
        self.instruction = self._spoken(self.instruction)

    def _rename(self, seed: int) -> None:
        """Even seeds: the cube asked for has an unseen colour. Odd ones: all the others have, so that they mislead."""
        rng = np.random.default_rng([seed, 20])
        words = [list(UNSEEN_COLOURS)[i] for i in rng.permutation(len(UNSEEN_COLOURS))]
        self.variant = "others" if seed % 2 else "named"
        renamed = [c for c in self._layout if (c == self.task.colour) == (self.variant == "named")]
        self._words = dict(zip(renamed, words, strict=False))

    def _spoken(self, plain: str) -> str:
        for colour, word in self._words.items():
            plain = plain.replace(f"the {colour} ", f"the {word} ")
        return plain

    def _plain(self, spoken: str) -> str:
        for colour, word in self._words.items():
            spoken = spoken.replace(f"the {word} ", f"the {colour} ")
        return spoken

    def _paint(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        super()._paint(cubes, rng)
        if self.shift == "instance":
            self._reshape(np.random.default_rng([self.seed, 21]))

    def _reshape(self, rng: np.random.Generator) -> None:
        """All cubes of the episode become one unseen kind of thing of the same colour and mass."""
        self.variant = list(UNSEEN_SHAPES)[int(rng.integers(len(UNSEEN_SHAPES)))]
        kind, size = UNSEEN_SHAPES[self.variant]
        extent = np.array((size[0], size[0], size[1]) if kind == _CYLINDER else size)
        m = self.model
        for colour in COLOURS:
            geom, body = self._geom_of(colour), m.body(f"cube_{colour}").id
            m.geom_type[geom], m.geom_size[geom] = kind, size
            m.geom_rbound[geom] = np.linalg.norm(extent)
            m.geom_aabb[geom, 3:] = extent
            m.bvh_aabb[m.body_bvhadr[body], 3:] = extent  # the middle phase of collision reads it
            squares = extent**2
            m.body_inertia[body] = m.body_mass[body] / 3 * (squares.sum() - squares)
        mujoco.mj_setConst(m, self.data)
        mujoco.mj_resetData(m, self.data)

    def _half(self, colour: str) -> float:
        """Half of its height in metres."""
        size = self.model.geom_size[self._geom_of(colour)]
        return float(size[1] if self.model.geom_type[self._geom_of(colour)] == _CYLINDER else size[2])

    def _vary(self, domain: DomainConfig, rng: np.random.Generator) -> None:
        """Only what is behind the cubes: they themselves stay plain."""
        super()._vary(domain, rng)
        for colour in COLOURS:
            self.model.geom_matid[self._geom_of(colour)] = -1

    # --- what the judge knows ---------------------------------------------------------------------------------------

    @property
    def target(self) -> str:
        """The colour asked for, in the words of this scene."""
        return self._words.get(self.task.colour, self.task.colour)

    def chosen(self) -> str | None:
        """See ``TabletopWorld``, in the words of this scene."""
        found = super().chosen()
        return None if found is None else self._words.get(found, found)

    def other_instruction(self) -> str | None:
        """See ``TabletopWorld``, in the words of this scene."""
        other = next((colour for colour in self._layout if colour != self.task.colour), None)
        if other is None:
            return None
        return self._spoken(self._plain(self.instruction).replace(self.task.colour, other))

    def about(self) -> dict[str, Any]:
        """See ``TabletopWorld``, and which unseen thing it was."""
        return {**super().about(), **({"variant": self.variant} if self.variant else {})}


class ShiftedAloha(ShiftedTable, AlohaWorld):
    """The ALOHA world along one axis."""

    unseen_book = UNSEEN_TWO_ARMS

    def _sample(self, rng: np.random.Generator, task: str) -> list[CubeLayout]:
        if self.shift != "position":
            return super()._sample(rng, task)

        def draw() -> np.ndarray:
            return np.array([rng.uniform(*ALOHA_OUTER[:2]) * rng.choice([-1.0, 1.0]), rng.uniform(*ALOHA_OUTER[2:])])

        def unseen(place: np.ndarray) -> bool:
            return not (abs(place[0]) <= CUBE_X[1] + BEYOND and CUBE_Y[0] - BEYOND <= place[1] <= CUBE_Y[1] + BEYOND)

        colours = choose_colours(self.randomize, rng, 2, 3)
        return lay_out(self.randomize, rng, colours, _apart(self.randomize, len(colours), draw, unseen))


class ShiftedWidowX(ShiftedTable, WidowXWorld):
    """The WidowX world along one axis; the belt has no ``position``."""

    unseen_book = UNSEEN_PLATE_AND_BELT

    def _sample(self, rng: np.random.Generator, task: str) -> list[CubeLayout]:
        if self.shift != "position" or task == "belt":
            return super()._sample(rng, task)
        plate = np.array(self._plate_place())

        def draw() -> np.ndarray:
            return np.array([rng.uniform(*WIDOWX_OUTER[:2]), rng.uniform(*WIDOWX_OUTER[2:])])

        def unseen(place: np.ndarray) -> bool:
            inside = AREA[0] - BEYOND <= place[0] <= AREA[1] + BEYOND and abs(place[1]) <= AREA[3] + BEYOND
            within_reach = np.linalg.norm(place) <= WIDOWX_REACH
            return bool(not inside and within_reach and np.linalg.norm(place - plate) >= PLATE_RADIUS + 0.05)

        colours = choose_colours(self.randomize, rng, 2, 3)
        return lay_out(self.randomize, rng, colours, _apart(self.randomize, len(colours), draw, unseen))


BEYOND = 0.01  # metres outside the region of the demonstrations
ALOHA_OUTER = (0.05, 0.25, 0.36, 0.66)  # least and largest distance from the middle plane and y, metres
WIDOWX_OUTER = (0.16, 0.42, -0.29, 0.29)  # least and largest x and y, metres
WIDOWX_REACH = 0.45  # metres from the base, to which the hand can still point straight down


def _apart(
    config: RandomizationConfig, count: int, draw: Callable[[], np.ndarray], allowed: Callable[[np.ndarray], bool]
) -> list[np.ndarray]:
    """``count`` allowed places that keep the least distance; all are drawn again where one finds no room."""
    while True:
        places: list[np.ndarray] = []
        for _ in range(100 * count):
            place = draw()
            if allowed(place) and all(np.linalg.norm(place - other) >= config.min_gap for other in places):
                places.append(place)
                if len(places) == count:
                    return places


def shade(word: str, seed: int) -> tuple[float, float, float]:
    """The RGB (0..1) that an unseen colour has in the scene of ``seed``."""
    hue, saturation, value = UNSEEN_COLOURS[word]
    rng = np.random.default_rng([seed, 22])
    return colorsys.hsv_to_rgb(
        (hue + rng.uniform(-0.012, 0.012)) % 1.0, saturation * rng.uniform(0.92, 1.0), value * rng.uniform(0.92, 1.0)
    )
