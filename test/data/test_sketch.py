"""The sketch against numpy.quantile on 10^7 values, and its independence of the order of values and merges."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from qwen_vla_core.data import sketch as sketch_module
from qwen_vla_core.data.sketch import MAX_BINS, QuantileSketch

N = 10_000_000
ASKED = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


def with_outlier(rng: Generator) -> np.ndarray:
    x = rng.standard_normal(N, np.float32)
    x[N // 2] = 1e9
    return x


def bimodal(rng: Generator) -> np.ndarray:
    x = rng.standard_normal(N, np.float32) * np.float32(0.05)
    x[: N // 2] += 100
    return x


def switch(rng: Generator) -> np.ndarray:
    return np.repeat(np.float32([0.0, 1.0, 0.3, 0.0]), N // 4)


DISTRIBUTIONS: dict[str, Callable[[Generator], np.ndarray]] = {
    "normal": lambda rng: rng.standard_normal(N, np.float32),
    "uniform": lambda rng: rng.random(N, np.float32),
    "heavy-tailed": lambda rng: rng.standard_cauchy(N).astype(np.float32),
    "bimodal": bimodal,
    "switch": switch,
    "with an outlier": with_outlier,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ten_million_values_against_numpy(name: str) -> None:
    x = DISTRIBUTIONS[name](np.random.default_rng(1))
    sketch = QuantileSketch()
    for part in np.array_split(x, 61):
        sketch.add(part)
    wide = x.astype(np.float64)
    true = np.quantile(wide, ASKED)
    error = np.abs(sketch.quantile(ASKED) - true)
    assert error.max() < sketch.width
    assert error.max() <= 1e-4 * (true[-1] - true[0])  # asked: 0.5 % of the range
    assert error[2:-2].max() <= 0.005 * (true[8] - true[2])  # and of q99 − q01, which is what normalisation divides by
    assert sketch.count == N and (sketch.minimum, sketch.maximum) == (x.min(), x.max())
    assert sketch.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-9)
    assert sketch.std == pytest.approx(wide.std(), rel=1e-9)
    assert len(sketch.keys) <= MAX_BINS


def test_an_outlier_costs_no_resolution() -> None:
    x = np.random.default_rng(2).standard_normal(100_000)
    plain, far = QuantileSketch(), QuantileSketch()
    plain.add(x)
    far.add(np.append(x, [1e12, -1e12]))
    assert far.width == plain.width < 2 * (x.max() - x.min()) / (MAX_BINS - 4)


@pytest.mark.parametrize("value", [0.0, 0.1, -273.15, 1e30, 1e-40])
def test_constants_are_exact(value: float) -> None:
    value = float(np.float32(value))
    sketch = QuantileSketch()
    sketch.add(np.full(1000, value))
    assert np.all(sketch.quantile(ASKED) == value)
    assert sketch.mean == value and sketch.std == 0


def test_few_different_values_keep_52_bits() -> None:
    values = np.float32([0, 0.1, 0.2, 1.0, 1e6]).astype(np.float64)
    sketch = QuantileSketch()
    sketch.add(np.repeat(values, 200))
    error = sketch.quantile([0, 0.1, 0.3, 0.5, 0.7, 0.9]) - values[[0, 0, 1, 2, 3, 4]]
    assert np.abs(error).max() <= sketch.width == 2.0**-32


def test_std_does_not_cancel() -> None:
    sketch = QuantileSketch()
    sketch.add(np.float32([2**24 - 1, 2**24, 2**24 - 2]))
    assert sketch.std == pytest.approx(np.sqrt(2 / 3), rel=1e-12)


@given(
    st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32), max_size=40),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_order_and_split_do_not_matter(parts: list[list[float]], random: object) -> None:
    values = [x for part in parts for x in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_module, "MAX_BINS", 16)
        whole = QuantileSketch()
        whole.add(np.array(values))
        backwards = QuantileSketch()
        for part in reversed(parts):
            backwards.add(np.array(part))
        shuffled = list(values)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        trees = [QuantileSketch() for _ in range(4)]
        for i, x in enumerate(shuffled):
            trees[i % 4].add(np.array([x]))
        trees[0].merge(trees[1])
        trees[3].merge(trees[2])
        trees[3].merge(trees[0])
        assert whole == backwards == trees[3]
        assert len(whole.keys) <= 16 and whole.counts.sum() == len(values)
        assert QuantileSketch.from_json(json.loads(json.dumps(whole.to_json()))) == whole
        if values:
            assert np.all(np.abs(whole.quantile(ASKED) - np.quantile(values, ASKED)) <= whole.width)


def test_what_cannot_be_counted_is_refused() -> None:
    sketch = QuantileSketch()
    for value in (np.nan, np.inf, 1e200):
        with pytest.raises(ValueError, match="finite"):
            sketch.add(np.array([0.0, value]))
    with pytest.raises(ValueError, match="no values"):
        sketch.quantile(0.5)
    sketch.add(np.zeros(0))
    assert sketch.count == 0
    sketch.add(np.ones(3))
    with pytest.raises(ValueError, match="0, 1"):
        sketch.quantile(1.5)
    with pytest.raises(ValueError, match="add up"):
        QuantileSketch.from_json(sketch.to_json() | {"counts": [2]})
