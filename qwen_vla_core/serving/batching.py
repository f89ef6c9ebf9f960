"""Questions that wait together are answered together: one worker thread, one ``Engine.predict`` per batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from qwen_vla_core.interfaces import Engine, Prediction, Request


@dataclass(frozen=True)
class Answer:
    """What became of one job.

    Attributes:
        predictions: one per request.
        queue_s: from submission until its inference began.
        inference_s: of the whole batch.
        batch: requests in that batch.
    """

    predictions: list[Prediction]
    queue_s: float
    inference_s: float
    batch: int


@dataclass(eq=False)
class _Job:
    requests: Sequence[Request]
    steps: int | None
    future: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class MicroBatcher:
    """Runs an engine in one thread; jobs that arrive while it is busy form the next batch, first come first served."""

    def __init__(
        self, engine: Engine, max_batch: int = 8, max_wait_s: float = 0.0, clients: Callable[[], int] = lambda: 0
    ) -> None:
        """
        Args:
            engine: only this class's thread calls it. One with an attribute ``steps`` gets each batch's Euler steps.
            max_batch: most requests in one call.
            max_wait_s: how long the first job may wait for company when the engine is free.
            clients: how many may ask: a batch with a job of each of them waits for nobody.
        """
        if max_batch < 1 or max_wait_s < 0:
            raise ValueError("max_batch must be at least 1 and max_wait_s at least 0")
        self.engine, self.max_batch, self.max_wait_s = engine, max_batch, max_wait_s
        self.batches: dict[int, int] = {}  # size → how often
        self._clients = clients
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], steps: int | None = None) -> Future[Answer]:
        """Queues one client's requests; cancel the future to withdraw them while they wait.

        Args:
            requests: at least one, at most ``max_batch``; they stay together.
            steps: Euler steps; None: the engine's own. Jobs with different ones never share a batch.
        """
        if not 1 <= len(requests) <= self.max_batch:
            raise ValueError(f"{len(requests)} requests at once, from 1 to {self.max_batch} are taken")
        job = _Job(requests, steps)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the thread after the batch it is in; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()
        self._thread.join(timeout_s)

    # --- worker thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while jobs := self._next():
            self._answer(jobs)

    def _next(self) -> list[_Job]:
        """Waits for the next batch; empty when closed."""
        with self._changed:
            while True:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                if self.max_wait_s > 0:
                    self._wait_for_company(self._jobs[0].since + self.max_wait_s)
                if jobs := self._take():
                    return jobs

    def _wait_for_company(self, until: float) -> None:
        while not self._closed and (left := until - time.monotonic()) > 0:
            if len(self._jobs) >= self._clients() or sum(len(job.requests) for job in self._jobs) >= self.max_batch:
                return
            self._changed.wait(left)

    def _take(self) -> list[_Job]:
        """The first job, and those behind it that go with it; withdrawn ones are dropped."""
        taken: list[_Job] = []
        kept: deque[_Job] = deque()
        size = 0
        for job in self._jobs:
            if taken and (job.steps != taken[0].steps or size + len(job.requests) > self.max_batch):
                kept.append(job)
            elif job.future.set_running_or_notify_cancel():
                taken.append(job)
                size += len(job.requests)
        self._jobs = kept
        return taken

    def _answer(self, jobs: list[_Job]) -> None:
        began = time.monotonic()
        requests = [request for job in jobs for request in job.requests]
        try:
            if hasattr(self.engine, "steps"):
                self.engine.steps = jobs[0].steps
            predictions = self.engine.predict(requests)
            if len(predictions) != len(requests):
                raise RuntimeError(f"the engine gave {len(predictions)} answers to {len(requests)} requests")
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # one client's bad request must not cost the others their answer
                self._answer([job])
            return
        inference_s = time.monotonic() - began
        self.batches[len(requests)] = self.batches.get(len(requests), 0) + 1
        first = 0
        for job in jobs:
            mine = predictions[first : first + len(job.requests)]
            first += len(job.requests)
            job.future.set_result(Answer(mine, began - job.since, inference_s, len(requests)))
