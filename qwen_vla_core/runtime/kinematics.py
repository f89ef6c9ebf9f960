"""Forward kinematics of serial chains: read once from URDF or MJCF, then evaluated with NumPy alone.

A joint is one matrix that is linear in (1, sin q, 1 − cos q, q), so that all joints of all chains are computed in one
vector operation; only the product along the chain is a loop. Chains of different length are padded with joints that do
nothing. MuJoCo is needed to read an MJCF, never to evaluate one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_vla_core.embodiment.errors import did_you_mean
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import resource_dir


class KinematicsError(UserError):
    """A chain cannot be read.

    Attributes:
        key: which key of ``Kinematics`` is to blame, e.g. ``tip`` or ``joints[2]``.
        problem, fix: what is wrong, and what to do.
    """

    def __init__(self, key: str, problem: str, fix: str) -> None:
        self.key, self.problem, self.fix = key, problem, fix
        super().__init__(f"{key}: {problem}; fix: {fix}")


@dataclass(frozen=True)
class ChainJoint:
    """One movable joint.

    Attributes:
        name: in the model.
        origin: (4, 4) from the joint before (or the base) to this one at q = 0.
        axis: (3,) unit vector in the joint's own frame.
        slides: whether it is prismatic (q in metres) instead of revolute (radians).
    """

    name: str
    origin: np.ndarray
    axis: np.ndarray
    slides: bool


@dataclass(frozen=True)
class SerialChain:
    """Joints from base to tip, and (4, 4) ``tip`` from the last joint's frame to the point."""

    joints: tuple[ChainJoint, ...]
    tip: np.ndarray


def translation(vector: Sequence[float] | np.ndarray) -> np.ndarray:
    """(4, 4) displacement."""
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


def cross_matrix(v: np.ndarray) -> np.ndarray:
    """(3, 3) matrix of ``v ×``."""
    return np.array([[0.0, -v[2], v[1]], [v[2], 0.0, -v[0]], [-v[1], v[0], 0.0]])


def find_model(name: str, yaml_path: str) -> Path:
    """A model's path: absolute, beside the YAML, or among the shipped embodiments.

    Raises:
        KinematicsError: it is nowhere.
    """
    given = Path(name).expanduser()
    folders = [Path(yaml_path).parent] if yaml_path else []
    for folder in (*folders, resource_dir("embodiments")):
        if (folder / given).is_file():
            return folder / given
    raise KinematicsError("model", f"no file '{name}'", "give a path relative to this YAML, or an absolute one")


def load_chain(path: Path, tip: str, base: str = "", offset: Sequence[float] = (0.0, 0.0, 0.0)) -> SerialChain:
    """Reads the chain from ``base`` (default: the model's root) to a point fixed to ``tip``.

    Args:
        path: a ``.urdf``; anything else is compiled by MuJoCo.
        tip: link of the URDF; site or body of the MJCF.
        base: link or body in whose frame the point is told.
        offset: (3,) the point in the tip's frame, metres.

    Raises:
        KinematicsError: unreadable, or no such chain.
    """
    if path.suffix.lower() == ".urdf":
        from qwen_vla_core.runtime.kinematics_urdf import urdf_chain

        joints, last = urdf_chain(path, tip, base)
    else:
        from qwen_vla_core.runtime.kinematics_mjcf import mjcf_chain

        joints, last = mjcf_chain(path, tip, base)
    if not joints:
        raise KinematicsError("tip", f"no joint moves '{tip}' against its base", "name a link beyond the joints")
    return SerialChain(tuple(joints), last @ translation(offset))


def unknown(key: str, what: str, name: str, known: Sequence[str]) -> KinematicsError:
    """The error of a name that a model does not have."""
    return KinematicsError(key, f"the model has no {what} '{name}'", did_you_mean(name, tuple(known)))


class ChainSet:
    """Several chains evaluated together.

    Attributes:
        count: m chains; length: n joints of the longest.
        reach: (m, n) largest distance of the point from each joint, metres (1 for sliding joints): it bounds how fast
            the Jacobian can change.
    """

    def __init__(self, chains: Sequence[SerialChain], travel: Sequence[Sequence[float]]) -> None:
        """``travel``: per chain and joint the largest |q| that will be asked for; it matters where joints slide."""
        m, n = len(chains), max(len(chain.joints) for chain in chains)
        self.count, self.length = m, n
        self._terms = np.zeros((4, m, n, 4, 4))  # of 1, sin q, 1 − cos q, q
        self._terms[0] = np.eye(4)
        self._axis = np.zeros((m, n, 3, 1))
        self._turns = np.zeros((m, n, 1), bool)
        self._tip = np.stack([chain.tip for chain in chains])
        self.reach = np.zeros((m, n))
        for i, chain in enumerate(chains):
            reach = float(np.linalg.norm(chain.tip[:3, 3]))
            for j in reversed(range(len(chain.joints))):
                joint = chain.joints[j]
                self._terms[:, i, j] = joint_terms(joint)
                self._axis[i, j, :, 0] = joint.axis
                self._turns[i, j] = not joint.slides
                reach += travel[i][j] if joint.slides else 0.0
                self.reach[i, j] = 1.0 if joint.slides else reach
                reach += float(np.linalg.norm(joint.origin[:3, 3]))

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(…, m, 3) points and (…, m, 3, n) Jacobians at joint values (…, m, n); padding columns may hold anything."""
        value = q[..., None, None]
        one, sine, rest, linear = self._terms
        matrices = one + np.sin(value) * sine + (1.0 - np.cos(value)) * rest + value * linear
        frame = matrices[..., 0, :, :]
        frames = [frame]
        for j in range(1, self.length):
            frame = frame @ matrices[..., j, :, :]
            frames.append(frame)
        point = (frame @ self._tip)[..., :3, 3]
        stacked = np.stack(frames, axis=-3)  # (…, m, n, 4, 4)
        axis = (stacked[..., :3, :3] @ self._axis)[..., 0]  # (…, m, n, 3)
        arm = point[..., None, :] - stacked[..., :3, 3]
        turned = axis[..., _NEXT] * arm[..., _AFTER] - axis[..., _AFTER] * arm[..., _NEXT]
        return point, np.swapaxes(np.where(self._turns, turned, axis), -1, -2)


_NEXT, _AFTER = [1, 2, 0], [2, 0, 1]  # components of a cross product


def joint_terms(joint: ChainJoint) -> np.ndarray:
    """(4, 4, 4) matrices of 1, sin q, 1 − cos q and q, whose weighted sum is the joint at q."""
    terms = np.zeros((4, 4, 4))
    terms[0] = joint.origin
    if joint.slides:
        terms[3, :3, 3] = joint.origin[:3, :3] @ joint.axis
    else:
        cross = cross_matrix(joint.axis)
        terms[1, :3, :3] = joint.origin[:3, :3] @ cross
        terms[2, :3, :3] = joint.origin[:3, :3] @ cross @ cross
    return terms
