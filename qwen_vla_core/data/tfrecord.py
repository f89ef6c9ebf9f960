"""TFRecord files and the ``tf.train.Example`` in them, without TensorFlow.

Framing (tensorflow.org, "TFRecord and tf.train.Example"): uint64 length, uint32 masked CRC-32C of the length, data,
uint32 masked CRC-32C of the data, little-endian; the mask is ``((crc >> 15) | (crc << 17)) + 0xa282ead8``. The message
is parsed by protobuf from a descriptor made here, so that no generated code is needed; the checksum is google-crc32c.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_LARGEST = 4 << 30  # a length beyond this is damage; the checksum has then missed it
Column = np.ndarray | list[bytes]


@dataclass(frozen=True)
class Record:
    """Where a record lies.

    Attributes:
        path: of the file.
        number: in the file, from 0.
        offset: of its data.
        length: of its data.
    """

    path: str
    number: int
    offset: int
    length: int

    @property
    def where(self) -> str:
        """File and record, for errors."""
        return f"{self.path}: record {self.number}"


def records(path: Path) -> Iterator[Record]:
    """Every record of a file; only the lengths are read.

    Raises:
        UserError: the file cannot be read, is cut short or no TFRecord file; names the record.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        offset, number = 0, 0
        while offset < size:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise UserError(f"{path}: record {number}: cut short in its header; copy the file again")
            length, crc = _HEADER.unpack(header)
            if masked_crc(header[:8]) != crc or length > _LARGEST:
                raise UserError(f"{path}: record {number}: damaged header; is this a TFRecord file? copy it again")
            if offset + _HEADER.size + length + _FOOTER.size > size:
                raise UserError(f"{path}: record {number}: cut short; copy the file again")
            yield Record(str(path), number, offset + _HEADER.size, length)
            offset += _HEADER.size + length + _FOOTER.size
            file.seek(offset)
            number += 1


def read(record: Record) -> dict[str, Column]:
    """The columns of an example by name: float32 or int64 arrays, or lists of bytes.

    Raises:
        UserError: the data do not have their checksum, or are no ``tf.train.Example``.
    """
    try:
        with Path(record.path).open("rb") as file:
            file.seek(record.offset)
            data, footer = file.read(record.length), file.read(_FOOTER.size)
    except OSError as error:
        raise UserError(f"{record.where}: cannot be read ({error.strerror})") from None
    if len(footer) < _FOOTER.size or masked_crc(data) != _FOOTER.unpack(footer)[0]:
        raise UserError(f"{record.where}: checksum does not fit; copy the file again")
    example = _message("Example")()
    try:
        example.ParseFromString(data)
    except _library("google.protobuf.message").DecodeError:
        raise UserError(f"{record.where}: is no tf.train.Example") from None
    columns: dict[str, Column] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            columns[name] = list(feature.bytes_list.value)
        elif kind == "float_list":
            columns[name] = np.array(feature.float_list.value, np.float32)
        else:
            columns[name] = np.array(feature.int64_list.value, np.int64)
    return columns


def masked_crc(data: bytes) -> int:
    """The checksum of the framing."""
    crc = _library("google_crc32c").value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _message(name: str) -> Any:
    """A message class of tensorflow/core/example/{example,feature}.proto."""
    descriptor: Any = _library("google.protobuf.descriptor_pb2")
    pool: Any = _library("google.protobuf.descriptor_pool").DescriptorPool()
    fields = descriptor.FieldDescriptorProto
    file = descriptor.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, parent: Any = None) -> Any:
        return (file.message_type if parent is None else parent.nested_type).add(name=name)

    def add(owner: Any, number: int, name: str, kind: int, repeated: bool = False, of: str = "") -> Any:
        label = fields.LABEL_REPEATED if repeated else fields.LABEL_OPTIONAL
        return owner.field.add(name=name, number=number, type=kind, label=label, type_name=of or None)

    for list_name, kind in (
        ("BytesList", fields.TYPE_BYTES),
        ("FloatList", fields.TYPE_FLOAT),
        ("Int64List", fields.TYPE_INT64),
    ):
        add(message(list_name), 1, "value", kind, repeated=True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, (field, of) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1
    ):
        add(feature, number, field, fields.TYPE_MESSAGE, of=f".tensorflow.{of}").oneof_index = 0
    features = message("Features")
    entry = message("FeatureEntry", features)
    entry.options.map_entry = True
    add(entry, 1, "key", fields.TYPE_STRING)
    add(entry, 2, "value", fields.TYPE_MESSAGE, of=".tensorflow.Feature")
    add(features, 1, "feature", fields.TYPE_MESSAGE, repeated=True, of=".tensorflow.Features.FeatureEntry")
    add(message("Example"), 1, "features", fields.TYPE_MESSAGE, of=".tensorflow.Features")
    pool.Add(file)
    return _library("google.protobuf.message_factory").GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.{name}"))


@functools.cache
def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"TFRecord files need protobuf and google-crc32c ({error}); pip install both") from None
