"""Keeps a position-controlled gripper from being commanded through the object it holds.

The force of such a gripper grows with how far its command leads its measured opening. While the fingers move freely
that lead is only lag and is left alone; once they have stopped on something, it is the force, and it is bounded.
"""

from __future__ import annotations

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment, GripSpec

BLOCKED_AFTER_S = 0.2  # fingers that have not closed further for this long are taken for blocked [O]
PROGRESS = 0.02  # share of the range that counts as closing further; sensor noise is below it [O]


class GripGuard:
    """Bounds the closing lead of every gripper channel while its fingers are blocked.

    Attributes:
        columns: (g,) action columns of gripper groups.
        closing_c: (c,) largest closing rate, units/s; infinite for other channels.
        closes_down_c: (c,) bool, True where a falling value closes a gripper.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        columns, spans, leads, sides = [], [], [], []
        count = len(embodiment.channels)
        self.closing_c = np.full(count, np.inf)
        self.closes_down_c = np.zeros(count, bool)
        start = 0
        for group in embodiment.actions:
            if group.kind == "gripper":
                grip = group.grip or GripSpec()
                for column in range(start, start + len(group.channels)):
                    span = group.limits.upper[column - start] - group.limits.lower[column - start]
                    columns.append(column)
                    spans.append(span)
                    leads.append(grip.max_lead * span)
                    sides.append(1.0 if grip.closed == "lower" else -1.0)
                    self.closing_c[column] = grip.closing_velocity * span
                    self.closes_down_c[column] = grip.closed == "lower"
            start += len(group.channels)
        self.columns = np.array(columns, dtype=np.intp)
        self._lead = np.array(leads)
        self._side = np.array(sides)
        self._progress = PROGRESS * np.array(spans)
        self.reset()

    def reset(self) -> None:
        """Forgets what the fingers did; call when the robot is taken over."""
        self._narrowest = np.full(len(self.columns), np.inf)
        self._still_s = np.zeros(len(self.columns))

    def limit(
        self, target_c: np.ndarray, measured_c: np.ndarray, command_c: np.ndarray, dt_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pulls targets back to ``max_lead`` beyond the measured opening of blocked fingers.

        Args:
            target_c: (c,) wanted commands.
            measured_c: (c,) measured openings; NaN leaves a channel alone.
            command_c: (c,) the last command.
            dt_s: seconds since the last call.

        Returns:
            (c,) targets and (c,) bool, which were changed.
        """
        changed = np.zeros(len(target_c), bool)
        if not len(self.columns):
            return target_c, changed
        measured = measured_c[self.columns] * self._side  # closing is down from here on
        known = np.isfinite(measured)
        measured = np.where(known, measured, 0.0)
        pressing = known & (measured - command_c[self.columns] * self._side > 0.5 * self._lead)
        closing = measured < self._narrowest - self._progress
        opening = measured > self._narrowest
        moved = closing | opening | ~pressing
        self._narrowest = np.where(moved, np.where(known, measured, np.inf), self._narrowest)
        still = pressing & ~closing
        self._still_s = np.where(still, self._still_s + (dt_s if dt_s > 0 else 0.0), 0.0)
        furthest = measured - self._lead
        wanted = target_c[self.columns] * self._side
        blocked = (self._still_s >= BLOCKED_AFTER_S) & (wanted < furthest)
        if not blocked.any():
            return target_c, changed
        held = target_c.copy()
        held[self.columns] = np.where(blocked, furthest * self._side, target_c[self.columns])
        changed[self.columns] = blocked
        return held, changed
