"""Closed-loop episodes in the middle of training: what a loss does not say.

Worlds, renderers and a second copy of the policy live in spawned processes that end with the evaluation, so that the
training process keeps its memory, its threads and its random state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Settings, film_in_worker, run_in_worker, spawned
from qwen_vla_core.evaluation.report import summarise
from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint
from qwen_vla_core.sim.registry import world_class
from qwen_vla_core.training.run_log import EVALUATIONS, append_rows

World = tuple[str, str | None]  # embodiment (shipped name or YAML), task (None = the world's first)
FIRST_SEED = 50_000  # demonstrations start at 0, final evaluations at 100,000: what is chosen here is judged elsewhere
FILM_FRAME_S, FILM_WIDTH = 0.2, 480


def parse_worlds(texts: Iterable[str], key: str = "evaluate.embodiments") -> list[World]:
    """``aloha`` or ``aloha/pick`` → (embodiment, task), checked before training begins and not hours later.

    Args:
        texts: as in a recipe.
        key: what errors name.

    Raises:
        UserError: unknown robot or task, or a robot without a simulated world.
    """
    worlds: list[World] = []
    for text in texts:
        name, slash, task = text.rpartition("/")
        # A slash may also be part of a YAML's path.
        world: World = (name, task) if slash and not task.endswith((".yaml", ".yml")) else (text, None)
        try:
            robot = load_embodiment(world[0])
        except UserError as error:
            raise UserError(f"{key}: {text}: {error}") from None
        if robot.simulation is None:
            raise UserError(f"{key}: {text}: {robot.name} names no `simulation.world` to evaluate in; leave it out")
        known = world_class(robot.simulation.world).task_names
        if world[1] not in (None, "all", *known):
            raise UserError(f"{key}: {text}: its world has the tasks {', '.join(known)} and all")
        worlds.append(world)
    return worlds


def evaluate_checkpoint(
    folder: str | Path,
    worlds: Sequence[World],
    episodes: int = 20,
    seed: int = FIRST_SEED,
    workers: int = 1,
    video_folder: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Success of a checkpoint in each world, over the same seeds whenever it is asked.

    Args:
        folder: checkpoint.
        worlds: from ``parse_worlds``.
        episodes: seeds per world.
        seed: the first of them.
        workers: processes.
        video_folder: the first episode of each world is filmed into ``<embodiment>_<task>.gif`` there (five pictures
            per simulated second, a moderate size); None: no films.
        options: further ``Settings``, such as ``device``, ``timeout`` or ``flow_steps``.

    Returns:
        One row per world: ``embodiment``, ``task``, ``seed``, ``episodes``, ``success`` and ``wrong_object`` (rate with
        its 95 % interval), ``mean_seconds_to_success``, ``metrics``, ``wall_seconds``, and ``film``.

    Raises:
        UserError: the checkpoint is damaged or lacks a robot, or a process died.
    """
    if not worlds:
        return []
    root = resolve_checkpoint(folder)
    drives = read_config(root)["embodiments"]
    plans = []
    for embodiment, task in worlds:
        robot = load_embodiment(embodiment)
        if robot.name not in drives:
            raise UserError(f"evaluation in {robot.name}'s world: the checkpoint {root} drives {', '.join(drives)}")
        assert robot.simulation is not None  # `parse_worlds` has seen to it
        named = task or world_class(robot.simulation.world).task_names[0]
        plans.append((robot.name, named, Settings(embodiment, str(root), named, **options)))
    seeds = range(seed, seed + episodes)
    rows = []
    with spawned(workers) as pool:
        for name, task, settings in plans:
            began = time.monotonic()
            results = list(pool.map(run_in_worker, [settings] * episodes, seeds))
            report = summarise(results, {})
            row: dict[str, Any] = {"embodiment": name, "task": task, "seed": seed, "episodes": episodes}
            row |= {key: report[key] for key in ("success", "wrong_object", "mean_seconds_to_success", "metrics")}
            if video_folder is not None:
                film = video_folder / f"{name}_{task}.gif"
                pool.submit(film_in_worker, settings, [seed], film, FILM_FRAME_S, FILM_WIDTH).result()
                row["film"] = str(film)
            row["wall_seconds"] = round(time.monotonic() - began, 1)
            rows.append(row)
    return rows


def record_evaluations(out: Path, step: int, rows: Iterable[Mapping[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Appends rows to ``OUT/evaluations.jsonl``, with stage and step in front; returns them as written."""
    written = [{"stage": stage, "step": step, **row} for row in rows]
    append_rows(out / EVALUATIONS, written)
    return written
