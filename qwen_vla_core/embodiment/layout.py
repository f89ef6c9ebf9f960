"""Channels ↔ columns of the common action tensor Y ∈ R^{H×K}: the first c columns are real, the rest zero [P]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwen_vla_core.embodiment.spec import MAX_CHANNELS, Embodiment


@dataclass(frozen=True)
class ActionLayout:
    """Pads an embodiment's c channels to K columns, with the masks that keep padding out of noise, input and loss.

    Attributes:
        embodiment: gives H and the channels.
        K: width of the tensor; 64 is inferred from the published parameter counts [I].

    Raises:
        ValueError: the embodiment has more than K channels.
    """

    embodiment: Embodiment
    K: int = MAX_CHANNELS

    def __post_init__(self) -> None:
        if self.c > self.K:
            raise ValueError(f"{self.embodiment.name} has {self.c} action channels, the tensor has only K={self.K}")

    @property
    def H(self) -> int:
        """Actions per chunk."""
        return self.embodiment.control.horizon

    @property
    def c(self) -> int:
        """Real channels."""
        return len(self.embodiment.channels)

    @cached_property
    def channel_mask(self) -> np.ndarray:
        """(K,) bool: which columns are real."""
        return np.arange(self.K) < self.c

    def step_mask(self, valid_steps: int | np.ndarray) -> np.ndarray:
        """(…, H) bool: the first ``valid_steps`` actions are real; fewer than H at the end of an episode.

        Raises:
            ValueError: a count outside 0 … H.
        """
        counts = np.asarray(valid_steps)
        if (counts < 0).any() or (counts > self.H).any():
            raise ValueError(f"valid_steps must be within 0 … {self.H}, got {valid_steps}")
        return np.arange(self.H) < counts[..., None]

    def mask(self, valid_steps: int | np.ndarray | None = None) -> np.ndarray:
        """(…, H, K) bool M: a real step of a real channel; all H steps when ``valid_steps`` is None."""
        steps = self.step_mask(self.H if valid_steps is None else valid_steps)
        return steps[..., None] & self.channel_mask

    def pad(self, actions_hc: np.ndarray) -> np.ndarray:
        """(…, c) → (…, K) with zeros in the padded columns, same dtype; usually (…, H, c) → (…, H, K).

        Raises:
            ValueError: the last axis is not c.
        """
        if actions_hc.shape[-1] != self.c:
            raise ValueError(f"expected {self.c} channels on the last axis, got shape {actions_hc.shape}")
        padded = np.zeros((*actions_hc.shape[:-1], self.K), dtype=actions_hc.dtype)
        padded[..., : self.c] = actions_hc
        return padded

    def unpad(self, actions_hk: np.ndarray) -> np.ndarray:
        """(…, K) → (…, c): drops the padded columns (a view, not a copy).

        Raises:
            ValueError: the last axis is not K.
        """
        if actions_hk.shape[-1] != self.K:
            raise ValueError(f"expected {self.K} columns on the last axis, got shape {actions_hk.shape}")
        return actions_hk[..., : self.c]
