"""Runs a policy in a simulated world without ROS: observe, predict a chunk, execute part of it, observe again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwen_vla_core.actions.conventions import continue_headings
from qwen_vla_core.evaluation.navigation import measure
from qwen_vla_core.interfaces import Observation, Policy, World
from qwen_vla_core.sim.track import Track

RENDER_SIZE = (256, 192)  # twice the tiny model's input, so that the area filter of its preprocessing has work to do


class JudgedWorld(World, Protocol):
    """A world that also says how an episode went, so that language following can be judged.

    Attributes:
        views: what ``render`` knows.
        time_s: simulated seconds since ``reset``.
        headings: the action columns that are angles modulo a turn.
        held_c: (c,) bool, True for displacements per period, which are held and not interpolated.
    """

    views: tuple[str, ...]
    time_s: float
    headings: tuple[int, ...]
    held_c: np.ndarray

    def command(self) -> np.ndarray:
        """(c,) the last action, after ``reset`` the start pose."""
        ...

    def command_by(self, channels: Sequence[str]) -> None:
        """Says which channels the steps to come are commanded in; before ``reset``."""
        ...

    def ended(self) -> bool:
        """Success, or over for another reason: a base that has stopped in the wrong place."""
        ...

    def chosen(self) -> str | None:
        """The object the robot acted on, whatever was asked; None while there is none."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of this episode so far, by name; the same names in every episode of a world."""
        ...

    def track(self) -> Track | None:
        """The walk so far, of a world in which the robot walks."""
        ...


@dataclass(frozen=True)
class EpisodeResult:
    """Outcome of one closed-loop episode."""

    seed: int
    instruction: str
    success: bool
    chosen: str | None
    seconds: float
    inferences: int
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


def observe(world: JudgedWorld, size: tuple[int, int] | None = None) -> Observation:
    """Renders every view and reads the state of ``world`` now.

    Args:
        world: in the middle of an episode.
        size: width and height of the pictures; None: the world's ``render_size``, where a benchmark says which, or
            ``RENDER_SIZE``.
    """
    if size is None:
        size = getattr(world, "render_size", RENDER_SIZE)
    width, height = size
    return Observation(
        images={view: world.render(view, width, height) for view in world.views},
        state=world.state(),
        instruction=world.instruction,
        stamp_ns=int(world.time_s * 1e9),
    )


def run_episode(
    world: JudgedWorld,
    policy: Policy,
    *,
    seed: int,
    instruction: str | None = None,
    execute_steps: int = 5,
    timeout_s: float = 12.0,
    on_step: Callable[[JudgedWorld], None] | None = None,
) -> EpisodeResult:
    """Runs one episode until it has ended or for ``timeout_s`` of simulated time.

    Args:
        world: the simulated robot; it is reset here.
        policy: gives a chunk for an observation.
        seed: of the world's randomisation.
        instruction: what to do; ``None`` lets the world choose.
        execute_steps: actions of each chunk that are executed before the next observation (receding horizon).
        timeout_s: simulated seconds until the episode counts as failed.
        on_step: called after each control step, e.g. to record a picture.
    """
    world.reset(seed, instruction)
    inferences = 0
    setpoint = np.asarray(world.command(), dtype=np.float64)
    while world.time_s < timeout_s and not world.ended():
        chunk = policy.predict(observe(world))
        inferences += 1
        until_s = min(world.time_s + execute_steps * chunk.period_s, timeout_s)
        setpoint = play_chunk(world, chunk.actions_hc, chunk.period_s, setpoint, until_s, on_step)
    return judge(world, seed, inferences)


def play_chunk(
    world: JudgedWorld,
    actions_hc: np.ndarray,
    period_s: float,
    setpoint_c: np.ndarray,
    until_s: float,
    on_step: Callable[[JudgedWorld], None] | None = None,
) -> np.ndarray:
    """Executes a chunk that was predicted from what is to be seen now, at the world's control rate.

    Args:
        world: in the middle of an episode.
        actions_hc: (H, c) absolute actions; action i is due ``(i + 1) * period_s`` from now.
        period_s: between two actions.
        setpoint_c: (c,) the last command; ``world.command()`` after a reset.
        until_s: simulated time at which to stop, if the episode has not ended before.
        on_step: called after each control step.

    Returns:
        (c,) the last command.
    """
    control_s = 1.0 / world.control_hz
    start_s = world.time_s
    # Targets over time: from where the last command was, through the actions at their due times.
    knots_tc = np.vstack([setpoint_c[None], continue_headings(actions_hc, setpoint_c, world.headings)])
    while world.time_s < until_s - 1e-9:
        setpoint_c = interpolate(knots_tc, (world.time_s + control_s - start_s) / period_s, world.held_c)
        world.step(setpoint_c)
        if on_step is not None:
            on_step(world)
        if world.ended():
            break
    return setpoint_c


def judge(world: JudgedWorld, seed: int, inferences: int) -> EpisodeResult:
    """How the episode that ``world`` is in has gone."""
    metrics = {**world.metrics(), **measure(world.track())}
    return EpisodeResult(seed, world.instruction, world.success(), world.chosen(), world.time_s, inferences, metrics)


def interpolate(knots_tc: np.ndarray, position: float, held_c: np.ndarray | None = None) -> np.ndarray:
    """Linear interpolation of (T, c) ``knots_tc`` at fractional row ``position``, held at both ends.

    Where ``held_c`` (c,) is True the next row counts for its whole period, and zero after the last.
    """
    following = int(np.ceil(position - 1e-6))
    position = min(max(position, 0.0), len(knots_tc) - 1.0)
    low = min(int(position), len(knots_tc) - 2)
    weight = position - low
    row_c = (1.0 - weight) * knots_tc[low] + weight * knots_tc[low + 1]
    if held_c is not None and held_c.any():
        row_c[held_c] = knots_tc[following][held_c] if following < len(knots_tc) else 0.0
    return row_c
