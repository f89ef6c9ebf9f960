"""JSON Schema and key tables, generated from the dataclasses so that editors and docs cannot drift from them."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qwen_vla_core.embodiment.parse import public_fields, required
from qwen_vla_core.embodiment.spec import UNITS_BY_KIND, Embodiment, LinearMap

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def embodiment_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an embodiment YAML; cross-field rules are only in ``embodiment check``."""
    definitions = {cls.__name__: _object(cls) for cls in _dataclasses(Embodiment)}
    root = definitions.pop(Embodiment.__name__)
    only = {"properties": {"training_only": {"const": True}}, "required": ["training_only"]}
    runs = {"if": {"not": only}, "then": {"properties": _of_robots(Embodiment)}}
    return {"$schema": SCHEMA_DIALECT, "title": "qwen_vla_ros embodiment", **root, **runs, "$defs": definitions}


def _of_robots(root: type) -> dict[str, Any]:
    """Key of the top level → the keys below it that all embodiments but those for training only must have."""
    hints = get_type_hints(root)
    found: dict[str, Any] = {}
    for field in public_fields(root):
        cls = _element(hints[field.name])
        if not dataclasses.is_dataclass(cls):
            continue
        names = [inner.name for inner in public_fields(cls) if inner.metadata.get("robot")]  # type: ignore[arg-type]
        many = get_origin(_inner(hints[field.name])[0]) is tuple
        if names:
            found[field.name] = {"items": {"required": names}} if many else {"required": names}
    return found


def schema_text() -> str:
    """The committed form of the schema."""
    return json.dumps(embodiment_schema(), indent=2, ensure_ascii=False) + "\n"


def keys_markdown() -> str:
    """One Markdown table of keys per dataclass, and the table of units."""
    parts = [_table(cls, path) for cls, path in _paths(Embodiment, "").items()]
    units = ["### Units", "", "| kind | units |", "|---|---|"]
    units += [f"| {kind} | {', '.join(f'`{unit}`' for unit in allowed)} |" for kind, allowed in UNITS_BY_KIND.items()]
    return "\n\n".join([*parts, "\n".join(units)]) + "\n"


def _inner(hint: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed)."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None)), True
    return hint, False


def _element(hint: Any) -> Any:
    hint, _ = _inner(hint)
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


def _dataclasses(root: type) -> list[type]:
    """``root`` and every dataclass reachable from it, each once."""
    found = [root]
    for cls in found:
        hints = get_type_hints(cls)
        for field in public_fields(cls):
            inner = _element(hints[field.name])
            if dataclasses.is_dataclass(inner) and inner not in found:
                found.append(inner)  # type: ignore[arg-type]
    return found


def _object(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    properties: dict[str, Any] = {}
    for field in public_fields(cls):
        schema = _type(hints[field.name], field.metadata)
        schema["description"] = field.metadata["doc"]
        if (
            not required(field, training_only=False)
            and not dataclasses.is_dataclass(field.default)
            and field.default not in (None, "", ())
        ):
            schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        properties[field.name] = schema
    described: dict[str, Any] = {"type": "object", "description": _summary(cls)}
    if cls is LinearMap:
        span = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        ranges = {
            "from": {**span, "description": "[c0, c1] in channel units."},
            "to": {**span, "description": "[m0, m1] in message units."},
        }
        return {
            **described,
            "oneOf": [
                {"properties": properties, "additionalProperties": False},
                {"properties": ranges, "additionalProperties": False, "required": ["from", "to"]},
            ],
        }
    names = [field.name for field in public_fields(cls) if required(field, training_only=True)]
    return {
        **described,
        "properties": properties,
        "additionalProperties": False,
        **({"required": names} if names else {}),
    }


def _type(hint: Any, metadata: Any) -> dict[str, Any]:
    inner, optional = _inner(hint)
    if optional:
        return {"anyOf": [_type(inner, metadata), {"type": "null"}]}
    if dataclasses.is_dataclass(inner):
        return {"$ref": f"#/$defs/{inner.__name__}"}  # type: ignore[union-attr]
    if get_origin(inner) is Literal:
        return {"enum": list(get_args(inner))}
    if get_origin(inner) is tuple:
        args = get_args(inner)
        array: dict[str, Any] = {"type": "array", "items": _type(args[0], metadata)}
        if args[-1] is not Ellipsis:
            array |= {"minItems": len(args), "maxItems": len(args)}
        return array
    bounds = {
        "minimum": metadata.get("minimum"),
        "exclusiveMinimum": metadata.get("exclusive_minimum"),
        "maximum": metadata.get("maximum"),
    }
    return {"type": _SCALARS[inner], **{key: value for key, value in bounds.items() if value is not None}}


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _paths(cls: type, path: str) -> dict[type, str]:
    """Dataclass → the key path a reader finds it under; first use wins (depth first)."""
    found = {cls: path}
    hints = get_type_hints(cls)
    for field in public_fields(cls):
        inner = _element(hints[field.name])
        if dataclasses.is_dataclass(inner):
            many = "[]" if get_origin(_inner(hints[field.name])[0]) is tuple else ""
            below = f"{path}.{field.name}{many}" if path else f"{field.name}{many}"
            for known, where in _paths(inner, below).items():  # type: ignore[arg-type]
                found.setdefault(known, where)
    return found


def _table(cls: type, path: str) -> str:
    hints = get_type_hints(cls)
    rows = [f"### {f'`{path}`' if path else 'Top level'}", "", _summary(cls), ""]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in public_fields(cls):
        default = "**required**" if required(field) else _default(field.default)
        rows.append(f"| `{field.name}` | {_type_words(hints[field.name])} | {default} | {_cell(field.metadata)} |")
    return "\n".join(rows)


def _cell(metadata: Any) -> str:
    text: str = metadata["doc"]
    if "exclusive_minimum" in metadata:
        text += f" Greater than {metadata['exclusive_minimum']:g}."
    if "minimum" in metadata:
        text += f" At least {metadata['minimum']:g}."
    if "maximum" in metadata:
        text += f" At most {metadata['maximum']:g}."
    if metadata.get("robot"):
        text += " Not with `training_only`."
    return text.replace("|", "\\|")


def _default(value: Any) -> str:
    if value is None or value in ("", ()):
        return "none"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    return f"`{json.dumps(value)}`"


def _type_words(hint: Any) -> str:
    inner, optional = _inner(hint)
    if get_origin(inner) is tuple:
        args = get_args(inner)
        words = f"list of {_type_words(args[0])}" if args[-1] is Ellipsis else f"{len(args)} × {_type_words(args[0])}"
    elif get_origin(inner) is Literal:
        words = " \\| ".join(f"`{choice}`" for choice in get_args(inner))
    elif dataclasses.is_dataclass(inner):
        words = "mapping"
    else:
        words = {bool: "true/false", int: "integer", float: "number", str: "text"}[inner]
    return f"{words} or null" if optional else words
