"""Forward kinematics, Jacobians and inverse kinematics of many poses of one arm at once, without a loop over poses.

Arrays keep the batch as their last axis inside (``…m``), so that every operation is one long vector operation; a loop
runs over the six or seven joints only. Each pose's result depends on that pose alone, never on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qwen_vla_core.data.t2a.robots import AXES, Arm


class Chain(NamedTuple):
    """Where the parts of an arm are, for m joint vectors.

    Attributes:
        position: (m, 3) point between the finger pads, metres.
        rotation: (m, 3, 3) tool orientation, axes as columns: along the fingers, across them, and their product.
        joints: (m, n, 3) places of the joints.
        axes: (m, n, 3) directions of the joint axes.
    """

    position: np.ndarray
    rotation: np.ndarray
    joints: np.ndarray
    axes: np.ndarray


class Solution(NamedTuple):
    """Answer of ``solve``: joint angles (m, n), and whether each is within tolerance and limits (m,)."""

    q: np.ndarray
    ok: np.ndarray


def forward(arm: Arm, q: np.ndarray) -> Chain:
    """Forward kinematics of joint vectors (m, n), radians."""
    m = len(q)
    columns = np.zeros((3, 3, m))  # columns[k] is the k-th axis of the moving frame, (3, m)
    for k in range(3):
        columns[k, k] = 1.0
    place = np.zeros((3, m))
    joints, axes = np.empty((arm.dof, 3, m)), np.empty((arm.dof, 3, m))
    cosines, sines = np.cos(q), np.sin(q)
    for i, joint in enumerate(arm.joints):
        place = place + _along(columns, joint.offset)
        k, sign = AXES[joint.axis]
        joints[i], axes[i] = place, sign * columns[k]
        a, b = (k + 1) % 3, (k + 2) % 3
        c, s = cosines[:, i], sign * sines[:, i]
        columns[a], columns[b] = c * columns[a] + s * columns[b], c * columns[b] - s * columns[a]
    rotation = np.stack([_along(columns, axis) for axis in arm.tool_axes.T], axis=-1)  # (3, m, 3)
    return Chain(
        (place + _along(columns, arm.tool)).T,
        rotation.transpose(1, 0, 2),
        joints.transpose(2, 0, 1),
        axes.transpose(2, 0, 1),
    )


def _along(columns: np.ndarray, vector: tuple[float, float, float] | np.ndarray) -> np.ndarray:
    """(3, m) a fixed vector of the moving frames, seen from the base; zero components cost nothing."""
    parts = [float(value) * columns[k] for k, value in enumerate(vector) if value]
    return np.sum(parts, axis=0) if parts else np.zeros(columns.shape[1:])


def jacobian(chain: Chain) -> np.ndarray:
    """(m, 6, n) velocity of the tool point (rows 0–2) and rotation (rows 3–5), base frame, per joint speed."""
    linear = np.cross(chain.axes, chain.position[:, None, :] - chain.joints)
    return np.concatenate([linear, chain.axes], axis=2).transpose(0, 2, 1)


def rotation_vector(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """(m, 3) axis times angle that turns orientations ``of`` into ``to``; both (m, 3, 3). Exact below half a turn."""
    turn = to @ of.transpose(0, 2, 1)
    twice = np.stack([turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0], turn[:, 1, 0] - turn[:, 0, 1]], 1)
    sine = 0.5 * np.linalg.norm(twice, axis=1)
    angle = np.arctan2(sine, 0.5 * (np.trace(turn, axis1=1, axis2=2) - 1.0))
    # At half a turn the axis cannot be read from the difference; any small step leaves that place.
    return twice * (0.5 * np.where(sine > 1e-9, angle / np.maximum(sine, 1e-9), 1.0))[:, None]


def solve(
    arm: Arm,
    position: np.ndarray,
    rotation: np.ndarray,
    seed: np.ndarray,
    *,
    rest: np.ndarray | None = None,
    iterations: int = 60,
    tolerance: float = 1e-5,
    damping: float = 0.03,
) -> Solution:
    """Damped least squares from every seed towards its pose, inside the joint limits.

    The damping fades with the error (it only has to tame the first steps), so convergence is quadratic at the end. A
    seventh joint is drawn towards ``rest`` in the null space: the same pose from the same seed gives the same elbow.

    Args:
        arm: the kinematic model.
        position: (m, 3) wanted tool points, metres.
        rotation: (m, 3, 3) wanted tool orientations.
        seed: (m, n) angles to start from.
        rest: (m, n) or (n,) preferred angles of redundant arms; None leaves the null space alone.
        iterations: at most this many steps.
        tolerance: largest position error (metres) and rotation error (radians) of a solution.
        damping: of the first steps, in metres and radians.
    """
    low, high, _, _ = arm.limits
    q = np.clip(seed, low, high)
    ok = np.zeros(len(q), bool)
    open_ = np.arange(len(q))
    for _ in range(iterations + 1):
        chain = forward(arm, q[open_])
        error = np.concatenate(
            [position[open_] - chain.position, rotation_vector(chain.rotation, rotation[open_])], axis=1
        )
        size = np.abs(error).max(axis=1)
        done = size < tolerance
        ok[open_[done]] = True
        if done.all():
            break
        open_, error, size = open_[~done], error[~done], size[~done]
        j = jacobian(Chain(*(part[~done] for part in chain)))
        jt = j.transpose(0, 2, 1)
        square = j @ jt
        square[:, np.arange(6), np.arange(6)] += (damping * np.minimum(1.0, 5 * size))[:, None] ** 2 + 1e-10
        wanted = error
        pull = np.zeros_like(q[open_])
        if rest is not None and arm.dof > 6:
            pull = 0.3 * np.minimum(1.0, 5 * size)[:, None] * (np.broadcast_to(rest, q.shape)[open_] - q[open_])
            wanted = error - np.einsum("mij,mj->mi", j, pull)
        step = np.einsum("mij,mj->mi", jt, np.linalg.solve(square, wanted[:, :, None])[:, :, 0]) + pull
        step *= np.minimum(1.0, 0.5 / np.maximum(np.abs(step).max(axis=1), 1e-12))[:, None]
        q[open_] = np.clip(q[open_] + step, low, high)
    return Solution(q, ok)
