"""Key poses → joint trajectories that respect every limit, many tasks at once.

A motion is a polynomial path in joint space (through Chebyshev points; a straight tool path has its inner points solved
by inverse kinematics, a free one is a straight joint line), run through from rest to rest by one smooth time law. Speed
and acceleration then scale as 1/T and 1/T², so the shortest duration that respects the limits is known in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from qwen_vla_core.data.t2a.kinematics import rotation_vector, solve
from qwen_vla_core.data.t2a.robots import AXES, GRIPPER_ACCELERATION, GRIPPER_SPEED, Arm
from qwen_vla_core.data.t2a.scenes import SPEEDS, Spec
from qwen_vla_core.data.t2a.templates import Key, keys

RATE_HZ = 50.0  # [P]
HORIZON = 400  # longest trajectory in steps [O]; longer ones are drawn again
NODES = 9  # Chebyshev points of a path
_GRID = 65  # points of the time law at which limits are looked at
_MARGIN = 1.01  # for peaks between these points
_SHORTEST_S = 0.1
TIP_SPEED = 0.7  # m/s at full share; straight motions only [O]
TURN_SPEED = 4.0  # rad/s at full share; straight motions only [O]
_MAX_JUMP = 0.9  # radians between neighbouring points of a straight path: beyond is another posture


class Trajectory(NamedTuple):
    """A planned motion at 50 Hz.

    Attributes:
        q: (T + 1, n) joint angles, radians; row 0 is the start.
        gripper: (T + 1,) opening fractions.
        phases: (label, first step, step after the last), together all of 0 … T.
    """

    q: np.ndarray
    gripper: np.ndarray
    phases: tuple[tuple[str, int, int], ...]


_RAMP = 0.3  # share of a motion that speeds up, and that slows down
PEAK_SPEED = 1 / (1 - _RAMP)
PEAK_ACCELERATION = 1.5 * PEAK_SPEED / _RAMP


def time_law(tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rest to rest on 0…1: a trapezoid of speed whose ramps are smooth. Value, first and second derivative."""
    u = np.clip(np.minimum(tau, 1 - tau) / _RAMP, 0, 1)  # 0 at either end, 1 from the end of the ramp on
    risen = PEAK_SPEED * (_RAMP * (u**3 - 0.5 * u**4) + np.maximum(np.minimum(tau, 1 - tau) - _RAMP, 0))
    late = tau > 0.5
    first = PEAK_SPEED * u**2 * (3 - 2 * u)
    second = PEAK_SPEED / _RAMP * 6 * u * (1 - u)
    return np.where(late, 1 - risen, risen), first, np.where(late, -second, second)


_POINTS = 0.5 - 0.5 * np.cos(np.pi * np.arange(NODES) / (NODES - 1))  # path parameter of the nodes, 0…1
_TO_COEFFICIENTS = np.linalg.inv(chebyshev.chebvander(2 * _POINTS - 1, NODES - 1))


def _evaluate(s: np.ndarray, derivative: int = 0) -> np.ndarray:
    """(len(s), NODES) matrix from node values to values (or derivatives by s) at path parameters ``s``."""
    coefficients = _TO_COEFFICIENTS
    if derivative:
        coefficients = chebyshev.chebder(coefficients, derivative, scl=2, axis=0)
    return chebyshev.chebvander(2 * s - 1, len(coefficients) - 1) @ coefficients


def _limit_matrices() -> tuple[np.ndarray, np.ndarray]:
    """(_GRID, NODES) each: node values → T · speed and T² · acceleration along the time law."""
    value, first, second = time_law(np.linspace(0, 1, _GRID))
    slope, bend = _evaluate(value, 1), _evaluate(value, 2)
    return first[:, None] * slope, (first**2)[:, None] * bend + second[:, None] * slope


_SPEED, _ACCELERATION = _limit_matrices()


@lru_cache(maxsize=1024)
def _samples(steps: int) -> np.ndarray:
    """(steps, NODES) node values → values at steps 1 … ``steps`` of a motion."""
    return _evaluate(time_law(np.arange(1, steps + 1) / steps)[0])


class _Motion(NamedTuple):
    """One motion of one task: its key, the pose and opening before it, and its path as (NODES, n) joint angles."""

    task: int
    key: Key
    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    nodes: np.ndarray


def plan(arm: Arm, specs: Sequence[Spec]) -> list[Trajectory | str]:
    """Plans every task; a string is the reason why one cannot be done.

    The answer for a task depends on the task alone (up to the last bit of the floating-point arithmetic, which may
    depend on the size of the batch).
    """
    reasons: dict[int, str] = {}
    motions = [motion for motion in _motions(arm, specs, reasons) if motion.task not in reasons]
    members: list[list[tuple[_Motion, int]]] = [[] for _ in specs]
    for motion, steps in zip(motions, _durations(arm, specs, motions), strict=True):
        members[motion.task].append((motion, int(steps)))
    return [reasons.get(task) or _sampled(members[task]) for task in range(len(specs))]


def _motions(arm: Arm, specs: Sequence[Spec], reasons: dict[int, str]) -> list[_Motion]:
    """Paths of all motions: key by key, each from where the one before ended, all tasks at once."""
    planned = [keys(spec, arm) for spec in specs]
    home = np.array(arm.home)
    q = np.tile(home, (len(specs), 1))
    grippers = [start.gripper for start, _ in planned]
    poses = [start.pose or (home, home) for start, _ in planned]  # a home pose is never used: a free motion follows it
    elsewhere = [i for i, (start, _) in enumerate(planned) if start.pose is not None]
    if elsewhere:  # one start pose per arm: the same answer for all
        position, rotation = poses[elsewhere[0]]
        start = solve(arm, position[None], rotation[None], home[None], rest=home, iterations=200)
        q[elsewhere] = start.q[0]
        if not start.ok[0]:
            reasons.update(dict.fromkeys(elsewhere, "start pose out of reach"))
    motions: list[_Motion] = []
    for k in range(max(len(path) for _, path in planned)):
        for way in (_free, _straight):
            tasks = [
                i
                for i, (_, path) in enumerate(planned)
                if k < len(path) and i not in reasons and path[k].straight is (way is _straight)
            ]
            if not tasks:
                continue
            wanted = [planned[i][1][k] for i in tasks]
            paths, good = way(arm, [poses[i] for i in tasks], wanted, q[tasks])
            for row, i in enumerate(tasks):
                if not good[row]:
                    reasons[i] = f"{wanted[row].label}: out of reach"
                    continue
                motions.append(_Motion(i, wanted[row], *poses[i], grippers[i], paths[row]))
                q[i], grippers[i] = paths[row, -1], wanted[row].gripper
                poses[i] = wanted[row].position, wanted[row].rotation
    return motions


_Poses = Sequence[tuple[np.ndarray, np.ndarray]]


def _free(arm: Arm, before: _Poses, wanted: Sequence[Key], q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight lines in joint space from home to a key pose: paths (m, NODES, n), and which can be done (m,)."""
    home = np.array(arm.home)
    position = np.stack([key.position for key in wanted])
    seed = np.tile(home, (len(wanted), 1))
    seed[:, 0] += AXES[arm.joints[0].axis][1] * np.arctan2(position[:, 1], position[:, 0])
    answer = solve(arm, position, np.stack([key.rotation for key in wanted]), seed, rest=seed)
    return q[:, None] + _POINTS[:, None] * (answer.q - q)[:, None], answer.ok


def _straight(arm: Arm, before: _Poses, wanted: Sequence[Key], q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight lines of the tool, followed point by point, each solved from the one before: the smallest joint motion.

    Returns:
        paths (m, NODES, n), and which can be done without a jump to another posture (m,).
    """
    p0, r0 = np.stack([position for position, _ in before]), np.stack([rotation for _, rotation in before])
    p1 = np.stack([key.position for key in wanted])
    turn = rotation_vector(r0, np.stack([key.rotation for key in wanted]))
    path, good = [q], np.ones(len(wanted), bool)
    for s in _POINTS[1:]:
        answer = solve(arm, p0 + s * (p1 - p0), _turned(r0, s * turn), path[-1])
        good &= answer.ok & (np.abs(answer.q - path[-1]).max(axis=1) < _MAX_JUMP)
        path.append(answer.q)
    return np.stack(path, axis=1), good


def _turned(rotation: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """(m, 3, 3) rotations turned about ``vector`` (m, 3; axis times angle, base frame): Rodrigues' formula."""
    angle = np.linalg.norm(vector, axis=1)
    x, y, z = (vector / np.maximum(angle, 1e-12)[:, None]).T
    zero = np.zeros_like(x)
    cross = np.stack([np.stack([zero, -z, y], 1), np.stack([z, zero, -x], 1), np.stack([-y, x, zero], 1)], 1)
    turn = np.eye(3) + np.sin(angle)[:, None, None] * cross + (1 - np.cos(angle))[:, None, None] * (cross @ cross)
    return turn @ rotation


def _durations(arm: Arm, specs: Sequence[Spec], motions: Sequence[_Motion]) -> np.ndarray:
    """(motions,) number of steps of every motion: the shortest whole number that respects every limit."""
    if not motions:
        return np.zeros(0, np.int64)
    _, _, velocity, acceleration = arm.limits
    nodes = np.stack([m.nodes for m in motions])
    share = np.array([SPEEDS[specs[m.task].speed] for m in motions])
    speed = (np.abs(_SPEED @ nodes) / velocity).max(axis=(1, 2)) / share
    force = (np.abs(_ACCELERATION @ nodes) / acceleration).max(axis=(1, 2)) / share
    stroke = np.array([abs(m.key.gripper - m.gripper) for m in motions])
    straight = [m for m in motions if m.key.straight]
    path, turn = np.zeros(len(motions)), np.zeros(len(motions))
    if straight:
        at = np.flatnonzero([m.key.straight for m in motions])
        path[at] = [np.linalg.norm(m.key.position - m.position) for m in straight]
        after = np.stack([m.key.rotation for m in straight])
        turn[at] = np.linalg.norm(rotation_vector(np.stack([m.rotation for m in straight]), after), axis=1)
    seconds = np.max(
        [
            _MARGIN * speed,
            _MARGIN * np.sqrt(force),
            PEAK_SPEED * stroke / GRIPPER_SPEED,
            np.sqrt(PEAK_ACCELERATION * stroke / GRIPPER_ACCELERATION),
            PEAK_SPEED * path / (TIP_SPEED * share),
            PEAK_SPEED * turn / (TURN_SPEED * share),
            [max(m.key.pause, _SHORTEST_S) for m in motions],
        ],
        axis=0,
    )
    return np.ceil(seconds * RATE_HZ - 1e-9).astype(np.int64)


def _sampled(parts: Sequence[tuple[_Motion, int]]) -> Trajectory | str:
    """The motions of one task, one after the other, at 50 Hz."""
    if sum(steps for _, steps in parts) > HORIZON:
        return f"longer than {HORIZON} steps"
    first = parts[0][0]
    q, gripper, phases, at = [first.nodes[:1]], [np.array([first.gripper])], [], 0
    for motion, steps in parts:
        q.append(_samples(steps) @ motion.nodes)
        law = time_law(np.arange(1, steps + 1) / steps)[0]
        gripper.append(motion.gripper + law * (motion.key.gripper - motion.gripper))
        phases.append((motion.key.label, at, at + steps))
        at += steps
    return Trajectory(np.concatenate(q), np.concatenate(gripper), tuple(phases))
