"""``qwen-vla train``: a checkpoint from a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from qwen_vla_core.training.recipe import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla train``."""
    parser.add_argument("--recipe", type=Path, required=True, help="YAML, e.g. training/recipes/aloha_tiny.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an interrupted run there resumes")
    parser.add_argument("--checkpoint", type=Path, help="where to write the checkpoint (default: OUT/checkpoint)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, no progress bars")


def run(args: argparse.Namespace) -> int:
    """Trains (or resumes), writes the checkpoint and a loss plot, prints where they are."""
    from qwen_vla_core.training.first_skill import train

    recipe = load_recipe(args.recipe)
    checkpoint = args.checkpoint or args.out / "checkpoint"
    result = train(recipe, args.out, checkpoint, progress=not args.json)
    if args.json:
        print(json.dumps({"recipe": dataclasses.asdict(recipe), **result}, indent=2))
    else:
        print(f"checkpoint: {checkpoint}\nlog and plot: {args.out}/log.jsonl, {args.out}/loss.png")
    return 0
