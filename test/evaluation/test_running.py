"""Trials in order whatever runs them, and a stop rule that may look as often as it likes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.report import axis_table
from qwen_vla_core.evaluation.results import Result
from qwen_vla_core.evaluation.running import StopRule, run_trials
from qwen_vla_core.evaluation.suites.protocol import Trial


class Coins:
    """A runner whose trials succeed by their seed; it notes what was begun."""

    def __init__(self, ahead: int) -> None:
        self.ahead, self.begun, self.running = ahead, [], 0
        self.most = 0

    def begin(self, trial: Trial) -> Trial:
        self.begun.append(trial.key)
        self.running += 1
        self.most = max(self.most, self.running)
        return trial

    def finish(self, handle: Trial) -> dict[str, Any]:
        self.running -= 1
        success = handle.axis == "easy" or handle.seed % 2 == 0
        return {"seed": handle.seed, "success": success, "seconds": 1.0, "metrics": {}, "chosen": None, "target": None}


TRIALS = [Trial(axis, "pick", seed) for axis in ("easy", "hard") for seed in range(200)]


def test_rows_come_in_order_and_only_so_many_run_at_once() -> None:
    runner = Coins(4)
    rows = list(run_trials(runner, TRIALS, {}, StopRule(None)))
    assert [row["key"] for _, row, _ in rows] == [trial.key for trial in TRIALS] and runner.most == 4
    assert all(new for _, _, new in rows)


def test_stored_trials_are_not_run_again() -> None:
    runner = Coins(3)
    stored = {row["key"]: row for _, row, _ in run_trials(Coins(1), TRIALS[:150], {}, StopRule(None))}
    rows = list(run_trials(runner, TRIALS, stored, StopRule(None)))
    assert [row["key"] for _, row, _ in rows] == [trial.key for trial in TRIALS]
    assert runner.begun == [trial.key for trial in TRIALS[150:]]
    assert [new for _, _, new in rows] == [False] * 150 + [True] * 250


@pytest.mark.parametrize("ahead", [1, 7])
def test_an_early_stop_does_not_depend_on_the_workers(ahead: int) -> None:
    rows = [row for _, row, _ in run_trials(Coins(ahead), TRIALS, {}, StopRule(0.2))]
    easy, hard = ([r for r in rows if r["axis"] == axis] for axis in ("easy", "hard"))
    assert len(easy) == 29  # the first n for which n successes of n leave less than 0.2
    low, high = Rate(29, 29).anytime_interval
    assert high - low < 0.2 <= 1.0 - Rate(28, 28).anytime_interval[0] and high == 1.0
    assert len(hard) == 200  # half of them succeed: that takes longer than there are trials
    table = axis_table(Result("r", {"until_interval_below": 0.2}, tuple(rows)))  # type: ignore[arg-type]
    assert [line.interval for line in table] == [Rate(29, 29).anytime_interval, Rate(100, 200).anytime_interval]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_anytime_interval_covers_at_every_number_of_trials_at_once(p: float) -> None:
    """Watched all the time it misses the truth in at most 5 % of runs; Wilson's misses far more often."""
    rng = np.random.default_rng(3)
    known: dict[tuple[int, int], tuple[bool, bool]] = {}

    def misses(s: int, n: int) -> tuple[bool, bool]:
        if (s, n) not in known:
            rate = Rate(s, n)
            known[s, n] = tuple(not low <= p <= high for low, high in (rate.anytime_interval, rate.interval))
        return known[s, n]

    runs, looks = 200, (*range(1, 30), *range(30, 201, 10))
    counts = (rng.random((runs, 200)) < p).cumsum(axis=1)
    ever = np.array([np.any([misses(int(path[n - 1]), n) for n in looks], axis=0) for path in counts])
    assert ever[:, 0].mean() <= 0.05 and ever[:, 1].mean() > 0.12


def test_intervals_of_nothing_and_of_the_extremes() -> None:
    assert Rate(0, 0).anytime_interval == (0.0, 1.0)
    low, high = Rate(0, 20).anytime_interval
    assert low == 0.0 and 0.2 < high < 0.4
    assert Rate(20, 20).anytime_interval == pytest.approx((1 - high, 1.0))
    for s, n in ((5, 10), (1, 3), (90, 100)):
        (low, high), (wilson_low, wilson_high) = Rate(s, n).anytime_interval, Rate(s, n).interval
        assert low < wilson_low < s / n < wilson_high < high
