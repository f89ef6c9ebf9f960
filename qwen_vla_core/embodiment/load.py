"""YAML file → validated ``Embodiment``, or one error line that names file, line, key and fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import yaml

from qwen_vla_core.embodiment.check import find_problems
from qwen_vla_core.embodiment.errors import EmbodimentError, did_you_mean
from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.embodiment.yamlpos import compose, line_of, read_text
from qwen_vla_core.resources import resource_dir

SUFFIXES = (".yaml", ".yml")
SUITES = "suites"  # folder of the robots that live in benchmarks' simulators: they have no drivers and no ROS graph
PLACEHOLDER = "TODO"  # what a draft writes where a person must know better


def shipped_embodiments(runnable: bool = False) -> tuple[str, ...]:
    """Names that ``load_embodiment`` accepts without a path; ``runnable``: without those for training only."""
    names = tuple(sorted(path.stem for path in resource_dir("embodiments").glob("*.yaml")))
    return tuple(name for name in names if not load_embodiment(name).training_only) if runnable else names


def resolve_embodiment(name_or_path: str | Path) -> Path:
    """Path of an embodiment file; a bare word is a shipped name, anything with a slash or suffix a path.

    The robots of benchmarks' simulators (``suites/<name>``) are shipped too, and may be named without the folder.

    Raises:
        EmbodimentError: neither exists; the shipped names are listed.
    """
    path = Path(name_or_path).expanduser()
    bare = path.suffix not in SUFFIXES and len(path.parts) == 1
    shipped = shipped_embodiments()
    if bare and path.name in shipped:
        return resource_dir("embodiments") / f"{path.name}.yaml"
    if path.is_file():
        return path
    if bare or (path.parts[:1] == (SUITES,) and len(path.parts) == 2):
        of_suite = resource_dir("embodiments") / SUITES / f"{path.stem}.yaml"
        if of_suite.is_file():
            return of_suite
    problem = "is a directory, not a file" if path.is_dir() else "no such embodiment file"
    fix = did_you_mean(path.stem, shipped) if bare else "check the path"
    raise EmbodimentError(str(name_or_path), 0, "", problem, f"{fix} (shipped names: {', '.join(shipped)})")


def load_embodiment(name_or_path: str | Path) -> Embodiment:
    """Loads and validates one robot.

    Args:
        name_or_path: a shipped name (``aloha``) or the path of a YAML file.

    Raises:
        EmbodimentError: see ``parse_embodiment``; also when the file does not exist or is not UTF-8.
    """
    path = resolve_embodiment(name_or_path)
    return parse_embodiment(read_text(path, str(path)), source=str(path))


def load_robot(name_or_path: str | Path) -> Embodiment:
    """``load_embodiment`` for whatever is to run: nodes, launch files, dry runs.

    Raises:
        EmbodimentError: see ``parse_embodiment``; also for an embodiment that is for training only.
    """
    robot = load_embodiment(name_or_path)
    if robot.training_only:
        runnable = ", ".join(shipped_embodiments(runnable=True))
        problem = f"'{robot.name}' is for training only: it has no topics, limits or commands, so nothing can run it"
        raise mistake(robot, "training_only", problem, f"name a robot ({runnable}, or your YAML)")
    return robot


def parse_embodiment(text: str, source: str = "<string>") -> Embodiment:
    """Parses and validates YAML text.

    Args:
        text: the YAML document.
        source: name shown in errors and kept as ``source_path``.

    Raises:
        EmbodimentError: the first mistake, as ``source:line: key.path: what is wrong; fix: …``.
    """
    embodiment, problems = diagnose(text, source)
    if problems:
        raise problems[0]
    return embodiment


def diagnose(text: str, source: str = "<string>") -> tuple[Embodiment, list[EmbodimentError]]:
    """Like ``parse_embodiment``, but returns every broken cross-field rule, in line order, and raises none.

    Raises:
        EmbodimentError: the text does not even parse into the dataclasses.
    """
    root = compose(text, source)
    _refuse_unfilled(root, source)
    parser = NodeParser(source)
    parsed = parser.dataclass(Embodiment, root, "")
    embodiment = dataclasses.replace(parsed, source_text=text, source_path=source)
    problems = [
        EmbodimentError(source, parser.line(problem.key), problem.key, problem.problem, problem.fix)
        for problem in find_problems(embodiment)
    ]
    return embodiment, sorted(problems, key=lambda problem: problem.line)


def mistake(embodiment: Embodiment, key: str, problem: str, fix: str) -> EmbodimentError:
    """The error of a key of an embodiment that was already loaded: what is only found out when a file is opened."""
    source, line = embodiment.source_path, 0
    try:
        parser = NodeParser(source)
        parser.dataclass(Embodiment, compose(embodiment.source_text, source), "")
        line = parser.line(key)
    except EmbodimentError:  # made in code, not read from a file
        pass
    return EmbodimentError(source or embodiment.name, line, key, problem, fix)


def _refuse_unfilled(root: yaml.Node, source: str) -> None:
    """A draft's placeholder would be a fine topic name: it is refused by name, with every line that has one."""
    places = list(_unfilled(root, "", set()))
    if places:
        (line, key), others = places[0], sorted({line for line, _ in places[1:]})
        more = f" (and on line{'s' * (len(others) > 1)} {', '.join(map(str, others))})" if others else ""
        problem = f"still says {PLACEHOLDER}{more}"
        raise EmbodimentError(
            source, line, key, problem, "write your robot's own value; the comment beside it says what"
        )


def _unfilled(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[int, str]]:
    """(line, key) of every placeholder; a node that aliases share, or that holds itself, is looked at once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.value == PLACEHOLDER:
            yield line_of(node), path
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _unfilled(item, f"{path}[{index}]", seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _unfilled(value, f"{path}.{key.value}" if path else str(key.value), seen)
