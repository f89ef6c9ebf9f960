"""The plan being played: one chunk, read by time, replaced without a jump.

A chunk is placed by the time of the observation that caused it, so inference latency is skipped by the clock itself:
the actions whose time has passed while the model was thinking are never played, and nothing is ever padded.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from qwen_vla_core.interfaces import ActionChunk

NANO = 1_000_000_000


class ChunkBuffer:
    """Accepts or refuses chunks, and answers what the plan says at a given time.

    Args:
        channels: the c channel names in the order ``sample`` answers in.
        horizon: H, actions per chunk.
        period_s: seconds between two actions.
        blend_s: the step between the old plan and a new one fades out over this time.
        future_tolerance_s: a stamp may be ahead of the clock by this much (clocks of two processes differ a little).
        held_c: (c,) bool, True for displacements per period: held for their period instead of interpolated, so that
            what is commanded adds up to what was planned, and zero once the plan is over.

    Attributes:
        epoch: counts ``flush`` calls; a chunk observed before the current epoch began is refused.
        rejections: how often a chunk was refused, by reason.
        accepted: how many chunks were taken.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        horizon: int,
        period_s: float,
        *,
        blend_s: float = 0.2,
        future_tolerance_s: float = 0.05,
        held_c: np.ndarray | None = None,
    ) -> None:
        self.channels = channels
        self.horizon = horizon
        self.period_s = period_s
        self.epoch = 0
        self.accepted = 0
        self.rejections: Counter[str] = Counter()
        self._held_c = np.zeros(len(channels), bool) if held_c is None else np.asarray(held_c, bool)
        self._blend_ns = int(blend_s * NANO)
        self._future_ns = int(future_tolerance_s * NANO)
        self._epoch_start_ns: int | None = None
        self._newest_ns: int | None = None
        self._chunk: ActionChunk | None = None
        self._step_c: np.ndarray | None = None
        self._blend_start_ns = 0

    @property
    def empty(self) -> bool:
        """Whether there is no plan."""
        return self._chunk is None

    @property
    def stamp_ns(self) -> int | None:
        """Observation stamp of the plan being played."""
        return None if self._chunk is None else self._chunk.stamp_ns

    def push(self, chunk: ActionChunk, now_ns: int) -> str | None:
        """Makes ``chunk`` the plan from ``now_ns`` on.

        Columns may come in any order; the set of names must be exactly this robot's.

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
        before_c = self.sample(now_ns)
        self._chunk = ActionChunk(actions_hc, self.channels, chunk.stamp_ns, self.period_s)
        self._newest_ns = chunk.stamp_ns
        self._step_c = None
        if before_c is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # finite, but 1e308 apart: nothing worth blending
                step_c = before_c - self._planned(now_ns)
            self._step_c = np.where(np.isfinite(step_c), step_c, 0.0)
        self._blend_start_ns = now_ns
        self.accepted += 1
        return None

    def sample(self, t_ns: int) -> np.ndarray | None:
        """(c,) the plan at ``t_ns``, linear between actions; before the first and after the last action, that action.
        Displacements per period: the action whose period it is.

        For ``blend_s`` after a replacement the difference between both plans at that instant fades out linearly, so
        the answer is continuous in time however different the plans are. None without a plan.
        """
        if self._chunk is None:
            return None
        planned_c = self._planned(t_ns)
        if self._step_c is not None:
            elapsed = t_ns - self._blend_start_ns
            if elapsed < self._blend_ns:
                return planned_c + self._step_c * (1.0 - max(elapsed, 0) / self._blend_ns)
        return planned_c

    def consumed(self, t_ns: int) -> ActionChunk | None:
        """The actions of the plan that are due by ``t_ns``: what a next inference may condition on; None if none."""
        count = self.consumed_count(t_ns)
        if self._chunk is None or count == 0:
            return None
        return ActionChunk(self._chunk.actions_hc[:count], self.channels, self._chunk.stamp_ns, self.period_s)

    def consumed_count(self, t_ns: int) -> int:
        """How many actions of the plan are due by ``t_ns``; 0 without a plan."""
        if self._chunk is None:
            return 0
        elapsed = (t_ns - self._chunk.stamp_ns) / NANO / self.period_s
        return min(max(int(elapsed + 1e-6), 0), self.horizon)

    def clear(self) -> None:
        """Drops the plan; chunks not newer than it stay refused."""
        self._chunk = None
        self._step_c = None

    def flush(self, now_ns: int) -> None:
        """Drops the plan and begins a new epoch: whatever was observed before ``now_ns`` will be refused."""
        self.clear()
        self.epoch += 1
        self._epoch_start_ns = now_ns
        self._newest_ns = None

    def _planned(self, t_ns: int) -> np.ndarray:
        """(c,) the current chunk alone at ``t_ns``. Action i is due at stamp + (i + 1)·period."""
        planned_c = self._interpolated(t_ns)
        if self._held_c.any():
            assert self._chunk is not None
            period = max(int((t_ns - self._chunk.stamp_ns) / NANO / self.period_s + 1e-6), 0)
            now_c = self._chunk.actions_hc[period] if period < self.horizon else np.zeros(len(self.channels))
            planned_c[self._held_c] = now_c[self._held_c]
        return planned_c

    def _interpolated(self, t_ns: int) -> np.ndarray:
        """(c,) every channel as a target that is due at the end of its period."""
        assert self._chunk is not None
        index = (t_ns - self._chunk.stamp_ns) / NANO / self.period_s - 1.0
        index = min(max(index, 0.0), self.horizon - 1.0)
        first = min(int(index), self.horizon - 2) if self.horizon > 1 else 0
        weight = index - first
        actions_hc = self._chunk.actions_hc
        if weight == 0.0:
            return actions_hc[first].copy()
        return actions_hc[first] * (1.0 - weight) + actions_hc[first + 1] * weight

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
