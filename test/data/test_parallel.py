"""The same work in this process, in spawned processes and as a Ray Data job."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import pytest

from qwen_vla_core.data.parallel import map_episodes
from qwen_vla_core.embodiment import EmbodimentError
from qwen_vla_core.errors import UserError


def square(x: int, wrong: int = -1, dead: int = -1) -> tuple[int, dict[str, Any]]:
    if x == wrong:
        raise EmbodimentError("robot.yaml", 3, "name", f"is {x}", "write another")
    if x == dead:
        os._exit(9)
    return x * x, {"pair": (x, [x])}


EXPECTED = [(x * x, {"pair": (x, [x])}) for x in range(7)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_the_items(workers: int) -> None:
    assert list(map_episodes(square, range(7), workers, progress=False)) == EXPECTED
    assert list(map_episodes(square, [], workers, progress=False)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_good_results_come_before_the_mistake(workers: int) -> None:
    results = map_episodes(partial(square, wrong=2), range(7), workers, progress=False)
    assert [next(results), next(results)] == EXPECTED[:2]
    with pytest.raises(UserError, match=r"robot\.yaml:3: name: is 2; fix: write another"):
        next(results)


def test_a_dead_worker_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="a worker process died"):
        list(map_episodes(partial(square, dead=3), range(7), 2, progress=False))


def test_workers_are_at_least_one() -> None:
    with pytest.raises(UserError, match="--workers 0"):
        next(map_episodes(square, range(7), 0, progress=False))


def test_ray_missing_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray: Ray Data is not installed .* pip install 'ray\[data\]'"):
        next(map_episodes(square, range(7), 1, ray=True, progress=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_gives_the_same_results_and_the_same_mistake() -> None:
    """Takes 5 to 10 s: it starts a real Ray of one CPU."""
    pytest.importorskip("ray.data")
    results = map_episodes(partial(square, wrong=6), range(7), 1, ray=True, progress=False)
    assert [next(results) for _ in range(6)] == EXPECTED[:6]
    with pytest.raises(UserError, match="is 6; fix"):
        next(results)
