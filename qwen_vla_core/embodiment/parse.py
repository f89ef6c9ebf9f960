"""Node tree → frozen dataclasses, driven by their type hints, defaults and ``doc`` metadata; no per-key code.

Only types and single-value bounds are judged here; rules that need several keys live in ``check.py``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from dataclasses import MISSING, Field
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from qwen_vla_core.embodiment.errors import EmbodimentError, did_you_mean, shown
from qwen_vla_core.embodiment.spec import Embodiment, LinearMap
from qwen_vla_core.embodiment.yamlpos import describe, entries, line_of, scalar

T = TypeVar("T")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_LARGEST = 1e12  # beyond this a value is a typing mistake, and float arithmetic on it would lose the units


def public_fields(cls: type) -> tuple[Field[Any], ...]:
    """Fields a user may write in YAML: all but those marked ``internal``."""
    return tuple(field for field in dataclasses.fields(cls) if not field.metadata.get("internal"))


def required(field: Field[Any], training_only: bool = False) -> bool:
    """Whether the YAML must give the field; a robot that runs needs more than one that is only trained on."""
    if field.metadata.get("robot"):
        return not training_only
    return field.default is MISSING and field.default_factory is MISSING


class NodeParser:
    """Parses one file; remembers the line of every key path for the rules that run afterwards."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[str, int] = {}
        self._training_only = False

    def line(self, path: str) -> int:
        """Line of ``path``, or of the nearest enclosing key that is in the file."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, 1)

    def fail(self, path: str, problem: str, fix: str, line: int | None = None) -> NoReturn:
        """Raises the one-line error of ``path``."""
        raise EmbodimentError(self.source, self.line(path) if line is None else line, path, problem, fix)

    def dataclass(self, cls: type[T], node: yaml.Node, path: str) -> T:
        """Parses a mapping node into ``cls``, recursively."""
        if not isinstance(node, yaml.MappingNode):
            keys = (
                ", ".join(field.name for field in public_fields(cls) if required(field)) or public_fields(cls)[0].name
            )
            self.fail(path, f"expected a mapping, got {describe(node)}", f"give it the keys {keys}")
        given = entries(node, self.source, path)
        if cls is LinearMap and given.keys() & {"from", "to"}:
            return self._map_from_ranges(given, path)  # type: ignore[return-value]
        fields = {field.name: field for field in public_fields(cls)}
        if cls is Embodiment and "training_only" in given:
            key = "training_only"
            self._training_only = bool(self.value(bool, given[key][1], key, fields[key].metadata))
        known = tuple(fields) + (("from", "to") if cls is LinearMap else ())
        for key, (line, _) in given.items():
            if key not in fields:
                self.fail(_join(path, key), "unknown key", did_you_mean(key, known), line)
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, field in fields.items():
            where = _join(path, key)
            if key in given:
                self.lines[where] = given[key][0]
                values[key] = self.value(hints[key], given[key][1], where, field.metadata)
            elif required(field, self._training_only):
                self.fail(where, "missing", f"add '{key}': {field.metadata['doc']}", self.line(path))
        return cls(**values)

    def value(self, hint: Any, node: yaml.Node, path: str, metadata: Any) -> Any:
        """Parses a node as the type ``hint``."""
        origin = get_origin(hint)
        if origin in (Union, types.UnionType):
            inner = next(arg for arg in get_args(hint) if arg is not type(None))
            if isinstance(node, yaml.ScalarNode) and self._scalar(node, path) is None:
                return None
            return self.value(inner, node, path, metadata)
        if origin is tuple:
            return self._tuple(get_args(hint), node, path, metadata)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, node, path)  # type: ignore[arg-type]
        if not isinstance(node, yaml.ScalarNode):
            self.fail(path, f"expected {_wanted(hint)}, got {describe(node)}", metadata["doc"])
        value = self._scalar(node, path)
        if origin is Literal:
            choices = get_args(hint)
            if value not in choices:
                self.fail(path, f"got {describe(node)}", did_you_mean(str(value), choices))
            return value
        if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)  # YAML 1.1 reads 1e-4 as text, YAML 1.2 and people as a number
        if hint is float and type(value) in (int, float):
            return float(self._number(value, path, metadata))
        if type(value) is not hint:
            self.fail(path, f"expected {_wanted(hint)}, got {describe(node)}", metadata["doc"])
        return self._number(value, path, metadata) if hint is int else value

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        try:
            return scalar(node)
        except ValueError as error:
            self.fail(path, str(error), "write a plain value without a '!' tag")

    def _number(self, value: int | float, path: str, metadata: Any) -> int | float:
        if not abs(value) < _LARGEST:  # also true of NaN
            self.fail(path, f"{shown(value)} is not a finite number of sensible size", metadata["doc"])
        minimum, above = metadata.get("minimum"), metadata.get("exclusive_minimum")
        if minimum is not None and value < minimum:
            self.fail(path, f"{shown(value)} is too small", f"use at least {minimum:g}")
        if above is not None and value <= above:
            self.fail(path, f"{shown(value)} is too small", f"use a number greater than {above:g}")
        maximum = metadata.get("maximum")
        if maximum is not None and value > maximum:
            self.fail(path, f"{shown(value)} is too large", f"use at most {maximum:g}")
        return value

    def _tuple(self, args: tuple[Any, ...], node: yaml.Node, path: str, metadata: Any) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(path, f"expected a list, got {describe(node)}", f"write [ … ]: {metadata['doc']}")
        if args[-1] is not Ellipsis and len(node.value) != len(args):
            self.fail(path, f"expected {len(args)} values, got {len(node.value)}", metadata["doc"])
        result = []
        for index, item in enumerate(node.value):
            where = f"{path}[{index}]"
            self.lines[where] = line_of(item)
            result.append(self.value(args[0] if args[-1] is Ellipsis else args[index], item, where, metadata))
        return tuple(result)

    def _map_from_ranges(self, given: dict[str, tuple[int, yaml.Node]], path: str) -> LinearMap:
        for key, (line, _) in given.items():
            if key not in ("from", "to"):
                self.fail(_join(path, key), "unknown key beside from/to", "give {from, to} or {scale, offset}", line)
        ranges: dict[str, tuple[float, float]] = {}
        for key, meaning in (("from", "[c0, c1] in channel units"), ("to", "[m0, m1] in message units")):
            where = _join(path, key)
            if key not in given:
                self.fail(where, "missing", f"add '{key}: {meaning}'", self.line(path))
            self.lines[where] = given[key][0]
            low, high = self._tuple((float, float), given[key][1], where, {"doc": f"give {meaning}"})
            if low == high:
                self.fail(where, f"both ends are {low:g}, so the map cannot be inverted", f"give two values: {meaning}")
            ranges[key] = (float(low), float(high))
        (c0, c1), (m0, m1) = ranges["from"], ranges["to"]
        scale = (m1 - m0) / (c1 - c0)
        if scale == 0.0 or not math.isfinite(scale):
            self.fail(path, "the ranges give no usable scale", "use ranges of comparable size")
        return LinearMap(scale=scale, offset=m0 - scale * c0)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _wanted(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint) or f"one of {', '.join(map(str, get_args(hint)))}"
