"""``qwen-vla sim expert|demos|render``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three jobs."""
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)

    expert = jobs.add_parser("expert", help="success of the scripted expert, without rendering")
    demos = jobs.add_parser("demos", help="write demonstrations of the expert; resumes where it stopped")
    render = jobs.add_parser("render", help="a picture (PNG) or film (GIF) of all views")
    for job in (expert, demos, render):
        job.add_argument("--embodiment", default="aloha", help="name of a shipped embodiment or path of a YAML")
        job.add_argument("--task", default="all", help="one of the world's tasks, or all (default: all)")
        job.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
        job.add_argument("--json", action="store_true", help="machine-readable report on stdout")
    expert.add_argument("--episodes", type=int, default=200, help="seeds per task (default: 200)")
    demos.add_argument("--episodes", type=int, required=True, help="successful episodes wanted in the folder")
    demos.add_argument("--out", type=Path, required=True, help="folder of the LeRobot dataset")
    demos.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    demos.add_argument(
        "--noise",
        type=float,
        nargs="?",
        const=0.7,
        default=0.0,
        help="chance that an episode is pushed off its path, for recovery data (bare flag: 0.7; default: 0)",
    )
    demos.add_argument(
        "--drops",
        type=float,
        default=0.0,
        metavar="CHANCE",
        help="with --noise: chance that a push while a gripper is closed opens it, so that the cube falls (default: 0)",
    )
    demos.add_argument(
        "--pilot",
        metavar="CHECKPOINT",
        help="corrections: this policy drives until, at a random moment, the expert takes over (default: off)",
    )
    render.add_argument("--out", type=Path, required=True, help="picture to write: .png or .gif")
    for job in (demos, render):
        job.add_argument(
            "--randomize",
            nargs="?",
            const="",
            metavar="FILE",
            help="full domain randomisation: the default ranges, or those of a YAML file (default: off)",
        )
    render.add_argument("--instruction", help="what to do (default: drawn from the seed)")
    render.add_argument("--expert", action="store_true", help="let the expert act (a PNG then shows several moments)")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen job."""
    world_name, embodiment_name = _world_name(args.embodiment)
    jobs = {"expert": _expert, "demos": _demos, "render": _render}
    return jobs[args.job](args, world_name, embodiment_name)


def _world_name(embodiment: str) -> tuple[str, str]:
    from qwen_vla_core.embodiment import load_embodiment

    robot = load_embodiment(embodiment)
    world = robot.simulation.world if robot.simulation else None
    if world is None:
        raise UserError(f"--embodiment {embodiment}: its YAML names no simulation.world")
    return world, robot.name


def _tasks(task: str, world_name: str) -> tuple[str, ...]:
    from qwen_vla_core.sim.registry import world_class

    known: tuple[str, ...] = world_class(world_name).task_names
    if task == "all":
        return known
    if task not in known:
        raise UserError(f"--task {task}: use one of {', '.join(known)}, all")
    return (task,)


def _expert(args: argparse.Namespace, world_name: str, embodiment_name: str) -> int:
    from tqdm import tqdm

    from qwen_vla_core.evaluation.metrics import Rate, mean_metrics
    from qwen_vla_core.evaluation.navigation import measure
    from qwen_vla_core.sim.demos import check_expert
    from qwen_vla_core.sim.registry import make_world

    if args.episodes < 1:
        raise UserError("--episodes: must be at least 1")
    report: dict[str, Any] = {"embodiment": embodiment_name, "world": world_name, "tasks": {}}
    for task in _tasks(args.task, world_name):
        world = make_world(world_name, tasks=(task,))
        seeds = range(args.seed, args.seed + args.episodes)
        lines = check_expert(world, world_name, tqdm(seeds, desc=task, leave=False, disable=None))
        done = [line for line in lines if line["success"]]
        rate = Rate(len(done), len(lines))
        report["tasks"][task] = {
            "episodes": len(lines),
            "successes": len(done),
            "rate": rate.value,
            "interval95": list(rate.interval),
            "mean_seconds": float(np.mean([line["seconds"] for line in done])) if done else None,
            "metrics": mean_metrics([{**line["metrics"], **measure(line["track"])} for line in lines]),
            "failed_seeds": [line["seed"] for line in lines if not line["success"]],
        }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{'task':<10} {'success':>9}   {'95 % interval':<17} {'mean time':>9}")
    for task, line in report["tasks"].items():
        low, high = line["interval95"]
        seconds = "-" if line["mean_seconds"] is None else f"{line['mean_seconds']:.1f} s"
        print(f"{task:<10} {line['successes']:>4}/{line['episodes']:<4}   {low:.1%} – {high:.1%}  {seconds:>9}")
        if line["metrics"]:
            print(" " * 11 + "  ".join(f"{name} {value:.3f}" for name, value in line["metrics"].items()))
    return 0


def _demos(args: argparse.Namespace, world_name: str, embodiment_name: str) -> int:
    from tqdm import tqdm

    from qwen_vla_core.data.lerobot import LeRobotDataset
    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.sim.demos import DemoConfig, generate

    if args.episodes < 1 or args.workers < 1:
        raise UserError("--episodes and --workers: must be at least 1")
    if not 0 <= args.noise <= 1:
        raise UserError("--noise: a chance between 0 and 1")
    if not 0 <= args.drops <= 1 or (args.drops and not args.noise):
        raise UserError("--drops: a chance between 0 and 1, of the pushes that --noise makes; give both")
    if args.pilot and args.noise:
        raise UserError("--pilot and --noise: a policy goes astray by itself; give one of them")
    config = DemoConfig(
        world=world_name,
        tasks=_tasks(args.task, world_name),
        noise=args.noise,
        drops=args.drops,
        domain=_domain(args, world_name),
        pilot=args.pilot,
    )
    with tqdm(total=args.episodes, unit="episode", disable=args.json) as bar:

        def progress(kept: int, failed: int) -> None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(min(kept, args.episodes) - bar.n)

        robot = load_embodiment(args.embodiment)
        kept, failed = generate(
            args.out, config, robot, args.episodes, seed=args.seed, workers=args.workers, progress=progress
        )
    steps = int(LeRobotDataset(args.out).lengths.sum())
    if args.json:
        print(json.dumps({"out": str(args.out), "episodes": kept, "failed": failed, "steps": steps}))
    else:
        print(f"{args.out}: {kept} episodes, {steps} steps; {failed} seeds failed and were left out")
    return 0


def _domain(args: argparse.Namespace, world_name: str) -> Any:
    """Ranges of ``--randomize``; None without it, and then nothing of it is imported."""
    if args.randomize is None:
        return None
    from qwen_vla_core.sim.domain import domain_option
    from qwen_vla_core.sim.registry import world_class

    return domain_option(args.randomize, world_class(world_name).domain_type)


def _render(args: argparse.Namespace, world_name: str, embodiment_name: str) -> int:
    from qwen_vla_core.sim.pictures import film, save
    from qwen_vla_core.sim.registry import make_world

    if args.out.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"--out {args.out}: must end in .png or .gif")
    domain = {} if args.randomize is None else {"domain": _domain(args, world_name)}
    world = make_world(world_name, tasks=_tasks(args.task, world_name), **domain)
    world.reset(args.seed, args.instruction)
    frames = film(world, world_name, act=args.expert)
    save(args.out, frames, world.decision_s)
    report = {"out": str(args.out), "instruction": world.instruction, "frames": len(frames), "success": world.success()}
    if args.json:
        print(json.dumps(report))
    else:
        done = ", done" if report["success"] else ""
        print(f"{args.out}: {world.instruction!r}, {report['frames']} frames{done}")
    return 0
