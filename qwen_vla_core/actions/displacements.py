"""Displacements per action ↔ the positions they add up to: joints, hand poses in base or tool axes, planar bases.

A displacement leads from the target before it to its own: the first starts at the state of the chunk's first frame.
``from_displacements(to_displacements(a))`` is ``a`` to 1e-8, rotations as rotations. The runtime adds them up in
shares, a controller's tick at a time, which is why a rotation is scaled along its own axis (``share_of_turn``).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import join_pose, split_pose

FRAMES = ("base", "tool")


def to_displacements(targets_hc: np.ndarray, start_c: np.ndarray, unit: str, frame: str = "base") -> np.ndarray:
    """(…, H, n) positions → (…, H, n) displacements; undone by ``from_displacements``.

    Args:
        targets_hc: joints, or one hand pose per row.
        start_c: (…, n) where the chunk begins.
        unit: of the group; says how a pose's rotation is written.
        frame: axes of a hand's displacement: ``base``, or ``tool``, those of the pose before it; ``joint``: plain
            differences, whatever the unit.

    Raises:
        ValueError: an unknown frame, or the numbers of a pose are no rotation.
    """
    targets, start = np.asarray(targets_hc, np.float64), np.asarray(start_c, np.float64)
    before = np.concatenate(
        [np.broadcast_to(start[..., None, :], (*targets.shape[:-2], 1, targets.shape[-1])), targets], axis=-2
    )
    if _plain(frame):
        return np.asarray(np.diff(before, axis=-2))
    place, turn = split_pose(before, unit)
    rotation = Rotation.from_quat(turn.reshape(-1, 4)).as_matrix().reshape(*place.shape, 3)
    last, now = rotation[..., :-1, :, :], rotation[..., 1:, :, :]
    move = np.diff(place, axis=-2)
    back = np.swapaxes(last, -1, -2)
    if frame == "tool":
        move, turned = (back @ move[..., None])[..., 0], back @ now
    else:
        turned = now @ back
    quaternion = Rotation.from_matrix(turned.reshape(-1, 3, 3)).as_quat().reshape(*move.shape[:-1], 4)
    return join_pose(move, quaternion, unit)


def from_displacements(moves_hc: np.ndarray, start_c: np.ndarray, unit: str, frame: str = "base") -> np.ndarray:
    """(…, H, n) displacements → (…, H, n) positions, added up from ``start_c`` (…, n); see ``to_displacements``."""
    moves, start = np.asarray(moves_hc, np.float64), np.asarray(start_c, np.float64)
    if _plain(frame):
        return np.asarray(start[..., None, :] + np.cumsum(moves, axis=-2))
    place, turn = split_pose(np.broadcast_to(start, (*moves.shape[:-2], moves.shape[-1])), unit)
    rotation = Rotation.from_quat(turn.reshape(-1, 4)).as_matrix().reshape(*place.shape, 3)
    step, turned = split_pose(moves, unit)
    turns = Rotation.from_quat(turned.reshape(-1, 4)).as_matrix().reshape(*step.shape, 3)
    rows = []
    for h in range(moves.shape[-2]):
        place, rotation = advance(place, rotation, step[..., h, :], turns[..., h, :, :], frame)
        quaternion = Rotation.from_matrix(rotation.reshape(-1, 3, 3)).as_quat().reshape(*place.shape[:-1], 4)
        rows.append(join_pose(place, quaternion, unit))
    return np.stack(rows, axis=-2)


def advance(
    place: np.ndarray, rotation: np.ndarray, move: np.ndarray, turn: np.ndarray, frame: str
) -> tuple[np.ndarray, np.ndarray]:
    """One displacement: (…, 3) and (…, 3, 3) pose, (…, 3) and (…, 3, 3) motion → the pose after it.

    In base axes the turn is about the hand's own point, which moves by ``move`` whatever the turn is.
    """
    if frame == "tool":
        return place + (rotation @ move[..., None])[..., 0], rotation @ turn
    return place + move, turn @ rotation


def share_of_turn(values: np.ndarray, unit: str, share: float) -> np.ndarray:
    """(n,) a displacement as the plan gives it → (3, 3) the turn of a ``share`` of its period.

    A plan that is slowed down scales its numbers. So the length of a quaternion, or of the columns of ``rot6d``, says
    which part of the turn is meant; nothing at all is no turn.
    """
    if unit == "m":
        return np.eye(3)
    numbers = np.asarray(values, np.float64)[3:]
    representation = unit.removeprefix("m,")
    if representation == "axis_angle":
        vector = numbers
    else:
        if representation in ("quaternion", "rot6d"):
            length = float(np.linalg.norm(numbers)) / (1.0 if representation == "quaternion" else np.sqrt(2.0))
            if length < 1e-6:
                return np.eye(3)
            share *= length
        quaternion = split_pose(np.concatenate([np.zeros(3), numbers]), unit)[1]
        vector = Rotation.from_quat(quaternion).as_rotvec()
    return np.asarray(Rotation.from_rotvec(vector * share).as_matrix())


def to_twists(poses_hc: np.ndarray, start_c: np.ndarray, period_s: float) -> np.ndarray:
    """(H, 3) planar poses x, y, heading → (H, 3) constant twists vx, vy, wz that lead from each to the next.

    The exact logarithm of SE(2): a twist drives an arc. Undone by ``from_twists`` while a period turns by less than
    half a turn; headings may be given modulo a turn.
    """
    poses = np.vstack([np.asarray(start_c, np.float64)[None], np.asarray(poses_hc, np.float64)])
    dx, dy = np.diff(poses[:, 0]), np.diff(poses[:, 1])
    turn = np.remainder(np.diff(poses[:, 2]) + np.pi, 2 * np.pi) - np.pi
    cos, sin = np.cos(poses[:-1, 2]), np.sin(poses[:-1, 2])
    ahead, left = cos * dx + sin * dy, cos * dy - sin * dx
    half = 0.5 * turn
    scale = np.where(np.abs(half) < 1e-8, 1.0, half / np.where(half == 0.0, 1.0, np.tan(half)))
    return np.stack([scale * ahead + half * left, scale * left - half * ahead, turn], axis=1) / period_s


def from_twists(twists_hc: np.ndarray, start_c: np.ndarray, period_s: float) -> np.ndarray:
    """(H, 3) twists, each held for a period → (H, 3) planar poses, headings counted on from the start."""
    x, y, heading = np.asarray(start_c, np.float64)
    rows = []
    for vx, vy, wz in np.asarray(twists_hc, np.float64) * period_s:
        sine = 1.0 if abs(wz) < 1e-8 else np.sin(wz) / wz
        rest = 0.5 * wz if abs(wz) < 1e-8 else (1.0 - np.cos(wz)) / wz
        ahead, left = sine * vx - rest * vy, rest * vx + sine * vy
        x, y = (
            x + np.cos(heading) * ahead - np.sin(heading) * left,
            y + np.sin(heading) * ahead + np.cos(heading) * left,
        )
        heading = heading + wz
        rows.append((x, y, heading))
    return np.array(rows, np.float64).reshape(-1, 3)


def _plain(frame: str) -> bool:
    if frame != "joint" and frame not in FRAMES:
        raise ValueError(f"unknown frame {frame!r}; one of joint, {', '.join(FRAMES)}")
    return frame == "joint"
