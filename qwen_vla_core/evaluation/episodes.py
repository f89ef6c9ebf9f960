"""Seeded closed-loop episodes of a checkpoint, here or in spawned processes: for ``qwen-vla eval`` and training."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import EpisodeResult, run_episode
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.interfaces import Committed, Request
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, find_strategy

FRAME_S = 0.1  # of a film


@dataclass(frozen=True)
class Settings:
    """Whose episodes, in which world, and how.

    Attributes:
        embodiment: shipped name or YAML; its ``simulation.world`` is the world.
        checkpoint: shipped name or folder.
        task: of the world; ``all`` for all, None for its first.
        execute_steps: actions executed of each chunk; with ``latency_ms`` at most, see ``LookSchedule``.
        flow_steps: Euler steps; None for the checkpoint's.
        timeout: simulated seconds per episode; None for the world's.
        language: also ask for another object in the same scene.
        told: the robot that the prompt speaks of; None: the one that is driven.
        device: ``auto``, ``cpu`` or ``cuda``.
        latency_ms: how late chunks are; None: the world waits for the policy.
        strategy: with ``latency_ms``, how chunks follow each other (``runtime.continuity``).
        blend_ms: with ``latency_ms``, fade between chunks; None: the strategy's.
    """

    embodiment: str
    checkpoint: str
    task: str | None = None
    execute_steps: int = 5
    flow_steps: int | None = None
    timeout: float | None = None
    language: bool = False
    told: str | None = None
    device: str = "auto"
    latency_ms: float | None = None
    strategy: str = DEFAULT_STRATEGY
    blend_ms: float | None = None


Row = dict[str, Any]


class Evaluator:
    """One world and one policy, reused over seeds."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from qwen_vla_core.embodiment import load_embodiment
        from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint
        from qwen_vla_core.model.device import choose_device
        from qwen_vla_core.sim.registry import make_world, world_class

        torch.set_num_threads(1)
        self.settings = settings
        embodiment = self.embodiment = load_embodiment(settings.embodiment)
        assert embodiment.simulation is not None  # whoever starts episodes has seen to it
        known = world_class(embodiment.simulation.world).task_names
        tasks = known if settings.task == "all" else (settings.task or known[0],)
        self.world = make_world(embodiment.simulation.world, tasks=tasks)
        device, dtype = choose_device(settings.device)
        self.policy = load_checkpoint(resolve_checkpoint(settings.checkpoint), device, dtype)
        self.generator = torch.Generator(device)

    def __call__(self, seed: int, on_step: Callable[[Any], None] | None = None) -> Row:
        result = self._episode(seed, None, on_step)
        row = self._row(result)
        if self.settings.language:
            other = self.world.other_instruction()
            if other is not None:
                row["other"] = self._row(self._episode(seed, other))
        return row

    def _episode(
        self, seed: int, instruction: str | None, on_step: Callable[[Any], None] | None = None
    ) -> EpisodeResult:
        self.generator.manual_seed(seed)
        settings = self.settings
        sampler = _Sampler(self.policy, self.embodiment.name, settings.flow_steps, self.generator, settings.told)
        common: dict[str, Any] = {
            "seed": seed,
            "instruction": instruction,
            "timeout_s": self.world.limit_s if settings.timeout is None else settings.timeout,
            "on_step": on_step,
        }
        if settings.latency_ms is None:
            return run_episode(self.world, sampler, execute_steps=settings.execute_steps, **common)
        timing = Timing(
            settings.latency_ms / 1000,
            find_strategy(settings.strategy),
            settings.execute_steps,
            blend_s=None if settings.blend_ms is None else settings.blend_ms / 1000,
        )
        return run_episode_in_time(self.world, sampler, self.embodiment, timing=timing, **common)

    def _row(self, result: EpisodeResult) -> Row:
        return {**result.to_dict(), "target": self.world.target}


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
    evaluator: Evaluator, seeds: Sequence[int], path: Path, frame_s: float = FRAME_S, width: int | None = None
) -> None:
    """Runs some seeds with the camera on and writes a GIF: all views side by side, the instruction below.

    Args:
        evaluator: of the world and the policy; a second instruction in the same scene is left out.
        seeds: one episode each.
        path: .gif.
        frame_s: simulated seconds between frames.
        width: of the film in pixels; None: as rendered.
    """
    import cv2

    from qwen_vla_core.sim.pictures import save, tile

    frames: list[Any] = []

    def take(world: Any) -> None:
        frame = tile(world)
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
        for seed in seeds:
            evaluator(seed, on_step)
            for _ in range(round(0.5 / frame_s)):  # half a second on the result
                take(evaluator.world)
    finally:
        evaluator.settings = settings
    save(path, frames, frame_s)


# ---- in other processes --------------------------------------------------------------------------------------------


@contextmanager
def spawned(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for ``run_in_worker`` and ``film_in_worker``; each keeps its last evaluator.

    Spawned, not forked: a forked GL context does not work. What the caller leaves undone is cancelled.

    Raises:
        UserError: a process died, usually for want of memory.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start)
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


def run_in_worker(settings: Settings, seed: int) -> Row:
    """One episode, in a process of ``spawned``."""
    return _evaluator_of(settings)(seed)


def film_in_worker(settings: Settings, seeds: Sequence[int], path: Path, frame_s: float, width: int | None) -> None:
    """``film_episodes`` in a process of ``spawned``."""
    film_episodes(_evaluator_of(settings), seeds, path, frame_s, width)


_kept: Evaluator | None = None
_LOADED = ("embodiment", "checkpoint", "task", "device")  # what an evaluator is built from; the rest is read each time


def _evaluator_of(settings: Settings) -> Evaluator:
    global _kept
    if _kept is None or any(getattr(_kept.settings, key) != getattr(settings, key) for key in _LOADED):
        if _kept is not None:
            _kept.world.close()
        _kept = Evaluator(settings)
    _kept.settings = settings
    return _kept


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business


def run_seeds(settings: Settings, seeds: Sequence[int], workers: int) -> Iterator[Row]:
    """Yields one row per seed, in order, from this process or, with more than one worker, from spawned ones."""
    if workers <= 1:
        yield from map(Evaluator(settings), seeds)
        return
    with spawned(workers) as pool:
        yield from pool.map(run_in_worker, [settings] * len(seeds), seeds)
