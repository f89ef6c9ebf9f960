"""Rates with their uncertainty: never one without the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy
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

    @property
    def anytime_interval(self) -> tuple[float, float]:
        """95 % confidence sequence: holds at every number of trials at once, so one may look and stop at any time.

        The p that a uniform mixture of binomials does not refute: B(1+s, 1+n-s) / (p^s (1-p)^(n-s)) < 1 / 0.05, by
        Ville's inequality for that ratio, which is a martingale under p. Wider than Wilson's, which holds for a number
        of trials fixed beforehand.
        """
        s, f = self.successes, self.trials - self.successes
        if not self.trials:
            return (0.0, 1.0)
        bound = betaln(1 + s, 1 + f) + math.log(0.05)

        def refuted(p: float) -> float:
            return float(bound - xlogy(s, p) - xlog1py(f, -p))

        tiny = 1e-12
        low = brentq(refuted, tiny, min(self.value, 1 - tiny)) if s else 0.0
        high = brentq(refuted, max(self.value, tiny), 1 - tiny) if f else 1.0
        return (float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "rate": self.value, "interval_95": list(self.interval)}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.successes}/{self.trials} = {self.value:.0%} [{low:.0%}, {high:.0%}]"


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all episodes report; {} without any episode."""
    shared = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}
