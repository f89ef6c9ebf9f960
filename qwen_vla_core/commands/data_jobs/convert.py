"""``qwen-vla data convert SRC OUT --from NAME``: one module per kind of corpus, found by its file name."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json

SOURCES = "qwen_vla_core.data.sources"
REPORT = "convert_report.json"
VERSIONS = ("v3.0", "v2.1")


def source_names() -> list[str]:
    """Every module of the sources' package; none is imported."""
    package = importlib.import_module(SOURCES)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all sources share; the chosen source adds its own when the command line is parsed.

    A source offers ``add_arguments(parser)`` and
    ``convert(src: Path, out: Path, options: Namespace, workers: int, progress: bool) -> dict``. The dict is JSON with
    ``converted`` (a count), ``dropped`` (a list of ``{"item": …, "reason": …}``) and whatever else is worth telling.
    """
    parser.add_argument("src", type=Path, metavar="SRC", help="the corpus: a folder or file, as the source says")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--from", dest="source", required=True, metavar="NAME", help=", ".join(source_names()))
    parser.add_argument("--version", choices=VERSIONS, default="v3.0", help="LeRobot version to write (default: v3.0)")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run of this command stopped")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")
    parse = parser.parse_known_args

    def parse_with_source(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        name = _named_source(args or ())
        if name in source_names():
            importlib.import_module(f"{SOURCES}.{name}").add_arguments(parser.add_argument_group(f"--from {name}"))
        return parse(args, namespace)

    # Arguments must be known before parsing starts, and importing every source for its arguments would be slow.
    parser.parse_known_args = parse_with_source  # type: ignore[assignment,method-assign]


def _named_source(args: Sequence[str]) -> str | None:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--from", dest="source", nargs="?")
    return peek.parse_known_args(list(args))[0].source


def run(args: argparse.Namespace) -> int:
    """Converts, prints the report and leaves it in the output folder."""
    if args.source not in source_names():
        raise UserError(f"--from {args.source}: no such source; use one of {', '.join(source_names())}")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    module = importlib.import_module(f"{SOURCES}.{args.source}")
    report: dict[str, Any] = module.convert(args.src, args.out, args, args.workers, not args.json)
    report = {"source": args.source, "src": str(args.src), "out": str(args.out), **report}
    if args.out.is_dir():
        atomic_write_json(args.out / REPORT, report)
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    if not report.get("converted", 1):
        first = next((entry["reason"] for entry in report.get("dropped", [])), "nothing was found")
        raise UserError(f"{args.src}: nothing was converted ({first})")
    return 0


def _print(report: dict[str, Any]) -> None:
    dropped = report.get("dropped", [])
    print(f"{report['out']}: {report.get('converted', '?')} converted, {len(dropped)} dropped")
    for reason, count in Counter(str(entry["reason"]) for entry in dropped).most_common(10):
        print(f"  {count:>6} × {reason}")
    if dropped:
        print(f"  all of them: {Path(report['out']) / REPORT}")
