"""What the robot will be doing anyway while the next chunk is computed, aligned with that chunk's observation.

The controller says from time to time what is left of its plan (``ChunkBuffer.rest``); the policy's side keeps the last
few of these and reads from them, for any observation, the actions that are committed.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.interfaces import Committed, CommittedUse
from qwen_vla_core.runtime.plan_clock import NANO


@dataclass(frozen=True)
class PlanRest:
    """The plan from one moment on.

    Attributes:
        t_ns: that moment.
        rows_tc: (1 + n, c) what is commanded then, and what is due 1 … n periods of plan time later.
    """

    t_ns: int
    rows_tc: np.ndarray


class PlanHistory:
    """The last plans that the controller told.

    Args:
        period_s: between two actions.
        held_c: (c,) bool, True for displacements per period.
        keep_s: how long a plan is kept.
    """

    def __init__(self, period_s: float, held_c: np.ndarray, keep_s: float = 4.0) -> None:
        self.period_s = period_s
        self.held_c = np.asarray(held_c, bool)
        self._keep_ns = int(keep_s * NANO)
        self._rests: deque[PlanRest] = deque()

    def clear(self) -> None:
        """Forgets everything: what was told belongs to another motion."""
        self._rests.clear()

    @property
    def times_ns(self) -> tuple[int, ...]:
        """When the plans that are kept were told, oldest first."""
        return tuple(rest.t_ns for rest in self._rests)

    def add(self, rest: PlanRest) -> None:
        """Keeps a plan; plans come in the order of their times, one that is older than the last is ignored."""
        if self._rests and rest.t_ns <= self._rests[-1].t_ns:
            return
        self._rests.append(rest)
        while self._rests[0].t_ns < rest.t_ns - self._keep_ns:
            self._rests.popleft()

    @property
    def end_ns(self) -> int | None:
        """When the newest plan ends at full speed; None without one."""
        if not self._rests:
            return None
        newest = self._rests[-1]
        return newest.t_ns + int((len(newest.rows_tc) - 1) * self.period_s * NANO)

    def committed(
        self, stamp_ns: int, horizon: int, latency_s: float, use: CommittedUse = "guided"
    ) -> Committed | None:
        """The rest of the plan from an observation on.

        What lies between an observation and the newest plan is read from the plans before it.

        Args:
            stamp_ns: of the observation.
            horizon: H; no more rows than these.
            latency_s: from the stamp until the chunk will take over; the rows up to there, and the one it goes on to,
                are frozen.
            use: how the sampler is to continue them.

        Returns:
            None where the plan does not reach one period beyond the observation, or does not go back to it.
        """
        rows = []
        for index in range(horizon):
            row_c = self._row(stamp_ns, index)
            if row_c is None:
                break
            rows.append(row_c)
        if not rows:
            return None
        frozen = math.ceil(latency_s / self.period_s - 1e-6)
        return Committed(np.array(rows), min(max(frozen, 0), len(rows)), use)

    def _row(self, stamp_ns: int, index: int) -> np.ndarray | None:
        """(c,) what is due ``index + 1`` periods after ``stamp_ns``."""
        due_s = (index + 1) * self.period_s
        for rest in reversed(self._rests):
            ahead_s = (stamp_ns - rest.t_ns) / NANO + due_s
            if ahead_s < -1e-9:
                continue  # told after this was due
            position = ahead_s / self.period_s
            if position > len(rest.rows_tc) - 1 + 1e-6:
                return None  # the newest that was told by then ends before
            position = min(max(position, 0.0), len(rest.rows_tc) - 1.0)
            low = min(int(position + 1e-9), len(rest.rows_tc) - 1)
            high = min(low + 1, len(rest.rows_tc) - 1)
            weight = max(position - low, 0.0)
            row_c = (1.0 - weight) * rest.rows_tc[low] + weight * rest.rows_tc[high]
            if self.held_c.any():
                row_c[self.held_c] = rest.rows_tc[max(round(position), min(1, high))][self.held_c]
            return np.asarray(row_c, dtype=np.float64)
        return None
