"""The six templates [P] as key poses: where the tool has to be, how it gets there, and what the gripper does meanwhile.

The paper names the templates only; what a template does in detail is our choice [O] and is told by the instruction.
"""

from __future__ import annotations

from math import asin, atan2, ceil, cos, degrees, radians, sin
from typing import NamedTuple

import numpy as np

from qwen_vla_core.data.t2a.robots import Arm
from qwen_vla_core.data.t2a.scenes import POINTING, Spec, Thing

HOVER = 0.10  # metres above a grasp, release or wipe from which the tool goes straight down
FINGER = 0.015  # metres from the tool point to the outside of the closed fingers, for pushing
RUN_UP = 0.03  # metres between fingers and thing before a push
SQUEEZE = 0.005  # metres by which a grip is commanded narrower than the thing
SPONGE = 0.03  # height of the tool point while wiping
MOUTH = 0.06  # metres from the tool point up to the mouth of a held cup
RELEASE = 0.06  # metres above a vessel at which a thing is let go
CUP_PITCH = 45  # degrees below the horizontal at which the fingers hold an upright cup
POUR_S = 0.4  # seconds for which a cup stays tilted


class Key(NamedTuple):
    """The end of one motion.

    Attributes:
        position: (3,) tool point, metres.
        rotation: (3, 3) tool axes as columns.
        gripper: opening fraction at the end.
        straight: whether the tool moves on a straight line (turning evenly), not freely in joint space.
        pause: shortest duration, seconds.
        label: what the motion is.
    """

    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    straight: bool
    pause: float
    label: str


class Start(NamedTuple):
    """Where a trajectory begins: None for the arm's home pose, or a tool pose; and the opening fraction."""

    pose: tuple[np.ndarray, np.ndarray] | None
    gripper: float


def down(yaw_deg: float) -> np.ndarray:
    """(3, 3) fingers pointing at the table, closing across a direction that is turned by ``yaw_deg`` from x."""
    c, s = cos(radians(yaw_deg)), sin(radians(yaw_deg))
    return np.array([[0.0, -s, c], [0.0, c, s], [-1.0, 0.0, 0.0]])


def facing(heading: float, pitch_deg: float = 0.0) -> np.ndarray:
    """(3, 3) fingers pointing along ``heading`` (radians) and ``pitch_deg`` below the horizontal, closing sideways."""
    ch, sh, cp, sp = cos(heading), sin(heading), cos(radians(pitch_deg)), sin(radians(pitch_deg))
    return np.array([[cp * ch, -sh, sp * ch], [cp * sh, ch, sp * sh], [-sp, 0.0, cp]])


def tilted(heading: float, tilt_deg: float) -> np.ndarray:
    """(3, 3) the orientation that holds a cup, tipped about the horizontal heading: positive to the left."""
    axis, angle = np.array([cos(heading), sin(heading), 0.0]), -radians(tilt_deg)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn = np.eye(3) + sin(angle) * cross + (1 - cos(angle)) * cross @ cross
    return turn @ facing(heading, CUP_PITCH)


def grip(arm: Arm, thing: Thing) -> float:
    """Opening fraction that holds a thing."""
    return arm.opening(thing.width - SQUEEZE)


def keys(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    """Start and key poses of a task."""
    return _KEYS[spec.template](spec, arm)


def push_way(spec: Spec) -> tuple[np.ndarray, float]:
    """(2,) unit direction of a push, and the distance from the thing's middle to the tool point in contact."""
    assert spec.thing is not None
    way = np.array([spec.goal[0] - spec.thing.x, spec.goal[1] - spec.thing.y])
    return way / np.linalg.norm(way), 0.5 * spec.thing.width + FINGER


def pour_point(spec: Spec) -> tuple[np.ndarray, float]:
    """(3,) tool point, and heading, at which the tilted cup's mouth is over the middle of the vessel.

    The fingers point away from the base through the tool point, and the mouth swings out at right angles to them.
    """
    x, y, z = spec.goal
    swing = MOUTH * sin(radians(spec.amount))  # metres to the left of the tool point
    distance = float(np.hypot(x, y))
    heading = atan2(y, x) - asin(swing / distance)
    forward = np.sqrt(distance**2 - swing**2)
    return np.array([forward * cos(heading), forward * sin(heading), z]), heading


def wipe_corners(spec: Spec) -> np.ndarray:
    """(2 * strokes, 2) ends of the strokes in order, starting at the corner with the smallest x and y."""
    strokes = round(spec.amount)
    a, b = (0, 1) if spec.along == "x" else (1, 0)
    corners = np.zeros((strokes, 2, 2))
    for i in range(strokes):
        across = -0.5 * spec.extent[b] + spec.extent[b] * i / max(strokes - 1, 1)
        ends = np.array([-0.5, 0.5] if i % 2 == 0 else [0.5, -0.5]) * spec.extent[a]
        corners[i, :, a], corners[i, :, b] = ends, across
    return corners.reshape(-1, 2) + np.array(spec.goal[:2])


def _at(*xyz: float) -> np.ndarray:
    return np.array(xyz, dtype=np.float64)


def _reach(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    x, y, z = spec.goal
    turn = down(0) if spec.pointing == "down" else facing(atan2(y, x), POINTING[spec.pointing])
    return Start(None, 1.0), [Key(_at(x, y, z), turn, 1.0, False, 0.0, "reach")]


def _pick(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    thing = spec.thing
    assert thing is not None
    turn, low, held = down(thing.yaw), 0.5 * thing.height, grip(arm, thing)
    at = _at(thing.x, thing.y, low)
    up = np.array([0.0, 0.0, 1.0])
    return Start(None, 1.0), [
        Key(at + HOVER * up, turn, 1.0, False, 0.0, "approach"),
        Key(at, turn, 1.0, True, 0.0, "descend"),
        Key(at, turn, held, True, 0.3, "grasp"),
        Key(at + spec.amount * up, turn, held, True, 0.0, "lift"),
    ]


def _place(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    thing = spec.thing
    assert thing is not None
    vessel = spec.others[0].height + RELEASE if spec.into else 0.0
    turn, held = down(thing.yaw), grip(arm, thing)
    at = _at(spec.goal[0], spec.goal[1], vessel + 0.5 * thing.height)
    up = np.array([0.0, 0.0, HOVER])
    return Start(None, held), [
        Key(at + up, turn, held, False, 0.0, "carry"),
        Key(at, turn, held, True, 0.0, "lower"),
        Key(at, turn, 1.0, True, 0.3, "release"),
        Key(at + up, turn, 1.0, True, 0.0, "retreat"),
    ]


def _push(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    thing = spec.thing
    assert thing is not None
    way, contact = push_way(spec)
    yaw = degrees(atan2(way[1], way[0]))
    yaw = (yaw + 90) % 180 - 90  # the fingers are the same both ways round
    turn, z = down(yaw), min(0.5 * thing.height, 0.04)
    begin = np.array([thing.x, thing.y]) - (contact + RUN_UP) * way
    end = np.array(spec.goal[:2]) - contact * way
    off = end - RUN_UP * way
    high = z + thing.height + 0.06
    return Start(None, 1.0), [
        Key(_at(*begin, high), turn, 0.0, False, 0.0, "approach"),
        Key(_at(*begin, z), turn, 0.0, True, 0.0, "descend"),
        Key(_at(*end, z), turn, 0.0, True, 0.0, "push"),
        Key(_at(*off, z), turn, 0.0, True, 0.0, "back off"),
        Key(_at(*off, high), turn, 0.0, True, 0.0, "retreat"),
    ]


def pour_start(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Tool pose in which every arm holds a cup upright in front of itself."""
    return _at(0.7 * arm.reach[1], 0.0, 0.4 * arm.reach[1]), tilted(0.0, 0.0)


def _pour(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    assert spec.thing is not None
    held, (at, heading) = grip(arm, spec.thing), pour_point(spec)
    upright, tipped = tilted(heading, 0.0), tilted(heading, spec.amount)
    return Start(pour_start(arm), held), [
        Key(at, upright, held, True, 0.0, "carry"),
        Key(at, tipped, held, True, 0.0, "tilt"),
        Key(at, tipped, held, True, POUR_S, "pour"),
        Key(at, upright, held, True, 0.0, "upright"),
    ]


def _wipe(spec: Spec, arm: Arm) -> tuple[Start, list[Key]]:
    assert spec.thing is not None
    corners, turn, held = wipe_corners(spec), down(0 if spec.along == "y" else 90), grip(arm, spec.thing)
    path = [Key(_at(*corners[0], SPONGE + HOVER), turn, held, False, 0.0, "approach")]
    path.append(Key(_at(*corners[0], SPONGE), turn, held, True, 0.0, "descend"))
    for i, corner in enumerate(corners[1:]):
        path.append(
            Key(_at(*corner, SPONGE), turn, held, True, 0.0, f"stroke {ceil((i + 1) / 2)}" if i % 2 == 0 else "shift")
        )
    path.append(Key(_at(*corners[-1], SPONGE + HOVER), turn, held, True, 0.0, "retreat"))
    return Start(None, held), path


_KEYS = {"reach": _reach, "pick": _pick, "place": _place, "push": _push, "pour": _pour, "wipe": _wipe}
