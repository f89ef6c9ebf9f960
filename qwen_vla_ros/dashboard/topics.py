"""Reading topics at the page's rate instead of theirs: subscriptions that nobody spins, asked now and then.

A callback per message would cost a Python interpreter more than the page is worth (three cameras at 30 Hz and joint
states at 50 Hz are 240 wake-ups a second). These subscriptions belong to a node of their own that is in no executor;
the middleware keeps the newest messages of each, and ``poll`` takes them. How many were published in between is read
from the publisher's own numbers.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription

from qwen_vla_ros.live import stamp_of

RATE_WINDOW_S = 3.0
PUBLISHERS_EVERY_S = 1.0


def newest(depth: int) -> QoSProfile:
    """Best effort: a publisher never waits for the page, and what the page is too slow for is dropped unread."""
    return QoSProfile(
        reliability=ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
    )


class PolledTopic:
    """One topic. All methods belong to one thread.

    Args:
        stamped: its messages begin with a std_msgs/Header, so that their age is that of what they tell, as the policy
            judges it, and not only how long ago they arrived.

    Attributes:
        name: resolved; publishers: how many there are, as last looked at.
    """

    def __init__(self, node: Node, message_type: type, topic: str, depth: int, stamped: bool = False) -> None:
        self._node = node
        self._type = message_type
        self._subscription: Subscription = node.create_subscription(
            message_type, topic, lambda _: None, newest(depth), raw=True
        )
        self._depth = depth
        self._stamped = stamped
        self._stamp_ns = 0
        self.name = node.resolve_topic_name(topic)
        self.publishers = 0
        self._publishers_at = -PUBLISHERS_EVERY_S
        self._heard_ns: int | None = None  # system clock
        self._number: int | None = None
        self._counted: deque[tuple[float, int]] = deque()

    def poll(self) -> list[bytes]:
        """What has arrived since the last call, serialised, oldest first."""
        taken: list[bytes] = []
        now = time.monotonic()
        published = 0
        with self._subscription.handle:
            for _ in range(self._depth):
                found = self._subscription.handle.take_message(self._type, True)
                if found is None:
                    break
                data, info = found
                taken.append(bytes(data))
                published += self._published(info)
                self._heard_ns = int(info.get("received_timestamp") or 0) or time.time_ns()
        if taken and self._stamped:
            self._stamp_ns = stamp_of(taken[-1])
        if now - self._publishers_at >= PUBLISHERS_EVERY_S:
            self._publishers_at = now
            self.publishers = self._node.count_publishers(self.name)
        self._counted.append((now, published))
        while self._counted and now - self._counted[0][0] > RATE_WINDOW_S:
            self._counted.popleft()
        return taken

    def _published(self, info: dict[str, Any]) -> int:
        """How many messages this one stands for: itself, and those before it that were not kept."""
        number, before = info.get("publication_sequence_number"), self._number
        self._number = number
        alone = self.publishers == 1 and number is not None and before is not None and number > before
        return number - before if alone and number is not None and before is not None else 1

    def decode(self, data: bytes) -> Any:
        """A message from its bytes."""
        return deserialize_message(data, self._type)

    def age_s(self, now_ns: int, simulated_time: bool) -> float | None:
        """Seconds since what the newest message tells was so; None: none has arrived.

        Args:
            now_ns: by the ROS clock.
            simulated_time: whether that clock is a simulator's, which real seconds since the arrival do not belong to.
        """
        if self._heard_ns is None:
            return None
        arrived_s = max(0.0, (time.time_ns() - self._heard_ns) * 1e-9)
        if not self._stamp_ns:  # a driver that stamps nothing
            return arrived_s
        told_s = max(0.0, (now_ns - self._stamp_ns) * 1e-9)
        return told_s if simulated_time else max(arrived_s, told_s)

    @property
    def rate_hz(self) -> float:
        """Messages per second over the last seconds."""
        if len(self._counted) < 2:
            return 0.0
        seconds = self._counted[-1][0] - self._counted[0][0]
        return sum(count for _, count in list(self._counted)[1:]) / seconds if seconds > 0 else 0.0

    def close(self) -> None:
        """Unsubscribes."""
        self._node.destroy_subscription(self._subscription)
