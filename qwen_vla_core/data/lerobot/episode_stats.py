"""The statistics that LeRobot keeps per episode and per dataset, in its own names and shapes.

Per episode they are exact (``numpy.quantile``); LeRobot's own are read off histograms of 5,000 bins. Over a dataset
minimum, maximum, mean and standard deviation follow from the episodes; quantiles do not: LeRobot averages those of the
episodes, this package counts all rows in a sketch (``data.sketch``) for state, action and other numbers, and averages
for pictures only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen_vla_core.data.sketch import QuantileSketch

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
KEYS = ("min", "max", "mean", "std", "count", *QUANTILES)
FeatureStats = dict[str, np.ndarray]
_SIDE = 150  # pictures are thinned to about this many pixels a side before they are counted [X]


def row_stats(values: np.ndarray) -> FeatureStats:
    """Statistics of (T, …) numbers over T; each entry has the shape of one step, and (1,) for plain numbers."""
    x = values.reshape(len(values), -1).astype(np.float64)
    shape = values.shape[1:] or (1,)
    quantiles = np.quantile(x, list(QUANTILES.values()), axis=0)
    stats = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    stats |= dict(zip(QUANTILES, quantiles, strict=True))
    return {key: value.reshape(shape) for key, value in stats.items()} | {"count": np.array([len(x)])}


class PictureStats:
    """Statistics of the pictures that pass through ``watch``: some of each episode, as shares of full brightness."""

    def __init__(self, length: int) -> None:
        """
        Args:
            length: pictures that will pass; ``length ** 0.75``, at least 100, are looked at [X].
        """
        wanted = min(length, max(100, int(length**0.75)))
        self.sampled = set(np.linspace(0, length - 1, wanted).round().astype(int).tolist())
        self._counts = np.zeros((3, 256), np.int64)

    def watch(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes pictures on, counting the sampled ones."""
        for index, picture in enumerate(pictures):
            if index in self.sampled and picture.dtype == np.uint8 and picture.ndim == 3:
                self.add(picture)
            yield picture

    def add(self, picture: np.ndarray) -> None:
        """Counts one (height, width, 3) picture."""
        step = max(1, max(picture.shape[:2]) // _SIDE)
        for channel in range(3):
            self._counts[channel] += np.bincount(picture[::step, ::step, channel].ravel(), minlength=256)

    def result(self) -> FeatureStats:
        """Entries of shape (3, 1, 1); ``count`` is the number of pictures looked at."""
        levels = np.arange(256) / 255
        stats: dict[str, list[float]] = {key: [] for key in KEYS if key != "count"}
        for counts in self._counts:
            seen, total = np.flatnonzero(counts), counts.sum()
            mean = float(counts @ levels / total)
            stats["min"].append(levels[seen[0]])
            stats["max"].append(levels[seen[-1]])
            stats["mean"].append(mean)
            stats["std"].append(float(np.sqrt(counts @ (levels - mean) ** 2 / total)))
            reached = np.cumsum(counts) / total
            for key, fraction in QUANTILES.items():
                stats[key].append(levels[int(np.searchsorted(reached, fraction))])
        shaped = {key: np.array(values).reshape(3, 1, 1) for key, values in stats.items()}
        return shaped | {"count": np.array([len(self.sampled)])}


class Totals:
    """Statistics of a dataset from those of its episodes, one by one."""

    def __init__(self) -> None:
        self._sums: dict[str, FeatureStats] = {}

    def add(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Counts one episode: feature → entry → value."""
        for feature, entries in stats.items():
            values = {key: np.asarray(value, np.float64) for key, value in entries.items()}
            count = values["count"].reshape(-1)[0]
            part = {key: value * count for key, value in values.items() if key == "mean" or key in QUANTILES}
            part |= {key: values[key] for key in ("min", "max", "count")}
            part["squares"] = (values["std"] ** 2 + values["mean"] ** 2) * count
            known = self._sums.get(feature)
            if known is None:
                self._sums[feature] = part
                continue
            for key, value in part.items():
                join = {"min": np.minimum, "max": np.maximum}.get(key, np.add)
                if key in known:
                    known[key] = join(known[key], value)

    def result(self, sketches: Mapping[str, list[QuantileSketch]]) -> dict[str, dict[str, Any]]:
        """``stats.json``; where there are sketches, mean, deviation and quantiles are theirs."""
        report: dict[str, dict[str, Any]] = {}
        for feature, sums in self._sums.items():
            count = sums["count"].reshape(-1)[0]
            mean = sums["mean"] / count
            stats = {
                "min": sums["min"],
                "max": sums["max"],
                "mean": mean,
                "std": np.sqrt(np.maximum(sums["squares"] / count - mean**2, 0)),
                "count": sums["count"].astype(np.int64),
                **{key: sums[key] / count for key in QUANTILES if key in sums},
            }
            if feature in sketches:
                channels = sketches[feature]
                stats["mean"] = np.reshape([channel.mean for channel in channels], mean.shape)
                stats["std"] = np.reshape([channel.std for channel in channels], mean.shape)
                quantiles = np.array([channel.quantile(tuple(QUANTILES.values())) for channel in channels])
                for column, key in enumerate(QUANTILES):
                    stats[key] = quantiles[:, column].reshape(mean.shape)
            report[feature] = {key: stats[key].tolist() for key in KEYS if key in stats}
        return report
