"""Damped-least-squares inverse kinematics on MuJoCo Jacobians."""

from __future__ import annotations

import mujoco
import numpy as np


def solve_ik(
    model: mujoco.MjModel,
    scratch: mujoco.MjData,
    site: int,
    dofs: np.ndarray,
    position: np.ndarray,
    rotation: np.ndarray,
    seed_q: np.ndarray,
    *,
    iterations: int = 40,
    tolerance: float = 5e-4,
    damping: float = 0.02,
) -> np.ndarray:
    """Joint angles that bring ``site`` to a pose, starting from ``seed_q`` and never leaving the joint ranges.

    Args:
        model: the compiled scene.
        scratch: a data object of this solver alone; the simulation's own is never touched.
        site: site id.
        dofs: (n,) hinge joints, as degree-of-freedom addresses (equal to their qpos addresses in this scene).
        position: (3,) goal in metres, world frame.
        rotation: (3, 3) goal orientation of the site, world frame.
        seed_q: (n,) angles to start from, radians.
        iterations: at most this many steps.
        tolerance: stop below this error (metres, and radians / 10).
        damping: of the least-squares steps.

    Returns:
        (n,) angles in radians: the goal where it is reachable, otherwise as near as the steps came.
    """
    joints = model.dof_jntid[dofs]
    low, high = model.jnt_range[joints].T
    jacobian_6v = np.zeros((6, model.nv))
    q = np.clip(seed_q, low, high)
    for _ in range(iterations):
        scratch.qpos[dofs] = q
        mujoco.mj_kinematics(model, scratch)
        mujoco.mj_comPos(model, scratch)
        actual = scratch.site_xmat[site].reshape(3, 3)
        turn = 0.5 * sum(np.cross(actual[:, i], rotation[:, i]) for i in range(3))
        error = np.concatenate([position - scratch.site_xpos[site], turn])
        if np.abs(error[:3]).max() < tolerance and np.abs(turn).max() < 10 * tolerance:
            break
        mujoco.mj_jacSite(model, scratch, jacobian_6v[:3], jacobian_6v[3:], site)
        j = jacobian_6v[:, dofs]
        step = j.T @ np.linalg.solve(j @ j.T + damping**2 * np.eye(6), error)
        q = np.clip(q + step * min(1.0, 0.5 / max(np.abs(step).max(), 1e-9)), low, high)
    return q
