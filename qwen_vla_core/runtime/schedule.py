"""When the policy looks again: as rarely as it may, early enough that its chunk comes in time."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.runtime.chunk_buffer import brake_seconds
from qwen_vla_core.runtime.latency import LatencyWindow


@dataclass(frozen=True)
class LookSchedule:
    """The rule, in seconds on any clock.

    Attributes:
        execute_s: time between two looks, as long as chunks come in time; 0: as soon as the policy is free.
        patience_s: a chunk that comes later than this after the last one is too late: the controller has begun to slow
            the plan down.
        brake_s: what the controller needs to stop a plan at its end.
        margin_s: chunks are wanted this much earlier than needed.
    """

    execute_s: float
    patience_s: float
    brake_s: float
    margin_s: float = 0.02

    @classmethod
    def of(cls, robot: Embodiment, execute_steps: int | None = None) -> LookSchedule:
        """For a robot; ``execute_steps`` actions are executed between two looks (None: as its YAML says)."""
        execute_steps = robot.execute_steps if execute_steps is None else execute_steps
        watchdog_s = robot.safety.watchdog_ms / 1000.0
        brake_s = brake_seconds(watchdog_s)
        return cls(execute_steps * robot.period_s, watchdog_s - brake_s, brake_s)

    def next_look_s(
        self, last_look_s: float, last_chunk_s: float | None, plan_end_s: float | None, latency: LatencyWindow
    ) -> float:
        """When to look next; a time that has passed means at once.

        ``execute_s`` after the last look, but not so late that the chunk, taking as long as 95 % of them, would come
        after the controller has to slow down: for want of a fresh chunk, or because the plan ends.

        Args:
            last_look_s: when the last inference started.
            last_chunk_s: when its chunk was published; None before the first.
            plan_end_s: when the plan ends at full speed; None where that is not known.
            latency: from the start of an inference to its chunk.
        """
        wanted_s = last_look_s + self.execute_s
        if last_chunk_s is None:
            return wanted_s
        takes_s = latency.p95
        if takes_s is None:  # no experience yet: as long as the last one, or a slow robot times out at its first chunks
            takes_s = max(last_chunk_s - last_look_s, 0.0)
        needed_s = last_chunk_s + self.patience_s
        if plan_end_s is not None:
            needed_s = min(needed_s, plan_end_s - self.brake_s / 2)
        return min(wanted_s, needed_s - takes_s - self.margin_s)
