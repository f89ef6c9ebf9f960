"""What is asked for, as numbers: drawn here, told by ``language``, planned by ``planner``, judged by ``checks``.

Places lie on a centimetre grid and angles on a 15 degree grid, so that the text holds them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import cos, radians, sin
from typing import Any, Literal

import numpy as np

from qwen_vla_core.data.t2a.robots import Arm

Template = Literal["reach", "pick", "place", "push", "pour", "wipe"]
TEMPLATES: tuple[Template, ...] = ("reach", "pick", "place", "push", "pour", "wipe")  # [P]
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
# kind → height in metres; None: as high as wide
GRASPABLE: dict[str, float | None] = {"cube": None, "block": None, "ball": None, "can": 0.10, "bottle": 0.14}
TURNED = frozenset({"cube", "block"})  # kinds whose yaw can be seen
VESSELS: dict[str, float] = {"bowl": 0.06, "box": 0.08, "tray": 0.03}  # heights in metres
SPEEDS: dict[str, float] = {"slowly": 0.4, "": 0.65, "quickly": 0.95}  # share of the joint limits [O]
POINTING: dict[str, int] = {"down": 90, "forward and down": 45, "forward": 0}  # degrees below the horizontal
MIN_APART = 0.12  # metres between the middles of things on the table


@dataclass(frozen=True)
class Thing:
    """An object: kind, colour, middle of its footprint (x, y in metres), width in metres, yaw in degrees."""

    kind: str
    colour: str
    x: float
    y: float
    width: float
    yaw: int = 0

    @property
    def height(self) -> float:
        """Metres; a cube, block or ball is as high as wide."""
        return VESSELS.get(self.kind) or GRASPABLE.get(self.kind) or self.width


@dataclass(frozen=True)
class Spec:
    """One task. Metres, degrees; the table is z = 0, x points away from the robot and y to its left.

    Attributes:
        template: which of the six.
        speed: key of ``SPEEDS``; an adverb or nothing.
        thing: what is acted on: for reach what is hovered over (or None), for wipe and pour what is held.
        goal: reach: the tool point. pick: unused. place, push: where the thing ends (z 0). pour: over which vessel, and
            how high the gripper is. wipe: the middle of the wiped rectangle.
        others: further things on the table; for place and pour the first may be the vessel.
        into: whether the goal is the first of ``others``.
        pointing: reach only: the way the fingers point, key of ``POINTING``.
        amount: pick: metres of lift. pour: tilt in degrees, positive to the robot's left. wipe: number of strokes.
        extent: wipe: size of the rectangle along x and y.
        along: wipe: the axis of the strokes.
    """

    template: Template
    speed: str
    thing: Thing | None
    goal: tuple[float, float, float]
    others: tuple[Thing, ...] = ()
    into: bool = False
    pointing: str = "down"
    amount: float = 0.0
    extent: tuple[float, float] = (0.0, 0.0)
    along: str = "x"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; undone by ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spec:
        """Restores what ``to_json`` gave, also after a journey through JSON."""
        return cls(
            **{
                **value,
                "thing": None if value["thing"] is None else Thing(**value["thing"]),
                "goal": tuple(value["goal"]),
                "others": tuple(Thing(**thing) for thing in value["others"]),
                "extent": tuple(value["extent"]),
            }
        )


def draw(template: Template, arm: Arm, rng: np.random.Generator) -> Spec:
    """A random task. Not every one can be done: what cannot is found while planning and drawn again."""
    speed = str(rng.choice(list(SPEEDS)))
    colours = [str(colour) for colour in rng.permutation(COLOURS)]
    return _DRAW[template](arm, rng, speed, colours)


def _cm(value: float) -> float:
    """Rounded to the centimetre, never -0."""
    return round(float(value), 2) + 0.0


def _spot(arm: Arm, rng: np.random.Generator, nearest: float = 0.0) -> tuple[float, float]:
    """(x, y) in front of the arm: not nearer than ``nearest`` metres, up to 65 degrees to each side."""
    near, far = arm.reach
    distance, azimuth = rng.uniform(max(near, nearest), far), radians(rng.uniform(-65, 65))
    return _cm(distance * cos(azimuth)), _cm(distance * sin(azimuth))


def _thing(arm: Arm, rng: np.random.Generator, colour: str, spot: tuple[float, float] | None = None) -> Thing:
    """Something the gripper can close on, at ``spot`` or anywhere in front."""
    low, high = arm.gap
    widths = [w / 100 for w in range(3, 9) if low + 0.005 <= w / 100 <= high - 0.015]
    kind = str(rng.choice(list(GRASPABLE)))
    yaw = 15 * int(rng.integers(-3, 4)) if kind in TURNED else 0
    x, y = spot or _spot(arm, rng)
    return Thing(kind, colour, x, y, float(rng.choice(widths)), yaw)


def _apart(spots: list[tuple[float, float]]) -> bool:
    return all(
        np.hypot(a[0] - b[0], a[1] - b[1]) >= MIN_APART for i, a in enumerate(spots) for b in spots[:i] if a != b
    )


def _others(
    arm: Arm, rng: np.random.Generator, colours: list[str], taken: list[tuple[float, float]]
) -> tuple[Thing, ...]:
    """None to two bystanders, away from what is used; they only have to be told apart from it in the text."""
    found: list[Thing] = []
    for colour in colours[: int(rng.choice(3, p=[0.5, 0.3, 0.2]))]:
        for _ in range(20):
            thing = _thing(arm, rng, colour)
            spots = [*taken, *((other.x, other.y) for other in found), (thing.x, thing.y)]
            if (thing.x, thing.y) not in spots[:-1] and _apart(spots):
                found.append(thing)
                break
    return tuple(found)


def _reach(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    x, y = _spot(arm, rng)
    if rng.random() < 0.4:  # over a thing
        thing = _thing(arm, rng, colours[0], (x, y))
        goal = (x, y, _cm(thing.height + 0.01 * int(rng.integers(5, 16))))
        return Spec("reach", speed, thing, goal, _others(arm, rng, colours[1:], [(x, y)]))
    goal = (x, y, _cm(rng.uniform(0.05, 0.75 * arm.reach[1])))
    return Spec("reach", speed, None, goal, pointing=str(rng.choice(list(POINTING))))


def _pick(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    thing = _thing(arm, rng, colours[0])
    lift = 0.01 * int(rng.integers(8, 21))
    return Spec(
        "pick",
        speed,
        thing,
        (thing.x, thing.y, 0.0),
        _others(arm, rng, colours[1:], [(thing.x, thing.y)]),
        amount=_cm(lift),
    )


def _place(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    thing, (x, y) = _thing(arm, rng, colours[0], (0.0, 0.0)), _spot(arm, rng)
    if rng.random() < 0.5:
        vessel = Thing(str(rng.choice(list(VESSELS))), colours[1], x, y, 0.16)
        others = (vessel, *_others(arm, rng, colours[2:], [(x, y)]))
        return Spec("place", speed, _unturned(thing), (x, y, 0.0), others, into=True)
    return Spec("place", speed, thing, (x, y, 0.0), _others(arm, rng, colours[1:], [(x, y)]))


def _unturned(thing: Thing) -> Thing:
    return Thing(thing.kind, thing.colour, thing.x, thing.y, thing.width)


def _push(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    thing = _unturned(_thing(arm, rng, colours[0]))
    way, distance = radians(15 * int(rng.integers(-12, 12))), 0.01 * int(rng.integers(6, 19))
    goal = (_cm(thing.x + distance * cos(way)), _cm(thing.y + distance * sin(way)), 0.0)
    return Spec("push", speed, thing, goal, _others(arm, rng, colours[1:], [(thing.x, thing.y), goal[:2]]))


def _pour(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    x, y = _spot(arm, rng, 0.5 * arm.reach[1])
    vessel = Thing(str(rng.choice(["bowl", "box"])), colours[1], x, y, 0.16)
    cup = Thing("cup", colours[0], 0.0, 0.0, _thing(arm, rng, colours[0]).width)
    tilt = 15 * int(rng.integers(4, 8)) * (1 if rng.random() < 0.5 else -1)
    height = _cm(rng.uniform(vessel.height + 0.12, 0.6 * arm.reach[1]))
    others = (vessel, *_others(arm, rng, colours[2:], [(x, y)]))
    return Spec("pour", speed, cup, (x, y, height), others, into=True, amount=float(tilt))


def _wipe(arm: Arm, rng: np.random.Generator, speed: str, colours: list[str]) -> Spec:
    x, y = _spot(arm, rng)
    sponge = Thing("sponge", colours[0], 0.0, 0.0, _thing(arm, rng, colours[0]).width)
    along = str(rng.choice(["x", "y"]))
    strokes, long = int(rng.integers(2, 5)), 0.02 * int(rng.integers(5, 11))
    wide = 0.04 * (strokes - 1)
    extent = (_cm(long), _cm(wide)) if along == "x" else (_cm(wide), _cm(long))
    return Spec("wipe", speed, sponge, (x, y, 0.0), amount=float(strokes), extent=extent, along=along)


_DRAW = {"reach": _reach, "pick": _pick, "place": _place, "push": _push, "pour": _pour, "wipe": _wipe}
