"""A closed-loop episode with the clock running: the robot's own control law plays chunks that arrive late.

``closed_loop.run_episode`` stops the world while the policy thinks. Here simulated time goes on, through the same
``ControlLoop`` (limits, watchdog, plan clock, joining) and the same rules of when to look and what is committed as on
the robot, so that latency and the way chunks follow each other can be measured repeatably, without ROS and without a
real clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.evaluation.closed_loop import EpisodeResult, JudgedWorld, judge, observe
from qwen_vla_core.evaluation.smoothness import PlayStatistics
from qwen_vla_core.interfaces import ActionChunk, Committed, Observation, Policy
from qwen_vla_core.runtime.commitment import PlanHistory, PlanRest
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES, Strategy
from qwen_vla_core.runtime.controller import ControlLoop, held_channels
from qwen_vla_core.runtime.latency import LatencyWindow
from qwen_vla_core.runtime.plan_clock import NANO
from qwen_vla_core.runtime.schedule import LookSchedule


@runtime_checkable
class ContinuingPolicy(Policy, Protocol):
    """A policy that can be told what the robot will be doing while it thinks."""

    def continued(self, observation: Observation, committed: Committed) -> ActionChunk: ...


@runtime_checkable
class DrivenWorld(Protocol):
    """A world whose base takes a twist (m/s, rad/s), as real ones do."""

    def drive(self, speed: float, turning: float) -> None: ...


@dataclass(frozen=True)
class Timing:
    """How late chunks are, how often they come and how they follow each other.

    Attributes:
        latency_s: from the observation to its chunk at the controller.
        strategy: of continuity.
        execute_steps: actions between two looks, see ``LookSchedule``; None: as the robot's YAML says.
        replan_s: a fixed time between two looks instead.
        blend_s: instead of the strategy's.
    """

    latency_s: float = 0.1
    strategy: Strategy = STRATEGIES[DEFAULT_STRATEGY]
    execute_steps: int | None = None
    replan_s: float | None = None
    blend_s: float | None = None


class _PolicySide:
    """What the policy's process does: looks in time, and asks with what is committed."""

    def __init__(self, policy: Policy, robot: Embodiment, timing: Timing) -> None:
        self.policy, self.robot, self.timing = policy, robot, timing
        self.inferences = 0
        self._schedule = LookSchedule.of(robot, timing.execute_steps)
        # A robot that has been running for a while knows its latency.
        self._latency = LatencyWindow(warm_up=0)
        self._latency.add(timing.latency_s)
        self._plans = PlanHistory(robot.period_s, held_channels(robot))
        self._look_s: float | None = None
        self._chunk_s: float | None = None
        self._under_way: tuple[float, ActionChunk] | None = None

    def told(self, loop: ControlLoop, now_ns: int) -> None:
        """The controller's message: what is left of its plan."""
        loop.buffer.advance(now_ns)
        rest_tc = loop.buffer.rest()
        if rest_tc is not None:
            self._plans.add(PlanRest(now_ns, rest_tc))

    def arrived(self, now_s: float) -> ActionChunk | None:
        """The chunk that reaches the controller by now."""
        if self._under_way is None or now_s < self._under_way[0] - 1e-9:
            return None
        chunk = self._under_way[1]
        self._under_way = None
        assert self._look_s is not None
        self._latency.add(now_s - self._look_s)
        self._chunk_s = now_s
        return chunk

    def look_is_due(self, now_s: float) -> bool:
        """Whether an inference starts now."""
        if self._under_way is not None:
            return False
        if self._look_s is None:
            return True
        if self.timing.replan_s is not None:
            return now_s >= self._look_s + self.timing.replan_s - 1e-9
        end_ns = self._plans.end_ns
        end_s = None if end_ns is None else end_ns / NANO
        return now_s >= self._schedule.next_look_s(self._look_s, self._chunk_s, end_s, self._latency) - 1e-9

    def look(self, observation: Observation, now_s: float) -> None:
        """Starts an inference."""
        use = self.timing.strategy.conditioning
        committed = None
        if use != "none":
            horizon, latency_s = self.robot.control.horizon, self._latency.p95 or 0.0
            committed = self._plans.committed(observation.stamp_ns, horizon, latency_s, use)
        if committed is None:
            chunk = self.policy.predict(observation)
        elif isinstance(self.policy, ContinuingPolicy):
            chunk = self.policy.continued(observation, committed)
        else:
            raise TypeError(f"strategy {self.timing.strategy.name} needs a policy that can be told what is committed")
        self._under_way = (now_s + self.timing.latency_s, chunk)
        self._look_s = now_s
        self.inferences += 1


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
        policy: gives a chunk for an observation; its own computing time does not count, ``timing.latency_s`` does. A
            strategy with conditioning needs a ``ContinuingPolicy``.
        robot: channels, limits and watchdog of the control law.
        seed: of the world's randomisation.
        timing: latency, when to look, and the strategy.
        instruction: what to do; ``None`` lets the world choose.
        timeout_s: simulated seconds until the episode counts as failed.
        on_step: called after each control step.

    Returns:
        The outcome; its metrics also hold those of ``PlayStatistics``.
    """
    strategy = timing.strategy if timing.blend_s is None else replace(timing.strategy, blend_s=timing.blend_s)
    loop = ControlLoop(robot, strategy=strategy)
    if loop.commanded is not robot:
        world.command_by(loop.commanded.channels)
    world.reset(seed, instruction)
    measured = {channel: column for column, channel in enumerate(robot.state_channels)}
    columns = [measured.get(channel, -1) for channel in loop.commanded.channels]  # a displacement is measured nowhere
    tracked = next((group for group in robot.actions if group.tracked()), None)
    loop.start(0)
    side = _PolicySide(policy, robot, timing)
    statistics = PlayStatistics(loop.commanded, world.control_hz, robot)

    def deliver(now_s: float, now_ns: int) -> None:
        chunk = side.arrived(now_s)
        if chunk is not None and loop.feed(chunk, now_ns) is None:
            statistics.add_switch(loop.buffer.last_jump_c)
            side.told(loop, now_ns)

    while world.time_s < timeout_s and not world.ended():
        now_s = world.time_s
        now_ns = round(now_s * NANO)
        deliver(now_s, now_ns)
        state = np.asarray(world.state(), dtype=np.float64)
        loop.update_state(dict(zip(robot.state_channels, state.tolist(), strict=True)), now_ns)
        if side.look_is_due(now_s):
            side.told(loop, now_ns)
            side.look(observe(world), now_s)
            deliver(now_s, now_ns)
        commands = loop.tick(now_ns).commands
        command_c = loop.limiter.position_c if commands else np.append(state, 0.0)[columns]
        statistics.add_command(command_c)
        if tracked is not None and isinstance(world, DrivenWorld):
            twist = commands[tracked.name].values if commands else np.zeros(len(tracked.twist_fields))
            speeds = dict(zip(tracked.twist_fields, twist.tolist(), strict=True))
            world.drive(speeds["vx"], speeds["wz"])
        else:
            world.step(command_c)
        if on_step is not None:
            on_step(world)
    result = judge(world, seed, side.inferences)
    played = statistics.metrics(loop.buffer.clock.now_s, world.time_s)
    return replace(result, metrics={**result.metrics, **played})
