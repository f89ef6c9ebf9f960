"""``qwen-vla data mixture show``: what a mixture recipe really draws."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the one action."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="open every source of a recipe, draw samples, compare with what is wanted")
    show.add_argument("recipe", type=Path, help="YAML, e.g. training/recipes/mixtures/small.yaml")
    show.add_argument("--draws", type=int, default=10_000, help="samples to draw, in whole batches (default: 10000)")
    show.add_argument("--root", type=Path, help="folder that the recipe's paths start from, instead of its `root`")
    show.add_argument("--first-step", type=int, default=0, help="training step to begin with (default: 0)")
    show.add_argument("--tasks", type=int, default=20, help="how many tasks to list (default: 20)")
    show.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Draws and prints."""
    from qwen_vla_core.data.mixture import Mixture
    from qwen_vla_core.data.mixture_recipe import load_mixture
    from qwen_vla_core.data.mixture_report import mixture_report

    for flag, value, least in (
        ("--draws", args.draws, 1),
        ("--first-step", args.first_step, 0),
        ("--tasks", args.tasks, 0),
    ):
        if value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    recipe = load_mixture(args.recipe)
    if args.root is not None:
        recipe = dataclasses.replace(recipe, root=str(args.root.resolve()))
    report = mixture_report(Mixture(recipe), args.draws, args.first_step, args.tasks)
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else _text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['recipe']}: {report['draws']} draws in {report['batches']} batches of {report['batch_size']}"
        + (f"; left out: {', '.join(report['absent'])}" if report["absent"] else "")
    ]

    def table(title: str, extra: str, rows: list[tuple[str, dict[str, Any], str]]) -> None:
        width = max([len(title), *(len(name) for name, _, _ in rows)])
        lines.extend(["", f"{title:<{width}}  {'wanted':>8} {'drawn':>8}  {extra}".rstrip()])
        for name, row, rest in rows:
            lines.append(f"{name:<{width}}  {row['wanted']:>8.2%} {row['drawn']:>8.2%}  {rest}".rstrip())

    families = [(row["family"], row, "{} – {}".format(*row["per_batch"])) for row in report["families"]]
    table("family", "per batch", families)
    datasets = [
        (f"{row['dataset']} ({row['family']})", row, f"{row['samples']:>11} {row['epochs']:>8.3g}")
        for row in report["datasets"]
    ]
    table("dataset", f"{'samples':>11} {'epochs':>8}", datasets)
    if report["embodiments"]:
        table("embodiment", "", [(row["embodiment"], row, "") for row in report["embodiments"]])
    if report["tasks"]:
        several = len(report["embodiments"]) > 1
        tasks = [
            (_short(f"{row['embodiment']}: {row['task']}" if several else row["task"]), row, "")
            for row in report["tasks"]
        ]
        table(f"task ({len(tasks)} of {report['task_count']})", "", tasks)
    return "\n".join(lines)


def _short(text: str, most: int = 72) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
