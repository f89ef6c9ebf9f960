"""The same rotations, written so that neighbouring rows have neighbouring numbers.

Between two rows a controller draws a straight line. A quaternion and its negative, an axis-angle of 179° and one of
−179°, Euler angles that wrap round: these are neighbours in space and far apart in numbers, and the line between them
is a spin. Each row is written here in the way that is nearest to the one before it.
"""

from __future__ import annotations

import numpy as np

from qwen_vla_core.actions.rotations import join_pose, split_pose

TURN = 2.0 * np.pi


def continue_poses(poses_hc: np.ndarray, from_c: np.ndarray | None, unit: str) -> np.ndarray:
    """(H, n) poses in a unit → the same poses, each row nearest to the one before; the first to ``from_c`` (n,).

    Quaternions come out with length 1, ``rot6d`` with orthonormal columns.

    Raises:
        ValueError: numbers that are no rotation.
    """
    if unit in ("m", "m,rad"):
        return np.asarray(poses_hc, np.float64)
    result = np.array(poses_hc, np.float64)
    representation = unit.removeprefix("m,")
    if representation in ("quaternion", "rot6d"):
        result = join_pose(*split_pose(result, unit), unit)
    near = None if from_c is None or not np.isfinite(from_c[3:]).all() else np.asarray(from_c, np.float64)[3:]
    for row in result:
        if near is not None:
            row[3:] = nearest(row[3:], near, representation)
        near = row[3:]
    return result


def nearest(rotation: np.ndarray, near: np.ndarray, representation: str) -> np.ndarray:
    """(d,) the way to write a rotation whose numbers are nearest to ``near`` (d,)."""
    if representation == "quaternion":
        return -rotation if float(rotation @ near) < 0.0 else rotation
    if representation == "axis_angle":
        return _turns(rotation, near)
    if representation == "euler_xyz":
        flipped = np.array([rotation[0] + np.pi, np.pi - rotation[1], rotation[2] + np.pi])
        ways = [near + np.remainder(way - near + np.pi, TURN) - np.pi for way in (rotation, flipped)]
        return np.asarray(min(ways, key=lambda way: float(np.sum((way - near) ** 2))))
    return rotation


def _turns(vector: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Axis-angle plus whole turns about its own axis."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:  # no turn at all has every axis: a whole turn about that of the one before
        length = float(np.linalg.norm(near))
        return vector if length < np.pi else near / length * TURN * round(length / TURN)
    axis = vector / angle
    return np.asarray(axis * (angle + TURN * round((float(axis @ near) - angle) / TURN)))
