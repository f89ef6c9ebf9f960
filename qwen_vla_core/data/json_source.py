"""JSON annotation files whose every entry knows its line, so that an error can name it.

Corpora ship one document with an array of a million entries, often in one line. ``Document`` holds the parsed file and
the line of every top-level entry; ``stream_array`` reads tables too large for memory entry by entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from qwen_vla_core.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_GAP = re.compile(r"[ \t\n\r,]*")
_BLOCK = 1 << 20
_LARGEST_ENTRY = 64 << 20


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        path: of the file.
        value: its content.
        lines: key (or key and position) of a top-level entry → its line, from 1.
    """

    path: Path
    value: Any
    lines: dict[tuple[str | int, ...], int] = field(repr=False)

    def where(self, *keys: str | int) -> str:
        """``file:line: key[position].key`` of an entry."""
        line = 1
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.lines:
                line = self.lines[keys[:length]]
                break
        shown = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        return f"{self.path}:{line}: {shown}" if shown else f"{self.path}:{line}"

    def fail(self, problem: str, *keys: str | int) -> NoReturn:
        """Raises the one-line error of an entry."""
        raise UserError(" ".join(f"{self.where(*keys)}: {problem}".split()))

    def array(self, key: str) -> list[dict[str, Any]]:
        """The array of objects under a top-level key."""
        if not isinstance(self.value, dict) or key not in self.value:
            self.fail(f"no {key!r} here; is this the right file and layout?")
        found = self.value[key]
        if not isinstance(found, list):
            self.fail("expected a list", key)
        for position, item in enumerate(found):
            if not isinstance(item, dict):
                self.fail("expected an object", key, position)
        return found

    def get(self, entry: dict[str, Any], kind: type | tuple[type, ...], name: str, *keys: str | int) -> Any:
        """``entry[name]`` of a type; ``keys`` lead to the entry.

        Raises:
            UserError: it is missing or of another type.
        """
        if name not in entry:
            self.fail(f"has no {name!r}", *keys)
        value = entry[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            self.fail(f"expected {wanted}, got {str(value)[:40]!r}", *keys, name)
        return value


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        UserError: it cannot be read, or is no UTF-8; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{data.count(10, 0, error.start) + 1}: not UTF-8; convert the file first") from None


def load(path: Path) -> Document:
    """Parses a whole file.

    Raises:
        UserError: it cannot be read or is no JSON; names line and column.
    """
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise UserError(f"{path}: pickle files can run code and are never read; let whoever made it write it as JSON")
    text = read_text(path)
    decoder, lines = json.JSONDecoder(), {}
    line, seen = 1, 0

    def at(position: int) -> int:
        nonlocal line, seen
        line, seen = line + text.count("\n", seen, position), position
        return line

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]

    def array(position: int, *above: str | int) -> tuple[list[Any], int]:
        items: list[Any] = []
        position = skip(position + 1)
        while text[position : position + 1] != "]":
            place: tuple[str | int, ...] = (*above, len(items))
            lines[place] = at(position)
            item, position = decoder.raw_decode(text, position)
            items.append(item)
            position = comma(skip(position), "]")
        return items, position + 1

    def comma(position: int, end: str) -> int:
        found = text[position : position + 1]
        if found == end:
            return position
        if found != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = skip(position + 1)
        if text[position : position + 1] == end:
            raise json.JSONDecodeError("Illegal trailing comma", text, position)
        return position

    value: Any
    try:
        position = skip(0)
        if text[position : position + 1] == "[":
            value, position = array(position)
        elif text[position : position + 1] == "{":
            value, position = {}, skip(position + 1)
            while text[position : position + 1] != "}":
                here = at(position)
                key, position = decoder.raw_decode(text, position)
                position = skip(position)
                if not isinstance(key, str) or text[position : position + 1] != ":":
                    raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
                lines[(key,)] = here
                position = skip(position + 1)
                if text[position : position + 1] == "[":
                    value[key], position = array(position, key)
                else:
                    value[key], position = decoder.raw_decode(text, position)
                position = comma(skip(position), "}")
            position += 1
        else:
            value, position = decoder.raw_decode(text, position)
        if skip(position) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(position))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg})") from None
    return Document(path, value, lines)


def stream_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every entry of a file that is one array of objects, in constant memory.

    Raises:
        UserError: it cannot be read, or is no such array; names the line.
    """
    decoder = json.JSONDecoder()
    buffer, position, line = "", 0, 1

    def refill() -> bool:
        nonlocal buffer, position
        more = file.read(_BLOCK)
        buffer, position = buffer[position:] + more, 0
        return bool(more)

    def skip(pattern: re.Pattern[str]) -> str:
        """Steps over what matches; returns it."""
        nonlocal position, line
        found = ""
        while True:
            match = pattern.match(buffer, position)
            found += match[0] if match else ""
            line += match[0].count("\n") if match else 0
            position = match.end() if match else position
            if position < len(buffer) or not refill():
                return found

    try:
        file = path.open(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        try:
            skip(_SPACE)
            if buffer[position : position + 1] != "[":
                raise UserError(f"{path}:{line}: expected an array of objects")
            position += 1
            between = skip(_SPACE) + ","
            while buffer[position : position + 1] != "]":
                if "," not in between:
                    raise UserError(f"{path}:{line}: not JSON: no comma between two entries, or cut short")
                while True:
                    try:
                        item, end = decoder.raw_decode(buffer, position)
                        break
                    except json.JSONDecodeError as error:
                        at = line + buffer.count("\n", position, error.pos)
                        if len(buffer) - position > _LARGEST_ENTRY or not refill():
                            raise UserError(
                                f"{path}:{at}: not JSON ({error.msg}), or cut short; copy it again"
                            ) from None
                if not isinstance(item, dict):
                    raise UserError(f"{path}:{line}: expected an object")
                yield line, item
                line += buffer.count("\n", position, end)
                position = end
                between = skip(_GAP)
        except UnicodeDecodeError:
            raise UserError(f"{path}:{line}: not UTF-8 after this line; copy it again") from None
