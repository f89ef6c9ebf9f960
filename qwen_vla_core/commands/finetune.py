"""``qwen-vla finetune``: a checkpoint learns a new robot, from an embodiment YAML and a dataset of demonstrations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_vla_core.commands.train_jobs.stage import run_page
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import DEFAULT_CHECKPOINT

LOOKED_AT = 500  # pictures of a dataset that the check looks at: a faulty camera shows in these


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla finetune``."""
    parser.add_argument("--embodiment", required=True, help="YAML of the robot, or a shipped name")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="DATASET", help="LeRobot datasets of it")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="what it begins with (default: generalist)")
    parser.add_argument(
        "--out", type=Path, help="folder of the run (default: runs/finetune_ROBOT); goes on where it stopped"
    )
    parser.add_argument(
        "--method", choices=("auto", "lora", "full"), default="auto", help="default: by the backbone's size"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: ten times through the data)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step (default: 32)")
    parser.add_argument(
        "--left-out", type=int, help="last episodes of each dataset that are judged by (default: a tenth)"
    )
    parser.add_argument(
        "--report-minutes", type=float, default=10.0, help="how often it says how well it predicts (10)"
    )
    parser.add_argument("--hold-at-end", action="store_true", help="episodes end at rest, where the robot shall stay")
    parser.add_argument("--force", action="store_true", help="train although the data do not fit the YAML")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, choose, say how long it takes; train nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, no progress bars")


def run(args: argparse.Namespace) -> int:
    """Checks the data against the YAML, writes recipe and mixture, trains, and says what to do next."""
    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
    from qwen_vla_core.model.policy import count
    from qwen_vla_core.training import finetune

    for key, least in (("steps", 1), ("batch_size", 1), ("left_out", 0)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key.replace('_', '-')} {value}: give at least {least}")
    if not args.report_minutes > 0:
        raise UserError(f"--report-minutes {args.report_minutes:g}: give more than 0")
    robot = load_embodiment(args.embodiment)
    lengths = [_examined(path, args, robot) for path in args.data]
    backbone = count(load_checkpoint(resolve_checkpoint(args.checkpoint), "cpu").backbone)
    chosen = finetune.plan(args.method, backbone, lengths, args.batch_size, args.steps, args.left_out)
    out = args.out or Path("runs") / f"finetune_{robot.name}"
    yaml_path = args.embodiment if not Path(args.embodiment).is_file() else str(Path(args.embodiment).resolve())
    family = "navigation" if robot.control.convention == "waypoint" else "manipulation"
    start = args.checkpoint if not Path(args.checkpoint).is_dir() else str(Path(args.checkpoint).resolve())
    mixture = finetune.mixture_of(chosen, args.data, yaml_path, family, args.hold_at_end, out)
    small = backbone < finetune.FULL_BELOW
    recipe = finetune.recipe_of(chosen, small, yaml_path, start, args.report_minutes)
    path = finetune.write(out, recipe, mixture)
    if not args.json:
        kept = ", ".join(str(number) for number in chosen.left_out)
        print(f"{chosen.method}: {chosen.why}")
        print(f"{chosen.steps} steps of {chosen.batch_size} samples; {chosen.frames} frames, left out: {kept} episodes")
        print(f"recipe: {path}")
    code = run_page(path, "sft", _page_arguments(args, path, out))
    if code == 0 and not args.dry_run and not args.json:
        print(f"drive it: qwen-vla up {args.embodiment} --checkpoint {out / 'checkpoint'} --mock --instruction '…'")
    return code


def _examined(path: Path, args: argparse.Namespace, robot: Any) -> list[int]:
    """Steps of each episode of a dataset that fits the robot."""
    from qwen_vla_core.commands.data_jobs.examining import open_both
    from qwen_vla_core.data.doctor.case import examine_all
    from qwen_vla_core.data.doctor.config import load_thresholds
    from qwen_vla_core.data.doctor.diagnose import diagnose
    from qwen_vla_core.evaluation.open_loop import check
    from qwen_vla_core.training.finetune import refuse

    dataset, known = open_both(str(path), args.embodiment)
    check(robot, dataset)
    if not args.force:
        progress = not args.json
        case = examine_all(dataset, known, load_thresholds(None, {}), LOOKED_AT, progress=progress)
        refuse(diagnose(case), robot, path)
    return [int(length) for length in dataset.lengths]


def _page_arguments(args: argparse.Namespace, recipe: Path, out: Path) -> argparse.Namespace:
    """As ``qwen-vla train run`` would parse them."""
    return argparse.Namespace(
        recipe=recipe,
        out=out,
        checkpoint=None,
        start=None,
        changes=args.changes,
        device=args.device,
        dry_run=args.dry_run,
        json=args.json,
    )
