from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.interfaces import ActionChunk

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
    looks = [
        run_episode_in_time(PerfectArms(), TurnLeft(), ROBOT, seed=0, timing=Timing(latency), timeout_s=8).inferences
        / run_episode_in_time(PerfectArms(), TurnLeft(), ROBOT, seed=0, timing=Timing(latency), timeout_s=8).seconds
        for latency in (0.1, 0.4)
    ]
    assert looks[1] < 0.7 * looks[0]
