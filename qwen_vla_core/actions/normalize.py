"""Quantile normalisation of states and actions: an invertible pair that lives inside the checkpoint.

Published form [P]: ``ã = 2 (a − q01) / (q99 − q01) − 1``, clipped to [−1, 1], per dataset and channel. A channel whose
quantiles (almost) coincide carries no information: it maps to 0 and inverts to q01 [O], where a plain division would
blow up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError

# q99 − q01 at or below this fraction of the channel's magnitude (or of 1) counts as constant.
CONSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Quantiles:
    """The 1 % and 99 % quantiles of n channels.

    Attributes:
        q01: n values in channel units.
        q99: n values in channel units, each ≥ q01.
        names: n channel names; loading against another robot's channels fails by name.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.q01) == len(self.q99) == len(self.names):
            raise ValueError(
                f"q01, q99 and names differ in length: {len(self.q01)}, {len(self.q99)}, {len(self.names)}"
            )
        if not np.all(np.isfinite([self.q01, self.q99])):
            raise ValueError("quantiles must be finite")
        for name, low, high in zip(self.names, self.q01, self.q99, strict=True):
            if high < low:
                raise ValueError(f"channel {name}: q99 {high} is below q01 {low}")

    @classmethod
    def fit(cls, values_nc: np.ndarray, names: Sequence[str]) -> Quantiles:
        """Quantiles of data.

        Args:
            values_nc: (..., c) in channel units; all leading axes are samples.
            names: c channel names.

        Raises:
            ValueError: no samples, a wrong channel count, or a non-finite value.
        """
        values = np.asarray(values_nc, dtype=np.float64).reshape(-1, np.shape(values_nc)[-1])
        if values.shape[0] == 0 or values.shape[1] != len(names):
            raise ValueError(f"need samples of {len(names)} channels, got an array of shape {np.shape(values_nc)}")
        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(tuple(map(float, q01)), tuple(map(float, q99)), tuple(names))

    @property
    def constant(self) -> np.ndarray:
        """(c,) bool: channels without information."""
        low, high = np.asarray(self.q01), np.asarray(self.q99)
        return (high - low) <= CONSTANT_TOLERANCE * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """(..., c) channel units → (..., c) in [−1, 1], float64; undone by ``denormalize``."""
        low, span = np.asarray(self.q01), np.asarray(self.q99) - np.asarray(self.q01)
        unit = 2.0 * (np.asarray(values, dtype=np.float64) - low) / np.where(self.constant, 1.0, span) - 1.0
        return np.where(self.constant, 0.0, np.clip(unit, -1.0, 1.0))

    def denormalize(self, unit: np.ndarray) -> np.ndarray:
        """(..., c) in [−1, 1] → (..., c) channel units, float64. Values outside [−1, 1] are clipped first."""
        low, span = np.asarray(self.q01), np.asarray(self.q99) - np.asarray(self.q01)
        values = low + 0.5 * (np.clip(np.asarray(unit, dtype=np.float64), -1.0, 1.0) + 1.0) * span
        return np.where(self.constant, low, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"names": list(self.names), "q01": list(self.q01), "q99": list(self.q99)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantiles:
        """The inverse of ``to_dict``.

        Raises:
            UserError: keys are missing, unknown, or hold no valid quantiles.
        """
        if set(data) != {"names", "q01", "q99"}:
            raise UserError(f"quantiles need exactly the keys names, q01, q99; got {sorted(data)}")
        try:
            return cls(tuple(map(float, data["q01"])), tuple(map(float, data["q99"])), tuple(map(str, data["names"])))
        except (TypeError, ValueError) as error:
            raise UserError(f"quantiles are not valid: {error}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
