"""The command line of ``training/rl.py``. Torch is imported late: processes with worlds import the page."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.training.page import CURVES, RESULT, add_arguments


def main(text: str, argv: Sequence[str] | None = None) -> int:
    """Runs the stage; a user's mistake is one line on stderr and exit 2, Ctrl-C exits 130 and can be resumed."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML of the stage")
    add_arguments(parser)
    parser.add_argument("--ray", action="store_true", help="worlds as Ray actors, like --set workers_backend=ray")
    args = parser.parse_args(argv)
    try:
        return execute(args)
    except UserError as error:
        print(f"rl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rl: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130


def execute(args: argparse.Namespace) -> int:
    """Runs (or resumes, or describes) the stage of parsed arguments."""
    from qwen_vla_core.training.rl_recipe import load_rl_recipe

    start = [f"start={json.dumps(args.start)}"] if args.start else []
    changes = [*args.changes, *start, *(["workers_backend=ray"] if args.ray else [])]
    recipe = load_rl_recipe(args.recipe, changes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "torchrun: this stage updates in one process and spreads its worlds; use --set workers=N or --ray"
        )
    if args.out is None and not args.dry_run:
        raise UserError("--out: name a folder for the run")
    from qwen_vla_core.training.curves import plot_runs
    from qwen_vla_core.training.rl import train_rl
    from qwen_vla_core.training.rl_setup import describe

    if args.dry_run:
        print("\n".join(describe(recipe)))
        return 0
    checkpoint = args.checkpoint or args.out / "checkpoint"
    result = train_rl(recipe, args.out, checkpoint, progress=not args.json, device=args.device)
    atomic_write_json(args.out / RESULT, result)
    plot_runs([args.out], args.out / CURVES)
    if args.json:
        print(json.dumps({"recipe": recipe.to_json(), "checkpoint": str(checkpoint), **result}, indent=2))
    else:
        print(f"rl: {result['iterations']} iterations; checkpoint {checkpoint}, curves {args.out / CURVES}")
    return 0
