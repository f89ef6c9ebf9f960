from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_support import make_policy

from qwen_vla_core.model.policy import QwenVLA


@pytest.fixture
def policy() -> QwenVLA:
    return make_policy()


@pytest.fixture
def difference() -> Callable[[np.ndarray, np.ndarray], float]:
    """Largest difference relative to the largest value."""

    def measure(answer: np.ndarray, reference: np.ndarray) -> float:
        assert answer.shape == reference.shape
        return float(np.abs(answer - reference).max() / np.abs(reference).max())

    return measure
