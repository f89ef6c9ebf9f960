"""The last chunks, what of them was executed, and what is left of the plan: the page's timeline. No ROS in here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_ros.dashboard.board import to_json

KEPT_CHUNKS = 8
KEPT_VALUES = 40  # measured values kept for the curve: some seconds, at the page's rate
DIGITS = 5


@dataclass
class _Kept:
    chunk: ActionChunk
    received_ns: int
    consumed: int = 0


class Timeline:
    """Feeds from one thread, JSON for any number of others.

    All times are ROS time in nanoseconds, and become seconds before ``now`` on the page.
    """

    def __init__(self, channels: tuple[str, ...]) -> None:
        self._channels = channels
        self._lock = threading.Lock()
        self._chunks: deque[_Kept] = deque(maxlen=KEPT_CHUNKS)
        self._plan: PlanRest | None = None
        self._measured: deque[tuple[int, tuple[float | None, ...]]] = deque(maxlen=KEPT_VALUES)
        self._version = 0
        self._texts: dict[int, tuple[int, str]] = {}

    @property
    def version(self) -> int:
        """Counts changes."""
        return self._version

    def add_chunk(self, chunk: ActionChunk, received_ns: int) -> None:
        """A chunk of the policy; one of other channels is not shown."""
        if chunk.channels == self._channels:
            self._change(lambda: self._chunks.append(_Kept(chunk, received_ns)))

    def add_consumed(self, prefix: ActionChunk) -> None:
        """The executed part of the chunk with the same stamp."""

        def change() -> None:
            for kept in self._chunks:
                if kept.chunk.stamp_ns == prefix.stamp_ns:
                    kept.consumed = max(kept.consumed, min(len(prefix.actions_hc), len(kept.chunk.actions_hc)))

        self._change(change)

    def add_plan(self, rest: PlanRest) -> None:
        """What is left of the plan."""

        def change() -> None:
            self._plan = rest if len(rest.rows_tc) > 1 else None

        self._change(change)

    def add_measured(self, t_ns: int, values: tuple[float | None, ...]) -> None:
        """Measured values by action channel; None where nothing measures it."""
        self._change(lambda: self._measured.append((t_ns, values)))

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            self._version += 1

    def text(self, channel: int) -> tuple[int, str]:
        """(version, JSON) for the page: every chunk's span, and the values of one channel."""
        channel = channel if 0 <= channel < len(self._channels) else 0
        with self._lock:
            known = self._texts.get(channel)
            if known is not None and known[0] == self._version:
                return known
            text = to_json(self._section(channel))
            self._texts[channel] = (self._version, text)
            return self._texts[channel]

    def _section(self, channel: int) -> dict[str, Any]:
        chunks = [
            {
                "stamp": _seconds(kept.chunk.stamp_ns),
                "received": _seconds(kept.received_ns),
                "period": round(kept.chunk.period_s, 6),
                "consumed": kept.consumed,
                "values": _rounded(kept.chunk.actions_hc[:, channel]),
            }
            for kept in self._chunks
        ]
        plan = self._plan
        measured = [(t_ns, values[channel]) for t_ns, values in self._measured if values[channel] is not None]
        return {
            "channel": channel,
            "chunks": chunks,
            "plan": None if plan is None else {"t": _seconds(plan.t_ns), "values": _rounded(plan.rows_tc[:, channel])},
            "measured": {
                "t": [_seconds(t_ns) for t_ns, _ in measured],
                "values": [round(float(value or 0.0), DIGITS) for _, value in measured],
            },
        }


def _seconds(t_ns: int) -> float:
    return round(t_ns * 1e-9, 3)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
