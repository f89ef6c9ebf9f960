"""``qwen-vla embodiment dry-run``: what the controller would command, before a robot is connected."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_vla_core.embodiment import load_robot
from qwen_vla_core.embodiment.findings import failed, summary
from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the job's arguments."""
    parser.add_argument("file", help="embodiment YAML, or a shipped name such as 'aloha'")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write (default: NAME_dry_run.png)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the small sine, to see the limits at work")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plays, draws, reports; 0 without an error, 2 otherwise."""
    from qwen_vla_core.runtime.rehearsal import rehearse, report
    from qwen_vla_core.runtime.rehearsal_plot import plot_rehearsal

    if not 0 < args.scale <= 1000:
        raise UserError("--scale: must be greater than 0 and at most 1000")
    robot = load_robot(args.file)
    out = args.out or Path(f"{robot.name}_dry_run.png")
    played = rehearse(robot, args.scale)
    findings = report(played)
    if len(played.times_s):
        plot_rehearsal(played, out)
    good = not failed(findings)
    if args.json:
        amplitudes = dict(zip(played.robot.channels, played.amplitude_c.tolist(), strict=True))
        changes = {phase: dict(counts) for phase, counts in played.changes.items()}
        result = {"file": args.file, "ok": good, "picture": str(out), "amplitudes": amplitudes, "changes": changes}
        print(json.dumps({**result, "findings": [f.as_json() for f in findings]}, indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            print(finding)
        print(f"{args.file}: {summary(findings)}; picture: {out}")
    return 0 if good else 2
