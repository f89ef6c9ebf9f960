"""Does a trajectory do what its text says? Judged from the written numbers and forward kinematics alone.

Nothing here looks at what the planner meant: the same function judges an episode that was read back from disk. An
episode is good when the list of faults is empty.
"""

from __future__ import annotations

from math import cos, radians, sin
from typing import NamedTuple

import numpy as np

from qwen_vla_core.data.t2a.kinematics import forward
from qwen_vla_core.data.t2a.planner import HORIZON, RATE_HZ
from qwen_vla_core.data.t2a.robots import GRIPPER_ACCELERATION, GRIPPER_SPEED, Arm
from qwen_vla_core.data.t2a.scenes import POINTING, Spec
from qwen_vla_core.data.t2a.templates import (
    CUP_PITCH,
    MOUTH,
    RELEASE,
    SPONGE,
    facing,
    grip,
    pour_start,
    push_way,
    wipe_corners,
)

PLACE_TOLERANCE = 0.002  # metres
ANGLE_TOLERANCE = radians(1.0)
CLEARANCE = 0.005  # metres that the tool point stays above the table
JOINT_CLEARANCE = 0.02  # metres that the joints' middles stay above the table
_ROUNDING = 1e-3  # share by which float32 and finite differences may exceed a limit


class Path(NamedTuple):
    """An episode as the checks see it; T + 1 moments, the start included.

    Attributes:
        q: (T + 1, n) joint angles.
        gripper: (T + 1,) opening fractions.
        position: (T + 1, 3) tool points.
        rotation: (T + 1, 3, 3) tool orientations.
        lowest: smallest height of any joint.
    """

    q: np.ndarray
    gripper: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    lowest: float


def check(arm: Arm, spec: Spec, state: np.ndarray, action: np.ndarray) -> list[str]:
    """Faults of an episode; empty when there are none.

    Args:
        arm: the robot.
        spec: what the instruction says.
        state: (T, n + 1) joint angles and opening before each step.
        action: (T, n + 1) what is commanded at each step.
    """
    if not (np.isfinite(state).all() and np.isfinite(action).all()):
        return ["a value is not finite"]
    if state.shape != action.shape or state.shape[1] != arm.dof + 1 or not 1 <= len(action) <= HORIZON:
        return [f"shapes {state.shape} and {action.shape} are not those of this robot's episode"]
    if not np.array_equal(state[1:], action[:-1]):
        return ["the state does not follow the actions"]
    rows = np.concatenate([state[:1], action]).astype(np.float64)
    chain = forward(arm, rows[:, :-1])
    path = Path(rows[:, :-1], rows[:, -1], chain.position, chain.rotation, float(chain.joints[:, 1:, 2].min()))
    return [*_limits(arm, path), *_ends(arm, spec, path), *_CHECKS[spec.template](arm, spec, path)]


def _limits(arm: Arm, path: Path) -> list[str]:
    """Position, speed and acceleration of every channel, and the table."""
    low, high, velocity, acceleration = arm.limits
    faults = []
    rows = np.column_stack([path.q, path.gripper])
    low, high = np.append(low, 0.0), np.append(high, 1.0)
    velocity, acceleration = np.append(velocity, GRIPPER_SPEED), np.append(acceleration, GRIPPER_ACCELERATION)
    still = np.concatenate([rows[:1], rows, rows[-1:]])  # at rest before and after
    speed = np.diff(still, axis=0) * RATE_HZ
    force = np.diff(speed, axis=0) * RATE_HZ
    slack = 4e-7 * np.abs(rows).max(axis=0) * RATE_HZ  # float32 rounding seen through one difference
    for name, bad in (
        ("position", ((rows < low - 1e-6) | (rows > high + 1e-6)).any(axis=0)),
        ("speed", (np.abs(speed) > velocity * (1 + _ROUNDING) + slack).any(axis=0)),
        ("acceleration", (np.abs(force) > acceleration * (1 + _ROUNDING) + 2 * slack * RATE_HZ).any(axis=0)),
    ):
        if bad.any():
            faults.append(f"{name} limit of {', '.join(np.array(arm.channels)[bad])}")
    if path.position[:, 2].min() < CLEARANCE:
        faults.append(f"the fingers come to {path.position[:, 2].min():.3f} m above the table")
    if path.lowest < JOINT_CLEARANCE:
        faults.append(f"a joint comes to {path.lowest:.3f} m above the table")
    return faults


def _ends(arm: Arm, spec: Spec, path: Path) -> list[str]:
    """Starts where every trajectory of the template starts."""
    if spec.template != "pour":
        same = np.abs(path.q[0] - np.array(arm.home)).max() < 1e-5
    else:
        position, rotation = pour_start(arm)
        same = (
            np.linalg.norm(path.position[0] - position) < PLACE_TOLERANCE and _angle(path.rotation[:1], rotation) < 0.01
        )
    return [] if same else ["does not begin at the start pose"]


def _angle(rotation: np.ndarray, wanted: np.ndarray) -> float:
    """Largest angle in radians between orientations (m, 3, 3) and ``wanted`` (3, 3)."""
    cosine = (np.einsum("mij,ij->m", rotation, wanted) - 1) / 2
    return float(np.arccos(np.clip(cosine, -1, 1)).max())


def _leans(path: Path, where: np.ndarray) -> float:
    """Largest angle between the fingers and straight down at some moments."""
    return float(np.arccos(np.clip(-path.rotation[where, 2, 0], -1, 1)).max())


def _near(path: Path, point: tuple[float, float, float] | np.ndarray) -> np.ndarray:
    """(T + 1,) whether the tool point is at a place."""
    return np.linalg.norm(path.position - np.asarray(point), axis=1) < PLACE_TOLERANCE


def _reach(arm: Arm, spec: Spec, path: Path) -> list[str]:
    faults = [] if _near(path, spec.goal)[-1] else ["does not end at the point"]
    pitch = POINTING[spec.pointing]
    heading = np.arctan2(spec.goal[1], spec.goal[0])
    fingers = facing(heading, pitch)[:, 0]
    if np.arccos(np.clip(path.rotation[-1, :, 0] @ fingers, -1, 1)) > ANGLE_TOLERANCE:
        faults.append(f"the fingers do not point {spec.pointing}")
    if (path.gripper < 1 - 1e-6).any():
        faults.append("the gripper moves")
    return faults


def _pick(arm: Arm, spec: Spec, path: Path) -> list[str]:
    thing = spec.thing
    assert thing is not None
    at = np.array([thing.x, thing.y, 0.5 * thing.height])
    held, faults = grip(arm, thing), []
    closing = np.flatnonzero(np.abs(np.diff(path.gripper)) > 1e-7)
    if path.gripper[0] < 1 - 1e-6 or abs(path.gripper[-1] - held) > 1e-3 or not len(closing):
        return ["the gripper does not close on the thing"]
    moments = np.arange(closing[0], closing[-1] + 2)
    if not _near(path, at)[moments].all():
        faults.append("closes elsewhere")
    if _leans(path, moments) > ANGLE_TOLERANCE:
        faults.append("does not grasp from above")
    across = np.abs(path.rotation[moments[0], :2, 1] @ [-sin(radians(thing.yaw)), cos(radians(thing.yaw))])
    if across < cos(ANGLE_TOLERANCE):
        faults.append("the fingers are not aligned with the thing")
    if not _near(path, at + np.array([0, 0, spec.amount]))[-1]:
        faults.append("does not lift it as far as said")
    return faults


def _place(arm: Arm, spec: Spec, path: Path) -> list[str]:
    thing = spec.thing
    assert thing is not None
    held, faults = grip(arm, thing), []
    at = np.array([*spec.goal[:2], 0.5 * thing.height + (spec.others[0].height + RELEASE if spec.into else 0.0)])
    opening = np.flatnonzero(np.abs(np.diff(path.gripper)) > 1e-7)
    if abs(path.gripper[0] - held) > 1e-3 or path.gripper[-1] < 1 - 1e-6 or not len(opening):
        return ["the gripper does not hold and then let go"]
    moments = np.arange(opening[0], opening[-1] + 2)
    if not _near(path, at)[moments].all():
        faults.append("lets go elsewhere")
    if path.position[-1, 2] < at[2] + 0.05 or np.linalg.norm(path.position[-1, :2] - at[:2]) > PLACE_TOLERANCE:
        faults.append("does not retreat upwards")
    across = np.abs(path.rotation[moments[0], :2, 1] @ [-sin(radians(thing.yaw)), cos(radians(thing.yaw))])
    if _leans(path, moments) > ANGLE_TOLERANCE or across < cos(ANGLE_TOLERANCE):
        faults.append("does not set it down as said")
    return faults


def _push(arm: Arm, spec: Spec, path: Path) -> list[str]:
    thing = spec.thing
    assert thing is not None
    way, contact = push_way(spec)
    start, faults = np.array([thing.x, thing.y]), []
    far = float(np.linalg.norm(np.array(spec.goal[:2]) - start))
    ahead = (path.position[:, :2] - start) @ way  # metres along the push, from the thing's first place
    aside = (path.position[:, :2] - start) @ np.array([-way[1], way[0]])
    low = path.position[:, 2] < thing.height
    touching = low & (ahead > -contact - PLACE_TOLERANCE) & (np.abs(aside) < 0.5 * thing.width + 0.02)
    if abs(ahead[touching].max(initial=-np.inf) - (far - contact)) > PLACE_TOLERANCE:
        return ["does not push as far as said"]
    pushing = np.arange(np.flatnonzero(touching)[0], int(np.argmax(np.where(touching, ahead, -np.inf))) + 1)
    if not touching[pushing].all() or (np.diff(ahead[pushing]) < -1e-6).any():
        faults.append("loses contact")
    if np.ptp(path.position[pushing, 2]) > PLACE_TOLERANCE:
        faults.append("does not keep its height in contact")
    if np.abs(aside[pushing]).max() > PLACE_TOLERANCE:
        faults.append("leaves the line of the push")
    if path.gripper[pushing].max() > 1e-3:
        faults.append("pushes with an open gripper")
    if _leans(path, pushing) > ANGLE_TOLERANCE:
        faults.append("does not push with upright fingers")
    return faults


def _pour(arm: Arm, spec: Spec, path: Path) -> list[str]:
    assert spec.thing is not None
    faults = []
    pitch = radians(CUP_PITCH)
    axis = path.rotation @ np.array(
        [-sin(pitch), 0.0, cos(pitch)]
    )  # (T + 1, 3) from the bottom to the mouth of the cup
    lean = np.arccos(np.clip(axis[:, 2], -1, 1))
    mouth = path.position + MOUTH * axis
    full = np.abs(lean - radians(abs(spec.amount))) < ANGLE_TOLERANCE
    if not full.any() or lean.max() > radians(abs(spec.amount)) + ANGLE_TOLERANCE:
        return ["is not tilted as said"]
    over = np.linalg.norm(mouth[:, :2] - np.array(spec.goal[:2]), axis=1) < 2 * PLACE_TOLERANCE
    if not over[full].all():
        faults.append("the mouth is not over the vessel")
    if full.sum() < 0.3 * RATE_HZ:
        faults.append("does not stay tilted")
    here = np.linalg.norm(path.position[:, :2] - path.position[full][0, :2], axis=1) < PLACE_TOLERANCE
    if (lean[~here] > ANGLE_TOLERANCE).any():
        faults.append("spills on the way")
    if lean[-1] > ANGLE_TOLERANCE:
        faults.append("does not end upright")
    if np.abs(path.position[full, 2] - spec.goal[2]).max() > PLACE_TOLERANCE:
        faults.append("is not at the height said")
    left = np.array([-path.position[-1, 1], path.position[-1, 0]])  # of somebody who looks outwards from the base
    if np.sign(axis[full][0, :2] @ left) != np.sign(spec.amount):
        faults.append("is tilted to the other side")
    if np.abs(path.gripper - grip(arm, spec.thing)).max() > 1e-3:
        faults.append("lets go of the cup")
    return faults


def _wipe(arm: Arm, spec: Spec, path: Path) -> list[str]:
    assert spec.thing is not None
    faults = []
    corners = wipe_corners(spec)
    down = np.abs(path.position[:, 2] - SPONGE) < PLACE_TOLERANCE
    if not down.any():
        return ["never touches the table"]
    contact = np.arange(np.flatnonzero(down)[0], np.flatnonzero(down)[-1] + 1)
    if not down[contact].all():
        faults.append("leaves the plane while wiping")
    if _leans(path, contact) > ANGLE_TOLERANCE:
        faults.append("tips the sponge")
    swept, at = path.position[contact, :2], 0
    for corner in corners:  # in this order
        hits = np.flatnonzero(np.linalg.norm(swept[at:] - corner, axis=1) < PLACE_TOLERANCE)
        if not len(hits):
            faults.append("misses a corner of the area")
            break
        at += int(hits[0])
    low, high = corners.min(axis=0) - PLACE_TOLERANCE, corners.max(axis=0) + PLACE_TOLERANCE
    if (swept < low).any() or (swept > high).any():
        faults.append("wipes outside the area")
    along = swept[:, 0 if spec.along == "x" else 1]
    moves = np.diff(along)
    way = np.sign(moves[np.abs(moves) > 1e-4])
    if 1 + int((np.diff(way) != 0).sum()) != round(spec.amount):
        faults.append("does not make the number of strokes said")
    if np.abs(path.gripper - grip(arm, spec.thing)).max() > 1e-3:
        faults.append("lets go of the sponge")
    return faults


_CHECKS = {"reach": _reach, "pick": _pick, "place": _place, "push": _push, "pour": _pour, "wipe": _wipe}
