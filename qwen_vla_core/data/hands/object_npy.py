"""Dictionaries of arrays that NumPy saved as objects, read as data: nothing in the file is ever called.

``np.save`` of a dict writes a ``.npy`` header and then a stream of opcodes that Python's own reader would execute.
VITRA ships its annotations so. Here the opcodes are only looked at (``pickletools.genops``): containers and numbers
become values, and exactly the calls with which NumPy describes an array, a dtype and a scalar are understood as
descriptions. Anything else is refused. No function named by a file runs, whoever wrote it.
"""

from __future__ import annotations

import ast
import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qwen_vla_core.errors import UserError

_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_SCALAR = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_DTYPE, _NDARRAY = "numpy dtype", "numpy ndarray"
_KINDS = "biuf"  # plain numbers only
_MARK = object()
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Name:
    """A function or class that the file names; never looked up."""

    name: str


@dataclass
class _Described:
    """What a call or a state in the file describes.

    Attributes:
        what: ``array`` or ``dtype``.
        code: of a dtype, such as ``f8``.
        value: of an array, once its state was given.
    """

    what: str
    code: str = ""
    value: np.ndarray | None = field(default=None, repr=False)


def read_dict(path: Path) -> dict[str, Any]:
    """The dictionary in a ``.npy`` file that holds one object.

    Raises:
        UserError: the file is cut short, holds something else than numbers, texts and arrays, or is no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        value = _plain(_read(data[_header(data) :]))
    except (
        _NotData,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SyntaxError,
    ) as error:
        raise UserError(
            f"{path}: not a dictionary of plain arrays, or cut short ({' '.join(str(error).split())}); copy it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a dictionary")
    return value


class _NotData(Exception):
    """The stream says more than data."""


def _refuse(what: str) -> NoReturn:
    raise _NotData(what)


def _header(data: bytes) -> int:
    if data[:6] != b"\x93NUMPY" or data[6] not in (1, 2, 3):
        _refuse("no .npy header")
    width = 2 if data[6] == 1 else 4
    end = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = ast.literal_eval(data[8 + width : end].decode("latin1").strip())
    if header.get("descr") != "|O" or header.get("shape") != ():
        _refuse("not one stored object")
    return end


def _read(stream: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        position = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[position + 1 :]
        del stack[position:]
        return items

    opcode: Any
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "LIST":
            stack.append(since_mark())
        elif name == "APPEND":
            item = stack.pop()
            _of(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = since_mark()
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _of(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Name(f"{stack[-2]} {stack[-1]}")]
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_described(called, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _complete(stack[-1], state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            _refuse(f"opcode {name}")
    _refuse("no end")


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        _refuse(f"expected a {kind.__name__}")
    return value


def _described(called: Any, arguments: tuple[Any, ...]) -> Any:
    name = called.name if isinstance(called, _Name) else str(type(called))
    if name == _DTYPE:
        code = str(arguments[0])
        if code == "O8" or code == "O":
            return _Described("dtype", "O")
        if code[:1] not in _KINDS or not code[1:].isdigit():
            _refuse(f"dtype {code}")
        return _Described("dtype", code)
    if name in _ARRAY and isinstance(arguments[0], _Name) and arguments[0].name == _NDARRAY:
        return _Described("array")
    if name in _SCALAR:
        return np.frombuffer(arguments[1], np.dtype(_of(arguments[0], _Described).code), 1)[0]
    _refuse(f"names {name}")


def _complete(described: Any, state: tuple[Any, ...]) -> None:
    if _of(described, _Described).what == "dtype":
        if state[1] == ">":
            described.code = ">" + described.code
        return
    _, shape, dtype, fortran, data = state
    if _of(dtype, _Described).code == "O":
        if shape != () or not isinstance(data, list) or len(data) != 1:
            _refuse("an array of objects")
        described.value = data[0]
        return
    flat = np.frombuffer(data, np.dtype(dtype.code))
    described.value = flat.reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """Descriptions → what they describe."""
    if isinstance(value, _Described):
        if value.what != "array" or value.value is None:
            _refuse("an array without content")
        return _plain(value.value)
    if isinstance(value, _Name):
        _refuse(f"names {value.name}")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
