"""``qwen-vla eval run``: closed-loop episodes of a checkpoint in a suite, or in its robot's own simulated world."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Evaluator, Settings, execute_steps_of, film_episodes, suite_of
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.report import axis_table, print_axes, print_report, summarise, summarise_axes
from qwen_vla_core.evaluation.results import SUFFIX, Result, ResultFile, weights_of
from qwen_vla_core.evaluation.running import StopRule, open_runner, run_trials
from qwen_vla_core.evaluation.suites import SUITES
from qwen_vla_core.evaluation.suites.protocol import Suite, Trial
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES

FIRST_SEED = 100_000  # demonstrations start at 0
DEFAULT_ROBOT = "aloha"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla eval run``."""
    what = parser.add_argument_group("what is run")
    what.add_argument("--suite", metavar="NAME", help=f"{', '.join(SUITES)}; without it, the robot's own world")
    what.add_argument("--embodiment", help=f"without --suite: shipped name or YAML (default: {DEFAULT_ROBOT})")
    what.add_argument("--task", help="only this task; without --suite also all (default: the world's first)")
    what.add_argument("--axis", action="append", default=[], help="only this axis of the suite; may be repeated")
    what.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or checkpoint folder")
    what.add_argument("--expert", action="store_true", help="let the scripted expert act: is every trial solvable?")
    what.add_argument("--episodes", type=int, default=50, help="seeds per axis and task (default: 50)")
    what.add_argument("--seed", type=int, default=FIRST_SEED, help="first seed (default: 100000, never trained on)")
    what.add_argument("--language", action="store_true", help="also ask for another object in the same scene")
    how = parser.add_argument_group("how the policy is played")
    how.add_argument(
        "--execute-steps", type=int, help="actions executed of each chunk (default: as the robot's YAML says)"
    )
    how.add_argument("--flow-steps", type=int, default=None, help="Euler steps (default: the checkpoint's)")
    how.add_argument("--timeout", type=float, help="simulated seconds per episode (default: the trial's)")
    how.add_argument(
        "--latency-ms",
        type=float,
        help="let simulated time go on: chunks reach the robot's control law this late (default: the world waits)",
    )
    how.add_argument(
        "--strategy",
        default=DEFAULT_STRATEGY,
        help=f"with --latency-ms or --ros: {', '.join(STRATEGIES)} (default: {DEFAULT_STRATEGY})",
    )
    how.add_argument("--blend-ms", type=float, help="with --latency-ms: fade between chunks (the strategy's)")
    how.add_argument("--told", metavar="EMBODIMENT", help="speak of another of the checkpoint's robots in the prompt")
    how.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, CUDA where there is one"
    )
    how.add_argument("--ros", action="store_true", help="through the whole ROS 2 graph, in real time")
    how.add_argument("--rollouts", default="", metavar="DIR", help="with --ros: record every episode below DIR")
    where = parser.add_argument_group("how it is run")
    where.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    where.add_argument("--ray", action="store_true", help="workers are Ray actors; RAY_ADDRESS names a cluster")
    where.add_argument("--output", type=Path, help=f"append every trial to this file ({SUFFIX})")
    where.add_argument("--resume", action="store_true", help="go on with --output; the same command goes on")
    where.add_argument(
        "--until-interval-below",
        type=float,
        metavar="WIDTH",
        help="stop an axis and task once its 95 %% interval is narrower (0.1: ±5 %%), at --episodes at the latest",
    )
    where.add_argument("--gif", type=Path, help="film the first trials (see --gif-episodes) into this GIF")
    where.add_argument("--gif-episodes", type=int, default=3, help="episodes in the film (default: 3)")
    where.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the trials and prints rates with their 95 % intervals."""
    settings, suite = _check(args)
    trials = _choose(suite, args)
    header = _header(args, settings, suite)
    rows: list[dict[str, Any]] = []
    with _output(args, header) as file, tqdm(total=len(trials), desc=suite.name, disable=args.json) as bar:
        stored = file.rows if file else {}
        for trial, row, new in _run(args, settings, suite, trials, stored):
            rows.append(row)
            if new and file:
                file.append(row)
            of_cell = [r["success"] for r in rows if (r["axis"], r["task"]) == (trial.axis, trial.task)]
            bar.set_postfix_str(f"{trial.axis} {trial.task} {Rate(sum(of_cell), len(of_cell))}", refresh=False)
            bar.update()
    result = Result(args.output or Path(suite.name), header, tuple(rows))
    if args.gif:
        film_episodes(Evaluator(settings), trials[: args.gif_episodes], args.gif)
    _tell(args, suite, result)
    return 0


def _run(
    args: argparse.Namespace, settings: Settings, suite: Suite, trials: Sequence[Trial], stored: dict[str, Any]
) -> Iterator[tuple[Trial, dict[str, Any], bool]]:
    stop = StopRule(args.until_interval_below)
    if all(trial.key in stored for trial in trials):  # nothing to run: no checkpoint needs to be loaded
        yield from run_trials(_Nothing(), trials, stored, stop)
        return
    if args.ros:
        from qwen_vla_core.commands.eval_jobs.ros import open_graph

        opened: Any = open_graph(suite, settings, trials, stored, args.rollouts)
    else:
        opened = open_runner(settings, args.workers, args.ray)
    with opened as runner:
        yield from run_trials(runner, trials, stored, stop)


class _Nothing:
    """The runner of a run that is complete."""

    ahead = 1

    def begin(self, trial: Trial) -> Any:
        raise AssertionError(trial)

    def finish(self, handle: Any) -> dict[str, Any]:
        raise AssertionError(handle)


def _header(args: argparse.Namespace, settings: Settings, suite: Suite) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "title": suite.title,
        "settings": dataclasses.asdict(settings),
        "seed": args.seed,
        "episodes": args.episodes,
        "weights": None if args.expert else weights_of(args.checkpoint),
        "until_interval_below": args.until_interval_below,
        "ros": args.ros,
        "axes": dict(suite.axes),
        "protocol": suite.protocol.to_dict(),
    }


@contextlib.contextmanager
def _output(args: argparse.Namespace, header: dict[str, Any]) -> Iterator[ResultFile | None]:
    if args.output is None:
        yield None
        return
    with ResultFile(args.output, header, resume=args.resume) as file:
        yield file


def _choose(suite: Suite, args: argparse.Namespace) -> list[Trial]:
    for axis in args.axis:
        if axis not in suite.axes:
            raise UserError(f"--axis {axis}: this suite has {', '.join(suite.axes)}")
    if args.task is not None and args.task not in suite.tasks:
        raise UserError(f"--task {args.task}: use one of {', '.join(suite.tasks)}")
    return [
        trial
        for trial in suite.trials(args.episodes, args.seed)
        if (not args.axis or trial.axis in args.axis) and args.task in (None, trial.task)
    ]


def _tell(args: argparse.Namespace, suite: Suite, result: Result) -> None:
    if not result.rows:
        raise UserError("no trials: check --axis and --task")
    report = summarise(result.rows, result.header["settings"])
    if args.json:
        print(json.dumps({"suite": suite.name, **report, "axes": summarise_axes(result)}, indent=2))
        return
    if len(axis_table(result)) > 1:
        print_axes(result)
    print_report(report, anytime=result.early_stop)


def _check(args: argparse.Namespace) -> tuple[Settings, Suite]:
    """Every mistake that can be seen before the first episode: inside a worker it would be a traceback."""
    _check_numbers(args)
    if args.suite and args.embodiment:
        raise UserError(f"--embodiment {args.embodiment}: --suite {args.suite} says which robot it needs; leave it out")
    if args.axis and not args.suite:
        raise UserError("--axis: a robot's own world has none; name a --suite")
    if args.output and args.output.suffix != SUFFIX:
        raise UserError(f"--output {args.output}: must end in {SUFFIX}")
    if args.resume and not args.output:
        raise UserError("--resume: name the --output to go on with")
    if args.ros and (args.expert or args.latency_ms is not None or args.told or args.language or args.workers > 1):
        raise UserError(
            "--ros: runs the graph as it is, once: leave out --expert, --latency-ms, --told, --language, --workers"
        )
    if args.rollouts and not args.ros:
        raise UserError("--rollouts: only the ROS graph records; add --ros")
    args.embodiment = "" if args.suite else args.embodiment or DEFAULT_ROBOT
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    if args.suite:
        settings = dataclasses.replace(settings, task=None)
    suite = suite_of(settings)
    missing = suite.missing()
    if missing:
        raise UserError(f"--suite {suite.name}: install {missing}")
    _check_robot(args, suite)
    if args.execute_steps is None:
        settings = dataclasses.replace(settings, execute_steps=execute_steps_of(suite.embodiment))
    return settings, suite


def _check_numbers(args: argparse.Namespace) -> None:
    for key, least in (("episodes", 1), ("seed", 0), ("execute_steps", 1), ("flow_steps", 1), ("workers", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key.replace('_', '-')} {value}: give at least {least}")
    for key in ("latency_ms", "blend_ms"):
        if getattr(args, key) is not None and not getattr(args, key) >= 0:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key):g}: give 0 or more milliseconds")
    if args.strategy not in STRATEGIES:
        raise UserError(f"--strategy {args.strategy}: use one of {', '.join(STRATEGIES)}")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout:g}: give more than 0 seconds")
    if args.until_interval_below is not None and not 0 < args.until_interval_below < 1:
        raise UserError(f"--until-interval-below {args.until_interval_below:g}: give a width between 0 and 1")
    if args.gif and args.gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: must end in .gif")


def _check_robot(args: argparse.Namespace, suite: Suite) -> None:
    """That the checkpoint drives what the suite needs."""
    if args.expert:
        if not hasattr(suite, "make_expert"):
            raise UserError(f"--expert: suite {suite.name} has none")
        return
    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint

    name = suite.embodiment if args.suite else load_embodiment(suite.embodiment).name
    drives = read_config(resolve_checkpoint(args.checkpoint))["embodiments"]
    if args.told is not None and args.told not in drives:
        raise UserError(f"--told {args.told}: this checkpoint drives {', '.join(drives)}")
    if (args.suite or len(drives) > 1) and name not in drives:
        flag = f"--suite {args.suite} needs {name}" if args.suite else f"--embodiment {name}"
        raise UserError(f"{flag}: this checkpoint drives {', '.join(drives)}")
