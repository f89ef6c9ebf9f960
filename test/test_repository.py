"""House rules that no single module can keep: the two rooms stay apart, robots stay data, nothing unsafe is read."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vla_core.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
LINES, MEGABYTES = 500, 8
CODE_FOLDERS = ("qwen_vla_core", "qwen_vla_ros", "launch", "benchmarks", "scripts")
ROS = re.compile(
    r"rclpy|rcl_interfaces|launch|launch_\w+|lifecycle_msgs|ament_\w+|cv_bridge|tf2\w*|rosgraph_msgs|qwen_vla_ros|\w+_msgs"
    r"|\w+_interfaces|std_srvs|domain_coordinator"
)


def repository_files() -> list[Path]:
    """What a commit holds: everything tracked, and new files that are not ignored."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: the list of committed files is unknown")
    return sorted(path for name in names if name and (path := ROOT / name).is_file())


def sources(*folders: str) -> list[Path]:
    """Python files below folders of the repository; all of them without an argument."""
    found = [path for path in repository_files() if path.suffix == ".py"]
    return [path for path in found if not folders or path.relative_to(ROOT).parts[0] in folders]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions and through ``import_module("literal")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def unsafe_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that can run code hidden in a file."""
    for line, module in imports(tree):
        if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
            yield line, f"import {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("torch.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            yield node.lineno, call
        elif call == "yaml.load" and "Safe" not in " ".join(
            [given.get("Loader", ""), *map(ast.unparse, node.args[1:])]
        ):
            yield node.lineno, "yaml.load without a safe loader"
        elif call.endswith(".load") and given.get("allow_pickle") == "True":
            yield node.lineno, f"{call}(allow_pickle=True)"


def robot_comparisons(tree: ast.AST, robots: set[str]) -> Iterator[tuple[int, str]]:
    """(line, expression) of every comparison with, or match on, a robot's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            values = [leaf for side in (node.left, *node.comparators) for leaf in ast.walk(side)]
        elif isinstance(node, ast.match_case):
            values = list(ast.walk(node.pattern))
        else:
            continue
        for value in values:
            if isinstance(value, ast.Constant) and str(value.value).lower() in robots:
                yield value.lineno, f"compares with {value.value!r}"


def test_the_scans_find_what_they_look_for() -> None:
    bad = (
        "import pickle\nimport torch\ntorch.load(p)\nyaml.load(t, Loader=yaml.Loader)\nnp.load(p, allow_pickle=True)\n"
    )
    assert [line for line, _ in unsafe_reads(ast.parse(bad))] == [1, 3, 4, 5]
    assert not list(unsafe_reads(ast.parse("yaml.safe_load(t); yaml.load(t, Loader=yaml.SafeLoader); json.load(f)")))
    tree = ast.parse('if robot == "aloha" or name in ("x", "ALOHA"):\n    f("aloha")\n')
    assert len(list(robot_comparisons(tree, {"aloha"}))) == 2
    hidden = 'def f():\n    from std_msgs.msg import String\n    importlib.import_module("rclpy.node")\n'
    assert [module for _, module in imports(ast.parse(hidden)) if ROS.fullmatch(module.split(".")[0])] == [
        "std_msgs.msg",
        "rclpy.node",
    ]


def test_the_core_never_imports_ros() -> None:
    found = [
        f"{shown(path)}:{line}: {module}"
        for path in sources("qwen_vla_core")
        for line, module in imports(ast.parse(path.read_text()))
        if ROS.fullmatch(module.split(".")[0])
    ]
    assert found == []


def test_nothing_that_can_run_code_is_read() -> None:
    found = [
        f"{shown(path)}:{line}: {what}"
        for path in sources()
        for line, what in unsafe_reads(ast.parse(path.read_text()))
    ]
    assert found == []


def test_no_robot_is_named_in_a_condition() -> None:
    robots = {path.stem.lower() for path in (ROOT / "embodiments").rglob("*.yaml")}
    assert "aloha" in robots
    found = [
        f"{shown(path)}:{line}: {what}"
        for path in sources(*CODE_FOLDERS)
        for line, what in robot_comparisons(ast.parse(path.read_text()), robots)
    ]
    assert found == []


def test_files_stay_readable_and_the_repository_small() -> None:
    files = repository_files()
    assert [shown(path) for path in files if path.stat().st_size > MEGABYTES * 2**20] == []
    long = {shown(path): lines for path in sources() if (lines := len(path.read_text().splitlines())) > LINES}
    assert long == {}


def test_one_version_everywhere() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text())
    keywords = {k.arg: k.value for node in ast.walk(setup) if isinstance(node, ast.Call) for k in node.keywords}
    version = ast.literal_eval(keywords["version"])
    assert ElementTree.parse(ROOT / "package.xml").findtext("version") == version
    assert re.search(rf"^{re.escape(version)} ", (ROOT / "CHANGELOG.rst").read_text(), re.MULTILINE)


def console_scripts() -> list[str]:
    setup = ast.parse((ROOT / "setup.py").read_text())
    keywords = {k.arg: k.value for node in ast.walk(setup) if isinstance(node, ast.Call) for k in node.keywords}
    return list(ast.literal_eval(keywords["entry_points"])["console_scripts"])


@pytest.mark.parametrize("script", console_scripts())
def test_every_console_script_exists(script: str) -> None:
    module, function = script.split("=")[1].strip().split(":")
    if module.startswith("qwen_vla_ros"):
        pytest.importorskip("rclpy")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("command", [*COMMANDS, None], ids=str)
def test_every_command_answers_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    assert "usage: qwen-vla" in capsys.readouterr().out
