"""21 points of a hand → wrist frame and 45-number finger pose, the same for every corpus.

Point order: wrist, then thumb, index, middle, ring, little, each from the knuckle to the tip (OpenPose, MediaPipe,
VITRA, Xperience; EgoDex's ARKit joints are picked in this order).

Wrist frame [O]: origin at the wrist, x to the middle knuckle, z out of the back of the hand, y = z × x. It needs no
hand model, and a MANO wrist rotation becomes the same frame by ``mano_wrist``.

Finger pose [O]: 15 joints in MANO's order (index, middle, little, ring, thumb; knuckle, middle, last), each the
smallest rotation, as axis times angle in its parent's frame, that turns a straight finger's direction into the bone's.
Left hands are mirrored first, so that both hands share one pose space and one set of eigengrasps. Points cannot show a
bone's twist about itself, which fingers hardly have; MANO's own rotations (``mano_fingers``) can, and are a pose space
of their own.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

POINTS, JOINTS, POSE = 21, 15, 45
# first point of each finger, in MANO's order of fingers
_KNUCKLES = {"index": 5, "middle": 9, "little": 17, "ring": 13, "thumb": 1}
FINGERS = tuple(_KNUCKLES)
# Direction of a straight finger in the wrist frame; the thumb's points half-way to the side [O].
_STRAIGHT = {name: np.array([1.0, 0.0, 0.0]) for name in FINGERS} | {"thumb": np.array([1.0, 1.0, 0.0]) / np.sqrt(2)}
_MIRROR = np.array([1.0, -1.0, 1.0])
_PALM_M = (0.03, 0.2)  # wrist to middle knuckle of any living hand, with room; other lengths mean another unit
_TURNED_OVER = np.deg2rad(175)  # beyond this the axis of the smallest rotation is noise
# Columns: our wrist axes in MANO's. A MANO right hand has its fingers along −x, its thumb at +z and its back at +y; the
# left one, of mirrored right-hand parameters, has them along +x. Verified on a published episode of VITRA.
_MANO_AXES = {
    "right": np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
    "left": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


def wrist_frames(points: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Wrist poses.

    Args:
        points: (T, 21, 3) metres in any frame.
        side: ``left`` or ``right``.

    Returns:
        (T, 4, 4) wrist → that frame (identity where invalid), (T,) bool: the palm has a hand's size and a direction.
    """
    checked(points, "points", (POINTS, 3))
    total = len(points)
    finite = np.isfinite(points).all(axis=(1, 2))
    safe = np.where(finite[:, None, None], points, 0.0).astype(np.float64)
    forward = safe[:, _KNUCKLES["middle"]] - safe[:, 0]
    length = np.linalg.norm(forward, axis=1)
    across = safe[:, _KNUCKLES["index"]] - safe[:, _KNUCKLES["little"]]  # towards the thumb
    back = np.cross(forward, across) if side == "right" else np.cross(across, forward)
    height = np.linalg.norm(back, axis=1)
    valid = finite & (length > _PALM_M[0]) & (length < _PALM_M[1]) & (height > 1e-4 * np.maximum(length, 1e-9))
    x = forward / np.where(valid, length, 1.0)[:, None]
    z = back / np.where(valid, height, 1.0)[:, None]
    frames = np.tile(np.eye(4), (total, 1, 1))
    frames[:, :3, :3] = np.stack([x, np.cross(z, x), z], axis=2)
    frames[:, :3, 3] = safe[:, 0]
    frames[~valid] = np.eye(4)
    return frames, valid


def finger_pose(points: np.ndarray, wrist: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Finger poses.

    Args:
        points: (T, 21, 3) metres, in the frame of ``wrist``'s target.
        wrist: (T, 4, 4) from ``wrist_frames``.
        side: ``left`` or ``right``.

    Returns:
        (T, 45) radians, (T,) bool: every bone has a length and no joint is turned over.
    """
    local = np.einsum("tji,tpj->tpi", wrist[:, :3, :3], np.nan_to_num(points) - wrist[:, None, :3, 3])
    if side == "left":
        local = local * _MIRROR
    pose, valid = np.zeros((len(points), JOINTS, 3)), np.isfinite(points).all(axis=(1, 2))
    for f, name in enumerate(FINGERS):
        first = _KNUCKLES[name]
        bones = np.diff(local[:, first : first + 4], axis=1)
        lengths = np.linalg.norm(bones, axis=2)
        valid &= (lengths > 1e-4).all(axis=1)
        directions = bones / np.maximum(lengths, 1e-9)[..., None]
        frame = Rotation.identity(len(points))
        for j in range(3):
            turn = _swing(_STRAIGHT[name], frame.inv().apply(directions[:, j]))
            valid &= np.linalg.norm(turn, axis=1) < _TURNED_OVER
            pose[:, 3 * f + j] = turn
            frame = frame * Rotation.from_rotvec(turn)
    return pose.reshape(-1, POSE), valid


def points_of(pose: np.ndarray, wrist: np.ndarray, side: str, hand: np.ndarray) -> np.ndarray:
    """The inverse of the two functions above: places the points of a hand.

    Args:
        pose: (T, 45) from ``finger_pose``.
        wrist: (T, 4, 4).
        side: ``left`` or ``right``.
        hand: (21, 3) any measured pose of the same hand in its right-handed wrist frame: palm and bone lengths.

    Returns:
        (T, 21, 3).
    """
    local = np.tile(hand.astype(np.float64), (len(pose), 1, 1))
    turns = pose.reshape(-1, JOINTS, 3)
    for f, name in enumerate(FINGERS):
        first, frame = _KNUCKLES[name], Rotation.identity(len(pose))
        for j in range(3):
            frame = frame * Rotation.from_rotvec(turns[:, 3 * f + j])
            length = np.linalg.norm(hand[first + j + 1] - hand[first + j])
            local[:, first + j + 1] = local[:, first + j] + length * frame.apply(_STRAIGHT[name])
    if side == "left":
        local = local * _MIRROR
    return np.einsum("tij,tpj->tpi", wrist[:, :3, :3], local) + wrist[:, None, :3, 3]


def mano_wrist(rotation: np.ndarray, position: np.ndarray, side: str) -> np.ndarray:
    """MANO's wrist → this module's wrist frame.

    Args:
        rotation: (T, 3, 3) from MANO's canonical space; a left hand has mirrored right-hand parameters (VITRA).
        position: (T, 3) of the wrist joint, metres.
        side: ``left`` or ``right``.

    Returns:
        (T, 4, 4).
    """
    frames = np.tile(np.eye(4), (len(rotation), 1, 1))
    frames[:, :3, :3] = rotation @ _MANO_AXES[side]
    frames[:, :3, 3] = position
    return frames


def mano_fingers(rotations: np.ndarray) -> np.ndarray:
    """(T, 15, 3, 3) local joint rotations of MANO → (T, 45) axis times angle."""
    return np.asarray(Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_rotvec()).reshape(-1, POSE)


def checked(values: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    """Refuses anything but (T, *shape).

    Raises:
        ValueError: names what it is.
    """
    if values.ndim != 1 + len(shape) or values.shape[1:] != shape:
        raise ValueError(f"{name} has shape {values.shape}, expected (T, {', '.join(map(str, shape))})")


def _swing(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Smallest rotations, (T, 3) axis times angle, from one unit vector to (T, 3) others."""
    axis = np.cross(start, end)
    sine = np.linalg.norm(axis, axis=1)
    angle = np.arctan2(sine, end @ start)
    return axis * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 0.0)[:, None]
