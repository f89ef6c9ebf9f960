"""When a plan may no longer be played, group by group.

Two clocks run. One measures how long ago a fresh chunk arrived: a dead policy, or one that repeats what it has said.
The other measures how old the observation behind the plan is: a policy that goes on talking, but later and later, or
about a picture that comes late. The first limit may differ by group, so that a base stops before the arms hold; the
second is one for all, because a chunk is one look at the world.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment

MILLI = 1_000_000


class Verdict(NamedTuple):
    """What has timed out: (c,) bool, whether that is everything, and the reason ('' when nothing has)."""

    late_c: np.ndarray
    everything: bool
    reason: str


class Watchdog:
    """Judges the plan by time alone; times are ROS nanoseconds."""

    def __init__(self, embodiment: Embodiment) -> None:
        safety = embodiment.safety
        self._groups: list[tuple[str, slice, int]] = []
        start = 0
        for group in embodiment.actions:
            columns = slice(start, start + len(group.channels))
            limit_ms = safety.watchdog_ms if group.watchdog_ms is None else group.watchdog_ms
            self._groups.append((group.name, columns, int(limit_ms * MILLI)))
            start += len(group.channels)
        self._count = start
        self._shortest_ns = min(limit for _, _, limit in self._groups)
        self._observation_ns = int(embodiment.max_observation_age_ms * MILLI)
        self._none = Verdict(np.zeros(start, bool), False, "")
        self._arrived_ns: int | None = None
        self._observed_ns: int | None = None

    def fresh(self, t_ns: int, observed_ns: int) -> None:
        """A chunk became the plan at ``t_ns``; it was caused by an observation of ``observed_ns``."""
        self._arrived_ns, self._observed_ns = t_ns, observed_ns

    def clear(self) -> None:
        """There is no plan to judge until the next chunk."""
        self._arrived_ns = self._observed_ns = None

    def check(self, t_ns: int) -> Verdict:
        """What has timed out at ``t_ns``; nothing while no chunk has come at all."""
        if self._arrived_ns is None or self._observed_ns is None:
            return self._none
        silent_ns, age_ns = t_ns - self._arrived_ns, t_ns - self._observed_ns
        if age_ns > self._observation_ns:
            reason = f"watchdog: the plan's observation is {age_ns / MILLI:.0f} ms old"
            # A dead policy is the commoner cause, and the more useful thing to say.
            if silent_ns > max(limit for _, _, limit in self._groups):
                reason = f"watchdog: no chunk for {silent_ns / MILLI:.0f} ms"
            return Verdict(np.ones(self._count, bool), True, reason)
        if silent_ns <= self._shortest_ns:
            return self._none
        late_c, names = np.zeros(self._count, bool), []
        for name, columns, limit in self._groups:
            if silent_ns > limit:
                late_c[columns] = True
                names.append(name)
        reason = f"watchdog: no chunk for {silent_ns / MILLI:.0f} ms"
        if late_c.all():
            return Verdict(late_c, True, reason)
        return Verdict(late_c, False, f"{reason} ({', '.join(names)} timed out)")
