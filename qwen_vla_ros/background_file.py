"""A file whose writer never waits for the disk: a thread hands the bytes over, in order. No rclpy in here."""

from __future__ import annotations

import io
import threading
from collections import deque

MOST_BYTES = 256 << 20  # 3 s of three raw 640×480 cameras at 30 Hz; then the writer waits


class BackgroundFile:
    """Appends to a file from a thread of its own.

    A disk that is busy for a second would otherwise stop whoever writes, and a recorder that does not listen loses
    messages. What the disk refuses is raised by the next ``write``, ``flush`` or ``close``; nothing follows it.
    """

    def __init__(self, file: io.FileIO, most_bytes: int = MOST_BYTES) -> None:
        """
        Args:
            file: unbuffered, opened for writing; closed here.
            most_bytes: how much may wait in memory.
        """
        self._file, self._most = file, most_bytes
        self._position = file.tell()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._error: OSError | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="disk", daemon=True)
        self._thread.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Takes bytes; waits only while too many are on their way.

        Raises:
            OSError: the disk has refused something written before.
        """
        copied = bytes(data)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._size < self._most)
            self._raise()
            self._waiting.append(copied)
            self._size += len(copied)
            self._position += len(copied)
            self._changed.notify_all()
        return len(copied)

    def tell(self) -> int:
        """Where the next byte will be."""
        return self._position

    def fileno(self) -> int:
        """Of the file."""
        return self._file.fileno()

    def flush(self) -> None:
        """Nothing is kept back: what was taken is on its way. Raises OSError as ``write``."""
        with self._changed:
            self._raise()

    def close(self) -> None:
        """Waits until everything has been handed to the operating system, and closes the file.

        Raises:
            OSError: the disk has refused something that no caller knows of yet.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._file.close()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._size = 0
                    self._changed.notify_all()
                return
            with self._changed:
                self._size -= len(data)
                self._changed.notify_all()
