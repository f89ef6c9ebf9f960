"""One episode on disk: a rosbag2 folder (MCAP) with its metadata inside and beside it. No rclpy in here."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json, fsync
from qwen_vla_core.rollouts.index import PARTIAL, SIDECAR
from qwen_vla_ros.background_file import BackgroundFile

SIDECAR_VERSION = 2  # of episode.json


class EpisodeBag:
    """An open bag. It lives in a folder ``.partial`` beside its final place until ``close`` moves it there.

    Attributes:
        messages: number of messages written; size_bytes: their payload.
    """

    def __init__(self, path: Path, types: Mapping[str, type], metadata: Mapping[str, Any]) -> None:
        """Opens the bag and declares every topic, so that also a silent one is listed in it.

        Args:
            path: final folder; must not exist.
            types: topic → ROS message class.
            metadata: JSON-able facts about the episode; ``close`` adds the outcome.

        Raises:
            UserError: A message type is unknown to the bag writer and its definition is not installed.
        """
        self.path = path
        self.messages = 0
        self.size_bytes = 0
        self._partial = path.parent / PARTIAL / path.name  # the writer names the .mcap after this folder
        self._metadata = {
            "version": SIDECAR_VERSION,
            **metadata,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        names = {topic: _type_name(message_type) for topic, message_type in types.items()}
        told = {name: _definition(name) for name in names.values()}
        self._writer = Writer(self._partial, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._storage = cast(Any, self._writer.storage)  # a McapWriter, whose file is replaced by one that never waits
        self._storage.bio.close()
        file = self._storage.path.open("r+b", buffering=0)
        file.seek(0, 2)
        self._storage.bio = BackgroundFile(file)
        # Whoever lists rollouts sees by this lock that the bag is being written; the kernel drops it with the process.
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Without waiting for the disk: messages arrive meanwhile, and what is closed is written again.
        about = json.dumps({**self._metadata, "outcome": "unfinished"}, indent=2)
        (self._partial / SIDECAR).write_text(about, encoding="utf-8")
        self._connections = {
            topic: self._writer.add_connection(topic, name, msgdef=told[name][0], rihs01=told[name][1])
            for topic, name in names.items()
        }

    def write(self, topic: str, stamp_ns: int, data: bytes) -> None:
        """Appends one serialised message, stamped with the time of its arrival."""
        self._writer.write(self._connections[topic], stamp_ns, data)
        self.messages += 1
        self.size_bytes += len(data)

    def flush(self) -> None:
        """Hands everything to the operating system: what is written from now on is all that a killed process loses.

        The writer itself keeps up to one megabyte back, which is 40 s of joint states without cameras.
        """
        if self._storage.chunk.msgs:
            self._storage.close_chunk()
        self._storage.bio.flush()

    def close(self, outcome: Mapping[str, Any]) -> Path:
        """Writes the metadata (``episode.json`` and the bag's custom data), closes and renames; returns the folder."""
        metadata = {**self._metadata, **outcome, "messages": self.messages, "bytes": self.size_bytes}
        for key, value in metadata.items():
            self._writer.set_custom_data(key, str(value))
        self._writer.close()
        for file in self._partial.glob("*.mcap"):
            fsync(file)
        atomic_write_json(self._partial / SIDECAR, metadata)
        self._partial.replace(self.path)
        with contextlib.suppress(OSError):  # another unfinished bag is still in it
            self._partial.parent.rmdir()
        fsync(self.path.parent)
        return self.path

    def abandon(self, outcome: Mapping[str, Any]) -> None:
        """Gives up after a failed write: what the disk took stays below ``.partial``, with the outcome if it fits."""
        metadata = {**self._metadata, **outcome, "messages": self.messages, "bytes": self.size_bytes}
        with contextlib.suppress(OSError):
            self._writer.abort()
        with contextlib.suppress(OSError):
            atomic_write_json(self._partial / SIDECAR, metadata)


def learn(types: Iterable[type]) -> None:
    """Reads the definitions of message types ahead: an episode's first messages must not wait for that.

    Raises:
        UserError: as ``EpisodeBag``.
    """
    for message_type in types:
        _definition(_type_name(message_type))


@functools.cache
def _store() -> Typestore:
    return get_typestore(Stores.ROS2_JAZZY)


@functools.cache
def _definition(name: str) -> tuple[str, str]:
    """A type's definition and its hash."""
    _teach(_store(), name)
    return _store().generate_msgdef(name, ros_version=2)[0], _store().hash_rihs01(name)


def _type_name(message_type: type) -> str:
    return f"{message_type.__module__.split('.')[0]}/msg/{message_type.__name__}"


def _teach(store: Typestore, name: str) -> None:
    """Adds a type that is not part of ROS itself, and what it is made of, from the installed package's .msg files."""
    if name in store.fielddefs:
        return
    from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

    package, _, short = name.split("/")
    try:
        text = (Path(get_package_share_directory(package)) / "msg" / f"{short}.msg").read_text()
    except (PackageNotFoundError, OSError) as error:
        raise UserError(f"cannot record {name}: its definition is not installed (package {package})") from error
    for line in text.splitlines():
        part = re.match(r"\s*([A-Za-z_]\w*)(?:/([A-Za-z_]\w*))?(?:\[[^\]]*\])?\s+[a-z]\w*", line.split("#")[0])
        if part and (part[2] or part[1][0].isupper()):
            _teach(store, f"{part[1]}/msg/{part[2]}" if part[2] else f"{package}/msg/{part[1]}")
    store.register(get_types_from_msg(text, name))
