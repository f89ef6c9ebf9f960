"""Demonstrations: the expert at the policy's rate, with pictures, at times pushed off its path so that it recovers."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from qwen_vla_core.data.episodes import (
    INDEX,
    Episode,
    EpisodeStore,
    episode_file,
    read_entry,
    write_episode,
    write_index,
)
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.experts import interpolate
from qwen_vla_core.sim.registry import make_expert, make_world

if TYPE_CHECKING:
    from qwen_vla_core.sim.domain import DomainConfig

RENDER_SIZE = (256, 192)  # width, height; then shrunk by area, as a 640×480 camera picture is
STORED_SIZE = (128, 96)
HOLD_AFTER = 5  # steps recorded after success: a policy must learn to stay


@dataclass(frozen=True)
class NoiseConfig:
    """Pushes while recording (DART [X]): the command is displaced for some steps, the label stays the expert's wish.

    What a push does to which robot, and how far, its expert says.

    Attributes:
        start: chance per step that a push begins.
        steps: shortest and longest push, in policy steps.
        most: pushes per episode at most.
    """

    start: float = 0.12
    steps: tuple[int, int] = (2, 5)
    most: int = 3


@dataclass(frozen=True)
class DemoConfig:
    """What to record.

    Attributes:
        world: name in the registry.
        tasks: those drawn from.
        noise: chance that an episode is pushed.
        domain: full domain randomisation; None is off.
    """

    world: str
    tasks: tuple[str, ...]
    noise: float = 0.0
    domain: DomainConfig | None = None


class _Push:
    """The displacement of the executed action, step by step; None between pushes."""

    def __init__(self, config: NoiseConfig, expert: Any, rng: np.random.Generator) -> None:
        self.config, self.expert, self.rng = config, expert, rng
        self.left, self.done = 0, 0
        self.offset: np.ndarray | None = None

    def execute(self, action_c: np.ndarray) -> np.ndarray:
        """(c,) what is executed in place of the expert's action at this step."""
        c = self.config
        if self.left == 0:
            self.offset = None
            if self.done < c.most and self.rng.random() < c.start:
                self.done += 1
                self.left = int(self.rng.integers(c.steps[0], c.steps[1] + 1))
                self.offset = self.expert.draw_push(action_c, self.rng)
        else:
            self.left -= 1
            if self.left == 0:
                self.offset = None
        return action_c if self.offset is None else np.asarray(self.expert.pushed(action_c, self.offset))


def shrink(picture: np.ndarray, size: tuple[int, int] = STORED_SIZE) -> np.ndarray:
    """Area-averaged (height, width, 3) picture of ``size`` (width, height)."""
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def record(world: Any, world_name: str, seed: int, *, noise: float = 0.0, pushes: NoiseConfig | None = None) -> Episode:
    """Runs the expert once; the episode says whether it succeeded.

    Args:
        world: reset here to ``seed``; its own instruction.
        world_name: its name in the registry.
        seed: of the scene, the instruction and the pushes.
        noise: chance that this episode is pushed.
        pushes: how.
    """
    world.reset(seed)
    expert = make_expert(world_name, world)
    rng = np.random.default_rng([seed, 3])
    push = _Push(pushes or NoiseConfig(), expert, rng) if rng.random() < noise else None
    pictures: dict[str, list[np.ndarray]] = {view: [] for view in world.views}
    states, actions, perturbed, scenes = [], [], [], []
    substeps = round(world.decision_s * world.control_hz)
    left = HOLD_AFTER
    while left and world.time_s < world.limit_s:
        for view in world.views:
            pictures[view].append(shrink(world.render(view, *RENDER_SIZE)))
        states.append(world.state())
        scenes.append(world.scene_state().to_dict())
        action = expert.action()
        executed = push.execute(action) if push and not world.ended() else action
        actions.append(action)
        perturbed.append(bool(np.any(executed != action)))
        for command in interpolate(world.command(), executed, substeps):
            world.step(command)
        left = left - 1 if world.ended() else HOLD_AFTER
    return Episode(
        images={view: np.stack(frames) for view, frames in pictures.items()},
        state=np.stack(states).astype(np.float32),
        action=np.stack(actions).astype(np.float32),
        perturbed=np.array(perturbed),
        instruction=world.instruction,
        seed=seed,
        success=bool(world.success()),
        info={**world.about(), "pushed": push is not None, **_domain_of(world)},
        scenes=scenes,
    )


def _domain_of(world: Any) -> dict[str, Any]:
    """What domain randomisation drew for this episode; nothing without it."""
    return {"domain": world.domain_drawn} if getattr(world, "domain", None) is not None else {}


_WORLD: dict[tuple[Any, ...], Any] = {}  # one world per process: building and its GL context cost a second


def _job(folder: str, config: DemoConfig, seed: int) -> tuple[int, dict[str, Any] | None]:
    """In a worker: records one seed, writes it if it succeeded."""
    key = (config.world, config.tasks, config.domain)
    if key not in _WORLD:
        cv2.setNumThreads(1)
        domain = {} if config.domain is None else {"domain": config.domain}
        _WORLD[key] = make_world(config.world, tasks=config.tasks, **domain)
    episode = record(_WORLD[key], config.world, seed, noise=config.noise)
    return seed, write_episode(folder, episode) if episode.success else None


def generate(
    folder: str | Path,
    config: DemoConfig,
    episodes: int,
    *,
    seed: int = 0,
    workers: int = 1,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda kept, failed: None,
) -> tuple[int, int]:
    """Brings a folder to ``episodes`` successful demonstrations, trying the seeds from ``seed`` on in order.

    What is already there is kept, also after a crash: an episode file is written whole or not at all, and one that
    the index misses is taken up again. The result does not depend on ``workers``.

    Returns:
        episodes kept and seeds that failed, both including what was there before.

    Raises:
        UserError: the folder was written with other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {**(about or {}), "world": config.world, "tasks": list(config.tasks), "noise": config.noise}
    described["domain"] = config.domain.to_json() if config.domain else None
    known, failed = _resume(folder, described)
    kept = {s: entry for s, entry in known.items() if s >= seed}
    progress(len(kept), len(failed))

    def settle(result: tuple[int, dict[str, Any] | None]) -> None:
        tried, entry = result
        if entry is None:
            failed.add(tried)
        else:
            kept[tried] = entry
        if (len(kept) + len(failed)) % 20 == 0:
            write_index(folder, list(kept.values()), sorted(failed), described)
        progress(len(kept), len(failed))

    seeds = (s for s in count(seed) if s not in kept and s not in failed)
    try:
        if workers <= 1:
            while len(kept) < episodes:
                settle(_job(str(folder), config, next(seeds)))
        else:
            _run_pool(folder, config, episodes, workers, seeds, kept, settle)
    finally:
        write_index(folder, list(kept.values()), sorted(failed), described)
    return len(kept), len(failed)


def _run_pool(
    folder: Path,
    config: DemoConfig,
    episodes: int,
    workers: int,
    seeds: Any,
    kept: dict[int, dict[str, Any]],
    settle: Callable[[tuple[int, dict[str, Any] | None]], None],
) -> None:
    """Spawned workers (a forked GL context does not work); never more jobs under way than episodes still missing."""
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to handle
    with ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        under_way: list[Future[tuple[int, dict[str, Any] | None]]] = []
        try:
            while len(kept) < episodes:
                while len(under_way) < min(2 * workers, episodes - len(kept)):
                    under_way.append(pool.submit(_job, str(folder), config, next(seeds)))
                settle(under_way.pop(0).result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _resume(folder: Path, described: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Episodes and failed seeds already there. A file that cannot be read is written again."""
    failed: set[int] = set()
    if (folder / INDEX).is_file():
        store = EpisodeStore(folder)
        for key, value in described.items():
            if store.index.get(key) != value:
                raise UserError(f"--out {folder}: was written with {key}={store.index.get(key)!r}, now {value!r}")
        failed = set(store.index.get("failed_seeds", []))
    known = {}
    for path in sorted(folder.glob(episode_file(0).replace("00000000", "*"))):
        try:
            entry = read_entry(path)
        except UserError:
            continue
        known[int(entry["seed"])] = entry
    return known, failed


def check_expert(world: Any, world_name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs the expert without rendering; one line per seed: success, seconds, which object it chose, metrics."""
    lines = []
    substeps = round(world.decision_s * world.control_hz)
    for seed in seeds:
        world.reset(seed)
        expert = make_expert(world_name, world)
        while not world.ended() and world.time_s < world.limit_s:
            for command in interpolate(world.command(), expert.action(), substeps):
                world.step(command)
        lines.append(
            {
                "seed": seed,
                "instruction": world.instruction,
                "success": world.success(),
                "seconds": world.time_s,
                "chosen": world.chosen(),
                "metrics": world.metrics(),
            }
        )
    return lines
