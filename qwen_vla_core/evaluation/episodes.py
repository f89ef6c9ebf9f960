"""Seeded closed-loop episodes of a checkpoint, here or in spawned processes: for ``qwen-vla eval`` and training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import EpisodeResult, judge, run_episode
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.evaluation.smoothness import Smoothness
from qwen_vla_core.evaluation.suites.protocol import Suite, Trial, Watcher
from qwen_vla_core.interfaces import Committed, Request
from qwen_vla_core.processes import begin_worker
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, find_strategy

FRAME_S = 0.1  # of a film
OnStep = Callable[[Any], None]


@dataclass(frozen=True)
class Settings:
    """Whose episodes, in which world, and how.

    Attributes:
        embodiment: shipped name or YAML; its ``simulation.world`` is the world.
        checkpoint: shipped name or folder.
        task: of the world; ``all`` for all, None for its first.
        execute_steps: actions executed of each chunk; with ``latency_ms`` at most, see ``LookSchedule``. None: as the
            robot's YAML says.
        flow_steps: Euler steps; None for the checkpoint's.
        timeout: simulated seconds per episode; None for the world's.
        language: also ask for another object in the same scene.
        told: the robot that the prompt speaks of; None: the one that is driven.
        device: ``auto``, ``cpu`` or ``cuda``.
        latency_ms: how late chunks are; None: the world waits for the policy.
        strategy: with ``latency_ms``, how chunks follow each other (``runtime.continuity``).
        blend_ms: with ``latency_ms``, fade between chunks; None: the strategy's.
        suite: a suite's name; it then says robot, worlds and tasks. None: the world of ``embodiment``.
        expert: the world's scripted expert acts instead of the checkpoint: is every trial solvable?
    """

    embodiment: str
    checkpoint: str
    task: str | None = None
    execute_steps: int | None = None
    flow_steps: int | None = None
    timeout: float | None = None
    language: bool = False
    told: str | None = None
    device: str = "auto"
    latency_ms: float | None = None
    strategy: str = DEFAULT_STRATEGY
    blend_ms: float | None = None
    suite: str | None = None
    expert: bool = False


Row = dict[str, Any]


def suite_of(settings: Settings) -> Suite:
    """The suite that the settings name, or their robot's own world as a suite of one axis and one task."""
    from qwen_vla_core.evaluation.suites import make_suite
    from qwen_vla_core.evaluation.suites.world import WorldSuite

    return make_suite(settings.suite) if settings.suite else WorldSuite(settings.embodiment, settings.task)


def execute_steps_of(embodiment: str) -> int:
    """Actions of each chunk that are executed where nobody says so: the robot's own, from its YAML.

    Args:
        embodiment: shipped name or YAML; a robot that only a checkpoint knows has the default.
    """
    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.embodiment.spec import DEFAULT_EXECUTE_STEPS

    try:
        return load_embodiment(embodiment).execute_steps
    except UserError:
        return DEFAULT_EXECUTE_STEPS


class Evaluator:
    """One policy (or the scripted expert) and the world it was last used in, reused over trials."""

    def __init__(self, settings: Settings) -> None:
        from qwen_vla_core.embodiment import load_embodiment

        self.settings = settings
        self.suite = suite_of(settings)
        self._own_steps = execute_steps_of(self.suite.embodiment)
        self.world: Any = None
        self._world_key = ""
        if settings.expert:
            self.policy: Any = None
            self.robot = load_embodiment(self.suite.embodiment)
            return
        import torch

        from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
        from qwen_vla_core.model.device import choose_device

        torch.set_num_threads(1)
        device, dtype = choose_device(settings.device)
        self.policy = load_checkpoint(resolve_checkpoint(settings.checkpoint), device, dtype)
        self.generator = torch.Generator(device)
        name = self.suite.embodiment
        self.robot = self.policy.embodiment(name) if name in self.policy.embodiments else load_embodiment(name)

    def __call__(self, trial: Trial | int, on_step: OnStep | None = None) -> Row:
        """Runs a trial, or the one of a seed; with ``language`` also another instruction in the same scene."""
        trial = self.suite.trials(1, trial)[0] if isinstance(trial, int) else trial
        self._prepare(trial)
        row = self._row(trial, trial.instruction, on_step)
        if self.settings.language:
            other = self.world.other_instruction()
            if other is not None:
                row["other"] = self._row(trial, other)
        return row

    def close(self) -> None:
        """Frees the world."""
        if self.world is not None:
            self.world.close()
        self.world, self._world_key = None, ""

    def _prepare(self, trial: Trial) -> None:
        if self._world_key != trial.world_key:
            self.close()
            self.world = self.suite.make_world(trial)
            self._world_key = trial.world_key

    def _row(self, trial: Trial, instruction: str | None, on_step: OnStep | None = None) -> Row:
        watchers: list[Watcher] = []

        def watch(world: Any) -> None:
            if not watchers:  # the world has been reset by now, and is one step old
                watchers.extend(self.suite.watch(world, trial))
                if self.settings.latency_ms is None:
                    watchers.append(Smoothness(self.robot, world.control_hz))
            for watcher in watchers:
                watcher.step(world)
            if on_step is not None:
                on_step(world)

        result = self._episode(trial, instruction, watch)
        metrics = dict(result.metrics)
        for watcher in watchers:
            metrics |= watcher.metrics(self.world)
        row = {**result.to_dict(), "metrics": metrics, "target": self.world.target}
        about = self.world.about() if hasattr(self.world, "about") else {}
        if "variant" in about:
            row["variant"] = about["variant"]
        return row

    def _episode(self, trial: Trial, instruction: str | None, on_step: OnStep) -> EpisodeResult:
        settings = self.settings
        limit_s = settings.timeout if settings.timeout is not None else trial.limit_s
        common: dict[str, Any] = {
            "seed": trial.seed,
            "instruction": instruction,
            "timeout_s": self.world.limit_s if limit_s is None else limit_s,
            "on_step": on_step,
        }
        if settings.expert:
            return run_expert(self.world, self.suite, **common)
        self.generator.manual_seed(trial.seed)
        sampler = _Sampler(self.policy, self.robot.name, settings.flow_steps, self.generator, settings.told)
        execute_steps = self._own_steps if settings.execute_steps is None else settings.execute_steps
        if settings.latency_ms is None:
            return run_episode(self.world, sampler, execute_steps=execute_steps, **common)
        timing = Timing(
            settings.latency_ms / 1000,
            find_strategy(settings.strategy),
            execute_steps,
            blend_s=None if settings.blend_ms is None else settings.blend_ms / 1000,
        )
        return run_episode_in_time(self.world, sampler, self.robot, timing=timing, **common)


def run_expert(
    world: Any, suite: Any, *, seed: int, instruction: str | None, timeout_s: float, on_step: OnStep
) -> EpisodeResult:
    """One episode of a world's scripted expert, which reads the simulator's state and renders nothing."""
    world.reset(seed, instruction)
    expert = suite.make_expert(world)
    while not world.ended() and world.time_s < timeout_s:
        for command in world.play(expert.action()):
            world.step(command)
            on_step(world)
    return judge(world, seed, 0)


class _Sampler:
    """A policy with its robot, its number of Euler steps and its noise source fixed."""

    def __init__(
        self, policy: Any, embodiment: str, steps: int | None, generator: Any, told: str | None = None
    ) -> None:
        self.policy, self.steps, self.generator, self.told = policy, steps, generator, told
        # A checkpoint of one robot drives whatever has its channels; one of several has to be told which.
        self.embodiment = embodiment if embodiment in policy.embodiments or len(policy.embodiments) > 1 else None

    def continued(self, observation: Any, committed: Committed) -> Any:
        """A chunk that continues what is committed; the prompt is the robot's own."""
        import torch

        from qwen_vla_core.engine.conditioning import predict_continued

        if self.told is not None:
            raise UserError("--told: cannot be combined with a strategy that conditions the sampler")
        robot = self.policy.embodiment(self.embodiment)
        shape = (robot.control.horizon, self.policy.config.decoder.channels)
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device).cpu().numpy()
        return predict_continued(self.policy, [Request(observation, robot.name, committed, noise)], self.steps)[0].chunk

    def predict(self, observation: Any) -> Any:
        return self.policy.predict(
            observation, self.embodiment, steps=self.steps, generator=self.generator, told=self.told
        )


def film_episodes(
    evaluator: Evaluator, trials: Sequence[Trial | int], path: Path, frame_s: float = FRAME_S, width: int | None = None
) -> None:
    """Runs some trials with the camera on and writes a GIF: all views side by side, the instruction below.

    Args:
        evaluator: of the world and the policy; a second instruction in the same scene is left out.
        trials: one episode each.
        path: .gif.
        frame_s: simulated seconds between frames.
        width: of the film in pixels; None: as rendered.
    """
    from qwen_vla_core.sim.pictures import save

    save(path, [frame for trial in trials for frame in film(evaluator, trial, frame_s, width)], frame_s)


def film(
    evaluator: Evaluator,
    trial: Trial | int,
    frame_s: float = FRAME_S,
    width: int | None = None,
    picture: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """The frames of one episode, run again with the camera on; see ``film_episodes``.

    Args:
        evaluator: see there.
        trial: which.
        frame_s: see there.
        width: see there.
        picture: world → (height, width, 3) RGB; None: all views side by side with the instruction.
    """
    import cv2

    from qwen_vla_core.sim.pictures import tile

    picture = picture or tile
    frames: list[Any] = []

    def take(world: Any) -> None:
        frame = picture(world)
        if width is not None and frame.shape[1] > width:
            size = (width, round(frame.shape[0] * width / frame.shape[1]))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        frames.append(frame)

    def on_step(world: Any) -> None:
        if round(world.time_s * world.control_hz) % max(1, round(frame_s * world.control_hz)) == 0:
            take(world)

    settings = evaluator.settings
    evaluator.settings = replace(settings, language=False)
    try:
        evaluator(trial, on_step)
        for _ in range(round(0.5 / frame_s)):  # half a second on the result
            take(evaluator.world)
    finally:
        evaluator.settings = settings
    return frames


# ---- in other processes --------------------------------------------------------------------------------------------


@contextmanager
def spawned(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for ``run_in_worker`` and ``film_in_worker``; each keeps its last evaluator.

    Spawned, not forked: a forked GL context does not work. What the caller leaves undone is cancelled.

    Raises:
        UserError: a process died, usually for want of memory.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker)
    try:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the children: two threads each on two cores are slower than one
        try:
            pool.submit(int)  # starts all of them
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"evaluation: one of {workers} worker processes died, most likely of memory; use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_in_worker(settings: Settings, trial: Trial | int) -> Row:
    """One episode, in a process of ``spawned``."""
    return _evaluator_of(settings)(trial)


def film_in_worker(settings: Settings, seeds: Sequence[int], path: Path, frame_s: float, width: int | None) -> None:
    """``film_episodes`` in a process of ``spawned``."""
    film_episodes(_evaluator_of(settings), seeds, path, frame_s, width)


_kept: Evaluator | None = None
_LOADED = (
    "embodiment",
    "checkpoint",
    "task",
    "device",
    "suite",
    "expert",
)  # what an evaluator is built from; the rest is read each time


def _evaluator_of(settings: Settings) -> Evaluator:
    global _kept
    if _kept is None or any(getattr(_kept.settings, key) != getattr(settings, key) for key in _LOADED):
        if _kept is not None:
            _kept.close()
        _kept = Evaluator(settings)
    _kept.settings = settings
    return _kept


def run_seeds(settings: Settings, seeds: Sequence[int], workers: int) -> Iterator[Row]:
    """Yields one row per seed, in order, from this process or, with more than one worker, from spawned ones."""
    if workers <= 1:
        yield from map(Evaluator(settings), seeds)
        return
    with spawned(workers) as pool:
        yield from pool.map(run_in_worker, [settings] * len(seeds), seeds)
