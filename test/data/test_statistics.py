"""Statistics of a dataset: against NumPy, the same for any number of workers, cached, and strict about NaN."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from memory_dataset import CHANNELS, FPS, MemoryDataset, contract, healthy, robot

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.statistics import FRACTIONS, Statistics, cache_key, dataset_statistics, default_cache
from qwen_vla_core.errors import UserError


def with_convention(dataset: MemoryDataset, convention: str) -> MemoryDataset:
    return dataclasses.replace(dataset, contract=contract(convention=convention))


def test_against_numpy() -> None:
    dataset = healthy(5)
    statistics = dataset_statistics(dataset, workers=1, progress=False)
    assert statistics.episodes == 5 and statistics.steps == sum(dataset.lengths) and statistics.chunk == ()
    for side in ("state", "action"):
        values = np.concatenate([getattr(rows, side) for rows in dataset.episodes]).astype(np.float64)
        channels = getattr(statistics, side)
        assert tuple(channel.name for channel in channels) == CHANNELS
        assert [channel.unit for channel in channels] == ["rad", "rad", "fraction"] * 2
        found = np.array([[getattr(c, f"q{round(100 * q):02d}") for q in FRACTIONS] for c in channels]).T
        assert np.abs(found - np.quantile(values, FRACTIONS, axis=0)).max() < 1e-3
        for name in ("min", "max", "mean", "std"):
            true = getattr(np, name)(values, axis=0)
            assert [getattr(c, name) for c in channels] == pytest.approx(true, rel=1e-9)
    assert statistics.action_quantiles.names == CHANNELS
    assert np.all(np.abs(statistics.state_quantiles.normalize(dataset.episodes[0].state)) <= 1)


def test_relative_convention_has_statistics_of_its_chunks() -> None:
    dataset = with_convention(healthy(3), "relative_joint")
    parts = relative_parts("relative_joint", dataset.contract.action, dataset.contract.state)
    seen = []
    for rows in dataset.episodes:
        for t in range(len(rows)):
            chunk, valid = rows.chunk(t, dataset.contract.horizon)
            seen.append(to_relative(parts, chunk, rows.state[t])[valid])
    values = np.concatenate(seen)
    statistics = dataset_statistics(dataset, workers=1, progress=False)
    assert [c.count for c in statistics.chunk] == [len(values)] * 6
    assert [c.mean for c in statistics.chunk] == pytest.approx(values.mean(axis=0), abs=1e-7)
    assert [c.max for c in statistics.chunk] == pytest.approx(values.max(axis=0), abs=1e-6)
    assert statistics.action_quantiles.q99[0] == statistics.chunk[0].q99 != statistics.action[0].q99
    plain = dataset_statistics(with_convention(dataset, "absolute_joint"), workers=1, progress=False)
    assert plain.action == statistics.action and plain.action_quantiles.q99[0] == statistics.action[0].q99


def test_workers_do_not_matter() -> None:
    dataset = healthy(70, steps=5)
    one = dataset_statistics(dataset, workers=1, progress=False)
    assert dataset_statistics(dataset, workers=2, progress=False) == one


def test_cache_is_by_content_and_contract(tmp_path: Path) -> None:
    dataset = healthy(2)
    first = dataset_statistics(dataset, 1, False, cache=tmp_path)
    file = tmp_path / f"{cache_key(dataset)}.json"
    assert Statistics.from_json(json.loads(file.read_text())) == first
    file.write_text(json.dumps(first.to_json() | {"steps": 7}))
    assert dataset_statistics(dataset, 1, False, cache=tmp_path).steps == 7  # read, not computed
    file.write_text("{")
    assert dataset_statistics(dataset, 1, False, cache=tmp_path) == first  # damaged: computed again
    relative = with_convention(dataset, "relative_joint")
    assert dataset_statistics(relative, 1, False, cache=tmp_path).chunk
    dataset.episodes[0].action[3, 0] += 0.5
    assert dataset_statistics(dataset, 1, False, cache=tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 3


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "qwen_vla" / "stats"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "qwen_vla" / "stats"


def test_what_poisons_statistics_is_named(tmp_path: Path) -> None:
    dataset = healthy(3)
    dataset.episodes[1].action[7, 4] = np.nan
    expected = r"memory: episode 1, row 7, action channel 'right_elbow' is nan \(1 such.*qwen-vla data clean"
    with pytest.raises(UserError, match=expected):
        dataset_statistics(dataset, 1, False, cache=tmp_path)
    assert not list(tmp_path.iterdir())

    narrow = healthy(1)
    narrow.episodes[0] = dataclasses.replace(narrow.episodes[0], state=narrow.episodes[0].state[:, :4])
    with pytest.raises(UserError, match=r"episode 0: state has shape \(50, 4\), but the contract names 6"):
        dataset_statistics(narrow, 1, False)

    none = np.zeros((0, 6), np.float32)
    empty = EpisodeRows(none, none, np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))
    with pytest.raises(UserError, match="has no rows"):
        dataset_statistics(MemoryDataset([empty], [{}]), 1, False)
    mixed = MemoryDataset([empty, healthy(1).episodes[0]], [{}, {}])
    assert dataset_statistics(with_convention(mixed, "relative_joint"), 1, False).steps == 50


def test_the_made_up_robot_is_what_the_tests_think() -> None:
    assert robot().channels == robot().state_channels == CHANNELS and robot().control.frequency_hz == FPS
