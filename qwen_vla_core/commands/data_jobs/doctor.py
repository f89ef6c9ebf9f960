"""``qwen-vla data doctor PATH --embodiment FILE``: findings, worst first. Exit code 0 without errors, 1 with."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vla_core.commands.data_jobs.examining import (
    add_picture_argument,
    add_threshold_arguments,
    add_view_argument,
    add_work_arguments,
    open_both,
    pictures,
    thresholds_of,
)
from qwen_vla_core.embodiment.errors import EmbodimentError
from qwen_vla_core.errors import UserError

if TYPE_CHECKING:
    from qwen_vla_core.data.doctor.diagnose import Diagnosis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.description = (parser.description or "") + ". Exit code: 0 without errors (warnings may be), 1 with errors."
    parser.add_argument("path", metavar="PATH", help="LeRobot dataset: a folder or a hub name")
    parser.add_argument("--embodiment", help="name or YAML of the robot whose limits count (default: units alone)")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with plots and thumbnails")
    add_view_argument(parser)
    add_picture_argument(parser)
    add_work_arguments(parser)
    add_threshold_arguments(parser, cleaning=False)


def run(args: argparse.Namespace) -> int:
    """Examines, prints, writes the page."""
    from qwen_vla_core.data.doctor.case import examine_all
    from qwen_vla_core.data.doctor.diagnose import diagnose

    if args.html:
        from qwen_vla_core.data.doctor.page import check_page

        check_page(args.html)
    thresholds = thresholds_of(args)
    try:
        dataset, robot = open_both(args.path, args.embodiment, args.view)
    except UserError as error:
        if not (Path(args.path) / "meta" / "info.json").is_file() or isinstance(error, EmbodimentError):
            raise
        return _cannot_open(args, error)  # a dataset, and so damaged that this is the finding
    case = examine_all(
        dataset, robot, thresholds, pictures(args.frames), args.workers, args.ray, progress=not args.json
    )
    diagnosis = diagnose(case)
    if args.html:
        from qwen_vla_core.data.doctor.page import write_page

        write_page(diagnosis, args.html)
    if args.json:
        page = str(args.html) if args.html else None
        print(json.dumps({"path": args.path, "html": page, **diagnosis.to_json()}, indent=2))
    else:
        _print(args.path, diagnosis)
        if args.html:
            print(f"page: {args.html}")
    return 1 if diagnosis.errors else 0


def _cannot_open(args: argparse.Namespace, error: UserError) -> int:
    from qwen_vla_core.data.doctor.findings import finding

    found = finding("cannot_open", "error", str(error), "nothing else can be checked before this is put right")
    if args.json:
        print(json.dumps({"path": args.path, "html": None, "errors": 1, "findings": [found.to_json()]}, indent=2))
    else:
        print(f"error    {found.code}: {found.message}\nfix: {found.fix}\n1 error, 0 warnings")
    return 1


def _print(path: str, diagnosis: Diagnosis) -> None:
    from qwen_vla_core.data.doctor.findings import many

    about = diagnosis.summary()
    print(
        f"{path}: {about['episodes']} episodes, {about['steps']} steps, {about['hours']:.2f} h at {about['fps']:g} Hz, "
        f"{about['pictures_looked_at']} pictures looked at"
    )
    for found in diagnosis.findings:
        lines = textwrap.wrap(found.message, 92)
        print(f"{found.severity:<8} {found.code:<27} {lines[0]}")
        for line in lines[1:]:
            print(" " * 37 + line)
        places = ", ".join(str(place) for place in found.places[:3])
        if places:
            rest = f", … {found.total} in all" if found.total > 3 else ""
            print(" " * 37 + f"at: {places}{rest}")
        for line in textwrap.wrap(f"fix: {found.fix}", 92, subsequent_indent="     "):
            print(" " * 37 + line)
    if not diagnosis.findings:
        print("nothing found")
    else:
        print(f"{many(about['errors'], 'error')}, {many(about['warnings'], 'warning')}")
