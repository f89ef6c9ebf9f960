"""The plan being played: chunks placed in plan time, joined without a jump.

A chunk is placed by its observation: what has been played since then is skipped, by the plan's own clock (see
``plan_clock``). So the actions that were executed while the model was thinking are never played twice, those that were
not are never left out, and nothing is ever padded.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES, Joiner, Plan, Strategy, make_joiner
from qwen_vla_core.runtime.plan_clock import NANO, PlanClock

LONGEST_BRAKE_S = 0.25


def brake_seconds(patience_s: float) -> float:
    """How long a plan takes to stop when its chunk is late: a quarter of the watchdog's time, 0.25 s at most."""
    return min(LONGEST_BRAKE_S, patience_s / 4)


class ChunkBuffer:
    """Accepts or refuses chunks, and answers what the plan says now.

    Args:
        channels: the c channel names in the order ``sample`` answers in.
        horizon: H, actions per chunk.
        period_s: seconds between two actions.
        strategy: how chunks are joined.
        patience_s: without a chunk for this long the plan has come to a stand (the watchdog's time); None: it is played
            to its end.
        future_tolerance_s: a stamp may be ahead of the clock by this much (clocks of two processes differ a little).
        held_c: (c,) bool, True for displacements per period: held for their period instead of interpolated, so that
            what is commanded adds up to what was planned, and zero while the plan stands.

    Attributes:
        epoch: counts ``begin_epoch`` calls; a chunk observed before the current epoch began is refused.
        rejections: how often a chunk was refused, by reason.
        accepted: how many chunks were taken.
        clock: the plan's time.
        last_jump_c: (c,) the newest chunk minus what was being played when it came; None where nothing was.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        horizon: int,
        period_s: float,
        *,
        strategy: Strategy = STRATEGIES[DEFAULT_STRATEGY],
        patience_s: float | None = None,
        future_tolerance_s: float = 0.05,
        held_c: np.ndarray | None = None,
    ) -> None:
        self.channels = channels
        self.horizon = horizon
        self.period_s = period_s
        self.epoch = 0
        self.accepted = 0
        self.rejections: Counter[str] = Counter()
        self.last_jump_c: np.ndarray | None = None
        self.held_c = np.zeros(len(channels), bool) if held_c is None else np.asarray(held_c, bool)
        self.clock = PlanClock(brake_seconds(4.0 if patience_s is None else patience_s), 2.0 * horizon * period_s + 1.0)
        self._strategy = strategy
        self._patience_ns = None if patience_s is None else int(patience_s * NANO)
        self._stop_by_ns: int | None = None
        self._future_ns = int(future_tolerance_s * NANO)
        self._epoch_start_ns: int | None = None
        self._newest_ns: int | None = None
        self._joiner: Joiner = make_joiner(strategy)
        self._plan: Plan | None = None
        self._chunk: ActionChunk | None = None
        self._plan_epoch = 0
        self._sampled: tuple[int, float] | None = None
        self._displaced_c = np.zeros(len(channels))

    @property
    def empty(self) -> bool:
        """Whether there is no plan."""
        return self._plan is None

    @property
    def plan_epoch(self) -> int | None:
        """The epoch in which the newest chunk of the plan was taken; None without a plan."""
        return None if self._plan is None else self._plan_epoch

    @property
    def stamp_ns(self) -> int | None:
        """Observation stamp of the newest chunk in the plan."""
        return None if self._chunk is None else self._chunk.stamp_ns

    def push(self, chunk: ActionChunk, now_ns: int, pose_c: np.ndarray | None = None) -> str | None:
        """Joins ``chunk`` to the plan from ``now_ns`` on.

        Columns may come in any order; the set of names must be exactly this robot's.

        Args:
            chunk: absolute actions.
            now_ns: time of its arrival.
            pose_c: (c,) what is commanded now, where there is no plan; None: unknown.

        Returns:
            None when accepted, otherwise why not (also counted in ``rejections``).
        """
        reason = self._objection(chunk, now_ns)
        if reason is not None:
            self.rejections[reason] += 1
            return reason
        actions_hc = np.asarray(chunk.actions_hc, dtype=np.float64)
        if chunk.channels != self.channels:
            actions_hc = actions_hc[:, [chunk.channels.index(name) for name in self.channels]]
        self.advance(now_ns)
        now_s, seen_s = self.clock.now_s, self.clock.at(chunk.stamp_ns)
        from_c, start_c = pose_c, pose_c
        if self._plan is not None:
            from_c, start_c = self._joiner.at(now_s), self._joiner.at(seen_s)
        knots_tc = np.vstack([actions_hc[:1] if start_c is None else start_c[None], actions_hc])
        plan = Plan(knots_tc, seen_s, self.period_s, self.held_c)
        with np.errstate(over="ignore", invalid="ignore"):
            self.last_jump_c = None if self._plan is None else plan.at(now_s) - from_c
        self._joiner.join(plan, now_s, from_c, alone=self._plan is None or self._plan_epoch != self.epoch)
        self._chunk = ActionChunk(actions_hc, self.channels, chunk.stamp_ns, self.period_s)
        self._plan, self._plan_epoch, self._newest_ns = plan, self.epoch, chunk.stamp_ns
        self._stop_by_ns = None if self._patience_ns is None else now_ns + self._patience_ns
        self.clock.released()
        self.accepted += 1
        return None

    def sample(self, t_ns: int) -> np.ndarray | None:
        """(c,) the joined plan at ``t_ns``, which moves the plan's clock there; None without a plan.

        Displacements are what the plan moved since the last call, per period: a plan at half speed moves half as far.
        """
        self.advance(t_ns)
        if self._plan is None:
            self._sampled = (t_ns, self.clock.now_s)
            return None
        value_c = self._joiner.at(self.clock.now_s)
        if self.held_c.any():
            self._displaced_c = self._displacement(t_ns)
            value_c[self.held_c] = self._displaced_c[self.held_c]
        self._sampled = (t_ns, self.clock.now_s)
        return value_c

    def now(self) -> np.ndarray | None:
        """(c,) the joined plan where it was last sampled; None without a plan."""
        return None if self._plan is None else self._joiner.at(self.clock.now_s)

    def hold(self, t_ns: int) -> None:
        """Nothing is played until ``t_ns``: the plan's clock stands."""
        self.clock.hold(t_ns)

    def late_ms(self, t_ns: int) -> float | None:
        """Milliseconds since the plan had to be slowed down for want of a chunk; None while it is in time."""
        since_ns = self.clock.late_since_ns
        return None if since_ns is None or self._plan is None else (t_ns - since_ns) / 1e6

    def rest(self) -> np.ndarray | None:
        """(1 + n, c) the plan from now on: where it is, and what is due 1, 2, … periods of plan time from now.

        n covers what is left of the newest chunk; a displacement is that of the period before it is due. None without a
        plan.
        """
        if self._plan is None:
            return None
        now_s = self.clock.now_s
        count = max(int((self._plan.end_s - now_s) / self.period_s + 1e-6), 0)
        rows_tc = np.array([self._joiner.at(now_s + index * self.period_s) for index in range(count + 1)])
        for index in range(1, count + 1):
            middle_c = self._joiner.at(now_s + (index - 0.5) * self.period_s)
            rows_tc[index, self.held_c] = middle_c[self.held_c]
        return rows_tc

    def consumed(self, t_ns: int) -> ActionChunk | None:
        """The actions of the newest chunk that have been played, or skipped as played before it came; None if none."""
        count = self.consumed_count(t_ns)
        if self._chunk is None or count == 0:
            return None
        return ActionChunk(self._chunk.actions_hc[:count], self.channels, self._chunk.stamp_ns, self.period_s)

    def consumed_count(self, t_ns: int) -> int:
        """How many of its actions that are; 0 without a plan."""
        if self._plan is None:
            return 0
        elapsed = (self.clock.at(t_ns) - self._plan.origin_s) / self.period_s
        return min(max(int(elapsed + 1e-6), 0), self.horizon)

    def clear(self) -> None:
        """Drops the plan; chunks not newer than it stay refused."""
        self._chunk = self._plan = None
        self.clock.released()

    def begin_epoch(self, now_ns: int) -> None:
        """What was observed before ``now_ns`` will be refused; the plan goes on until the next chunk replaces it."""
        self.epoch += 1
        self._epoch_start_ns = now_ns

    def flush(self, now_ns: int) -> None:
        """Drops the plan and begins a new epoch, also where the world's clock went back."""
        self.clear()
        self.begin_epoch(now_ns)
        self._newest_ns = self._sampled = None
        self._displaced_c = np.zeros(len(self.channels))
        self.clock.forget()

    def _displacement(self, t_ns: int) -> np.ndarray:
        """(c,) the displacements between the plan times of the last call and of this one, per period of real time."""
        assert self._plan is not None
        now_s = self.clock.now_s
        last_ns, last_s = self._sampled if self._sampled is not None else (t_ns, now_s)
        if t_ns <= last_ns:
            return self._displaced_c
        # A tick in which one action ends and the next begins has its share of both.
        periods = int((now_s - self._plan.origin_s) / self.period_s + 1e-9)
        border_s = min(max(self._plan.origin_s + periods * self.period_s, last_s), now_s)
        total_c = self._joiner.at((last_s + border_s) / 2) * (border_s - last_s)
        total_c += self._joiner.at((border_s + now_s) / 2) * (now_s - border_s)
        return np.asarray(total_c / ((t_ns - last_ns) / NANO))

    def advance(self, t_ns: int) -> None:
        """Moves the plan's clock on to ``t_ns``, as ``sample`` does."""
        if self._plan is None:
            self.clock.hold(t_ns)
        else:
            self.clock.advance(t_ns, self._plan.end_s, self._stop_by_ns)

    def _objection(self, chunk: ActionChunk, now_ns: int) -> str | None:
        actions_hc = np.asarray(chunk.actions_hc)
        if len(chunk.channels) != len(self.channels) or set(chunk.channels) != set(self.channels):
            return "wrong_channels"
        if actions_hc.shape != (self.horizon, len(self.channels)):
            return "wrong_length"
        if not abs(chunk.period_s - self.period_s) <= 0.01 * self.period_s:
            return "wrong_period"
        if not np.isfinite(actions_hc).all():
            return "non_finite"
        if chunk.stamp_ns > now_ns + self._future_ns:
            return "future_stamp"
        if chunk.stamp_ns + self.horizon * self.period_s * NANO < now_ns:
            return "expired"
        if self._epoch_start_ns is not None and chunk.stamp_ns < self._epoch_start_ns:
            return "before_epoch"
        if self._newest_ns is not None and chunk.stamp_ns <= self._newest_ns:
            return "not_newer"
        return None
