"""Recorded messages into a node's own subscriptions: exactly those that the live node held, as they arrived."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rclpy.serialization import deserialize_message
from std_msgs.msg import String

from qwen_vla_core.errors import UserError
from qwen_vla_ros.inference_log import InferenceRecord
from qwen_vla_ros.node_utils import INSTRUCTION_TOPIC, PLAN_TOPIC
from qwen_vla_ros.rollouts.episode import Episode

if TYPE_CHECKING:
    from qwen_vla_ros.rollouts.replay import ReplayedPolicy

AHEAD_NS = 1_000_000_000  # how much later than a node the recorder may have heard a message
UNSTAMPED_NS = 100_000_000  # the same of one without a stamp, which is known by its arrival only
Key = tuple[str, int]


def header_stamp_ns(data: bytes) -> int:
    """Stamp of a serialised message that begins with a std_msgs/Header; nothing else of it is read.

    Args:
        data: CDR: four bytes of encapsulation, whose second says little endian, then seconds and nanoseconds.
    """
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


class Feed:
    """Brings a node into the state that a record tells of."""

    def __init__(self, episode: Episode, node: ReplayedPolicy) -> None:
        """
        Raises:
            UserError: a topic the node listens to is not in the bag.
        """
        self._episode, self._node = episode, node
        self._subscriptions = {subscription.topic_name: subscription for subscription in node.subscriptions}
        robot = episode.robot
        self._camera_topics = {camera.view: self._topic(camera.topic) for camera in robot.cameras}
        self._state_topics = {group.name: self._topic(group.topic) for group in robot.state}
        self._plan_topic = self._topic(PLAN_TOPIC)
        self._instruction_topic = self._topic(INSTRUCTION_TOPIC)
        topics = {*self._camera_topics.values(), *self._state_topics.values(), self._plan_topic}
        self._incoming: Iterator[tuple[str, int, bytes]] = episode.bag.messages(topics)
        self._read_ns = 0  # arrival of the message read last
        self._kept: dict[str, dict[int, tuple[int, bytes]]] = {topic: {} for topic in topics}
        self._fed: set[Key] = set()
        self._texts = {str(msg.data).strip(): str(msg.data) for _, msg in episode.told(INSTRUCTION_TOPIC)}
        self._instructed_ns: int | None = None

    def _topic(self, name: str) -> str:
        found = self._episode.topic(name)
        if found is None or found not in self._subscriptions:
            raise UserError(f"{self._episode.rollout.name}: the policy listens to {name}, which is not in the bag")
        return found

    def up_to(self, record: InferenceRecord, arrived_ns: int, first: bool) -> int:
        """Feeds what the record says was held.

        Args:
            record: of the inference that follows.
            arrived_ns: when the recorder heard of it.
            first: whether it is the bag's first.

        Returns:
            how many of the messages it held the bag has not.
        """
        wanted = self._wanted(record)
        needed = wanted | self._plans(record)
        self._read(needed, arrived_ns + AHEAD_NS)
        missing = len(needed) - len(self._found(needed)) if not first else len(wanted) - len(self._found(wanted))
        if record.instructed_ns != self._instructed_ns:
            missing += self._instruct(record)
        if first and record.held is not None:
            self._node.resume(record.held.continuing)
        self._feed(needed - self._fed)
        if not missing and not self._node.remembers(record.cameras, record.states):
            self._instruct(record)  # it holds something else too: forget everything, and hear it anew
            if record.held is not None:
                self._node.resume(record.held.continuing)
            self._feed(wanted)
        self._forget(needed)
        return missing

    def _wanted(self, record: InferenceRecord) -> set[Key]:
        pictures = {(self._camera_topics[view], stamp) for view, stamps in record.cameras.items() for stamp in stamps}
        readings = {(self._state_topics[name], stamp) for name, stamps in record.states.items() for stamp in stamps}
        return pictures | readings

    def _plans(self, record: InferenceRecord) -> set[Key]:
        return set() if record.held is None else {(self._plan_topic, stamp) for stamp in record.held.plans_ns}

    def _read(self, needed: set[Key], until_ns: int) -> None:
        """Reads on until everything needed was found, or nothing of it can follow any more."""
        while self._read_ns < until_ns and len(self._found(needed)) < len(needed):
            entry = next(self._incoming, None)
            if entry is None:
                return
            topic, self._read_ns, data = entry
            stamp_ns = header_stamp_ns(data)
            self._kept[topic][stamp_ns or -self._read_ns] = (self._read_ns, data)

    def _found(self, keys: set[Key]) -> dict[Key, tuple[int, bytes]]:
        found: dict[Key, tuple[int, bytes]] = {}
        for topic, stamp_ns in keys:
            message = self._kept[topic].get(stamp_ns)
            if message is None:  # its driver stamps nothing: the node took its arrival for the stamp
                near = [key for key in self._kept[topic] if key < 0 and abs(-key - stamp_ns) < UNSTAMPED_NS]
                if near:
                    message = self._kept[topic][min(near, key=lambda key: abs(-key - stamp_ns))]
            if message is not None:
                found[topic, stamp_ns] = message
        return found

    def _feed(self, keys: set[Key]) -> None:
        found = self._found(keys)
        for (topic, stamp_ns), (_, data) in sorted(found.items(), key=lambda entry: (entry[1][0], entry[0])):
            self._node.clock_ns = stamp_ns  # what a message without a stamp is given
            self._hear(topic, data)
        self._fed |= found.keys()

    def _hear(self, topic: str, data: bytes) -> None:
        subscription: Any = self._subscriptions[topic]
        try:
            message = deserialize_message(data, subscription.msg_type)
        except Exception as error:  # rclpy raises a class of its C extension
            raise UserError(f"{self._episode.rollout.name}: a message on {topic} cannot be read ({error})") from None
        subscription.callback(message)

    def _instruct(self, record: InferenceRecord) -> int:
        """Gives the instruction anew, so that the node forgets what it saw; 1 where the bag has no such text."""
        self._node.clock_ns = self._instructed_ns = record.instructed_ns
        told = self._texts.get(record.instruction)
        for text in ("", record.instruction if told is None else told):
            self._subscriptions[self._instruction_topic].callback(String(data=text))
        self._fed = {key for key in self._fed if key[0] == self._plan_topic}
        return int(told is None)

    def _forget(self, needed: set[Key]) -> None:
        """Drops what is older than all that this record needed: records need ever newer messages."""
        for topic, kept in self._kept.items():
            oldest = min((stamp for name, stamp in needed if name == topic), default=None)
            if oldest is not None:
                for key in [key for key in kept if abs(key) < oldest - (UNSTAMPED_NS if key < 0 else 0)]:
                    del kept[key]
            elif topic == self._plan_topic:
                kept.clear()
        self._fed &= {(topic, stamp) for topic, kept in self._kept.items() for stamp in kept} | needed
