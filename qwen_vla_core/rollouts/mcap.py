"""Reading an MCAP file from its beginning, however it ends: what a killed recorder left has neither index nor footer.

A whole file is read by its index elsewhere (``bag``). Here records are taken one after another until the first that is
cut off or no record; inside the last, cut chunk that still gives every complete message of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rosbags.rosbag2.storage_mcap import DECOMPRESSORS

from qwen_vla_core.errors import UserError

MAGIC = b"\x89MCAP0\r\n"
_HEADER = struct.Struct("<BQ")  # opcode, length of what follows
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
_CHUNK = struct.Struct("<QQQI")  # first and last time, size, checksum
_SCHEMA_OP, _CHANNEL_OP, _MESSAGE_OP, _CHUNK_OP = 0x03, 0x04, 0x05, 0x06
_KNOWN = range(0x01, 0x10)


@dataclass(frozen=True)
class Channel:
    """A topic as the file declares it.

    Attributes:
        topic: its name.
        type: of its messages, such as ``std_msgs/msg/String``.
        definition: of the type, as text.
        encoding: of the definition: ``ros2msg`` or ``ros2idl``.
    """

    topic: str
    type: str
    definition: str
    encoding: str


Record = Channel | tuple[str, int, bytes]


def scan(path: Path) -> Iterator[Record]:
    """Channels as they are declared, and messages (topic, log time in ns, serialised bytes) in the order of the file.

    Raises:
        UserError: no MCAP file.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path}: no MCAP file, or nothing was written before the recorder died")
        yield from _Scan().records(file)


class _Scan:
    """What is declared so far."""

    def __init__(self) -> None:
        self._schemas: dict[int, tuple[str, str, str]] = {}
        self._channels: dict[int, Channel] = {}

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """Until the end, or the first record that is none."""
        while len(head := file.read(_HEADER.size)) == _HEADER.size:
            op, length = _HEADER.unpack(head)
            if op not in _KNOWN:
                return
            if op not in (_SCHEMA_OP, _CHANNEL_OP, _MESSAGE_OP, _CHUNK_OP):
                file.seek(length, 1)
                continue
            data = file.read(length)
            try:
                if op == _CHUNK_OP:
                    after = file.read(1)
                    file.seek(-len(after), 1)
                    yield from self._chunk(data, len(data) == length and (not after or after[0] in _KNOWN))
                else:
                    yield from self._plain(op, data, length)
            except (struct.error, ValueError, KeyError, RuntimeError):  # damaged: nothing after it can be trusted
                return

    def _chunk(self, data: bytes, whole: bool) -> Iterator[Record]:
        """Its records; ``whole``: nothing is missing at its end, and no zeros stand for what is."""
        _, _, size, _ = _CHUNK.unpack_from(data)
        compression, at = _text(data, _CHUNK.size)
        (stored,) = struct.unpack_from("<Q", data, at)
        inner = memoryview(data)[at + 8 : at + 8 + stored]
        if compression:
            if len(inner) < stored:
                return  # cut off: compressed bytes are worth nothing in part
            inner = memoryview(DECOMPRESSORS[compression](bytes(inner), size))
        at = 0
        before: list[Record] = []  # known to be whole when what follows it is a record too: a power cut leaves zeros
        while at + _HEADER.size <= len(inner):
            op, length = _HEADER.unpack_from(inner, at)
            if op not in _KNOWN:
                raise ValueError("no record")
            yield from before
            at += _HEADER.size
            before = list(self._plain(op, bytes(inner[at : at + length]), length))
            at += length
        last = before[-1] if before else None
        if whole or not isinstance(last, tuple) or not last[2].endswith(b"\0"):
            yield from before

    def _plain(self, op: int, data: bytes, length: int) -> Iterator[Record]:
        if len(data) < length:
            return
        if op == _SCHEMA_OP:
            name, at = _text(data, 2)
            encoding, at = _text(data, at)
            definition, _ = _text(data, at)
            self._schemas[struct.unpack_from("<H", data)[0]] = (name, definition, encoding)
        elif op == _CHANNEL_OP:
            number, schema = struct.unpack_from("<HH", data)
            topic, _ = _text(data, 4)
            name, definition, encoding = self._schemas[schema]
            channel = Channel(topic, name, definition, encoding)
            if self._channels.get(number) != channel:
                self._channels[number] = channel
                yield channel
        elif op == _MESSAGE_OP:
            number, _, time_ns, _ = _MESSAGE.unpack_from(data)
            yield self._channels[number].topic, time_ns, data[_MESSAGE.size :]


def _text(data: bytes, at: int) -> tuple[str, int]:
    """A string with its length before it, and where it ends."""
    (length,) = struct.unpack_from("<I", data, at)
    if at + 4 + length > len(data):
        raise ValueError("cut off")
    return data[at + 4 : at + 4 + length].decode(), at + 4 + length
