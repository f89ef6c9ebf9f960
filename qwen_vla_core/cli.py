"""``qwen-vla``: one command, one module per job, imported only when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from qwen_vla_core.errors import UserError

# command → (module with `add_arguments(parser)` and `run(args) -> int`, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "embodiment": ("qwen_vla_core.commands.embodiment", "show, check, draft or try an embodiment YAML"),
    "model": ("qwen_vla_core.commands.model", "print a preset or a checkpoint, part by part"),
    "sim": ("qwen_vla_core.commands.sim", "run the scripted expert, write demonstrations, render a picture"),
    "data": ("qwen_vla_core.commands.data", "convert, check, clean, mix and make training data"),
    "train": ("qwen_vla_core.commands.train", "run a stage of training, draw its curves"),
    "finetune": ("qwen_vla_core.commands.finetune", "teach a checkpoint a new robot from its YAML and demonstrations"),
    "eval": ("qwen_vla_core.commands.eval", "closed-loop success of a checkpoint in simulation"),
    "serve": ("qwen_vla_core.commands.serve", "serve a checkpoint to robots over websockets"),
    "rollouts": ("qwen_vla_core.commands.rollouts", "list, show, judge, repair, replay and export recorded episodes"),
    "up": ("qwen_vla_ros.up", "start the whole ROS 2 graph, supervised, without ros2 launch"),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Builds the parser; only the named command's module is imported, so that ``--help`` stays instant."""
    parser = argparse.ArgumentParser(
        prog="qwen-vla",
        description="Open, ROS 2-native Qwen-VLA: embodiments, model, simulation, training, evaluation.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name == wanted:
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. User mistakes print one line on stderr and exit 2; Ctrl-C exits 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(argv)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"qwen-vla: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
