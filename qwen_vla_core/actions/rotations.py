"""Rotation vectors of the action tensor ↔ ROS quaternions (x, y, z, w), through SciPy.

Representations, named as in an embodiment's unit (``m,axis_angle`` …):

* ``axis_angle`` (3): unit axis × angle in radians.
* ``euler_xyz`` (3): roll, pitch, yaw in radians about fixed axes (REP-103).
* ``quaternion`` (4): x, y, z, w.
* ``rot6d`` (6): the first two columns of the rotation matrix, one after the other (Zhou et al. 2019).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

ROTATION_SIZES: dict[str, int] = {"axis_angle": 3, "euler_xyz": 3, "quaternion": 4, "rot6d": 6}
_DEGENERATE = 1e-8


def to_quaternion(rotation: np.ndarray, representation: str) -> np.ndarray:
    """(…, d) rotation → (…, 4) unit quaternion x, y, z, w with w ≥ 0.

    Quaternions need not be normalised, nor the two columns of ``rot6d`` orthogonal: a policy's output is neither.

    Raises:
        ValueError: unknown representation, wrong last axis, a non-finite value, or one that is no rotation (zero
            quaternion, parallel 6-D columns).
    """
    values = _checked(rotation, representation)
    flat = values.reshape(-1, values.shape[-1])
    if representation == "axis_angle":
        result = Rotation.from_rotvec(flat)
    elif representation == "euler_xyz":
        result = Rotation.from_euler("xyz", flat)
    elif representation == "quaternion":
        if (np.linalg.norm(flat, axis=-1) < _DEGENERATE).any():
            raise ValueError("a zero quaternion is no rotation")
        result = Rotation.from_quat(flat)
    else:
        result = Rotation.from_matrix(_orthonormal(flat))
    return np.asarray(result.as_quat(canonical=True)).reshape(*values.shape[:-1], 4)


def from_quaternion(quaternion: np.ndarray, representation: str) -> np.ndarray:
    """(…, 4) quaternion x, y, z, w → (…, d); the inverse of ``to_quaternion``.

    Raises:
        ValueError: as in ``to_quaternion``.
    """
    if representation not in ROTATION_SIZES:
        raise ValueError(f"unknown rotation {representation!r}; one of {', '.join(ROTATION_SIZES)}")
    unit = to_quaternion(quaternion, "quaternion")
    rotation = Rotation.from_quat(unit.reshape(-1, 4))
    if representation == "axis_angle":
        flat = rotation.as_rotvec()
    elif representation == "euler_xyz":
        flat = rotation.as_euler("xyz")
    elif representation == "quaternion":
        flat = unit.reshape(-1, 4)
    else:
        flat = rotation.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6)
    return np.asarray(flat).reshape(*unit.shape[:-1], ROTATION_SIZES[representation])


def split_pose(pose: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(…, n) pose in a group's unit → position (…, 3) in metres and quaternion (…, 4) x, y, z, w.

    Args:
        pose: x, y, z and the rotation for ``m,<representation>``; x, y, yaw for ``m,rad``; x, y, z for ``m``.
        unit: the group's unit.

    Raises:
        ValueError: no pose unit, a length that does not fit it, or as in ``to_quaternion``.
    """
    values = np.asarray(pose, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] != pose_size(unit):
        raise ValueError(f"a pose in {unit!r} has {pose_size(unit)} numbers, got shape {values.shape}")
    position = np.zeros((*values.shape[:-1], 3))
    if unit == "m,rad":
        position[..., :2] = values[..., :2]
        upright = np.zeros_like(position)
        upright[..., 2] = values[..., 2]
        return position, to_quaternion(upright, "axis_angle")
    position[...] = values[..., :3]
    if unit == "m":
        return position, to_quaternion(np.zeros_like(position), "axis_angle")
    return position, to_quaternion(values[..., 3:], unit.removeprefix("m,"))


def join_pose(position: np.ndarray, quaternion: np.ndarray, unit: str) -> np.ndarray:
    """Inverse of ``split_pose``: (…, 3) and (…, 4) → (…, n); what the unit cannot express is dropped.

    Raises:
        ValueError: as in ``split_pose``.
    """
    pose_size(unit)
    place = np.asarray(position, dtype=np.float64)
    if unit == "m":
        return place
    if unit == "m,rad":
        yaw = from_quaternion(quaternion, "euler_xyz")[..., 2:]
        return np.concatenate([place[..., :2], yaw], axis=-1)
    return np.concatenate([place, from_quaternion(quaternion, unit.removeprefix("m,"))], axis=-1)


def pose_size(unit: str) -> int:
    """Numbers a pose in ``unit`` has.

    Raises:
        ValueError: the unit is no pose unit.
    """
    if unit in ("m", "m,rad"):
        return 3
    representation = unit.removeprefix("m,")
    if representation == unit or representation not in ROTATION_SIZES:
        raise ValueError(f"{unit!r} is no pose unit; one of m, m,rad, {', '.join(f'm,{r}' for r in ROTATION_SIZES)}")
    return 3 + ROTATION_SIZES[representation]


def _checked(rotation: np.ndarray, representation: str) -> np.ndarray:
    if representation not in ROTATION_SIZES:
        raise ValueError(f"unknown rotation {representation!r}; one of {', '.join(ROTATION_SIZES)}")
    values = np.asarray(rotation, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] != ROTATION_SIZES[representation]:
        raise ValueError(
            f"{representation} needs {ROTATION_SIZES[representation]} numbers on the last axis, got {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{representation} holds a non-finite number")
    return values if values.flags.writeable else values.copy()  # SciPy refuses read-only views


def _orthonormal(flat: np.ndarray) -> np.ndarray:
    """(n, 6) → (n, 3, 3) by Gram-Schmidt."""
    first, second = flat[:, :3], flat[:, 3:]
    length = np.linalg.norm(first, axis=-1, keepdims=True)
    if (length < _DEGENERATE).any():
        raise ValueError("rot6d with a zero column is no rotation")
    x = first / length
    rest = second - (x * second).sum(axis=-1, keepdims=True) * x
    length = np.linalg.norm(rest, axis=-1, keepdims=True)
    if (length < _DEGENERATE).any():
        raise ValueError("rot6d with parallel columns is no rotation")
    y = rest / length
    return np.stack([x, y, np.cross(x, y)], axis=-1)
