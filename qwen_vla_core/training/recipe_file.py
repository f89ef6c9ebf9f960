"""Reading the YAML of a recipe, with changes from the command line; what all recipes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.yamlpos import compose, read_text
from qwen_vla_core.errors import UserError

T = TypeVar("T")


def read_recipe(kind: type[T], path: str | Path, changes: Sequence[str] = ()) -> tuple[T, NodeParser]:
    """Parses a recipe; unknown keys are errors.

    Args:
        kind: dataclass of the recipe, with an internal field ``source``.
        path: of the YAML.
        changes: ``a.b=value``, as given to ``--set``; judged like the file.

    Returns:
        The recipe, which knows where it came from, and the parser, for rules that need several keys.

    Raises:
        UserError: with file, line, key and the fix.
    """
    source = str(path)
    node = compose(read_text(Path(path), source), source)
    for change in changes:
        _change(node, change)
    parser = NodeParser(source)
    recipe: Any = parser.dataclass(kind, node, "")
    return dataclasses.replace(recipe, source=source), parser


def _change(node: yaml.Node | None, change: str) -> None:
    """Writes one ``a.b=value`` into the node tree; what it says is judged afterwards, like the file itself."""
    key, separator, text = change.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise UserError(f"--set {change}: write it as key.subkey=value, for example optim.rates.decoder=1e-4")
    try:
        value = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {change}: the value is no YAML ({str(error).splitlines()[0]})") from None
    if value is None:
        value = yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    for depth, part in enumerate(path):
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"--set {change}: {'.'.join(path[:depth])} has no keys")
        found = next((i for i, (name, _) in enumerate(node.value) if name.value == part), None)
        if found is None:
            name = yaml.ScalarNode("tag:yaml.org,2002:str", part, node.start_mark, node.end_mark)
            child: yaml.Node = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
            node.value.append((name, child))
            found = len(node.value) - 1
        if depth == len(path) - 1:
            value.start_mark, value.end_mark = node.start_mark, node.end_mark
            node.value[found] = (node.value[found][0], value)
        node = node.value[found][1]
