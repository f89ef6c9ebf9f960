"""What differs between two episodes of a tabletop world. Every kind of variation can be switched off by itself."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS: tuple[str, ...] = ("red", "green", "blue")
PLAIN_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.85),
}


@dataclass(frozen=True)
class RandomizationConfig:
    """Switches and ranges. Lengths in metres, angles in radians.

    Attributes:
        cubes: number, colours and positions of the cubes vary; off: two cubes (red, green) at fixed places.
        cube_yaw: largest yaw away from the table's axes.
        cube_colour: hue, saturation and brightness are jittered inside what people still call red, green or blue.
        table: colour of the table and of the floor.
        light: direction and strength of the lights.
        camera: pose and field of view of every camera.
        camera_shift: largest camera displacement per axis.
        camera_turn: largest camera rotation per axis.
        camera_fovy: largest relative change of the field of view.
        start_pose: largest deviation of each arm joint from the start pose; 0 switches it off.
        min_gap: least distance between cube centres, so that an open gripper passes between them.
    """

    cubes: bool = True
    cube_yaw: float = 0.35
    cube_colour: bool = True
    table: bool = True
    light: bool = True
    camera: bool = True
    camera_shift: float = 0.012
    camera_turn: float = 0.015
    camera_fovy: float = 0.03
    start_pose: float = 0.03
    min_gap: float = 0.11


NO_RANDOMIZATION = RandomizationConfig(
    cubes=False, cube_yaw=0.0, cube_colour=False, table=False, light=False, camera=False, start_pose=0.0
)


@dataclass(frozen=True)
class CubeLayout:
    """Where one cube starts: colour name, (x, y) in metres, yaw in radians, RGB in 0..1."""

    colour: str
    xy: tuple[float, float]
    yaw: float
    rgb: tuple[float, float, float]


def nameable_rgb(colour: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """A random shade that is still called ``colour``."""
    hue, _, _ = colorsys.rgb_to_hsv(*PLAIN_RGB[colour])
    hue = (hue + rng.uniform(-0.025, 0.025)) % 1.0
    return colorsys.hsv_to_rgb(hue, float(rng.uniform(0.75, 1.0)), float(rng.uniform(0.6, 0.95)))


def sample_cubes(
    config: RandomizationConfig,
    rng: np.random.Generator,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[CubeLayout]:
    """Two or three cubes of different colours, mirrored left and right of x = 0.

    Args:
        config: what may vary.
        rng: the episode's generator.
        x_range: least and largest distance from the middle plane x = 0 in metres. The gap around the middle keeps
            "the nearer arm" unambiguous.
        y_range: least and largest y in metres.
    """
    if not config.cubes:
        middle = 0.5 * (y_range[0] + y_range[1])
        x = 0.5 * (x_range[0] + x_range[1])
        return [
            CubeLayout("red", (-x, middle), 0.0, PLAIN_RGB["red"]),
            CubeLayout("green", (x, middle), 0.0, PLAIN_RGB["green"]),
        ]
    colours = choose_colours(config, rng, 2, 3)
    places: list[np.ndarray] = []
    while len(places) < len(colours):
        place = np.array([rng.uniform(*x_range) * rng.choice([-1.0, 1.0]), rng.uniform(*y_range)])
        if all(np.linalg.norm(place - other) >= config.min_gap for other in places):
            places.append(place)
    return lay_out(config, rng, colours, places)


def choose_colours(config: RandomizationConfig, rng: np.random.Generator, least: int, most: int) -> list[str]:
    """``least`` to ``most`` different colours; the first ``least`` of ``COLOURS`` where cubes do not vary."""
    if not config.cubes:
        return list(COLOURS[:least])
    return [COLOURS[i] for i in rng.permutation(len(COLOURS))][: int(rng.integers(least, most + 1))]


def spread(
    config: RandomizationConfig,
    rng: np.random.Generator,
    count: int,
    area: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float]] = (),
) -> list[np.ndarray]:
    """``count`` places, each (2,) in metres, at least ``config.min_gap`` apart; in a row where cubes do not vary.

    Args:
        config: what may vary.
        rng: the episode's generator.
        count: how many; there must be room for them.
        area: least and largest x, least and largest y.
        taken: (x, y, least distance) of what lies there already.
    """
    if not config.cubes:
        return [np.array([0.5 * (area[0] + area[1]), y]) for y in np.linspace(*area[2:], count + 2)[1:-1]]
    while True:  # an unlucky first place can leave no room for the last: then all are drawn again
        places: list[np.ndarray] = []
        for _ in range(50 * count):
            place = np.array([rng.uniform(*area[:2]), rng.uniform(*area[2:])])
            apart = all(np.linalg.norm(place - other) >= config.min_gap for other in places)
            if apart and all(np.hypot(place[0] - x, place[1] - y) >= gap for x, y, gap in taken):
                places.append(place)
                if len(places) == count:
                    return places


def lay_out(
    config: RandomizationConfig, rng: np.random.Generator, colours: Sequence[str], places: Sequence[np.ndarray]
) -> list[CubeLayout]:
    """A cube of each colour at its place, turned and shaded at random as far as the switches allow."""
    return [
        CubeLayout(
            colour,
            (float(place[0]), float(place[1])),
            float(rng.uniform(-config.cube_yaw, config.cube_yaw)) if config.cube_yaw else 0.0,
            nameable_rgb(colour, rng) if config.cube_colour else PLAIN_RGB[colour],
        )
        for colour, place in zip(colours, places, strict=True)
    ]
