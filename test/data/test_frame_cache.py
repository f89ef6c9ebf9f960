"""The cache forgets what is oldest, never more bytes than allowed, and decodes only what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.frame_cache import ByteCache, FrameCache, jitter


class Film:
    """Frames whose grey level is their number; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def frames(self, episode: int, view: str, steps: Sequence[int]) -> np.ndarray:
        self.asked.append(list(steps))
        return np.stack([np.full((8, 12, 3), step, np.uint8) for step in steps])


@pytest.fixture
def film() -> Film:
    return Film()


def ask(cache: FrameCache, film: Film, steps: Sequence[int], episode: int = 0) -> np.ndarray:
    return cache.frames(0, cast(ActionDataset, film), episode, "ego", steps)


def test_the_least_recently_used_value_goes_first() -> None:
    cache: ByteCache[str] = ByteCache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)  # b was asked for longest ago
    assert (cache.get("a"), cache.get("b"), cache.get("c"), cache.bytes) == ("A", None, "C", 8)
    cache.put("a", "A2", 2)  # replaced, not counted twice
    assert (cache.get("a"), cache.bytes, len(cache)) == ("A2", 6, 2)
    cache.put("large", "L", 11)
    assert (cache.get("large"), len(cache)) == (None, 2)


def test_only_missing_frames_are_decoded_and_the_order_is_kept(film: Film) -> None:
    cache = FrameCache(10_000_000)
    assert ask(cache, film, [3, 1])[:, 0, 0, 0].tolist() == [3, 1]
    assert ask(cache, film, [1, 2, 2, 3])[:, 0, 0, 0].tolist() == [1, 2, 2, 3]
    assert ask(cache, film, [2])[:, 0, 0, 0].tolist() == [2]
    assert film.asked == [[3, 1], [2]]
    ask(cache, film, [2], episode=1)
    assert film.asked[-1] == [2]


@pytest.mark.parametrize("limit", [0, 8 * 12 * 3 * 2])
def test_memory_stays_below_the_limit_and_answers_stay_right(film: Film, limit: int) -> None:
    cache = FrameCache(limit)
    for steps in ([0, 1, 2, 3], [3, 0], [1, 1]):
        assert ask(cache, film, steps)[:, 0, 0, 0].tolist() == steps
        assert cache.cache.bytes <= limit


def test_a_kept_frame_does_not_keep_its_neighbours_alive(film: Film) -> None:
    cache = FrameCache(10_000_000)
    ask(cache, film, range(50))
    assert all(frame.base is None for frame, _ in cache.cache._values.values())


def test_reducing_averages_areas(film: Film) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    film.frames = lambda episode, view, steps: picture[None]  # type: ignore[method-assign]
    reduced = ask(FrameCache(0, size=(6, 4)), film, [0])[0]
    expected = picture.reshape(4, 2, 6, 2, 3).astype(float).mean((1, 3))
    assert reduced.shape == (4, 6, 3)
    assert np.abs(reduced - expected).max() <= 0.5


def test_jitter_is_decided_by_the_seed_and_changes_all_frames_alike() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 10, 14, 3), dtype=np.uint8)
    before = frames.copy()
    first, again, other = (jitter(frames, np.random.default_rng(seed), 1.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != frames).any()
    np.testing.assert_array_equal(jitter(frames, np.random.default_rng(1), 0.0), frames)
    for level in (0, 100, 255):  # one table per colour for all pixels of all frames
        assert len(np.unique(first[..., 1][frames[..., 1] == level])) <= 1
    change = first.astype(int) - frames
    assert np.abs(change).max() <= 0.22 * 128 + 15 + 1
