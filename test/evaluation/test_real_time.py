from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.evaluation.smoothness import jerks
from qwen_vla_core.interfaces import ActionChunk, Committed, Observation
from qwen_vla_core.runtime.continuity import STRATEGIES

ROBOT = load_embodiment("aloha")
JOINT = ROBOT.channels.index("left_waist")


class PerfectArms:
    """Goes exactly where it is told; done when the left waist is at 0.5 rad."""

    control_hz = 50.0
    channels = ROBOT.channels
    views = ("ego",)
    headings = ()
    held_c = np.zeros(len(ROBOT.channels), bool)
    instruction = "turn left"

    def __init__(self) -> None:
        self.commands: list[np.ndarray] = []

    def reset(self, seed: int, instruction: str | None = None) -> None:
        start = [value for group in ROBOT.actions for value in group.start]
        self.pose, self.time_s = np.array(start, dtype=np.float64), 0.0
        self.commands.clear()

    def step(self, action_c: np.ndarray) -> None:
        self.commands.append(np.array(action_c))
        self.pose = np.array(action_c)
        self.time_s += 1 / self.control_hz

    def state(self) -> np.ndarray:
        return self.pose

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 128, np.uint8)

    def success(self) -> bool:
        return bool(self.pose[JOINT] > 0.499)

    def command(self) -> np.ndarray:
        return self.state()

    def ended(self) -> bool:
        return self.success()

    def chosen(self) -> str | None:
        return None

    def track(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {"angle": float(self.pose[JOINT])}


class TurnLeft:
    """0.1 rad further per action, up to 0.5 rad; ``leap`` asks for all of it at once."""

    def __init__(self, leap: bool = False) -> None:
        self.leap = leap

    def predict(self, observation):
        actions = np.repeat(observation.state[None], ROBOT.control.horizon, axis=0)
        steps = np.arange(1, len(actions) + 1)
        actions[:, JOINT] = 0.5 if self.leap else np.minimum(observation.state[JOINT] + 0.1 * steps, 0.5)
        return ActionChunk(actions, ROBOT.channels, observation.stamp_ns, ROBOT.period_s)


@pytest.mark.parametrize("latency_s", [0.0, 0.1, 0.4])
def test_the_goal_is_reached_in_spite_of_late_chunks(latency_s):
    world = PerfectArms()
    result = run_episode_in_time(world, TurnLeft(), ROBOT, seed=0, timing=Timing(latency_s), timeout_s=8)
    assert result.success
    assert result.seconds > latency_s


def test_nothing_moves_before_the_first_chunk_arrives():
    world = PerfectArms()
    run_episode_in_time(world, TurnLeft(), ROBOT, seed=0, timing=Timing(latency_s=0.4), timeout_s=0.38)
    assert np.ptp(np.array(world.commands)[:, JOINT]) == 0.0


def test_the_robots_limits_hold_whatever_the_policy_asks():
    world = PerfectArms()
    assert run_episode_in_time(world, TurnLeft(leap=True), ROBOT, seed=0, timing=Timing(), timeout_s=8).success
    fastest = np.abs(np.diff(np.array(world.commands)[:, JOINT])).max() * world.control_hz
    limits = next(group.limits for group in ROBOT.actions if "left_waist" in group.channels)
    assert fastest <= limits.velocity[0] + 1e-9


def test_a_slow_policy_looks_less_often():
    timings = [Timing(latency, execute_steps=2) for latency in (0.1, 0.4)]
    episodes = [run_episode_in_time(PerfectArms(), TurnLeft(), ROBOT, seed=0, timing=t, timeout_s=8) for t in timings]
    looks = [episode.inferences / episode.seconds for episode in episodes]
    assert looks[1] < 0.7 * looks[0]


class Told(TurnLeft):
    """Keeps what it was told to be committed, and continues it exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Observation, Committed]] = []

    def continued(self, observation, committed):
        self.told.append((observation, committed))
        chunk = self.predict(observation)
        chunk.actions_hc[: len(committed.actions_hc)] = committed.actions_hc
        return chunk


@pytest.mark.parametrize(("latency_s", "frozen"), [(0.0, 0), (0.1, 1), (0.25, 3)])
def test_a_policy_is_told_what_the_robot_will_do_meanwhile(latency_s, frozen):
    world, policy = PerfectArms(), Told()
    # Looks are far enough apart that it is at full speed at the second: what the limits hold back no plan knows of.
    timing = Timing(latency_s, strategy=STRATEGIES["guided"], execute_steps=5)
    robot = replace(ROBOT, safety=replace(ROBOT.safety, soft_start_s=0.0))
    result = run_episode_in_time(world, policy, robot, seed=0, timing=timing, timeout_s=3)
    assert policy.told and {committed.frozen for _, committed in policy.told} == {frozen}
    for observation, committed in policy.told:
        now = round(observation.stamp_ns / 1e9 * world.control_hz)
        for row in range(frozen):  # at full speed these are the commands of the next periods, as the robot was told
            done = world.commands[min(now + 5 * (row + 1), len(world.commands) - 1)]
            np.testing.assert_allclose(committed.actions_hc[row], done, atol=0.03)
    assert result.metrics["jump_max"] < 1e-6  # it continued exactly what was committed


def test_a_strategy_that_conditions_needs_a_policy_that_listens():
    with pytest.raises(TypeError, match="guided"):
        timing = Timing(0.1, strategy=STRATEGIES["guided"])
        run_episode_in_time(PerfectArms(), TurnLeft(), ROBOT, seed=0, timing=timing, timeout_s=2)


def test_latency_makes_a_robot_idle():
    timings = [Timing(0.0), Timing(0.45)]
    idle = [
        run_episode_in_time(PerfectArms(), TurnLeft(), ROBOT, seed=0, timing=t, timeout_s=8).metrics["idle"]
        for t in timings
    ]
    assert 0 < idle[0] < 0.1 < idle[1] < 0.6


def test_jerk_is_the_third_difference_of_positions_and_the_second_of_displacements():
    t = np.arange(50) / 50
    commands = np.tile(t[:, None] ** 3, (1, len(ROBOT.channels)))  # third derivative: 6
    np.testing.assert_allclose(jerks(commands, ROBOT, 50.0), 6.0, rtol=1e-6)
    assert jerks(commands, ROBOT, 50.0).shape[1] == 12  # arms without grippers
    arm = load_embodiment("widowx")
    displacements = np.tile(t[:, None] ** 2 * arm.period_s, (1, len(arm.channels)))  # velocity t², jerk 2
    np.testing.assert_allclose(jerks(displacements, arm, 50.0), 2.0, rtol=1e-6)
    assert jerks(displacements, arm, 50.0).shape[1] == 3  # metres; radians have no common mean with them
    assert jerks(commands[:3], ROBOT, 50.0).size == 0
