"""Rates with their uncertainty: never one without the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A success count with its 95 % Wilson score interval."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """Success fraction; NaN without trials."""
        return self.successes / self.trials if self.trials else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval; (0, 1) without trials."""
        if not self.trials:
            return (0.0, 1.0)
        result = binomtest(self.successes, self.trials).proportion_ci(0.95, method="wilson")
        return (float(result.low), float(result.high))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "rate": self.value, "interval_95": list(self.interval)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.successes}/{self.trials} = {self.value:.0%} [{low:.0%}, {high:.0%}]"


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric over episodes that all report the same names; {} without any."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else {})}
