"""Inverse kinematics of a serial chain by damped least squares, in NumPy: a hand's pose becomes joint positions.

A step solves ``J dq = e`` with every singular direction damped by itself: ``dq = V diag(σ / (σ² + λ²)) Uᵀ e``, where λ
grows from 0 to ``damping`` as the smallest σ falls below ``NEAR`` (Nakamura & Hanafusa 1986, as Buss 2004 reviews it).
A step that does not come nearer is tried again with more damping (Levenberg-Marquardt), and one that never does ends
the search: so a pose out of reach is answered by the nearest one found, and asking again changes nothing. Joints at
their limits are taken out of the step and the rest solved again; a redundant arm leans to the middle of its ranges
within the null space. The search starts from the last answer and the answer moves no joint faster than its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.runtime.kinematics import SerialChain, joint_terms

NEAR = 0.02  # smallest singular value below which damping begins (metres per radian, rotations weighted)
LARGEST_STEP = 0.3  # of one joint in one iteration, rad or m: beyond it the Jacobian says little
REACHED_M, REACHED_RAD = 1e-5, 1e-4  # errors at which the search ends
LEAN = 0.02  # share of the way to mid-range that a redundant arm goes per iteration, in the null space
MORE = 8.0  # damping grows by this where a step does not come nearer
TRIES = 6


@dataclass(frozen=True)
class Solution:
    """An answer.

    Attributes:
        q: (n,) joint values inside their limits.
        position_m, rotation_rad: how far the hand is from the pose that was asked for.
        limited: the speed limit, not the search, ended the motion.
    """

    q: np.ndarray
    position_m: float
    rotation_rad: float
    limited: bool = False


class ChainPose:
    """Pose and geometric Jacobian of a chain's tip."""

    def __init__(self, chain: SerialChain) -> None:
        self.count = len(chain.joints)
        self._one, self._sine, self._rest, self._linear = np.stack([joint_terms(j) for j in chain.joints], axis=1)
        self._axes = np.array([joint.axis for joint in chain.joints])[:, :, None]
        self._slides = np.array([joint.slides for joint in chain.joints])
        self._tip = chain.tip

    def frames(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, 4, 4) of every joint after its motion, and (4, 4) of the tip, for (n,) joint values."""
        value = q[:, None, None]
        matrices = self._one + np.sin(value) * self._sine + (1.0 - np.cos(value)) * self._rest + value * self._linear
        frames = np.empty_like(matrices)
        frame = frames[0] = matrices[0]
        for j in range(1, self.count):
            frame = frames[j] = frame @ matrices[j]
        return frames, frame @ self._tip

    def pose(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(3,) position and (3, 3) rotation of the tip."""
        tip = self.frames(q)[1]
        return tip[:3, 3], tip[:3, :3]

    def jacobian(self, frames: np.ndarray, tip: np.ndarray) -> np.ndarray:
        """(6, n): metres, then radians of the tip per unit of each joint, in the base frame."""
        axis = (frames[:, :3, :3] @ self._axes)[..., 0]
        arm = tip[:3, 3] - frames[:, :3, 3]
        linear = axis[:, _NEXT] * arm[:, _AFTER] - axis[:, _AFTER] * arm[:, _NEXT]
        slides = self._slides[:, None]
        return np.concatenate([np.where(slides, axis, linear), np.where(slides, 0.0, axis)], axis=1).T


_NEXT, _AFTER = [1, 2, 0], [2, 0, 1]  # components of a cross product


class InverseKinematics:
    """Poses of a chain's tip → joint values, starting each time from the last answer.

    Args:
        chain: from ``load_chain``.
        lower, upper: (n,) joint limits; velocity: (n,) largest speeds, units/s.
        damping: largest λ, at a singularity.
        rotation_weight: metres that one radian counts where not the whole pose can be reached.
        iterations: of one search.
    """

    def __init__(
        self,
        chain: SerialChain,
        lower: np.ndarray,
        upper: np.ndarray,
        velocity: np.ndarray,
        *,
        damping: float = 0.1,
        rotation_weight: float = 0.2,
        iterations: int = 8,
    ) -> None:
        self.chain = ChainPose(chain)
        self.lower, self.upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
        self.velocity = np.asarray(velocity, np.float64)
        self.damping, self.weight, self.iterations = damping, rotation_weight, iterations
        self._middle = 0.5 * (self.lower + self.upper)
        self.q = np.clip(np.zeros(self.chain.count), self.lower, self.upper)

    def reset(self, q: np.ndarray) -> None:
        """Starts the next search at ``q`` (n,)."""
        self.q = np.clip(np.asarray(q, np.float64), self.lower, self.upper)

    def follow(self, position: np.ndarray, rotation: np.ndarray | None, dt_s: float) -> Solution:
        """The next joint values on the way to a pose: the search's answer, or as far as ``dt_s`` allows.

        The way is straight in joint space, so that a joint that must turn far does not leave the others behind.
        """
        most = self.velocity * max(dt_s, 0.0)
        found = self.solve(position, rotation, self.q, most)
        step = found.q - self.q
        share = float(np.min(most / np.maximum(np.abs(step), 1e-12)))
        if share < 1.0:
            q = self.q + share * step
            found = Solution(q, *self._distances(self._error(self.chain.frames(q)[1], position, rotation)), True)
        self.q = found.q
        return found

    def solve(
        self,
        position: np.ndarray,
        rotation: np.ndarray | None,
        seed_q: np.ndarray,
        enough: np.ndarray | None = None,
    ) -> Solution:
        """The joint values nearest to a pose that a search from ``seed_q`` finds.

        Args:
            position: (3,) of the tip in the chain's base, metres.
            rotation: (3, 3); None: any.
            seed_q: (n,) where the search starts.
            enough: (n,) the search ends where a joint has moved by more: no more will be made of it.

        Raises:
            ValueError: a non-finite number.
        """
        if not (np.isfinite(position).all() and (rotation is None or np.isfinite(rotation).all())):
            raise ValueError("a pose to reach must be finite")
        q = np.clip(np.asarray(seed_q, np.float64), self.lower, self.upper)
        frames, tip = self.chain.frames(q)
        error = self._error(tip, position, rotation)
        extra = 0.0  # damping beyond that of the singularity
        for _ in range(self.iterations):
            if _reached(error):
                break
            rows = len(error)
            jacobian = self.chain.jacobian(frames, tip)[:rows]
            weights = self._weights(rows)
            before = float(np.sum((weights * error) ** 2))
            for _ in range(TRIES):
                step = self._step(jacobian * weights[:, None], weights * error, q, extra)
                moved = np.minimum(np.maximum(q + step, self.lower), self.upper)
                frames_2, tip_2 = self.chain.frames(moved)
                error_2 = self._error(tip_2, position, rotation)
                after = float(np.sum((weights * error_2) ** 2))
                if after < before:
                    break
                extra = max(extra * MORE, self.damping**2)
            if after >= before * (1.0 - 1e-9):
                break
            q, frames, tip, error, extra = moved, frames_2, tip_2, error_2, extra / MORE
            if enough is not None and (np.abs(q - seed_q) > enough).any():
                break
        return Solution(q, *self._distances(error))

    def _step(self, jacobian: np.ndarray, error: np.ndarray, q: np.ndarray, extra: float) -> np.ndarray:
        """(n,) one damped step; joints that would leave their limits stay at them and the others make up for it."""
        free = np.ones(len(q), bool)
        step = np.zeros(len(q))
        for _ in range(len(q)):
            rest = error - jacobian[:, ~free] @ step[~free]
            step[free] = self._least_squares(jacobian[:, free], rest, self._middle[free] - q[free], extra)
            out = free & (((q + step > self.upper) & (step > 0)) | ((q + step < self.lower) & (step < 0)))
            if not out.any():
                break
            step[out] = np.where(step > 0, self.upper - q, self.lower - q)[out]
            free &= ~out
            if not free.any():
                break
        largest = float(np.abs(step).max())
        return step if largest <= LARGEST_STEP else step * (LARGEST_STEP / largest)

    def _least_squares(self, jacobian: np.ndarray, error: np.ndarray, lean: np.ndarray, extra: float) -> np.ndarray:
        u, sigma, vt = np.linalg.svd(jacobian, full_matrices=False)
        closeness = max(0.0, 1.0 - float(sigma[-1]) / NEAR)
        damped = np.maximum(sigma * sigma + (self.damping * closeness) ** 2 + extra, 1e-12)
        step = vt.T @ (sigma / damped * (u.T @ error))
        if vt.shape[1] > vt.shape[0]:  # more joints than the pose needs: the rest of the motion is free
            step = step + LEAN * (lean - vt.T @ (vt @ lean))
        return np.asarray(step)

    def _weights(self, rows: int) -> np.ndarray:
        weights = np.ones(rows)
        weights[3:] = self.weight
        return weights

    def _error(self, tip: np.ndarray, position: np.ndarray, rotation: np.ndarray | None) -> np.ndarray:
        """(3,) or (6,): metres, and the rotation vector from where the tip points to where it shall."""
        away = position - tip[:3, 3]
        if rotation is None:
            return np.asarray(away)
        return np.concatenate([away, rotation_vector(rotation @ tip[:3, :3].T)])

    def _distances(self, error: np.ndarray) -> tuple[float, float]:
        return float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))


def _reached(error: np.ndarray) -> bool:
    position, turn = error[:3], error[3:]
    return bool(position @ position <= REACHED_M**2 and turn @ turn <= REACHED_RAD**2)


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """(3,) axis times angle of a (3, 3) rotation; far from half a turn without SciPy's overhead."""
    skew = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine = 0.5 * float(np.sqrt(skew @ skew))
    cosine = 0.5 * (float(matrix[0, 0] + matrix[1, 1] + matrix[2, 2]) - 1.0)
    if cosine < -0.9:
        return np.asarray(Rotation.from_matrix(matrix).as_rotvec())
    if sine < 1e-7:
        return 0.5 * skew
    return skew * (float(np.arctan2(sine, cosine)) / (2.0 * sine))
