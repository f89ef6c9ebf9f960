"""Two results on the same trials: the test, the interval, the correction, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.compare import compare, detectable, holm
from qwen_vla_core.evaluation.results import Result


def result(name: str, outcomes: dict[str, list[bool]], **header: Any) -> Result:
    rows = [
        {
            "key": f"{axis}/pick/{seed}",
            "axis": axis,
            "task": "pick",
            "seed": seed,
            "instruction": f"lift {seed}",
            "success": success,
            "metrics": {"spl": 0.8 if success else 0.0},
        }
        for axis, values in outcomes.items()
        for seed, success in enumerate(values)
    ]
    return Result(Path(name), {"suite": "aloha", "settings": {}, **header}, tuple(rows))


def test_mcnemar_counts_only_pairs_that_differ() -> None:
    a = [True] * 40 + [False] * 20 + [True] * 3
    b = [True] * 40 + [True] * 10 + [False] * 10 + [False] * 3
    (line,) = compare(result("a", {"in": a}), result("b", {"in": b}))
    assert (line.only_a, line.only_b) == (3, 10) and (line.a.successes, line.b.successes) == (43, 50)
    assert line.p == pytest.approx(binomtest(3, 13, 0.5).pvalue) == pytest.approx(0.0923, abs=1e-4)
    assert line.difference == pytest.approx(7 / 63)
    low, high = line.interval or (0, 0)
    assert low < 7 / 63 < high and -0.02 < low < 0.02  # about as undecided as p says
    mean, span = line.metrics["spl"]
    assert mean == pytest.approx(0.8 * 7 / 63) and span is not None and span[0] < mean < span[1]


def test_no_pair_differs() -> None:
    (line,) = compare(result("a", {"in": [True] * 20}), result("b", {"in": [True] * 20}))
    assert line.p == 1.0 and line.interval is None and line.difference == 0.0
    assert 0.1 < line.detectable < 0.3  # never is not concluded from twenty


def test_axes_are_corrected_for_their_number_and_all_of_them_are_one_more_line() -> None:
    a, b = [False] * 12 + [True] * 12, [True] * 12 + [True] * 12
    lines = compare(result("a", {"x": a, "y": a}), result("b", {"x": b, "y": a}))
    assert [line.axis for line in lines] == ["x", "y", None]
    assert lines[0].p == pytest.approx(2 / 2**12) and lines[0].p_holm == pytest.approx(4 / 2**12)
    assert lines[1].p_holm == 1.0 and lines[2].a.trials == 48
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_what_can_be_seen_is_what_simulation_sees() -> None:
    """With a difference of ``detectable`` the exact test finds it in about 80 % of experiments."""
    n, discordant = 120, 36
    delta = detectable(discordant, n)
    share = (discordant + 1) / (n + 2)
    rng = np.random.default_rng(0)
    only_b, only_a = (share + delta) / 2, (share - delta) / 2
    counts = rng.multinomial(n, [only_b, only_a, 1 - share], size=400)
    found = np.mean([binomtest(int(b), int(a + b), 0.5).pvalue < 0.05 for b, a, _ in counts])
    assert 0.7 < found < 0.87  # the exact test is a little less powerful than the formula
    assert detectable(36, 120) > detectable(360, 1200) and detectable(5, 10) <= 1.0


def test_what_is_no_pair_is_refused() -> None:
    a = result("a", {"in": [True, False]})
    with pytest.raises(UserError, match="no trial in common"):
        compare(a, result("b", {"out": [True]}))
    with pytest.raises(UserError, match="of suite widowx"):
        compare(a, result("b", {"in": [True]}, suite="widowx"))
    with pytest.raises(UserError, match="was run with execute_steps 2"):
        compare(
            result("a", {"in": [True]}, settings={"execute_steps": 5}),
            result("b", {"in": [True]}, settings={"execute_steps": 2}),
        )
    other = result("b", {"in": [True, False]})
    other.rows[1]["instruction"] = "something else"
    with pytest.raises(UserError, match="trial in/pick/1: asked"):
        compare(a, other)
