"""Trials of a suite through the whole ROS graph: policy, controller and simulator as separate processes, in real time.

One graph runs for each axis and task; its simulator takes the seeds one after another and writes what it measured into
``summary.json`` after every episode, which is read here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.navigation import measure
from qwen_vla_core.evaluation.suites import make_suite
from qwen_vla_core.evaluation.suites.protocol import Trial, Watcher
from qwen_vla_ros.bringup import NodeSpec, build_graph, next_run_dir

POLL_S = 0.2


class WatchedEpisode:
    """A suite's measures inside ``sim_node``, whose physics thread calls ``step``.

    Attributes:
        world_options: of ``sim.registry.make_world``.
    """

    def __init__(self, suite: str, axis: str, task: str) -> None:
        """
        Args:
            suite: name.
            axis: of it.
            task: of it, or of the robot's own world.

        Raises:
            UserError: the suite does not run in a world of ours, or has no such axis.
        """
        self._suite: Any = make_suite(suite)
        if not hasattr(self._suite, "options_of"):
            raise UserError(f"parameter 'suite': {suite} runs in another simulator")
        if axis not in self._suite.axes:
            raise UserError(f"parameter 'axis': {axis!r} is none of {', '.join(self._suite.axes)}")
        self._trial = Trial(axis, task, 0)
        self.world_options: dict[str, Any] = self._suite.options_of(self._trial)
        self._watchers: list[Watcher] | None = None

    def begin(self) -> None:
        """The world has been reset."""
        self._watchers = None

    def step(self, world: Any) -> None:
        """After each control step."""
        if self._watchers is None:
            self._watchers = list(self._suite.watch(world, self._trial))
        for watcher in self._watchers:
            watcher.step(world)

    def row(self, world: Any) -> dict[str, Any]:
        """See ``episode_row``."""
        return episode_row(world, self._watchers or ())


def episode_row(world: Any, watchers: Sequence[Watcher] = ()) -> dict[str, Any]:
    """What a result file holds of an episode beside its outcome."""
    metrics = {**world.metrics(), **measure(world.track())}
    for watcher in watchers:
        metrics |= watcher.metrics(world)
    about = world.about()
    variant = {"variant": about["variant"]} if "variant" in about else {}
    return {"chosen": world.chosen(), "target": world.target, "metrics": metrics, **variant}


class GraphRunner:
    """A ``Runner`` of ``qwen_vla_core.evaluation.running``; a context that ends its graph."""

    ahead = 1

    def __init__(
        self, suite: Any, settings: Any, trials: Sequence[Trial], stored: Mapping[str, Any], rollouts: str = ""
    ) -> None:
        """
        Args:
            suite: in a world of ours.
            settings: of the run: checkpoint, steps, strategy, timeout.
            trials: all of the run, in order.
            stored: keys of those that need not be run.
            rollouts: folder for recordings; empty: nothing is recorded.
        """
        self._suite, self._settings, self._rollouts = suite, settings, rollouts
        self._wanted = [trial for trial in trials if trial.key not in stored]
        self._graph: _Graph | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> GraphRunner:
        from qwen_vla_ros.up import free_domain

        if importlib.util.find_spec("domain_coordinator") is not None:
            self._stack.enter_context(free_domain())
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._stack.close()

    def begin(self, trial: Trial) -> Trial:
        """See ``Runner``."""
        return trial

    def finish(self, handle: Trial) -> dict[str, Any]:
        """See ``Runner``.

        Raises:
            UserError: a node died, or the episode was aborted.
        """
        if self._graph is None or not self._graph.covers(handle):
            self._end()
            self._graph = _Graph(self._specs(handle), self._run_dir, handle, self._in_a_row(handle))
        return self._graph.row(handle)

    def _end(self) -> None:
        if self._graph is not None:
            self._graph.stop()
        self._graph = None

    def _in_a_row(self, first: Trial) -> int:
        """How many trials from this one on have consecutive seeds in the same axis and task."""
        start = self._wanted.index(first)
        count = 1
        for trial in self._wanted[start + 1 :]:
            if (trial.axis, trial.task, trial.seed) != (first.axis, first.task, first.seed + count):
                break
            count += 1
        return count

    def _specs(self, trial: Trial) -> list[NodeSpec]:
        settings = self._settings
        if self._rollouts:
            self._run_dir = next_run_dir(self._rollouts)
        else:
            self._run_dir = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen_vla_eval_")))
        own_world = self._suite.name == "world"
        specs = build_graph(
            embodiment=self._suite.embodiment,
            checkpoint=settings.checkpoint,
            strategy=settings.strategy,
            record=bool(self._rollouts),
            episodes=self._in_a_row(trial),
            seed=trial.seed,
            task=trial.task,
            suite="" if own_world else self._suite.name,
            axis="" if own_world else trial.axis,
            episode_timeout_s=settings.timeout or 0.0,
            run_dir=str(self._run_dir),
            log_level="warn",
        )
        steps = {"execute_steps": settings.execute_steps, "flow_steps": settings.flow_steps or 0}
        return [
            replace(spec, parameters={**spec.parameters, **steps}) if spec.name == "policy_node" else spec
            for spec in specs
        ]


class _Graph:
    """One running graph, supervised by a thread."""

    def __init__(self, specs: Sequence[NodeSpec], run_dir: Path, first: Trial, count: int) -> None:
        self._first, self._count = first, count
        self._summary = run_dir / "summary.json"
        self._stop = threading.Event()
        self._said: list[str] = []
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._supervise, args=(specs,), name="graph")
        self._thread.start()

    def _supervise(self, specs: Sequence[NodeSpec]) -> None:
        from qwen_vla_ros.up import supervise

        def echo(line: str) -> None:
            self._said.append(line)
            print(line, file=sys.stderr, flush=True)

        self._outcome = supervise(specs, echo, self._stop)

    def covers(self, trial: Trial) -> bool:
        """Whether this graph runs, or has run, a trial."""
        same = (trial.axis, trial.task) == (self._first.axis, self._first.task)
        return same and self._first.seed <= trial.seed < self._first.seed + self._count

    def row(self, trial: Trial) -> dict[str, Any]:
        """Waits for an episode."""
        index = trial.seed - self._first.seed
        while True:
            ended = not self._thread.is_alive()
            episodes = self._episodes()
            if index < len(episodes):
                return _row(trial, episodes[index])
            if ended:
                reason = self._outcome.reason if self._outcome is not None else "it could not be started"
                raise UserError(f"--ros: the graph ended before trial {trial.key} ({reason}); its log is above")
            time.sleep(POLL_S)

    def _episodes(self) -> list[dict[str, Any]]:
        if not self._summary.is_file():
            return []
        return list(json.loads(self._summary.read_text(encoding="utf-8"))["episodes"])

    def stop(self) -> None:
        """Ends it and waits."""
        self._stop.set()
        self._thread.join()


def _row(trial: Trial, episode: Mapping[str, Any]) -> dict[str, Any]:
    if episode["outcome"] == "aborted":
        raise UserError(f"--ros: trial {trial.key} was aborted from outside; --resume begins with it")
    rest = {key: value for key, value in episode.items() if key not in ("index", "outcome")}
    return {**rest, "success": episode["outcome"] == "success"}
