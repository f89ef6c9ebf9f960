from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.evaluation.closed_loop import interpolate, run_episode
from qwen_vla_core.interfaces import ActionChunk


class IntegratorWorld:
    """One joint that goes where it is told; done when it is at 1.0."""

    control_hz = 50.0
    channels = ("joint",)
    views = ("ego",)
    headings = ()
    held_c = np.zeros(1, bool)
    instruction = "reach one"

    def __init__(self) -> None:
        self.commands: list[float] = []

    def reset(self, seed: int, instruction: str | None = None) -> None:
        self.position, self.time_s = 0.0, 0.0
        self.commands.clear()

    def step(self, action_c: np.ndarray) -> None:
        self.commands.append(float(action_c[0]))
        self.position = float(action_c[0])
        self.time_s += 1 / self.control_hz

    def state(self) -> np.ndarray:
        return np.array([self.position])

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 128, np.uint8)

    def success(self) -> bool:
        return self.position > 0.999

    def command(self) -> np.ndarray:
        return self.state()

    def ended(self) -> bool:
        return self.success()

    def chosen(self) -> str | None:
        return None

    def track(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {"position": self.position}


class Approach:
    """Moves 0.1 per action from the observed position."""

    def __init__(self, horizon: int = 8) -> None:
        self.horizon = horizon

    def predict(self, observation):
        targets = observation.state[0] + 0.1 * np.arange(1, self.horizon + 1)
        return ActionChunk(np.minimum(targets, 1.0)[:, None], ("joint",), observation.stamp_ns, 0.1)


def test_episode_ends_at_success_and_counts_inferences():
    result = run_episode(IntegratorWorld(), Approach(), seed=3, execute_steps=5)
    assert result.success
    assert result.inferences == 2  # 10 actions at 5 per chunk
    assert result.seconds == pytest.approx(1.0, abs=0.03)


def test_commands_are_interpolated_between_actions_without_jumps():
    world = IntegratorWorld()
    run_episode(world, Approach(), seed=0, execute_steps=5)
    assert np.max(np.abs(np.diff([0.0, *world.commands]))) == pytest.approx(0.02, abs=1e-6)


def test_timeout_is_a_failure():
    class Idle:
        def predict(self, observation):
            return ActionChunk(np.zeros((8, 1)), ("joint",), observation.stamp_ns, 0.1)

    result = run_episode(IntegratorWorld(), Idle(), seed=0, timeout_s=1.0)
    assert not result.success
    assert result.seconds == pytest.approx(1.0, abs=0.03)


def test_interpolation_is_held_at_both_ends():
    knots = np.array([[0.0], [1.0], [4.0]])
    assert interpolate(knots, -1.0) == pytest.approx(0.0)
    assert interpolate(knots, 1.5) == pytest.approx(2.5)
    assert interpolate(knots, 9.0) == pytest.approx(4.0)


def test_displacements_count_for_their_whole_period_and_not_longer():
    knots = np.array([[9.0, 0.0], [1.0, 1.0], [3.0, 2.0]])
    held = np.array([True, False])
    ends = np.arange(1, 36) / 10  # ten control steps per period; three and a half periods
    rows = np.array([interpolate(knots, end, held) for end in ends])
    assert rows[:, 0].tolist() == [1.0] * 10 + [3.0] * 10 + [0.0] * 15
    np.testing.assert_allclose(rows[:20, 1], ends[:20])
    assert interpolate(knots, 0.1 + 0.2 + 0.7, held)[0] == 1.0  # 1.0000000000000002
