"""What each client has asked for and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from qwen_vla_core.runtime.latency import LatencyWindow

PARTS = ("queue", "inference", "total")


@dataclass
class ClientStatistics:
    """One connection; times are of the last 200 answers.

    Attributes:
        number: of the connection, counted from 1.
        address: of the other side.
        name: what it calls itself.
        layout: ``qwen_vla`` or ``openpi``; empty before its first message.
        embodiments: it speaks for.
        epoch: the newest it has named.
        requests: messages that asked for chunks.
        answered: of those, with chunks.
        failed: with an error.
        superseded: dropped for a newer epoch of the same client.
    """

    number: int
    address: str
    name: str = ""
    layout: str = ""
    embodiments: tuple[str, ...] = ()
    epoch: int = 0
    requests: int = 0
    answered: int = 0
    failed: int = 0
    superseded: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    largest_batch: int = 0
    since: float = field(default_factory=time.monotonic)
    windows: dict[str, LatencyWindow] = field(
        default_factory=lambda: {part: LatencyWindow(warm_up=0) for part in PARTS}
    )

    def add(self, queue_s: float, inference_s: float, total_s: float, batch: int) -> None:
        """Counts one answer; ``total_s`` is from the message's arrival to the answer's sending."""
        self.answered += 1
        self.largest_batch = max(self.largest_batch, batch)
        for part, seconds in zip(PARTS, (queue_s, inference_s, total_s), strict=True):
            self.windows[part].add(seconds)

    def report(self) -> dict[str, Any]:
        """Everything as plain values; milliseconds are None before the first answer."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ("since", "windows", "embodiments")}
        milliseconds = {
            f"{part}_{name}_ms": None if (value := getattr(window, name)) is None else round(value * 1e3, 3)
            for part, window in self.windows.items()
            for name in ("p50", "p95")
        }
        seconds = round(time.monotonic() - self.since, 1)
        return {**kept, "embodiments": list(self.embodiments), "connected_s": seconds, **milliseconds}

    def line(self) -> str:
        """The same for a log."""
        values = self.report()
        times = ", ".join(
            f"{part} {values[f'{part}_p50_ms']:.1f}/{values[f'{part}_p95_ms']:.1f}"
            for part in PARTS
            if values[f"{part}_p50_ms"] is not None
        )
        return (
            f"client {self.number} ({self.name or self.layout or 'silent'} at {self.address}): "
            f"{self.requests} requests, {self.answered} answered, {self.failed} failed, {self.superseded} superseded"
            + (f"; p50/p95 ms: {times}" if times else "")
        )
