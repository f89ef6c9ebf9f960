"""Demonstrations: the expert at the policy's rate, with pictures, at times pushed off its path so that it recovers."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

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
from qwen_vla_core.sim.experts import PERIOD_S, interpolate
from qwen_vla_core.sim.registry import make_expert, make_world

RENDER_SIZE = (256, 192)  # width, height; then shrunk by area, as a 640×480 camera picture is
STORED_SIZE = (128, 96)
HOLD_AFTER = 5  # steps recorded after success: a policy must learn to stay
LIMIT_S = 12.0


@dataclass(frozen=True)
class NoiseConfig:
    """Pushes while recording (DART [X]): the command is displaced for some steps, the label stays the expert's wish.

    Attributes:
        start: chance per step that a push begins.
        steps: shortest and longest push, in policy steps.
        arm: largest displacement per step of an arm joint, radians.
        gripper: chance that a push closes the open gripper instead.
        most: pushes per episode at most.
    """

    start: float = 0.12
    steps: tuple[int, int] = (2, 5)
    arm: float = 0.06
    gripper: float = 0.2
    most: int = 3


@dataclass(frozen=True)
class DemoConfig:
    """What to record. ``noise`` is the chance that an episode is pushed; ``tasks`` those drawn from."""

    world: str
    tasks: tuple[str, ...]
    noise: float = 0.0


class _Push:
    """The displacement of the executed command, step by step; zero between pushes."""

    def __init__(self, config: NoiseConfig, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.left, self.done, self.offset = 0, 0, np.zeros(14)

    def next(self, arm_index: int, opening: float) -> np.ndarray:
        """(14,) displacement for this step. ``opening`` is what the expert wants of the moving gripper."""
        c = self.config
        if self.left == 0:
            self.offset = np.zeros(14)
            if self.done < c.most and self.rng.random() < c.start:
                self.done += 1
                self.left = int(self.rng.integers(c.steps[0], c.steps[1] + 1))
                if opening > 0.9 and self.rng.random() < c.gripper:
                    self.offset[7 * arm_index + 6] = -1.0
                else:
                    self.offset[7 * arm_index : 7 * arm_index + 6] = self.rng.uniform(-c.arm, c.arm, 6)
        else:
            self.left -= 1
            if self.left == 0:
                self.offset = np.zeros(14)
        return self.offset


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
    push = _Push(pushes or NoiseConfig(), rng) if rng.random() < noise else None
    arm_index = 0 if world.arm == "left" else 1
    pictures: dict[str, list[np.ndarray]] = {view: [] for view in world.views}
    states, actions, perturbed, scenes = [], [], [], []
    substeps = round(PERIOD_S * world.control_hz)
    left = HOLD_AFTER
    while left and world.time_s < LIMIT_S:
        for view in world.views:
            pictures[view].append(shrink(world.render(view, *RENDER_SIZE)))
        states.append(world.state())
        scenes.append(world.scene_state().to_dict())
        action = expert.action()
        offset = push.next(arm_index, action[7 * arm_index + 6]) if push and not world.success() else np.zeros(14)
        executed = action + offset
        executed[[6, 13]] = executed[[6, 13]].clip(0, 1)
        actions.append(action)
        perturbed.append(bool(np.any(executed != action)))
        for command in interpolate(world.command(), executed, substeps):
            world.step(command)
        left = left - 1 if world.success() else HOLD_AFTER
    return Episode(
        images={view: np.stack(frames) for view, frames in pictures.items()},
        state=np.stack(states).astype(np.float32),
        action=np.stack(actions).astype(np.float32),
        perturbed=np.array(perturbed),
        instruction=world.instruction,
        seed=seed,
        success=bool(world.success()),
        info={"task": world.task.name, "target": world.task.colour, "arm": world.arm, "pushed": push is not None},
        scenes=scenes,
    )


_WORLD: dict[tuple[str, tuple[str, ...]], Any] = {}  # one world per process: building and its GL context cost a second


def _job(folder: str, config: DemoConfig, seed: int) -> tuple[int, dict[str, Any] | None]:
    """In a worker: records one seed, writes it if it succeeded."""
    key = (config.world, config.tasks)
    if key not in _WORLD:
        cv2.setNumThreads(1)
        _WORLD[key] = make_world(config.world, tasks=config.tasks)
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


def check_expert(world: Any, world_name: str, seeds: Sequence[int], limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """Runs the expert without rendering; one line per seed: success, seconds, which cube it lifted."""
    lines = []
    substeps = round(PERIOD_S * world.control_hz)
    for seed in seeds:
        world.reset(seed)
        expert = make_expert(world_name, world)
        while not world.success() and world.time_s < limit_s:
            for command in interpolate(world.command(), expert.action(), substeps):
                world.step(command)
        lines.append(
            {
                "seed": seed,
                "instruction": world.instruction,
                "success": world.success(),
                "seconds": world.time_s,
                "lifted": world.lifted_cube(),
            }
        )
    return lines
