"""Eigengrasps: the main directions in which hands change shape, fitted over datasets and stored as JSON.

10 principal components of the 45-number finger pose per hand [P]. Mean and covariance are gathered in one pass with
exact merging, so that corpora of any size fit in memory. Coefficients are invertible up to the residual, which is
reported at the fit and at every conversion.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.data.hands.points import POSE
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

VERSION = 1
POSES = ("points", "mano")


@dataclass(frozen=True)
class Moments:
    """Count, mean (45,) and scatter (45, 45) of finger poses; merging is exact up to rounding (Chan et al. 1979)."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, poses: np.ndarray) -> Moments:
        """Of (n, 45) poses."""
        if len(poses) == 0:
            return cls(0, np.zeros(POSE), np.zeros((POSE, POSE)))
        mean = poses.mean(axis=0)
        return cls(len(poses), mean, (poses - mean).T @ (poses - mean))

    def merge(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, self.mean + gap * (other.count / count), scatter)


@dataclass(frozen=True)
class Eigengrasps:
    """A fitted basis.

    Attributes:
        pose: how the poses were made: ``points`` or ``mano``; other poses have other components.
        mean: (45,) radians.
        components: (k, 45), orthonormal rows.
        variance: (45,) radians² along all principal directions, largest first.
        samples: hands seen.
        sources: what it was fitted on: [{name, path, hands}].
    """

    pose: str
    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    samples: int
    sources: tuple[dict[str, Any], ...] = ()

    @classmethod
    def fit(cls, moments: Moments, pose: str, count: int, sources: tuple[dict[str, Any], ...] = ()) -> Eigengrasps:
        """Principal components; their sign is chosen so that the largest entry is positive.

        Raises:
            UserError: fewer hands than components.
        """
        if not 1 <= count <= POSE:
            raise UserError(f"--components {count}: between 1 and {POSE}")
        if moments.count <= count:
            raise UserError(f"{moments.count} tracked hands are too few for {count} eigengrasps; add data")
        values, vectors = np.linalg.eigh(moments.scatter / (moments.count - 1))
        components = vectors[:, ::-1][:, :count].T
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        components = components * np.where(largest < 0, -1.0, 1.0)
        return cls(pose, moments.mean, components, np.maximum(values[::-1], 0.0), moments.count, sources)

    @property
    def explained(self) -> np.ndarray:
        """(k,) share of the variance along each component."""
        total = float(self.variance.sum())
        return np.asarray(self.variance[: len(self.components)] / total if total else np.zeros(len(self.components)))

    @property
    def residual_rms(self) -> float:
        """Root mean square, per joint angle in radians, of what the components leave out of the fitted data."""
        return float(np.sqrt(self.variance[len(self.components) :].sum() / POSE))

    def coefficients(self, poses: np.ndarray) -> np.ndarray:
        """(…, 45) → (…, k) radians along the components; undone by ``poses`` up to the residual."""
        return np.asarray((poses - self.mean) @ self.components.T)

    def poses(self, coefficients: np.ndarray) -> np.ndarray:
        """(…, k) → (…, 45) radians."""
        return np.asarray(self.mean + coefficients @ self.components)

    def squared_residual(self, poses: np.ndarray) -> float:
        """Sum over hands of the squared residual, radians²."""
        return float(np.square(poses - self.poses(self.coefficients(poses))).sum())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; undone by ``from_json``."""
        return {
            "version": VERSION,
            "pose": self.pose,
            "samples": self.samples,
            "sources": list(self.sources),
            "explained_variance": [float(share) for share in self.explained],
            "residual_rms_rad": self.residual_rms,
            "mean": self.mean.tolist(),
            "components": self.components.tolist(),
            "variance": self.variance.tolist(),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> Eigengrasps:
        """Reads what ``to_json`` wrote.

        Raises:
            UserError: it is not that; names ``where``.
        """
        try:
            if value["version"] != VERSION or value["pose"] not in POSES:
                raise ValueError("another version or pose")
            arrays = [np.array(value[key], np.float64) for key in ("mean", "components", "variance")]
            mean, components, variance = arrays
            if (
                mean.shape != (POSE,)
                or components.ndim != 2
                or components.shape[1] != POSE
                or variance.shape != (POSE,)
            ):
                raise ValueError("other dimensions")
            if not all(np.isfinite(array).all() for array in arrays):
                raise ValueError("a number is not finite")
            if np.abs(components @ components.T - np.eye(len(components))).max() > 1e-6:
                raise ValueError("components are not orthonormal")
            return cls(value["pose"], mean, components, variance, int(value["samples"]), tuple(value["sources"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: no eigengrasps ({error}); fit them: qwen-vla data hands fit") from None

    @property
    def hash(self) -> str:
        """SHA-256 of mean and components: datasets with the same one mean the same by their channels."""
        told = json.dumps([self.pose, self.mean.tolist(), self.components.tolist()])
        return hashlib.sha256(told.encode()).hexdigest()


def save(grasps: Eigengrasps, path: Path) -> None:
    """Writes the JSON file."""
    atomic_write_json(path, grasps.to_json())


def load(path: Path) -> Eigengrasps:
    """Reads it.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fit one: qwen-vla data hands fit") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return Eigengrasps.from_json(value, str(path))
