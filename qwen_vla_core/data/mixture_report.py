"""What a mixture recipe really draws, beside what it was meant to."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

from qwen_vla_core.data.mixture import Mixture


def mixture_report(mixture: Mixture, draws: int, first_step: int = 0, tasks: int = 20) -> dict[str, Any]:
    """Draws whole minibatches and counts.

    Args:
        mixture: an opened recipe.
        draws: at least so many samples.
        first_step: of training.
        tasks: how many tasks are listed, the most likely ones first.

    Returns:
        JSON: per family, dataset, embodiment and task the share ``wanted`` and ``drawn``; per dataset also its samples,
        and through how many epochs of it these draws would go; the smallest and largest number of each family in a
        batch.
    """
    recipe = mixture.recipe
    steps = math.ceil(draws / recipe.batch_size)
    drawn: Counter[tuple[int, int]] = Counter()  # (family, cell)
    per_batch: dict[int, list[int]] = defaultdict(list)
    for step in range(first_step, first_step + steps):
        members = [(family, cell) for _, family, cell in mixture.drawn(step)]
        drawn.update(members)
        counts = Counter(family for family, _ in members)
        for family in range(len(recipe.families)):
            per_batch[family].append(counts[family])
    total = steps * recipe.batch_size

    wanted: dict[str, defaultdict[Hashable, float]] = {level: defaultdict(float) for level in _LEVELS}
    got: dict[str, Counter[Hashable]] = {level: Counter() for level in _LEVELS}
    for number, (spec, share, sampler) in enumerate(zip(recipe.families, recipe.shares, mixture.samplers, strict=True)):
        for i, (cell, chance) in enumerate(zip(sampler.cells, sampler.probability, strict=True)):
            keys = (spec.name, cell.source, cell.embodiment, (spec.name, cell.embodiment, cell.task))
            for level, key in zip(_LEVELS, keys, strict=True):
                wanted[level][key] += share * float(chance)
                got[level][key] += drawn[number, i]

    def line(level: str, key: Hashable) -> dict[str, Any]:
        return {"wanted": wanted[level][key], "drawn": got[level][key] / total, "draws": got[level][key]}

    sizes = mixture.sizes()
    listed = sorted((k for k in wanted["task"] if k[2]), key=lambda k: (-wanted["task"][k], k))  # type: ignore[index]
    return {
        "recipe": recipe.source,
        "batch_size": recipe.batch_size,
        "batches": steps,
        "draws": total,
        "absent": list(recipe.absent),
        "families": [
            {
                "family": family.name,
                **line("family", family.name),
                "per_batch": [min(per_batch[i]), max(per_batch[i])],
            }
            for i, family in enumerate(recipe.families)
        ],
        "datasets": [
            {
                "dataset": source.dataset.name,
                "path": str(source.path),
                "family": source.family,
                "embodiment": source.embodiment,
                **line("dataset", i),
                "samples": sizes[i],
                "epochs": got["dataset"][i] / sizes[i],
            }
            for i, source in enumerate(mixture.sources)
        ],
        "embodiments": [{"embodiment": name, **line("embodiment", name)} for name in _named(wanted["embodiment"])],
        "task_count": len(listed),
        "tasks": [
            {"family": key[0], "embodiment": key[1], "task": key[2], **line("task", key)}  # type: ignore[index]
            for key in listed[:tasks]
        ],
    }


_LEVELS = ("family", "dataset", "embodiment", "task")


def _named(keys: Iterable[Hashable]) -> list[str]:
    return [key for key in keys if isinstance(key, str) and key]
