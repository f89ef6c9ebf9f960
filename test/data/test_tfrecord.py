"""TFRecord framing and examples against bytes that are put together by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from action_support import example, framed

from qwen_vla_core.data.tfrecord import masked_crc, read, records
from qwen_vla_core.errors import UserError

COLUMNS = {
    "steps/action": np.array([0.5, -1.5, 3.25], np.float32),
    "steps/is_first": np.array([1, 0, -(2**62)], np.int64),
    "steps/text": ["größer".encode(), b"", b"\xff\x00"],
}


def write(path: Path, count: int = 3) -> list[bytes]:
    data = [framed(example({**COLUMNS, "number": np.array([i])})) for i in range(count)]
    path.write_bytes(b"".join(data))
    return data


def test_checksum_is_the_published_one() -> None:
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8a9136aa.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_every_column_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a")
    found = list(records(tmp_path / "a"))
    assert [record.number for record in found] == [0, 1, 2]
    for i, record in enumerate(found):
        columns = read(record)
        assert columns["number"] == [i]
        np.testing.assert_array_equal(columns["steps/action"], COLUMNS["steps/action"])
        np.testing.assert_array_equal(columns["steps/is_first"], COLUMNS["steps/is_first"])
        assert columns["steps/text"] == COLUMNS["steps/text"]


@pytest.mark.parametrize("cut", [5, 11])
def test_a_cut_header_names_the_record(tmp_path: Path, cut: int) -> None:
    data = write(tmp_path / "a")
    (tmp_path / "a").write_bytes(data[0] + data[1][:cut])
    with pytest.raises(UserError, match="a: record 1: cut short in its header"):
        list(records(tmp_path / "a"))


def test_a_cut_record_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    data = write(tmp_path / "a")
    (tmp_path / "a").write_bytes(data[0] + data[1][:-1])
    with pytest.raises(UserError, match="a: record 1: cut short; copy"):
        list(records(tmp_path / "a"))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    data = b"".join(write(tmp_path / "a"))
    first = next(iter(records(tmp_path / "a")))
    damaged = bytearray(data)
    damaged[first.offset + 7] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(UserError, match="record 0: checksum does not fit"):
        read(first)
    damaged = bytearray(data)
    damaged[3] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises(UserError, match="record 0: damaged header"):
        list(records(tmp_path / "a"))


def test_another_message_is_no_example(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(framed(b"\x0a\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match=r"no tf\.train\.Example"):
        read(next(iter(records(tmp_path / "a"))))
    with pytest.raises(UserError, match="cannot be read"):
        list(records(tmp_path / "missing"))
