"""One function over many episodes: on this machine's cores, or as a Ray Data job with the same function.

Work on a corpus is a pure function of one episode, so that it can run anywhere; results come back in the order of the
items, so that what is written does not depend on the number of workers. Resuming is the caller's business: pass the
items that are left.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from tqdm import tqdm

from qwen_vla_core.errors import UserError
from qwen_vla_core.processes import begin_worker

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # items per worker in flight: enough to keep all busy, few enough to keep memory flat


def map_episodes(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None = None,
    ray: bool = False,
    progress: bool = True,
    description: str = "",
) -> Iterator[R]:
    """Yields ``function(item)`` for every item, in the order of the items, while later ones are being worked on.

    Args:
        function: importable by name (module level, or a ``functools.partial`` of one), because processes are spawned:
            forking a process that has used threads (BLAS, video decoders) can hang.
        items: small descriptions of the work, such as episode numbers; not the data.
        workers: processes; None is all cores; 1 works in this process. With Ray: its CPUs, unless ``RAY_ADDRESS``
            names a running cluster, which then decides.
        ray: work as a Ray Data job.
        progress: show a bar on stderr.
        description: what the bar says.

    Raises:
        UserError: what ``function`` raised first (by item order), fewer than 1 worker, a worker that died, or Ray is
            asked for and not installed.
    """
    count = os.cpu_count() or 1 if workers is None else workers
    if count < 1:
        raise UserError(f"--workers {count}: must be at least 1")
    results: Iterator[R]
    if ray and items:
        results = _with_ray(function, items, count)
    elif count == 1 or len(items) <= 1:
        results = map(function, items)
    else:
        results = _with_processes(function, items, min(count, len(items)))
    with tqdm(
        total=len(items), desc=description, unit="episode", leave=False, disable=None if progress else True
    ) as bar:
        for result in results:
            bar.update()
            yield result


class _Outcome(Generic[R]):
    """What came of one item, as the Python objects they are.

    Ray's tables would turn a bare tuple into a list and a dict into a struct; and a subclass of ``UserError`` with its
    own arguments does not survive the way between processes, its text does.
    """

    def __init__(self, value: R | None, mistake: str | None) -> None:
        self.value = value
        self.mistake = mistake

    def get(self) -> R:
        """The result, or the user's mistake raised again."""
        if self.mistake is not None:
            raise UserError(self.mistake)
        return cast(R, self.value)


def _attempt(function: Callable[[T], R], item: T) -> _Outcome[R]:
    try:
        return _Outcome(function(item), None)
    except UserError as error:
        return _Outcome(None, str(error))


def _with_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin_worker)
    waiting: deque[Future[_Outcome[R]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_attempt, function, item))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result().get()
        while waiting:
            yield waiting.popleft().result().get()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: a worker process died, most likely of memory; use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _with_ray(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
        ray_data: Any = importlib.import_module("ray.data")
    except ImportError as error:
        raise UserError(
            f"--ray: Ray Data is not installed ({error}); pip install 'ray[data]', or leave --ray out"
        ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="error")  # a running cluster knows its own CPUs
    elif started:
        # Its workers find modules where this process does, as spawned ones do.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}}
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env=environment,
        )
    try:
        context = ray_data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        with ray_data.DataContext.current(context):
            stored = ray.put(list(items))

            def work(row: dict[str, Any]) -> dict[str, Any]:
                return {"outcome": _attempt(function, ray.get(stored)[row["id"]])}

            for row in ray_data.range(len(items), override_num_blocks=len(items)).map(work).iter_rows():
                yield row["outcome"].get()
    finally:
        if started:
            ray.shutdown()
