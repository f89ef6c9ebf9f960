"""Demonstrations: the expert at the policy's rate, with pictures, at times pushed off its path so that it recovers."""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import EpisodeStager, LeRobotWriter, Staged
from qwen_vla_core.data.lerobot.layout import INFO
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_core.processes import begin_worker
from qwen_vla_core.sim.corrections import Pilot, weights_of
from qwen_vla_core.sim.demonstration import EXTRAS, SCENE, Demonstration
from qwen_vla_core.sim.registry import make_expert, make_world, world_class

if TYPE_CHECKING:
    from qwen_vla_core.sim.domain import DomainConfig

RENDER_SIZE = (256, 192)  # width, height; then shrunk by area, as a 640×480 camera picture is
STORED_SIZE = (128, 96)
SETTINGS = "meta/sim_demos.json"  # how the episodes were made, and the seeds that failed
HOLD_AFTER = 5  # steps recorded after success: a policy must learn to stay


@dataclass(frozen=True)
class NoiseConfig:
    """Pushes while recording (DART [X]): the command is displaced for some steps, the label stays the expert's wish.

    What a push does to which robot, and how far, its expert says.

    Attributes:
        start: chance per step that a push begins.
        steps: shortest and longest push, in policy steps.
        most: pushes per episode at most.
        drop: chance that a push while a gripper is closed opens it, so that what it holds falls.
    """

    start: float = 0.12
    steps: tuple[int, int] = (2, 5)
    most: int = 3
    drop: float = 0.0


@dataclass(frozen=True)
class DemoConfig:
    """What to record.

    Attributes:
        world: name in the registry.
        tasks: those drawn from.
        noise: chance that an episode is pushed.
        drops: chance that a push while a gripper is closed opens it, so that what it holds falls.
        domain: full domain randomisation; None is off.
        pilot: checkpoint of a policy that drives until the expert takes over; None: the expert alone.
    """

    world: str
    tasks: tuple[str, ...]
    noise: float = 0.0
    drops: float = 0.0
    domain: DomainConfig | None = None
    pilot: str | None = None


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
                self.offset = self.expert.draw_push(action_c, self.rng, c.drop)
        else:
            self.left -= 1
            if self.left == 0:
                self.offset = None
        return action_c if self.offset is None else np.asarray(self.expert.pushed(action_c, self.offset))


def shrink(picture: np.ndarray, size: tuple[int, int] = STORED_SIZE) -> np.ndarray:
    """Area-averaged (height, width, 3) picture of ``size`` (width, height)."""
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def record(
    world: Any,
    world_name: str,
    seed: int,
    *,
    noise: float = 0.0,
    pushes: NoiseConfig | None = None,
    pilot: Pilot | None = None,
) -> Demonstration:
    """Runs the expert once; the episode says whether it succeeded.

    Args:
        world: reset here to ``seed``; its own instruction.
        world_name: its name in the registry.
        seed: of the scene, the instruction and the pushes.
        noise: chance that this episode is pushed.
        pushes: how.
        pilot: drives first; an episode that is over, well or not, before the expert's turn is played again with an
            earlier hand-over.
    """
    if pilot is None:
        return _record(world, world_name, seed, noise, pushes or NoiseConfig(), None)
    pilot.begin(seed, world.limit_s)
    made = _record(world, world_name, seed, 0.0, NoiseConfig(), pilot)
    over_s = (len(made) - HOLD_AFTER) * world.decision_s
    if pilot.drives(over_s):
        pilot.begin(seed, world.limit_s, over_s)
        made = _record(world, world_name, seed, 0.0, NoiseConfig(), pilot)
    return made


def _record(
    world: Any, world_name: str, seed: int, noise: float, pushes: NoiseConfig, pilot: Pilot | None
) -> Demonstration:
    world.reset(seed)
    expert = make_expert(world_name, world)
    rng = np.random.default_rng([seed, 3])
    push = _Push(pushes, expert, rng) if rng.random() < noise else None
    pictures: dict[str, list[np.ndarray]] = {view: [] for view in world.views}
    states, actions, perturbed, scenes = [], [], [], []
    left = HOLD_AFTER
    while left and world.time_s < world.limit_s:
        seen = {view: world.render(view, *RENDER_SIZE) for view in world.views}
        for view, picture in seen.items():
            pictures[view].append(shrink(picture))
        states.append(world.state())
        scenes.append(json.dumps(world.scene_state().to_dict()))
        action = executed = expert.action()
        if not world.ended():
            if push is not None:
                executed = push.execute(action)
            elif pilot is not None and pilot.drives(world.time_s):
                executed = pilot.action(world, seen)
        actions.append(action)
        perturbed.append(bool(np.any(executed != action)))
        for command in world.play(executed):
            world.step(command)
        left = left - 1 if world.ended() else HOLD_AFTER
    handed_over = {} if pilot is None else {"expert_from": sum(perturbed)}
    return Demonstration(
        images={view: np.stack(frames) for view, frames in pictures.items()},
        rows=EpisodeRows(
            state=np.stack(states).astype(np.float32),
            action=np.stack(actions).astype(np.float32),
            timestamp=np.arange(len(states)) * float(world.decision_s),
            task=np.zeros(len(states), np.int64),
            perturbed=np.array(perturbed),
            extra={SCENE: scenes},
        ),
        instruction=world.instruction,
        seed=seed,
        success=bool(world.success()),
        info={**world.about(), "pushed": push is not None, **handed_over, **_domain_of(world)},
    )


def _domain_of(world: Any) -> dict[str, Any]:
    """What domain randomisation drew for this episode; nothing without it."""
    return {"domain": world.domain_drawn} if getattr(world, "domain", None) is not None else {}


_WORLD: dict[tuple[Any, ...], Any] = {}  # one world (and pilot) per process: building and its GL context cost a second


def _job(stager: EpisodeStager, config: DemoConfig, robot: str, seed: int) -> tuple[int, Staged | None]:
    """In a worker: records one seed, stages it if it succeeded."""
    key = (config.world, config.tasks, config.domain, config.pilot, robot)
    if key not in _WORLD:
        cv2.setNumThreads(1)
        domain: dict[str, Any] = {} if config.domain is None else {"domain": config.domain}
        world = make_world(config.world, tasks=config.tasks, **domain)
        _WORLD[key] = world, None if config.pilot is None else Pilot(config.pilot, robot)
    world, pilot = _WORLD[key]
    pushes = NoiseConfig(drop=config.drops)
    made = record(world, config.world, seed, noise=config.noise, pushes=pushes, pilot=pilot)
    return seed, stager.stage(made.rows, [made.instruction], made.images, made.noted) if made.success else None


def generate(
    folder: str | Path,
    config: DemoConfig,
    robot: Embodiment,
    episodes: int,
    *,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda kept, failed: None,
) -> tuple[int, int]:
    """Brings a LeRobot dataset to ``episodes`` successful demonstrations, trying the seeds from ``seed`` on in order.

    What is already there is kept, also after a crash. The result does not depend on ``workers``.

    Args:
        folder: of the dataset.
        config: what to record.
        robot: whose contract the dataset carries.
        episodes: wanted in all, counting those there whose seed is at least ``seed``.
        seed: first seed.
        workers: processes.
        progress: told after each seed how many were kept and how many failed.

    Returns:
        episodes kept and seeds that failed, both including what was there before.

    Raises:
        UserError: the folder was written with other settings, the world decides at another rate than the robot's, or
            the disk refuses.
    """
    folder, contract = Path(folder), DataContract.of(robot)
    rate = 1 / float(world_class(config.world).decision_s)
    if not np.isclose(contract.frequency_hz, rate):
        raise UserError(
            f"{robot.name}: control.frequency_hz is {contract.frequency_hz:g}, its world decides at {rate:g}"
        )
    described = {
        "embodiment": robot.name,
        "rate_hz": contract.frequency_hz,
        "picture_size": list(STORED_SIZE),
        "rendered_size": list(RENDER_SIZE),
        "world": config.world,
        "tasks": list(config.tasks),
        "noise": config.noise,
        "domain": config.domain.to_json() if config.domain else None,
        "pilot": None if config.pilot is None else weights_of(config.pilot),
        **({"drops": config.drops} if config.drops else {}),  # without it the file is what it was before there were any
    }
    failed = _failed_before(folder, described)
    with LeRobotWriter(
        folder,
        contract,
        family="synthetic",
        views=dict.fromkeys(contract.views, STORED_SIZE),
        source={"name": "qwen-vla sim demos", "licence": "Apache-2.0", **described},
        extras=EXTRAS,
        resume=(folder / INFO).exists(),
    ) as writer:
        kept = {int(noted["seed"]) for noted in writer.infos if int(noted["seed"]) >= seed}
        progress(len(kept), len(failed))

        def note() -> None:
            atomic_write_json(folder / SETTINGS, {**described, "failed_seeds": sorted(failed)})

        def settle(result: tuple[int, Staged | None]) -> None:
            tried, staged = result
            if staged is None:
                failed.add(tried)
                note()
            else:
                writer.add_staged(staged)
                kept.add(tried)
            progress(len(kept), len(failed))

        note()
        seeds = (s for s in count(seed) if s not in kept and s not in failed)
        if workers <= 1:
            while len(kept) < episodes:
                settle(_job(writer.stager, config, robot.name, next(seeds)))
        else:
            job = functools.partial(_job, writer.stager, config, robot.name)
            _run_pool(job, episodes, workers, seeds, kept, settle)
    return len(kept), len(failed)


def _run_pool(
    job: Callable[[int], tuple[int, Staged | None]],
    episodes: int,
    workers: int,
    seeds: Iterator[int],
    kept: set[int],
    settle: Callable[[tuple[int, Staged | None]], None],
) -> None:
    """Spawned workers (a forked GL context does not work); never more jobs under way than episodes still missing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        under_way: list[Future[tuple[int, Staged | None]]] = []
        try:
            while len(kept) < episodes:
                while len(under_way) < min(2 * workers, episodes - len(kept)):
                    under_way.append(pool.submit(job, next(seeds)))
                settle(under_way.pop(0).result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _failed_before(folder: Path, described: Mapping[str, Any]) -> set[int]:
    """Seeds that failed in an earlier run with the same settings."""
    path = folder / SETTINGS
    if not path.is_file():
        return set()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        failed = set(map(int, known["failed_seeds"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; delete it (failed seeds are then tried again)") from None
    for key, value in {"drops": None, **described}.items():
        if known.get(key) != value:
            raise UserError(f"--out {folder}: was written with {key}={known.get(key)!r}, now {value!r}")
    return failed


def check_expert(world: Any, world_name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs the expert without rendering; one line per seed: success, seconds, which object it chose, metrics, walk."""
    lines = []
    for seed in seeds:
        world.reset(seed)
        expert = make_expert(world_name, world)
        while not world.ended() and world.time_s < world.limit_s:
            for command in world.play(expert.action()):
                world.step(command)
        lines.append(
            {
                "seed": seed,
                "instruction": world.instruction,
                "success": world.success(),
                "seconds": world.time_s,
                "chosen": world.chosen(),
                "metrics": world.metrics(),
                "track": world.track(),
            }
        )
    return lines
