"""``qwen-vla data hands fit|show``: eigengrasps of human hands, fitted over corpora and stored as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError

SOURCES = ("egodex", "vitra", "egoverse", "xperience")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds both jobs."""
    jobs = parser.add_subparsers(dest="hands_job", metavar="JOB", required=True)
    fit = jobs.add_parser("fit", help="one pass over the tracked hands of one or several corpora")
    show = jobs.add_parser("show", help="what a fitted file explains and leaves out")
    for job in (fit, show):
        job.add_argument("--json", action="store_true", help="machine-readable report on stdout")
    fit.add_argument("sources", nargs="+", metavar="NAME=PATH", help=f"corpora; NAME is one of {', '.join(SOURCES)}")
    fit.add_argument("--out", type=Path, required=True, help="JSON file to write")
    fit.add_argument("--components", type=int, default=10, help="eigengrasps per hand (default: 10)")
    fit.add_argument("--every", type=int, default=1, help="use every so many-th tracked hand (default: 1)")
    fit.add_argument("--limit", type=int, help="only the first so many recordings of each corpus")
    fit.add_argument("--confidence", type=float, help="as in `data convert`, for corpora that store one (default: 0.5)")
    fit.add_argument(
        "--fingers",
        choices=("rotations", "points"),
        help="VITRA: MANO's rotations, or joint positions like the others (default: points beside other corpora, else "
        "rotations)",
    )
    fit.add_argument("--skip-damaged", action="store_true", help="leave damaged recordings out")
    fit.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    fit.add_argument("--ray", action="store_true", help="work as a Ray Data job")
    show.add_argument("file", type=Path, help="JSON of `fit`")


def run(args: argparse.Namespace) -> int:
    """Fits or shows."""
    return _show(args) if args.hands_job == "show" else _fit(args)


def _fit(args: argparse.Namespace) -> int:
    import numpy as np

    from qwen_vla_core.data.action_job import limited
    from qwen_vla_core.data.hands.convert import gather
    from qwen_vla_core.data.hands.eigengrasps import Eigengrasps, Moments, save
    from qwen_vla_core.data.hands.points import POSE

    if args.every < 1 or args.workers < 1:
        raise UserError("--every and --workers: must be at least 1")
    corpora = [_corpus(text) for text in args.sources]
    names = {name for name, _ in corpora}
    if args.fingers is None:
        args.fingers = "rotations" if names == {"vitra"} else "points"
    if args.fingers == "rotations" and names != {"vitra"}:
        raise UserError("--fingers rotations: only VITRA has MANO's rotations; fit it alone, or use --fingers points")
    args.no_pictures = True
    total, told = Moments.of(np.zeros((0, POSE))), []
    for name, path in corpora:
        module = importlib.import_module(f"qwen_vla_core.data.sources.{name}")
        items = limited(module.items(path, args), args, str(path))
        part = gather(module.read, items, args, args.every, args.workers, not args.json)
        told.append({"name": name, "path": path.name, "recordings": len(items), "hands": part.count})
        total = total.merge(part)
    pose = "mano" if args.fingers == "rotations" else "points"
    grasps = Eigengrasps.fit(total, pose, args.components, tuple(told))
    save(grasps, args.out)
    _print({"out": str(args.out), **_facts(grasps)}, args.json)
    return 0


def _show(args: argparse.Namespace) -> int:
    from qwen_vla_core.data.hands.eigengrasps import load

    _print({"file": str(args.file), **_facts(load(args.file))}, args.json)
    return 0


def _corpus(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or name not in SOURCES:
        raise UserError(f"{text}: write NAME=PATH with NAME one of {', '.join(SOURCES)}")
    if not Path(path).is_dir():
        raise UserError(f"{text}: no such folder")
    return name, Path(path)


def _facts(grasps: Any) -> dict[str, Any]:
    return {
        "pose": grasps.pose,
        "hands": grasps.samples,
        "sources": list(grasps.sources),
        "explained_variance": [float(share) for share in grasps.explained],
        "explained_together": float(grasps.explained.sum()),
        "residual_rms_rad": grasps.residual_rms,
        "hash": grasps.hash,
    }


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    where = report.get("out") or report.get("file")
    shares = report["explained_variance"]
    print(f"{where}: {len(shares)} eigengrasps of {report['hands']} hands ('{report['pose']}' poses)")
    for number, share in enumerate(shares):
        print(f"  {number}: {share:6.1%}")
    print(f"  together {report['explained_together']:.1%}; residual {report['residual_rms_rad']:.4f} rad rms per angle")
