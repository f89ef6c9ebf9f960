"""``qwen-vla embodiment new``: a first YAML from a URDF and, with ``--from-graph``, from what is running."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qwen_vla_core.commands.embodiment_jobs.ros import live_module
from qwen_vla_core.embodiment.draft import draft_embodiment
from qwen_vla_core.embodiment.urdf import read_urdf
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("--urdf", required=True, metavar="FILE", help="the robot's URDF (of a xacro: its output)")
    parser.add_argument("--from-graph", action="store_true", help="look up topics and types in the running ROS graph")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to look at the graph (default: 3)")
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing; never overwrites")
    parser.add_argument("--force", action="store_true", help="overwrite --output")
    parser.add_argument("--json", action="store_true", help="print what was written and what is to do as JSON")


def run(args: argparse.Namespace) -> int:
    """Drafts, writes, and tells what is left to do."""
    if args.json and not args.output:
        raise UserError("--json needs --output: stdout would hold both the report and the YAML")
    if args.output and Path(args.output).exists() and not args.force:
        raise UserError(f"--output {args.output}: exists; fix: name another file, or add --force to overwrite it")
    urdf = read_urdf(args.urdf)
    graph = live_module("--from-graph").graph_topics(args.seconds) if args.from_graph else None
    draft = draft_embodiment(urdf, graph)
    if args.output:
        try:
            atomic_write_text(args.output, draft.text)
        except OSError as error:
            raise UserError(f"--output {args.output}: {error.strerror}; fix: name a writable file") from None
    else:
        print(draft.text, end="")
    if args.json:
        todos = [{"line": line, "text": text} for line, text in draft.todos]
        print(json.dumps({"file": args.output, "todo": todos, "left_out": list(draft.left_out)}, indent=2))
        return 0
    place = args.output or "<stdout>"
    for text in draft.left_out:
        print(f"left out: {text}", file=sys.stderr)
    for line, text in draft.todos:
        print(f"{place}:{line}: to do: {text}", file=sys.stderr)
    if not draft.todos:
        print(f"{place}: nothing left to fill in; read the lines marked CHECK", file=sys.stderr)
    return 0
