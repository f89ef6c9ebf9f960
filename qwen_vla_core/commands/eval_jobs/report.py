"""``qwen-vla eval report PATH… --out report.html``: one page that needs nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="results of `eval run --output`, folders of them, or folders of recorded rollouts",
    )
    parser.add_argument("--out", type=Path, required=True, help=".html")
    parser.add_argument("--title", default="Evaluation", help="of the page")
    parser.add_argument(
        "--films", type=int, default=6, help="worst episodes per result that are run again and filmed (default: 6)"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where a checkpoint that a result names is now; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page."""
    from qwen_vla_core.evaluation.pages.report import gather, render
    from qwen_vla_core.files import atomic_write_text

    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: must end in .html")
    if args.films < 0:
        raise UserError(f"--films {args.films}: give 0 or more")
    for text in args.weights:
        if "=" not in text:
            raise UserError(f"--weights {text}: write NAME=FOLDER, with the name that the result gives")
    results, recorded = gather(args.paths)
    moved = dict(text.split("=", 1) for text in args.weights)
    page = render(results, recorded, args.films, args.title, moved)
    try:
        atomic_write_text(args.out, page)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    episodes = sum(len(result.rows) for result in results) + sum(len(rows) for _, rows in recorded)
    print(f"{args.out}: {len(results)} results, {episodes} episodes, {len(page.encode()) / 1e6:.1f} MB")
    return 0
