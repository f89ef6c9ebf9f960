"""YAML text → PyYAML node tree, with every mistake of the text itself turned into one ``EmbodimentError``.

Nodes keep the line of every key and value, which plain ``yaml.safe_load`` throws away. Scalars follow the YAML 1.2 core
schema instead of PyYAML's 1.1: ``1e-3`` is a number, and ``no``, ``010`` or ``1:30`` are not silently something else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qwen_vla_core.embodiment.errors import EmbodimentError, shown

MAX_BYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader whose plain scalars resolve by the YAML 1.2 core schema (plus ``<<`` merges)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol


for _name, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("merge", r"^<<$", "<"),
):
    _CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))
_CoreLoader.yaml_implicit_resolvers.setdefault("", []).append((_TAG + "null", re.compile(r"^$")))


def read_text(path: Path, source: str) -> str:
    """Reads a UTF-8 YAML file.

    Raises:
        EmbodimentError: unreadable, larger than ``MAX_BYTES`` or not UTF-8 (with the line of the first bad byte).
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EmbodimentError(
            source, 0, "", f"cannot be read ({error.strerror})", "name a readable YAML file"
        ) from None
    if len(data) > MAX_BYTES:
        raise EmbodimentError(source, 0, "", f"is larger than {MAX_BYTES} bytes", "name an embodiment YAML")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise EmbodimentError(
            source, line, "", f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8"
        ) from None


def compose(text: str, source: str) -> yaml.MappingNode:
    """Composes the single mapping a file must hold.

    Raises:
        EmbodimentError: a syntax error, an empty file, several documents, or a top level that is not a mapping.
    """
    loader = None
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise EmbodimentError(
            source, line, "", f"character {shown(error.character)} is not allowed in YAML", "delete it"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, source) from None
    except RecursionError:
        raise EmbodimentError(source, 0, "", "is nested too deeply", "embodiments need at most 5 levels") from None
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        raise EmbodimentError(source, 1, "", "the file is empty", "start from a shipped embodiment such as aloha.yaml")
    if not isinstance(node, yaml.MappingNode):
        raise EmbodimentError(
            source, line_of(node), "", f"expected 'key: value' pairs, got {describe(node)}", "start with 'name: …'"
        )
    return node


def _syntax_error(error: yaml.MarkedYAMLError, source: str) -> EmbodimentError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 0
    problem = error.problem or error.context or "is not valid YAML"
    if "'\\t'" in problem:
        return EmbodimentError(source, line, "", "a tab is used for indentation", "indent with spaces")
    if "undefined alias" in problem:
        return EmbodimentError(source, line, "", problem, "define it before with '&name' or correct its spelling")
    if "another document" in problem:
        return EmbodimentError(
            source, line, "", "a second document starts here", "keep one robot per file, remove '---'"
        )
    near = f", in what begins on line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
    return EmbodimentError(
        source, line, "", f"is not valid YAML: {problem}{near}", "correct the indentation, quotes or brackets there"
    )


def line_of(node: yaml.Node) -> int:
    """1-based line on which a node starts."""
    return int(node.start_mark.line) + 1


def scalar(node: yaml.ScalarNode) -> Any:
    """Python value of a scalar node: str, int, float, bool or None.

    Raises:
        ValueError: an explicit tag that is no plain scalar (``!!python/…``, ``!!binary``) or does not fit the text.
    """
    text = node.value
    match node.tag.removeprefix(_TAG):
        case "str":
            return text
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "null":
            return None
    raise ValueError(f"tag {shown(node.tag)} is not allowed here")


def describe(node: yaml.Node) -> str:
    """What a node is, in the words of an error message."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    if isinstance(node, yaml.ScalarNode) and not node.value and node.style is None:
        return "nothing"
    kind = {"int": "the number", "float": "the number", "bool": "the flag", "str": "the text"}
    return f"{kind.get(node.tag.removeprefix(_TAG), 'the value')} {shown(node.value)}"


def entries(node: yaml.MappingNode, source: str, path: str) -> dict[str, tuple[int, yaml.Node]]:
    """Key → (line of the key, value node) of a mapping, with ``<<`` merges applied (own keys win).

    Raises:
        EmbodimentError: a duplicate key, a key that is not text, or a merge of something that is not a mapping.
    """
    return _entries(node, source, path, ())


def _entries(
    node: yaml.MappingNode, source: str, path: str, inside: tuple[int, ...]
) -> dict[str, tuple[int, yaml.Node]]:
    own: dict[str, tuple[int, yaml.Node]] = {}
    merged: dict[str, tuple[int, yaml.Node]] = {}
    for key_node, value in node.value:
        line = line_of(key_node)
        if key_node.tag == _MERGE:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in parts:
                if not isinstance(part, yaml.MappingNode) or id(part) in (*inside, id(node)):
                    raise EmbodimentError(
                        source, line, path, f"'<<' cannot merge {describe(part)}", "merge another mapping: '<<: *name'"
                    )
                for key, entry in _entries(part, source, path, (*inside, id(node))).items():
                    merged.setdefault(key, entry)
            continue
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            raise EmbodimentError(source, line, path, f"{describe(key_node)} is used as a key", "keys are plain words")
        key = key_node.value
        if key in own:
            where = f"{path}.{key}" if path else key
            raise EmbodimentError(
                source, line, where, f"is given twice, first on line {own[key][0]}", "delete one of the two"
            )
        own[key] = (line, value)
    return {**merged, **own}
