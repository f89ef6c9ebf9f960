"""Counts of what was clipped or refused, per limit and channel, and how they read in diagnostics."""

from __future__ import annotations

from collections import Counter

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment


class Tally:
    """How often each limit changed each channel.

    Attributes:
        steps: limit → number of steps (or chunks) in which it acted on any channel.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self._groups: list[tuple[str, int, tuple[str, ...]]] = []
        start = 0
        for group in embodiment.actions:
            self._groups.append((group.name, start, group.channels))
            start += len(group.channels)
        self._count = start
        self.steps: Counter[str] = Counter()
        self._channels: dict[str, np.ndarray] = {}

    def add(self, limit: str, acted_c: np.ndarray) -> None:
        """Notes one step; ``acted_c`` (c,) bool says which channels were changed. None of them: nothing is noted."""
        if not acted_c.any():
            return
        self.steps[limit] += 1
        if limit not in self._channels:
            self._channels[limit] = np.zeros(self._count, dtype=np.int64)
        self._channels[limit] += acted_c

    def clear(self) -> None:
        """Begins again at zero."""
        self.steps.clear()
        self._channels.clear()

    def report(self, prefix: str) -> dict[str, int | str]:
        """Diagnostics: ``prefix.limit`` steps, ``prefix.limit.group`` of its worst channel, and that channel's name."""
        values: dict[str, int | str] = {}
        for limit, steps in self.steps.items():
            values[f"{prefix}.{limit}"] = steps
            counts = self._channels[limit]
            for name, start, channels in self._groups:
                own = counts[start : start + len(channels)]
                if own.any():
                    worst = int(np.argmax(own))
                    values[f"{prefix}.{limit}.{name}"] = int(own[worst])
                    values[f"{prefix}.{limit}.{name}.worst"] = channels[worst]
        return values
