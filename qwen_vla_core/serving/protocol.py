"""Messages between a robot and a policy server: msgpack with arrays, sizes bounded before anything is built.

Arrays travel as maps ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}``, the layout that openpi's clients speak,
so that one decoder serves both. Only plain numbers pass (no object or structured dtypes, no extension types, no
pickle), and an array must have exactly the bytes its shape asks for. Whatever is wrong is one ``ProtocolError``.

    server → client on connect   {"type": "metadata", …}                      metadata.py
    client → server              {"type": "hello", "protocol", "name", "embodiments": {name: {policy_hash, contract}}}
    server → client              {"type": "welcome"} or {"type": "error", …} and the end
    client → server              {"type": "predict", "id", "epoch", "steps", "requests": [...]}
    server → client              {"type": "chunks", "id", "epoch", "predictions": [...], "server": {...}}
                                 or {"type": "error", "id", "code", "message"}
    client → server              {"type": "cancel", "id"}: nobody waits for that answer any more
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgpack
import numpy as np

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 2**20  # eight observations of three 640×480 views, and some
MAX_TEXT = 2**16  # longest string, bytes
MAX_ITEMS = 1024  # longest list or map
MAX_CONTAINERS = 4096  # lists and maps in one message: a bomb of empty lists is refused before it has filled the memory
MAX_DIMENSIONS = 8
DTYPE_KINDS = "biuf"  # bool, integers, floats
ARRAY, GENERIC = b"__ndarray__", b"__npgeneric__"

# Codes of error messages. The first group ends the connection, the second concerns one request.
MALFORMED, VERSION, CONTRACT, BUSY = "malformed", "version", "contract", "busy"
BAD_REQUEST, FAILED, SUPERSEDED, DRAINING, FLOODED = "request", "failed", "superseded", "draining", "flooded"

T = TypeVar("T")


class ProtocolError(Exception):
    """What is wrong with a message of the other side, in one line."""

    def __init__(self, message: str, code: str = MALFORMED) -> None:
        super().__init__(message)
        self.code = code


def pack(value: Any) -> bytes:
    """Plain values and NumPy arrays → bytes.

    Raises:
        ValueError: an array's dtype is no plain number.
    """
    packed: bytes = msgpack.packb(value, default=_pack_array)
    return packed


def unpack(data: bytes | str) -> Any:
    """Bytes → plain values and read-only arrays.

    Raises:
        ProtocolError: not msgpack, a limit is exceeded, or an array contradicts itself.
    """
    if isinstance(data, str):
        raise ProtocolError("a text frame: messages are binary msgpack")
    containers = 0

    def count(value: T) -> T:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ProtocolError(f"more than {MAX_CONTAINERS} lists and maps in one message")
        return value

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda value: _unpack_array(count(value)),
            list_hook=count,
            max_str_len=MAX_TEXT,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, msgpack.UnpackException, TypeError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProtocolError(f"not a valid msgpack message: {reason}") from error


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in DTYPE_KINDS:
            raise ValueError(f"arrays of {value.dtype} cannot be sent")
        array = np.ascontiguousarray(value) if value.ndim else value
        data = array.data.cast("B") if array.size else b""
        return {ARRAY: True, b"data": data, b"dtype": array.dtype.str, b"shape": array.shape}
    if isinstance(value, np.generic) and value.dtype.kind in DTYPE_KINDS:
        return value.item()
    raise ValueError(f"{type(value).__name__} cannot be sent")


def _unpack_array(value: dict[Any, Any]) -> Any:
    if ARRAY not in value and GENERIC not in value:
        return value
    data, text, shape = value.get(b"data"), value.get(b"dtype"), value.get(b"shape", ())
    try:
        dtype = np.dtype(text) if isinstance(text, str) and len(text) <= 8 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in DTYPE_KINDS or dtype.subdtype is not None:
        raise ProtocolError(f"array: dtype {text!r:.40} is not a plain number")
    if GENERIC in value:
        if not isinstance(data, (bool, int, float)):
            raise ProtocolError("number: data is not a plain number")
        return data
    if not isinstance(data, bytes):
        raise ProtocolError("array: data is not bytes")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_DIMENSIONS
        or not all(type(side) is int and side >= 0 for side in shape)
    ):
        raise ProtocolError(f"array: shape {shape!r:.60} is not a list of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(f"array: {len(data)} bytes do not fill shape {list(shape)} of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)


# --- reading fields --------------------------------------------------------------------------------------------------


def message_type(message: Any) -> str:
    """The type of a message; an empty text for a map without one."""
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a map, not {type(message).__name__}")
    kind = message.get("type", "")
    if not isinstance(kind, str):
        raise ProtocolError("'type' is not a text")
    return kind


def field(message: Mapping[Any, Any], key: str, kind: type[T], what: str = "message") -> T:
    """One field of the wanted type; integers pass as floats, bools never as numbers.

    Raises:
        ProtocolError: it is missing or of another type; the message names it.
    """
    if key not in message:
        raise ProtocolError(f"{what}: '{key}' is missing")
    value = message[key]
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(f"{what}: '{key}' is {type(value).__name__}, not {kind.__name__}")
    return value


def texts(message: Mapping[Any, Any], key: str, what: str = "message") -> tuple[str, ...]:
    """A list of strings."""
    values = field(message, key, list, what)
    if not all(isinstance(value, str) for value in values):
        raise ProtocolError(f"{what}: '{key}' is not a list of texts")
    return tuple(values)


def numbers(
    message: Mapping[Any, Any], key: str, shape: tuple[int | None, ...], what: str = "message", dtype: str = ""
) -> np.ndarray:
    """A finite array of floats with this shape; None in ``shape`` is any size.

    Args:
        message: where it is.
        key: its name.
        shape: wanted sizes.
        what: what the message is called in errors.
        dtype: converted to this; empty: as sent.
    """
    array = field(message, key, np.ndarray, what)
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ProtocolError(f"{what}: '{key}' has shape {list(array.shape)}, not [{wanted}]")
    if not np.all(np.isfinite(array)):
        raise ProtocolError(f"{what}: '{key}' is not finite")
    return array.astype(dtype) if dtype else array


def error_message(message: str, code: str, number: int | None = None) -> dict[str, Any]:
    """What the other side is told; ``number`` is the request's id, None where the whole connection is meant."""
    return {"type": "error", "id": number, "code": code, "message": message}
