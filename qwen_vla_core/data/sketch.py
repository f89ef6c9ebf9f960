"""Quantiles of a channel in one streaming pass: exact counts on a dyadic grid that is as fine as the data allow [O].

Randomised sketches (KLL, t-digest) give another answer for every order of merging; the statistics inside a checkpoint
must come out the same on every machine. This one is a function of the multiset of values alone:

- A value x falls into bin ``floor(x / 2**e)``. Only occupied bins are kept, at most ``MAX_BINS``; when there are
  more, e grows by one and neighbours merge. The number of occupied bins never grows with e, so the final e is the
  smallest one that fits, whatever the order of values and merges.
- Sums and sums of squares are kept as exact integers, so mean and standard deviation do not depend on the order either.

Guarantee: a quantile differs from ``numpy.quantile`` by less than one bin width w, and for every set of m values left
out, ``w ≤ 2 R / (MAX_BINS − 2 − m)`` with R the range of the others (m = 0: w < 0.025 % of the range). A few far
outliers therefore cost their own bins, not the resolution of the rest; and a channel with up to ``MAX_BINS`` different
values (constants, switches, encoder counts) keeps them to 52 bits of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

MAX_BINS = 8192
_KEY_BITS = 52  # bins of the finest grid per largest magnitude: keys stay exact in float64
_FINEST = -1074  # the smallest exponent of float64
_UNIT = 400  # sums are integers in units of 2**-_UNIT: finer than the square of the smallest float32
_BLOCK = 1 << 20  # values summed at once: partial sums of 27-bit halves stay exact in float64


class QuantileSketch:
    """Counts of one channel; ``add`` values, ``merge`` with others, then ask.

    Attributes:
        count: number of values.
        minimum: smallest value (inf without values).
        maximum: largest value (−inf without values).
        exponent: e, the bin width is 2**e.
        keys: (bins,) int64, ascending numbers of the occupied bins.
        counts: (bins,) int64, values in each.
    """

    def __init__(self) -> None:
        self.count = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.exponent = _FINEST
        self.keys = np.empty(0, np.int64)
        self.counts = np.empty(0, np.int64)
        self._sum, self._squares = 0, 0  # exact, in units of 2**-_UNIT

    def add(self, values: np.ndarray) -> None:
        """Counts values of any shape, as float32: the precision of channels, whose squares are exact in float64.

        Raises:
            ValueError: a value is not finite, or beyond what float32 can hold.
        """
        with np.errstate(over="ignore"):
            x = np.asarray(values).astype(np.float32).astype(np.float64).ravel()
        for start in range(0, len(x), _BLOCK):
            self._add_block(x[start : start + _BLOCK])

    def _add_block(self, x: np.ndarray) -> None:
        largest = float(np.abs(x).max())
        if not math.isfinite(largest):
            raise ValueError("values must be finite and within float32")
        other = QuantileSketch()
        other.count = len(x)
        other.minimum, other.maximum = float(x.min()) + 0.0, float(x.max()) + 0.0  # + 0.0: there is no −0
        other.exponent = _finest_exponent(largest)
        other.keys, other.counts = np.unique(
            np.floor(np.ldexp(x, -other.exponent)).astype(np.int64), return_counts=True
        )
        other._sum, other._squares = _exact_sum(x), _exact_sum(np.square(x))
        self.merge(other)

    def merge(self, other: QuantileSketch) -> None:
        """Adds what ``other`` has counted; ``other`` stays as it is."""
        if other.count == 0:
            return
        self.count += other.count
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self._sum += other._sum
        self._squares += other._squares
        finest = _finest_exponent(max(abs(self.minimum), abs(self.maximum)))
        exponent = max(self.exponent, other.exponent, finest)
        keys = np.concatenate(
            [_coarser(self.keys, exponent - self.exponent), _coarser(other.keys, exponent - other.exponent)]
        )
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], np.concatenate([self.counts, other.counts])[order]
        shift = _needed_shift(keys)
        keys = _coarser(keys, shift)
        first = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        self.exponent, self.keys = exponent + shift, keys[first]
        self.counts = np.add.reduceat(counts, first)

    @property
    def width(self) -> float:
        """Bin width: the largest possible error of a quantile."""
        return math.ldexp(1.0, self.exponent)

    @property
    def mean(self) -> float:
        """Exact mean, rounded once.

        Raises:
            ValueError: there are no values.
        """
        self._need_values()
        return float(Fraction(self._sum, self.count << _UNIT))

    @property
    def std(self) -> float:
        """Population standard deviation from exact sums, so nothing cancels."""
        self._need_values()
        mean = Fraction(self._sum, self.count << _UNIT)
        return math.sqrt(max(Fraction(self._squares, self.count << _UNIT) - mean * mean, Fraction(0)))

    def quantile(self, q: float | Sequence[float]) -> np.ndarray:
        """Quantiles as ``numpy.quantile`` (linear) defines them, within ``width`` of them.

        Args:
            q: values in [0, 1], any shape.

        Raises:
            ValueError: there are no values, or q is outside [0, 1].
        """
        self._need_values()
        fractions = np.asarray(q, np.float64)
        if not np.all((fractions >= 0) & (fractions <= 1)):
            raise ValueError("quantiles are asked for in [0, 1]")
        place = fractions * (self.count - 1)
        below = np.floor(place)
        part = place - below
        low, high = self._ordered(below), self._ordered(np.minimum(below + 1, self.count - 1))
        return low + part * (high - low)

    def _ordered(self, ranks: np.ndarray) -> np.ndarray:
        """Values of 0-based ranks: spread evenly over their bin, which is cut off at the smallest and largest value."""
        ends = np.cumsum(self.counts)
        bins = np.searchsorted(ends, ranks, side="right")
        within = (ranks - (ends - self.counts)[bins] + 0.5) / self.counts[bins]
        low = np.maximum(np.ldexp(self.keys[bins].astype(np.float64), self.exponent), self.minimum)
        high = np.minimum(np.ldexp(self.keys[bins].astype(np.float64) + 1.0, self.exponent), self.maximum)
        values = low + within * (high - low)
        values = np.where(ranks == 0, self.minimum, values)
        return np.where(ranks == self.count - 1, self.maximum, values)

    def _need_values(self) -> None:
        if self.count == 0:
            raise ValueError("no values were added")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantileSketch) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, equal for equal multisets of values; undone by ``from_json``."""
        return {
            "count": self.count,
            "minimum": self.minimum if self.count else None,
            "maximum": self.maximum if self.count else None,
            "exponent": self.exponent,
            "keys": self.keys.tolist(),
            "counts": self.counts.tolist(),
            "sum": hex(self._sum),
            "squares": hex(self._squares),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> QuantileSketch:
        """Reads what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        sketch = cls()
        sketch.count, sketch.exponent = int(value["count"]), int(value["exponent"])
        sketch.keys, sketch.counts = np.asarray(value["keys"], np.int64), np.asarray(value["counts"], np.int64)
        sketch._sum, sketch._squares = int(value["sum"], 16), int(value["squares"], 16)
        if sketch.keys.shape != sketch.counts.shape or sketch.counts.sum() != sketch.count:
            raise ValueError("counts do not add up")
        if sketch.count:
            sketch.minimum, sketch.maximum = float(value["minimum"]), float(value["maximum"])
        return sketch


def _finest_exponent(largest: float) -> int:
    """Exponent of the finest grid whose keys, up to ``largest`` in magnitude, stay below 2**_KEY_BITS."""
    return max(math.frexp(largest)[1] - _KEY_BITS, _FINEST) if largest else _FINEST


def _coarser(keys: np.ndarray, shift: int) -> np.ndarray:
    """Bin numbers on a grid 2**shift times wider."""
    return keys >> min(shift, 63)


def _needed_shift(keys: np.ndarray) -> int:
    """Smallest shift that leaves at most MAX_BINS different values of sorted ``keys``."""
    low, high = 0, 63  # after 63 only 0 and −1 are left
    while low < high:
        middle = (low + high) // 2
        if np.count_nonzero(np.diff(keys >> middle)) < MAX_BINS:
            high = middle
        else:
            low = middle + 1
    return low


def _exact_sum(x: np.ndarray) -> int:
    """Σ x in units of 2**-_UNIT, without rounding: mantissas are summed per exponent, in two halves."""
    mantissa, exponent = np.frexp(x)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = int(exponent.min())
    place = exponent - lowest
    high = np.bincount(place, weights=(whole >> 27).astype(np.float64))
    low = np.bincount(place, weights=(whole & ((1 << 27) - 1)).astype(np.float64))
    total = 0
    for i in np.flatnonzero((high != 0) | (low != 0)):
        total += ((int(high[i]) << 27) + int(low[i])) << int(i)
    return total << (lowest - 53 + _UNIT)
