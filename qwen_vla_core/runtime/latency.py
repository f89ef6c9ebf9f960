"""Percentiles of recent durations, without the warm-up that would spoil them."""

from __future__ import annotations

from collections import deque

import numpy as np


class LatencyWindow:
    """Keeps the last ``size`` durations after ignoring the first ``warm_up`` ones.

    The first inferences of a process load kernels and fill caches; counting them in made peers skip most of a chunk.
    """

    def __init__(self, size: int = 200, warm_up: int = 3) -> None:
        if size < 1 or warm_up < 0:
            raise ValueError("size must be at least 1 and warm_up at least 0")
        self._values_s: deque[float] = deque(maxlen=size)
        self._to_ignore = warm_up

    def __len__(self) -> int:
        return len(self._values_s)

    def add(self, seconds: float) -> None:
        """Records one duration in seconds."""
        if self._to_ignore > 0:
            self._to_ignore -= 1
        else:
            self._values_s.append(seconds)

    def percentile(self, q: float) -> float | None:
        """The q-th percentile (0…100) in seconds; None before anything was recorded after the warm-up."""
        return float(np.percentile(list(self._values_s), q)) if self._values_s else None

    @property
    def p50(self) -> float | None:
        """Median in seconds."""
        return self.percentile(50)

    @property
    def p95(self) -> float | None:
        """95th percentile in seconds."""
        return self.percentile(95)

    @property
    def p99(self) -> float | None:
        """99th percentile in seconds."""
        return self.percentile(99)
