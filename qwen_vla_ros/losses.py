"""Counts messages that were published but never arrived, by the numbers their publishers gave them. No ROS in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class LossCounter:
    """Gaps in each publisher's own numbering, by topic.

    A best-effort message may be lost on its way, and a slow subscriber's queue overflows without a word: the numbers
    are the only witness. They count per publisher, so a stream must not mix two; a publisher that starts anew (a
    smaller number) begins a new stream.

    Attributes:
        lost: messages missing so far by topic; topics without a loss are not listed.
    """

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self._last: dict[str, int] = {}

    def heard(self, topic: str, stream: str, number: int | None, alone: Callable[[], bool]) -> None:
        """Takes the number of a message that arrived.

        Args:
            topic: where; stream: topic, or topic and publisher where several are known apart.
            number: the publisher's sequence number; None where the middleware has none.
            alone: whether the topic has one publisher, so that a gap is one; only asked when there is a gap.
        """
        if number is None:
            return
        last = self._last.get(stream)
        self._last[stream] = number
        if last is not None and number > last + 1 and alone():
            self.lost[topic] += number - last - 1
