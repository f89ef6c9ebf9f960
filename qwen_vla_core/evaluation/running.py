"""Trials in order, run here, in spawned processes, as Ray actors or over ROS; stopped where an interval is narrow.

Whatever runs them, rows come in the order of the trials. Episodes that succeed end sooner than those that fail, so
taking whatever is finished first would favour success wherever a run is cut short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

from qwen_vla_core.evaluation.episodes import Evaluator, Row, Settings, run_in_worker, spawned
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.suites.protocol import Trial

Cell = tuple[str, str]  # axis, task


class Runner(Protocol):
    """Where trials run. ``ahead`` of them are begun before the first is waited for."""

    ahead: int

    def begin(self, trial: Trial) -> Any:
        """Begins one; returns a handle."""
        ...

    def finish(self, handle: Any) -> Row:
        """Waits for it."""
        ...


class _Here:
    ahead = 1

    def __init__(self, settings: Settings) -> None:
        self.evaluator = Evaluator(settings)

    def begin(self, trial: Trial) -> Trial:
        return trial

    def finish(self, handle: Trial) -> Row:
        return self.evaluator(handle)


class _Processes:
    def __init__(self, pool: Any, settings: Settings, workers: int) -> None:
        self.pool, self.settings, self.ahead = pool, settings, 2 * workers

    def begin(self, trial: Trial) -> Future[Row]:
        future: Future[Row] = self.pool.submit(run_in_worker, self.settings, trial)
        return future

    def finish(self, handle: Future[Row]) -> Row:
        return handle.result()


@contextmanager
def open_runner(settings: Settings, workers: int, ray: bool = False) -> Iterator[Runner]:
    """A runner, closed on leaving the block.

    Raises:
        UserError: a process died, or Ray is asked for and not installed.
    """
    if ray:
        from qwen_vla_core.evaluation.ray_runner import RayRunner

        runner = RayRunner(settings, workers)
        try:
            yield runner
        finally:
            runner.close()
    elif workers <= 1:
        here = _Here(settings)
        try:
            yield here
        finally:
            here.evaluator.close()
    else:
        with spawned(workers) as pool:
            yield _Processes(pool, settings, workers)


class StopRule:
    """Ends an axis and task once its success rate is known well enough.

    The rule looks after every trial, so it uses the anytime-valid interval, which holds whenever one looks. Wilson's
    does not: its width depends on the rate as well as on the number of trials, and stopping at a lucky streak would
    overstate what a policy can do.
    """

    def __init__(self, width: float | None) -> None:
        """
        Args:
            width: of the 95 % interval, upper minus lower end; None: never stop.
        """
        self.width = width
        self._counts: dict[Cell, tuple[int, int]] = {}

    def add(self, trial: Trial, row: Row) -> None:
        """One more outcome."""
        s, n = self._counts.get((trial.axis, trial.task), (0, 0))
        self._counts[trial.axis, trial.task] = (s + bool(row["success"]), n + 1)

    def met(self, trial: Trial) -> bool:
        """Whether the cell of this trial needs no more."""
        counts = self._counts.get((trial.axis, trial.task))
        if self.width is None or counts is None:
            return False
        low, high = Rate(*counts).anytime_interval
        return high - low < self.width


def run_trials(
    runner: Runner, trials: Sequence[Trial], stored: Mapping[str, Row], stop: StopRule
) -> Iterator[tuple[Trial, Row, bool]]:
    """Yields (trial, row, whether it is new) in the order of ``trials``; what the stop rule spares is left out.

    Args:
        runner: from ``open_runner``.
        trials: all of the run.
        stored: key → row of those that have been run already; they count for the stop rule.
        stop: the rule.
    """
    waiting: deque[tuple[Trial, Any]] = deque()
    coming = iter(trials)

    def refill() -> None:
        running = sum(handle is not None for _, handle in waiting)
        while running < runner.ahead and (trial := next(coming, None)) is not None:
            if stop.met(trial):
                continue
            handle = None if trial.key in stored else (runner.begin(trial),)
            running += handle is not None
            waiting.append((trial, handle))

    refill()
    while waiting:
        trial, handle = waiting.popleft()
        # A trial that was begun before the rule was met is thrown away: what counts must not depend on the workers.
        spared = stop.met(trial)
        row = None
        if handle is not None:
            row = runner.finish(handle[0]) if not spared else None
        elif not spared:
            row = stored[trial.key]
        if row is not None:
            stop.add(trial, row)
            yield trial, _labelled(trial, row), handle is not None
        refill()


def _labelled(trial: Trial, row: Row) -> Row:
    return {"key": trial.key, "axis": trial.axis, "task": trial.task, **row}


Progress = Callable[[Trial, Row], None]
