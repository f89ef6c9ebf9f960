"""``qwen-vla embodiment show|check|new|dry-run|schema``: read, write and try a robot's YAML as the project does."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from qwen_vla_core.commands.embodiment_jobs import dry_run, live, new
from qwen_vla_core.embodiment import EmbodimentError, diagnose, load_embodiment
from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.load import resolve_embodiment
from qwen_vla_core.embodiment.report import describe_embodiment, embodiment_text
from qwen_vla_core.embodiment.schema import keys_markdown, schema_text
from qwen_vla_core.embodiment.yamlpos import read_text
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_text
from qwen_vla_core.runtime.targets import HandSolver
from qwen_vla_core.runtime.workspace import load_bounded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every action."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print prompt, channel table, maps, limits, topics and safety")
    show.add_argument("file", help="embodiment YAML, or a shipped name such as 'aloha'")
    show.add_argument("--instruction", default="<instruction>", help="instruction put into the prompt")
    show.add_argument("--json", action="store_true", help="print JSON")
    check = actions.add_parser("check", help="validate; exit 0 when every file is good, 2 otherwise")
    check.add_argument("files", nargs="+", metavar="file", help="embodiment YAMLs or shipped names")
    check.add_argument("--json", action="store_true", help="print JSON")
    live.add_arguments(check)
    new.add_arguments(actions.add_parser("new", help="draft a commented YAML from a URDF and the running graph"))
    text = "play a still and a small moving plan through the control loop and its limits; draw it"
    dry_run.add_arguments(actions.add_parser("dry-run", help=text, description=text))
    schema = actions.add_parser("schema", help="print the JSON Schema for editors")
    schema.add_argument("--output", metavar="FILE", help="write there instead of printing")
    schema.add_argument("--markdown", action="store_true", help="the key tables of docs/embodiment.md instead")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen action."""
    jobs = {"show": _show, "check": _check, "new": new.run, "dry-run": dry_run.run, "schema": _schema}
    return jobs[args.action](args)


def _show(args: argparse.Namespace) -> int:
    if not args.instruction.strip(" ."):
        raise UserError("--instruction is empty; fix: name a task, or leave the flag out")
    report = describe_embodiment(load_embodiment(args.file), args.instruction)
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else embodiment_text(report), end="")
    if args.json:
        print()
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.live:
        return live.run(args, _check_one)
    results = [_check_one(name) for name in args.files]
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        for result in results:
            if result["ok"]:
                print(f"{result['file']}: ok, {result['channels']} channels, {result['views']} views")
            for error in result["errors"]:
                print(error["message"], file=sys.stderr)
    return 0 if all(result["ok"] for result in results) else 2


def _check_one(name: str) -> dict[str, Any]:
    result: dict[str, Any] = {"file": name, "ok": False, "errors": []}
    try:
        path = resolve_embodiment(name)
        embodiment, problems = diagnose(read_text(path, str(path)), str(path))
        if not problems and not embodiment.training_only:  # opens the models of ik commands and workspace boxes
            for index, group in enumerate(embodiment.actions):
                if group.command.ik is not None:
                    HandSolver(embodiment, index)
            load_bounded(commanded_robot(embodiment))
    except EmbodimentError as error:
        problems = [error]
    else:
        result |= {"channels": len(embodiment.channels), "views": len(embodiment.views)}
        result |= {"sha256": embodiment.hash, "policy_sha256": embodiment.policy_hash}
    result["ok"] = not problems
    result["errors"] = [
        {"line": e.line, "key": e.key, "problem": e.problem, "fix": e.fix, "message": str(e)} for e in problems
    ]
    return result


def _schema(args: argparse.Namespace) -> int:
    text = keys_markdown() if args.markdown else schema_text()
    if args.output is None:
        print(text, end="")
        return 0
    try:
        atomic_write_text(args.output, text)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}; fix: name a writable file") from None
    return 0
