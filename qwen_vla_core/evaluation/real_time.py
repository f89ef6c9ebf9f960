"""A closed-loop episode with the clock running: the robot's own control law plays chunks that arrive late.

``closed_loop.run_episode`` stops the world while the policy thinks. Here simulated time goes on, through the same
``ControlLoop`` (limits, watchdog, blending) as on the robot, so that latency and the way chunks are replaced can be
measured repeatably, without ROS and without a real clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.evaluation.closed_loop import EpisodeResult, JudgedWorld, judge, observe
from qwen_vla_core.interfaces import ActionChunk, Policy
from qwen_vla_core.runtime.chunk_buffer import NANO
from qwen_vla_core.runtime.controller import ControlLoop


@dataclass(frozen=True)
class Timing:
    """How late chunks are and how often they come.

    Attributes:
        latency_s: from the observation to its chunk at the controller.
        replan_s: between two observations; a policy that is slower than this observes again as soon as it is free.
        blend_s: fade-out of the step between two plans.
    """

    latency_s: float = 0.1
    replan_s: float = 0.2
    blend_s: float = 0.2


def run_episode_in_time(
    world: JudgedWorld,
    policy: Policy,
    robot: Embodiment,
    *,
    seed: int,
    timing: Timing,
    instruction: str | None = None,
    timeout_s: float = 12.0,
    on_step: Callable[[JudgedWorld], None] | None = None,
) -> EpisodeResult:
    """Runs one episode until it has ended or for ``timeout_s`` of simulated time.

    Args:
        world: the simulated robot; it is reset here.
        policy: gives a chunk for an observation; its own computing time does not count, ``timing.latency_s`` does.
        robot: channels, limits and watchdog of the control law.
        seed: of the world's randomisation.
        timing: latency, replanning period and blending.
        instruction: what to do; ``None`` lets the world choose.
        timeout_s: simulated seconds until the episode counts as failed.
        on_step: called after each control step.
    """
    world.reset(seed, instruction)
    measured = {channel: column for column, channel in enumerate(robot.state_channels)}
    columns = [measured.get(channel, -1) for channel in robot.channels]  # a displacement is measured nowhere
    loop = ControlLoop(robot, blend_s=timing.blend_s)
    loop.start(0)
    under_way: tuple[float, ActionChunk] | None = None
    next_look_s, inferences = 0.0, 0
    while world.time_s < timeout_s and not world.ended():
        now_s = world.time_s
        now_ns = round(now_s * NANO)
        if under_way is not None and now_s >= under_way[0] - 1e-9:
            loop.feed(under_way[1], now_ns)
            under_way = None
        state = np.asarray(world.state(), dtype=np.float64)
        loop.update_state(dict(zip(robot.state_channels, state.tolist(), strict=True)), now_ns)
        if under_way is None and now_s >= next_look_s - 1e-9:
            under_way = (now_s + timing.latency_s, policy.predict(observe(world)))
            next_look_s = now_s + timing.replan_s
            inferences += 1
            if timing.latency_s <= 0:
                loop.feed(under_way[1], now_ns)
                under_way = None
        commanded = bool(loop.tick(now_ns).commands)
        world.step(loop.limiter.position_c if commanded else np.append(state, 0.0)[columns])
        if on_step is not None:
            on_step(world)
    return judge(world, seed, inferences)
