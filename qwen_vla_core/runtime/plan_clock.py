"""The time of the plan: it runs with the world's while chunks come in time, and slows down smoothly when one is late.

A plan is read by this clock and not by the world's, so that what is skipped of a new chunk is what has really been
played since its observation: nothing while the robot stood, less than the time that passed while the plan was slowed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque

NANO = 1_000_000_000
STEP_S = 0.01  # the law below is continuous: longer ticks are integrated in steps of this
LONGEST_S = 10.0  # of one tick; a longer gap counts as this


class PlanClock:
    """Plan time as a function of the world's time; rate 1 is normal, 0 stands still.

    The rate changes by at most ``1 / brake_s`` per second. It falls so that it reaches zero exactly where the plan
    ends, and by the time it has to: with deceleration d, a rate r still covers r²/2d of the plan and takes r/d.

    Args:
        brake_s: seconds from rate 1 to rate 0.
        keep_s: how long ``at`` remembers.

    Attributes:
        now_s: plan time.
        rate: plan seconds per second.
        late_since_ns: since when the rate is below what it would be with a chunk in time; None while it is not.
    """

    def __init__(self, brake_s: float, keep_s: float) -> None:
        if brake_s <= 0 or keep_s <= 0:
            raise ValueError("brake_s and keep_s must be positive")
        self.brake_s = brake_s
        self.now_s = 0.0
        self.rate = 0.0
        self.late_since_ns: int | None = None
        self._keep_ns = int(keep_s * NANO)
        self._last_ns: int | None = None
        self._history: deque[tuple[int, float]] = deque()

    def advance(self, t_ns: int, end_s: float, stop_by_ns: int | None = None) -> None:
        """Moves on to ``t_ns``, which may be the same as before; an earlier time changes nothing.

        Args:
            t_ns: the world's time.
            end_s: plan time at which the plan is over.
            stop_by_ns: time by which the plan has to stand still unless a chunk comes; None: no such time.
        """
        last_ns = self._last_ns
        if last_ns is not None and t_ns > last_ns:
            total_s = min((t_ns - last_ns) / NANO, LONGEST_S)
            count = math.ceil(total_s / STEP_S)
            for index in range(count):
                from_ns = last_ns + (t_ns - last_ns) * index // count
                self._step(total_s / count, end_s, None if stop_by_ns is None else (stop_by_ns - from_ns) / NANO)
            if self.late_since_ns is None and self._limit(STEP_S, end_s, stop_by_ns, t_ns) < 1.0:
                self.late_since_ns = t_ns
        self._remember(t_ns)

    def released(self) -> None:
        """A chunk has come: nothing is late any more."""
        self.late_since_ns = None

    def hold(self, t_ns: int) -> None:
        """Stands still until ``t_ns``: nothing was played."""
        self.rate = 0.0
        self.late_since_ns = None
        self._remember(t_ns)

    def at(self, t_ns: int) -> float:
        """Plan time at a moment in the past; before anything is remembered it stood still, the future is now."""
        if self._last_ns is None or t_ns >= self._last_ns:
            return self.now_s
        index = bisect_right(self._history, t_ns, key=lambda entry: entry[0])
        if index == 0:
            return self._history[0][1]
        (t0, s0), (t1, s1) = self._history[index - 1], self._history[index]
        return s0 + (s1 - s0) * (t_ns - t0) / (t1 - t0)

    def forget(self) -> None:
        """The world's clock went back: what was remembered of it is void."""
        self._history.clear()
        self._last_ns = None
        self.rate = 0.0
        self.late_since_ns = None

    def _step(self, dt_s: float, end_s: float, stop_in_s: float | None) -> None:
        change = dt_s / self.brake_s
        wanted = min(1.0, self._ending(dt_s, end_s))
        if stop_in_s is not None:
            wanted = min(wanted, max(stop_in_s - dt_s, 0.0) / self.brake_s)
        self.rate = min(max(wanted, self.rate - change), self.rate + change)
        self.now_s = min(self.now_s + self.rate * dt_s, max(end_s, self.now_s))
        if self.now_s >= end_s:
            self.rate = 0.0

    def _limit(self, dt_s: float, end_s: float, stop_by_ns: int | None, t_ns: int) -> float:
        limit = self._ending(dt_s, end_s)
        return limit if stop_by_ns is None else min(limit, (stop_by_ns - t_ns) / NANO / self.brake_s)

    def _ending(self, dt_s: float, end_s: float) -> float:
        """The largest rate of a step after which the plan can still be braked before its end.

        Positive root of ``r·dt + r²/(2d) = what is left``, d = 1 / brake_s.
        """
        left_s = max(end_s - self.now_s, 0.0)
        return 2.0 * left_s / (dt_s + math.sqrt(dt_s * dt_s + 2.0 * left_s * self.brake_s)) if left_s > 0 else 0.0

    def _remember(self, t_ns: int) -> None:
        if self._last_ns is not None and t_ns < self._last_ns:
            return
        if self._history and self._history[-1][0] == t_ns:
            self._history[-1] = (t_ns, self.now_s)
        else:
            self._history.append((t_ns, self.now_s))
        self._last_ns = t_ns
        while len(self._history) > 2 and self._history[1][0] < t_ns - self._keep_ns:
            self._history.popleft()
