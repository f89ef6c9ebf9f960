"""Two checkpoints on the same trials: what differs, how sure that is, and what so many trials could have shown.

Trials are paired by key, that is by the same scene and the same instruction. McNemar's exact test asks whether the
pairs that went differently lean to one side; pairs that went alike say nothing about a difference. The size of the
difference has a bootstrap interval over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, norm

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.results import Result, Row

RESAMPLES = 5000
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """B against A over the pairs of one axis, or of all.

    Attributes:
        axis: None: all of them.
        a: rate of A over the pairs; b: of B.
        only_a: pairs in which only A succeeded; only_b: only B.
        p: two-sided, of McNemar's exact test; 1 without any pair that differs.
        p_holm: after Holm's correction for the number of axes; of all axes together, p itself.
        difference: rate of B minus rate of A.
        interval: 95 %, percentile bootstrap over pairs; None where no two pairs differ, which it cannot handle.
        detectable: the difference that so many pairs show with 80 % power at 5 %, given how many pairs differ here.
        metrics: name → (mean of B minus A, 95 % bootstrap interval), of what both report.
    """

    axis: str | None
    a: Rate
    b: Rate
    only_a: int
    only_b: int
    p: float
    p_holm: float
    difference: float
    interval: tuple[float, float] | None
    detectable: float
    metrics: dict[str, tuple[float, tuple[float, float] | None]]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **vars(self),
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "interval": self.interval and list(self.interval),
            "metrics": {name: {"difference": d, "interval_95": i and list(i)} for name, (d, i) in self.metrics.items()},
        }


def compare(a: Result, b: Result) -> list[Comparison]:
    """Every axis, then all together where there are several.

    Raises:
        UserError: the two share no trial, or the same key stands for another scene or task.
    """
    if a.suite != b.suite:
        raise UserError(f"{b.path}: of suite {b.suite}, {a.path} is of {a.suite}; compare results of one suite")
    for name in ("execute_steps", "timeout", "latency_ms", "strategy"):
        one, other = (r.header.get("settings", {}).get(name) for r in (a, b))
        if one != other and None not in (one, other):
            raise UserError(f"{b.path}: was run with {name} {other}, {a.path} with {one}: no fair comparison")
    others = {row["key"]: row for row in b.rows}
    pairs = [(row, others[row["key"]]) for row in a.rows if row["key"] in others]
    if not pairs:
        raise UserError(f"{a.path} and {b.path}: no trial in common; run both with the same --suite and --seed")
    for one, other in pairs:
        if one["instruction"] != other["instruction"]:
            raise UserError(
                f"trial {one['key']}: asked {one['instruction']!r} in {a.path} and {other['instruction']!r} in "
                f"{b.path}: the suite has changed between them"
            )
    axes = tuple(axis for axis in a.axes if any(one["axis"] == axis for one, _ in pairs))
    found = [_compare(axis, [pair for pair in pairs if pair[0]["axis"] == axis]) for axis in axes]
    corrected = holm([line.p for line in found])
    found = [_with(line, p) for line, p in zip(found, corrected, strict=True)]
    return found if len(found) == 1 else [*found, _compare(None, pairs)]


def _with(line: Comparison, p_holm: float) -> Comparison:
    return Comparison(**{**vars(line), "p_holm": p_holm})


def _compare(axis: str | None, pairs: Sequence[tuple[Row, Row]]) -> Comparison:
    one, other = (np.array([bool(pair[i]["success"]) for pair in pairs]) for i in (0, 1))
    only_a, only_b = int((one & ~other).sum()), int((other & ~one).sum())
    n = len(pairs)
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    difference = other.astype(float) - one.astype(float)
    shared = [
        name for name in pairs[0][0]["metrics"] if all(name in x["metrics"] and name in y["metrics"] for x, y in pairs)
    ]
    metrics = {}
    for name in shared:
        values = np.array([y["metrics"][name] - x["metrics"][name] for x, y in pairs], dtype=float)
        metrics[name] = (float(values.mean()), bootstrap_mean(values))
    return Comparison(
        axis=axis,
        a=Rate(int(one.sum()), n),
        b=Rate(int(other.sum()), n),
        only_a=only_a,
        only_b=only_b,
        p=p,
        p_holm=p,
        difference=float(difference.mean()),
        interval=bootstrap_mean(difference),
        detectable=detectable(only_a + only_b, n),
        metrics=metrics,
    )


def bootstrap_mean(values: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean of (n,) paired differences; None where they are all the same."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    result = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=0)
    return (float(result.confidence_interval.low), float(result.confidence_interval.high))


def detectable(discordant: int, pairs: int) -> float:
    """The least difference of two rates that McNemar's test on ``pairs`` pairs finds four times in five.

    From the share of pairs that differ (with one pair and two trials added, so that none is not taken for never), after
    Connor 1987: (z₀.₉₇₅ √ψ + z₀.₈ √(ψ − δ²)) / √n = δ, solved for δ.
    """
    share = (discordant + 1) / (pairs + 2)
    z_a, z_b = float(norm.ppf(0.975)), float(norm.ppf(POWER))
    # δ√n − z_a√ψ = z_b√(ψ − δ²), squared and solved; the larger root is the one with a positive right-hand side.
    a, b, c = pairs + z_b**2, -2 * z_a * math.sqrt(share * pairs), share * (z_a**2 - z_b**2)
    return min(1.0, (-b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all of a family at once."""
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = worst
    return [float(value) for value in adjusted]
