"""Minibatches of a mixture, made by worker processes. The state of a loader is the number of the next step.

A batch is a pure function of recipe, seed and step (``mixture.py``); a worker makes whole batches, so the number of
workers only changes who does it. Workers are spawned, not forked (video decoders use threads), do not import torch, and
hand arrays over in shared memory (``shared.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from qwen_vla_core.data.mixture import Draw, Mixture, OpenSource
from qwen_vla_core.data.sample_maker import SampleMaker, SampleOptions, SourceReference
from qwen_vla_core.data.samples import SampleBatch
from qwen_vla_core.data.shared import PackedSamples, discard, pack, sweep, unpack
from qwen_vla_core.errors import UserError
from qwen_vla_core.processes import begin_worker

Made = PackedSamples | str  # a batch, or the user's mistake: an exception with arguments of its own cannot travel
_MAKER: list[SampleMaker] = []  # the one of this worker process


class MixtureLoader:
    """Batches by step, in order, from any step on. A context manager, because it owns processes."""

    def __init__(
        self,
        mixture: Mixture,
        options: SampleOptions | None = None,
        workers: int = 0,
        prefetch: int = 2,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            mixture: what is drawn.
            options: what samples look like; default: as stored.
            workers: processes; 0 makes batches in this one.
            prefetch: batches per worker that are made ahead.
            rank: of this training process among ``world``; it gets every ``world``-th sample of each batch.
            world: number of training processes; together they see the same batches as one would.

        Raises:
            UserError: a number that makes no sense.
        """
        if workers < 0 or prefetch < 1:
            raise UserError(f"loader: workers {workers} must be at least 0, prefetch {prefetch} at least 1")
        if not 0 <= rank < world <= mixture.recipe.batch_size:
            raise UserError(
                f"loader: rank {rank} of {world} with batch_size {mixture.recipe.batch_size}; every rank needs a sample"
            )
        self.mixture, self.workers, self.prefetch, self.rank, self.world = mixture, workers, prefetch, rank, world
        references = [SourceReference.of(source) for source in mixture.sources]
        self._start = (references, mixture.open_with, options or SampleOptions())
        self._maker = SampleMaker(*self._start, opened={i: s.dataset for i, s in enumerate(mixture.sources)})
        self._pool: ProcessPoolExecutor | None = None
        self._prefix = f"qwen_vla_{os.getpid()}_{secrets.token_hex(4)}_"  # of its blocks of shared memory

    def __enter__(self) -> MixtureLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            sweep(self._prefix)

    def draws(self, step: int) -> list[Draw]:
        """This rank's part of minibatch ``step``."""
        return self.mixture.draws(step)[self.rank :: self.world]

    def batch(self, step: int) -> SampleBatch:
        """Minibatch ``step``, made in this process.

        Raises:
            UserError: a file is missing or damaged.
        """
        return SampleBatch(step, [self._maker.make(draw) for draw in self.draws(step)])

    def batches(self, first: int = 0, count: int | None = None) -> Iterator[SampleBatch]:
        """Minibatches ``first``, ``first + 1``, …: ``count`` of them, or without end.

        Raises:
            UserError: a file is missing or damaged, shared memory is full, or a worker died.
        """
        steps = itertools.count(first) if count is None else range(first, first + count)
        if self.workers == 0:
            yield from map(self.batch, steps)
            return
        waiting: deque[tuple[int, Future[Made]]] = deque()
        try:
            for step in steps:
                waiting.append((step, self._submit(step)))
                if len(waiting) > self.workers * self.prefetch:
                    yield _received(*waiting.popleft())
            while waiting:
                yield _received(*waiting.popleft())
        except BrokenProcessPool:
            self.close()
            raise UserError(
                f"loader: one of {self.workers} worker processes died, most likely of memory; use fewer workers, a "
                "smaller prefetch or smaller caches"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()
                future.add_done_callback(_throw_away)

    def _submit(self, step: int) -> Future[Made]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=self._start
            )
        return self._pool.submit(_work, self.draws(step), self._prefix)


def _received(step: int, future: Future[Made]) -> SampleBatch:
    made = future.result()
    if isinstance(made, str):
        raise UserError(made)
    return SampleBatch(step, unpack(made))


def _throw_away(future: Future[Made]) -> None:
    with contextlib.suppress(Exception):  # cancelled, or the worker died
        made = future.result()
        if not isinstance(made, str):
            discard(made)


def _start_worker(sources: Sequence[SourceReference], open_with: OpenSource, options: SampleOptions) -> None:
    begin_worker()
    _MAKER[:] = [SampleMaker(sources, open_with, options)]


def _work(draws: Sequence[Draw], prefix: str) -> Made:
    try:
        return pack([_MAKER[0].make(draw) for draw in draws], prefix)
    except UserError as error:
        return str(error)
