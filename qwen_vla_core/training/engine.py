"""The training loop that all supervised stages share: step, average, log, save, resume, on one rank or on many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.batching import on_device
from qwen_vla_core.training.distributed import Ranks, all_sum, clip_gradients
from qwen_vla_core.training.feed import StepBatch, forward_arguments
from qwen_vla_core.training.flops import Work
from qwen_vla_core.training.optim import build_optimizer, parameter_groups, scale_at, set_rates
from qwen_vla_core.training.parallel import accumulating, autocast
from qwen_vla_core.training.peak import Peak, utilisation
from qwen_vla_core.training.run_log import append_rows
from qwen_vla_core.training.stage_recipe import StageRecipe
from qwen_vla_core.training.state import Average, restore_state, save_state

LOG_FILE = "log.jsonl"
Part = Mapping[str, torch.Tensor]


class Task(Protocol):
    """What a stage computes.

    Attributes:
        module: called with a micro-batch and keyword arguments, gives sums of losses; as ``parallelise`` returned it.
        learner: whose named parameters are trained, averaged and saved.
        weights: of the losses.
    """

    module: nn.Module
    learner: nn.Module
    weights: Mapping[str, float]

    def steps(self, first: int, count: int) -> Iterator[StepBatch]: ...

    def counts(self, part: Part) -> dict[str, int]: ...

    def work(self, part: Part) -> Work: ...

    def flops(self, part: Part) -> float: ...


@dataclass(frozen=True)
class Hooks:
    """What happens beside learning.

    Attributes:
        saved: called on all ranks with the step after every saved state, the averaged weights in place.
        logged: called on the first rank with every log row.
        peak: of one device, for its utilisation; None = unknown.
    """

    saved: Callable[[int], None] = lambda step: None
    logged: Callable[[dict[str, Any]], None] = lambda row: None
    peak: Peak | None = None


def run(
    task: Task,
    recipe: StageRecipe,
    ranks: Ranks,
    out: Path,
    provenance: Mapping[str, Any],
    hooks: Hooks,
    progress: bool,
) -> dict[str, Any]:
    """Runs or resumes a stage.

    Args:
        task: what it computes.
        recipe: of the stage.
        ranks: this process among all.
        out: folder of the stage: ``state/``, ``log.jsonl``.
        provenance: hashes of recipe and data; a state with others is refused.
        hooks: what else happens.
        progress: whether the first rank draws a bar.

    Returns:
        Last losses, steps, seconds.

    Raises:
        UserError: a damaged or foreign state, a full disk, a loss that is not finite (the last good state stays).
    """
    spec = recipe.optim
    optimizer = build_optimizer(parameter_groups(task.learner.named_parameters(), spec), spec)
    average = Average(task.learner, spec.average)
    first = restore_state(out, task.learner, optimizer, average, provenance)
    began, recent = time.monotonic(), dict[str, float]()
    saving = _Saving(recipe)
    log = _Log(out / LOG_FILE, recipe.stage, ranks, hooks, task)
    bar = tqdm(
        total=recipe.steps, initial=first, desc=recipe.stage, disable=not (progress and ranks.first), mininterval=1
    )
    for batch in task.steps(first, recipe.steps - first):
        step = batch.step
        torch.manual_seed(step * ranks.world + ranks.rank)  # of dropout, the only draw that is not in the batch
        learning = set_rates(optimizer, scale_at(step, recipe.steps, spec))
        means = gradients(task, batch, recipe, ranks)
        norm = clip_gradients(task.learner.parameters(), spec.clip_norm)
        if not all(map(math.isfinite, (*means.values(), norm))):
            found = "gradient" if all(map(math.isfinite, means.values())) else "loss"
            raise UserError(
                f"{recipe.stage}, step {step}: the {found} is not finite; the states in {out}/state are good: lower "
                "optim.rates or look at the data with `qwen-vla data doctor`, and run again"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(task.learner, step)
        recent = {
            key: value if key not in recent else 0.95 * recent[key] + 0.05 * value for key, value in means.items()
        }
        log.add(batch, means)
        bar.update()
        if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps:
            bar.set_postfix({key: f"{value:.4f}" for key, value in recent.items()}, refresh=False)
            log.write(step + 1, norm, learning)
        if saving(step + 1):
            save_state(out, step + 1, task.learner, optimizer, average, provenance)
            with average.applied_to(task.learner):
                hooks.saved(step + 1)
            saving.done()
    bar.close()
    return {"steps": recipe.steps, "seconds": round(time.monotonic() - began, 1), **recent}


def gradients(task: Task, batch: StepBatch, recipe: StageRecipe, ranks: Ranks) -> dict[str, float]:
    """Adds up the gradients of all micro-batches on all ranks; returns the mean of each loss."""
    counted = [task.counts(part) for part in batch.parts]
    counts = all_sum({key: float(sum(count.get(key, 0) for count in counted)) for key in task.weights})
    sums = dict.fromkeys(task.weights, 0.0)
    for number, part in enumerate(batch.parts):
        inputs, options = forward_arguments(on_device(part, ranks.device))
        with accumulating(task.module, number == len(batch.parts) - 1):
            with autocast(ranks, recipe.scale.precision):
                losses = task.module(inputs, **options)
            weighted = [task.weights[key] * value / max(counts[key], 1.0) for key, value in losses.items()]
            torch.stack(weighted).sum().backward()
        for key, value in losses.items():
            sums[key] += float(value.detach())
    total = all_sum(sums)
    return {key: total[key] / counts[key] for key in total if counts[key]}


class _Saving:
    """Whether a step is one after which the state is saved; the same answer on every rank."""

    def __init__(self, recipe: StageRecipe) -> None:
        self.recipe, self._since = recipe, time.monotonic()

    def __call__(self, step: int) -> bool:
        recipe = self.recipe
        if step % recipe.save_every == 0 or step == recipe.steps:
            return True
        if not recipe.save_minutes:
            return False
        overdue = time.monotonic() - self._since >= 60 * recipe.save_minutes
        return all_sum({"overdue": float(overdue)})["overdue"] > 0  # clocks of ranks differ a little

    def done(self) -> None:
        self._since = time.monotonic()


class _Log:
    """Rows of ``log.jsonl``, every ``log_every`` steps."""

    def __init__(self, path: Path, stage: str, ranks: Ranks, hooks: Hooks, task: Task) -> None:
        self.path, self.stage, self.ranks, self.hooks, self.task = path, stage, ranks, hooks, task
        self._since = time.monotonic()
        self._samples, self._tokens, self._flops = 0, 0, 0.0
        self._losses: dict[str, list[float]] = {}

    def add(self, batch: StepBatch, means: Mapping[str, float]) -> None:
        for key, value in means.items():
            self._losses.setdefault(key, []).append(value)
        self._samples += batch.samples
        self._tokens += batch.tokens
        if self.hooks.peak is not None:
            self._flops += sum(self.task.flops(part) for part in batch.parts)

    def write(self, step: int, norm: float, rates: Mapping[str, float]) -> None:
        """One row, losses averaged since the row before; every rank calls it, the first one writes."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        done = all_sum({"samples": float(self._samples), "tokens": float(self._tokens), "flops": self._flops})
        self._since, self._samples, self._tokens, self._flops = now, 0, 0, 0.0
        means = {key: sum(values) / len(values) for key, values in self._losses.items()}
        self._losses.clear()
        if not self.ranks.first:
            return
        used = utilisation(done["flops"] / self.ranks.world, seconds, self.hooks.peak)
        row = {
            "stage": self.stage,
            "step": step,
            **{key: round(value, 6) for key, value in means.items()},
            "grad_norm": round(norm, 5),
            **{f"lr_{part}": rate for part, rate in rates.items()},
            "samples_per_s": round(done["samples"] / seconds, 2),
            "tokens_per_s": round(done["tokens"] / seconds, 1),
            "mfu": None if used is None else round(used, 4),
            "seconds": round(seconds, 3),
        }
        append_rows(self.path, [row])
        self.hooks.logged(row)
