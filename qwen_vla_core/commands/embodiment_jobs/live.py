"""``qwen-vla embodiment check ROBOT --live``: the YAML against the running graph."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from qwen_vla_core.commands.embodiment_jobs.ros import live_module
from qwen_vla_core.embodiment import load_robot
from qwen_vla_core.embodiment.findings import failed, summary
from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the live check."""
    live = parser.add_argument_group("against the running robot (needs ROS 2; it only listens)")
    live.add_argument("--live", action="store_true", help="also compare one robot with the running ROS graph")
    live.add_argument("--seconds", type=float, default=3.0, help="how long to listen (default: 3)")
    live.add_argument("--namespace", default="", help="ROS namespace of the robot's relative topics")
    live.add_argument("--use-sim-time", action="store_true", help="judge time stamps by /clock")


def run(args: argparse.Namespace, check_file: Callable[[str], dict[str, Any]]) -> int:
    """Checks the file, then the graph; 0 without an error (warnings pass), 2 otherwise."""
    if len(args.files) != 1:
        raise UserError("--live: name exactly one robot")
    if not args.seconds > 0:
        raise UserError("--seconds: must be greater than 0")
    result = check_file(args.files[0])
    if not result["ok"]:
        if args.json:
            print(json.dumps([result], indent=2, ensure_ascii=False))
        for error in [] if args.json else result["errors"]:
            print(error["message"], file=sys.stderr)
        return 2
    module = live_module("--live")
    findings = module.check_live(
        load_robot(args.files[0]),
        seconds=args.seconds,
        namespace=args.namespace,
        use_sim_time=args.use_sim_time,
    )
    good = not failed(findings)
    if args.json:
        result |= {"ok": good, "live": [finding.as_json() for finding in findings]}
        print(json.dumps([result], indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            print(finding)
        print(f"{args.files[0]}: {summary(findings)}")
    return 0 if good else 2
