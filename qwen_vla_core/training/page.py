"""The command line that all pages in ``training/`` share: arguments, ranks, resume, export, pictures of the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.training.stage_recipe import StageRecipe, load_stage

RESULT, CURVES = "result.json", "curves.png"


@dataclass(frozen=True)
class Page:
    """One stage of training.

    Attributes:
        stage: its name, as in the recipe.
        text: the page's own words.
        task: builds what the stage computes from a ``stage.Stage``.
        check: refuses a recipe or mixture that is not this stage.
    """

    stage: str
    text: str
    task: Callable[[Any], Any]
    check: Callable[[Any], None]


def main(page: Page, argv: Sequence[str] | None = None) -> int:
    """Runs a page; a user's mistake is one line on stderr and exit 2, Ctrl-C exits 130 and can be resumed."""
    parser = argparse.ArgumentParser(description=page.text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML of the stage")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return execute(page, args)
    except UserError as error:
        print(f"{page.stage}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{page.stage}: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but ``--recipe``."""
    parser.add_argument("--out", type=Path, help="folder of the run; an interrupted run there goes on")
    parser.add_argument("--checkpoint", type=Path, help="where the weights go (default: OUT/checkpoint)")
    parser.add_argument(
        "--from", dest="start", metavar="CHECKPOINT", help="checkpoint to go on from, instead of the recipe's"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key, e.g. steps=100"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained on what, and how long it takes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, no progress bars")


def execute(page: Page, args: argparse.Namespace) -> int:
    """Runs (or resumes, or describes) the stage of parsed arguments."""
    changes = [*args.changes, *([f"start={json.dumps(args.start)}"] if args.start else [])]
    recipe = load_stage(args.recipe, changes)
    if recipe.stage != page.stage:
        raise UserError(f"{args.recipe}: stage: is {recipe.stage}, this page is {page.stage}; use its own page")
    if args.out is None and not args.dry_run:
        raise UserError("--out: name a folder for the run")
    from qwen_vla_core.training import distributed

    ranks = distributed.start(args.device)
    try:
        return _run(page, recipe, args, ranks)
    finally:
        distributed.stop()


def _run(page: Page, recipe: StageRecipe, args: argparse.Namespace, ranks: Any) -> int:
    from qwen_vla_core.training import engine, stage
    from qwen_vla_core.training.peak import peak_of

    out = args.out or Path()  # a dry run without --out writes nothing
    checkpoint = args.checkpoint or out / "checkpoint"
    done = out / RESULT
    with stage.opened(recipe, out, ranks, progress=not args.json) as opened:
        page.check(opened)
        if args.dry_run:
            return _describe(page, opened, args)
        if done.is_file() and checkpoint.is_dir() and json.loads(done.read_text())["provenance"] == opened.provenance:
            if ranks.first:
                print(f"{recipe.stage}: done already: {checkpoint}")
            return 0
        task = page.task(opened)
        with _Beside(opened, checkpoint) as beside:
            hooks = engine.Hooks(beside.saved, beside.logged, peak_of(ranks.device))
            result = engine.run(task, recipe, ranks, out, opened.provenance, hooks, progress=not args.json)
        if ranks.first:
            atomic_write_json(done, {"provenance": opened.provenance, **result})
            _report(args, recipe, out, checkpoint, result)
    return 0


def _describe(page: Page, opened: Any, args: argparse.Namespace) -> int:
    """Prints what the stage would do, from one real batch and a few real steps whose gradients are thrown away."""
    from qwen_vla_core.training import dry_run, engine
    from qwen_vla_core.training.peak import peak_of

    recipe, ranks = opened.recipe, opened.ranks
    task = page.task(opened)
    batch = next(task.steps(0, 1))

    def step() -> float:
        seconds = dry_run.time_step(lambda: engine.gradients(task, batch, recipe, ranks))
        task.learner.zero_grad(set_to_none=True)
        return seconds

    plan = dry_run.describe(
        opened.policy,
        stage=recipe.stage,
        rates=vars(recipe.optim.rates),
        steps=recipe.steps,
        mixture=opened.mixture.recipe,
        works=[task.work(part) for part in batch.parts],
        precision=recipe.scale.precision,
        recompute=recipe.scale.recompute,
        average=recipe.optim.average > 0,
        ranks=ranks.world,
        sharded=recipe.scale.parallel == "fsdp2" and ranks.world > 1,
        timed=step,
        peak=peak_of(ranks.device),
    )
    if ranks.first:
        print(json.dumps(plan.to_json(), indent=2) if args.json else plan)
    return 0


class _Beside:
    """What a run does beside learning: checkpoints, curves, TensorBoard, closed-loop episodes."""

    def __init__(self, opened: Any, checkpoint: Path) -> None:
        from qwen_vla_core.training.evaluation import parse_worlds
        from qwen_vla_core.training.state import latest, read_progress

        self.opened, self.checkpoint = opened, checkpoint
        recipe, out = opened.recipe, opened.out
        self.worlds = parse_worlds(recipe.evaluate.embodiments) if recipe.evaluate is not None else []
        self.left_out: Any = None
        if recipe.open_loop is not None and opened.ranks.first:
            from qwen_vla_core.training.left_out import LeftOut

            self.left_out = LeftOut(opened.mixture, opened.policy, out, recipe.stage, recipe.open_loop.frames)
        state = latest(out)
        self.step = read_progress(state)[0] if state is not None else 0
        self.board: Any = None

    def __enter__(self) -> _Beside:
        if self.opened.recipe.tensorboard and self.opened.ranks.first:
            from qwen_vla_core.training.tensorboard import FOLDER, TensorBoardLog

            self.board = TensorBoardLog(self.opened.out / FOLDER, self.step + 1 if self.step else 0)
        return self

    def __exit__(self, *error: object) -> None:
        if self.board is not None:
            self.board.close()

    def logged(self, row: dict[str, Any]) -> None:
        """Every row of the log."""
        if self.board is not None:
            self.board.row(row)

    def saved(self, step: int) -> None:
        """After every saved state: a checkpoint and curves; where the recipe asks for them, episodes."""
        from qwen_vla_core.training.curves import plot_runs
        from qwen_vla_core.training.distributed import barrier
        from qwen_vla_core.training.engine import LOG_FILE
        from qwen_vla_core.training.evaluation import evaluate_checkpoint, record_evaluations

        recipe, out = self.opened.recipe, self.opened.out
        before, self.step = self.step, step
        self.opened.export(self.checkpoint, {"stage": recipe.stage, "step": step})
        if self.opened.ranks.first:
            spec = recipe.evaluate
            if spec is not None and (step // spec.every > before // spec.every or step == recipe.steps):
                films = out / "films" / f"{step:06d}" if spec.video else None
                rows = evaluate_checkpoint(self.checkpoint, self.worlds, spec.episodes, video_folder=films)
                for row in record_evaluations(out, step, rows, recipe.stage):
                    if self.board is not None:
                        self.board.evaluation(row)
            if self.left_out is not None:
                from qwen_vla_core.training.left_out import verdict

                asked = verdict(self.left_out.ask(step))
                if self.opened.progress:
                    tqdm.write(asked)
            if (out / LOG_FILE).exists():
                plot_runs([out], out / CURVES)
        barrier()


def _report(args: argparse.Namespace, recipe: StageRecipe, out: Path, checkpoint: Path, result: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"recipe": recipe.to_json(), "checkpoint": str(checkpoint), **result}, indent=2))
        return
    losses = ", ".join(f"{key} {value:.4f}" for key, value in result.items() if key not in ("steps", "seconds"))
    print(f"{recipe.stage}: {result['steps']} steps, {losses}; checkpoint {checkpoint}, curves {out / CURVES}")
