"""Bytes reach the disk in order while nobody waits for it; what it refuses is raised, once for all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from qwen_vla_ros.background_file import BackgroundFile


class SlowFile:
    """A disk that writes nothing before it is let go, a few bytes at a time, and may refuse."""

    def __init__(self) -> None:
        self.go_on, self.written, self.closed = threading.Event(), bytearray(), False
        self.error: OSError | None = None

    def tell(self) -> int:
        return 5

    def write(self, data: memoryview) -> int:
        assert self.go_on.wait(30)
        if self.error is not None:
            raise self.error
        self.written += data[:3]
        return min(len(data), 3)

    def close(self) -> None:
        self.closed = True


def test_a_writer_does_not_wait_for_the_disk_and_the_order_stays() -> None:
    disk = SlowFile()
    file = BackgroundFile(disk)  # type: ignore[arg-type]
    buffer = bytearray(b"abcdefgh")
    assert file.write(buffer) == 8
    buffer[:] = b"--------"  # the caller's memory is its own again
    file.write(memoryview(b"ij"))
    assert file.tell() == 15 and not disk.written
    disk.go_on.set()
    file.close()
    assert disk.written == b"abcdefghij" and disk.closed


def test_no_more_than_so_much_waits_in_memory() -> None:
    disk = SlowFile()
    file = BackgroundFile(disk, most_bytes=4)  # type: ignore[arg-type]
    file.write(b"12345")
    done = threading.Event()
    writer = threading.Thread(target=lambda: (file.write(b"6"), done.set()))
    writer.start()
    assert not done.wait(0.05)
    disk.go_on.set()
    assert done.wait(30)
    writer.join()
    file.close()
    assert disk.written == b"123456"


def test_what_the_disk_refuses_is_raised_and_closing_does_not_hang() -> None:
    disk = SlowFile()
    file = BackgroundFile(disk, most_bytes=4)  # type: ignore[arg-type]
    file.write(b"12345")
    disk.error = OSError(28, "No space left on device")
    disk.go_on.set()
    with pytest.raises(OSError, match="No space left"):
        file.write(b"6")  # waits for room, which an error gives
    with pytest.raises(OSError, match="No space left"):
        file.flush()
    with pytest.raises(OSError, match="No space left"):
        file.close()
    assert disk.closed


def test_a_real_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"head ")
    raw = path.open("r+b", buffering=0)
    raw.seek(0, 2)
    file = BackgroundFile(raw)
    for number in range(1000):
        file.write(b"%d," % number)
    assert file.tell() == 5 + len(b"".join(b"%d," % n for n in range(1000)))
    file.close()
    assert path.read_bytes() == b"head " + b"".join(b"%d," % n for n in range(1000))
