"""One episode's bag, whole or cut off by a killed recorder, read in the same way."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rosbags.rosbag2 import Reader, ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.mcap import Channel, scan

if TYPE_CHECKING:
    from rosbags.interfaces.typing import Typesdict

Message = tuple[str, int, bytes]


@dataclass(frozen=True)
class Topic:
    """What a bag holds of a topic: type of its messages, and how many."""

    name: str
    type: str
    count: int


def types_of(channel: Channel) -> Typesdict:
    """A topic's type and all it is made of, from the definition in the bag."""
    if channel.encoding != "ros2idl":
        return get_types_from_msg(channel.definition, channel.type)
    types: Typesdict = {}
    for part in channel.definition.split("=" * 80 + "\n"):
        if part.strip():
            types.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    return types


class BagFile:
    """A bag opened for reading; a context manager.

    Attributes:
        folder: of the episode.
        whole: whether it was closed; False: it was read from its beginning as far as it goes.
        topics: by name; also silent ones.
        start_ns, end_ns: arrival of the first and the last message; 0 in an empty bag.
        count: messages.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UserError: there is no bag in the folder, or it is no MCAP file.
        """
        self.folder = Path(folder)
        self._file = self.folder / f"{self.folder.name}.mcap"
        self._channels: dict[str, Channel] = {}
        self._store = get_typestore(Stores.EMPTY)
        self._known: set[str] = set()
        self._reader: Reader | None = None
        if (self.folder / "metadata.yaml").is_file():
            try:
                self._reader = Reader(self.folder)
                self._reader.open()
            except (ReaderError, OSError):
                self._reader = None
        if self._reader is None and not self._file.is_file():
            raise UserError(f"{self.folder}: holds no bag {self._file.name}")
        self.whole = self._reader is not None
        if self._reader is not None:
            self._index(self._reader)
        else:
            self._scan()

    def _index(self, reader: Reader) -> None:
        topics: dict[str, Topic] = {}
        for connection in reader.connections:
            before = topics[connection.topic].count if connection.topic in topics else 0
            topics[connection.topic] = Topic(connection.topic, connection.msgtype, before + connection.msgcount)
            encoding = "ros2idl" if "IDL" in connection.msgdef.format.name else "ros2msg"
            self._channels[connection.topic] = Channel(
                connection.topic, connection.msgtype, connection.msgdef.data, encoding
            )
        self.topics = topics
        self.count = reader.message_count
        self.start_ns = int(reader.start_time) if self.count else 0
        self.end_ns = int(reader.end_time) - 1 if self.count else 0

    def _scan(self) -> None:
        counts: dict[str, int] = {}
        self.start_ns, self.end_ns = 0, 0
        for record in scan(self._file):
            if isinstance(record, Channel):
                self._channels[record.topic] = record
                counts.setdefault(record.topic, 0)
                continue
            topic, time_ns, _ = record
            counts[topic] += 1
            self.start_ns = time_ns if not self.start_ns else min(self.start_ns, time_ns)
            self.end_ns = max(self.end_ns, time_ns)
        self.topics = {name: Topic(name, self._channels[name].type, count) for name, count in counts.items()}
        self.count = sum(counts.values())

    def channel(self, topic: str) -> Channel:
        """How the bag declares a topic."""
        return self._channels[topic]

    def messages(self, topics: Collection[str] | None = None) -> Iterator[Message]:
        """(topic, arrival in ns, serialised message), in the order of arrival; of all topics, or of these.

        Raises:
            UserError: the bag is damaged where it should not be.
        """
        if self._reader is None:
            for record in scan(self._file):
                if not isinstance(record, Channel) and (topics is None or record[0] in topics):
                    yield record
            return
        wanted = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        try:
            for connection, time_ns, data in self._reader.messages(wanted):
                yield connection.topic, time_ns, data
        except (ReaderError, OSError) as error:
            raise UserError(f"{self._file}: damaged ({error}); copy it again") from None

    def decode(self, topic: str, data: bytes) -> Any:
        """A message as an object with the fields of its type; no ROS is needed for it.

        Raises:
            UserError: the bytes are no such message.
        """
        channel = self._channels[topic]
        if channel.type not in self._known:
            self._learn(channel)
        definition = self._store.get_msgdef(channel.type)
        try:
            read = definition.deserialize_cdr_le if data[1] & 1 else definition.deserialize_cdr_be
            message, _ = read(memoryview(data)[4:], 0, definition.cls, self._store)  # bytes may follow: ROS allows it
            return message
        except (SerdeError, struct.error, ValueError, IndexError) as error:
            raise UserError(f"{self._file}: a message on {topic} is no {channel.type} ({error})") from None

    def _learn(self, channel: Channel) -> None:
        types = types_of(channel)
        self._store.register({name: value for name, value in types.items() if name not in self._store.fielddefs})
        self._known.add(channel.type)

    def close(self) -> None:
        """Closes the file."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> BagFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
