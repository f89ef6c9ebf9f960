"""The rooms driven by twists, as real bases are: through the controller's tracker, seen by a laser scanner."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.sim.navigation_expert import NavigationExpert
from qwen_vla_core.sim.worlds.rooms import RoomsWorld
from qwen_vla_core.sim.worlds.rooms_layout import ROBOT_RADIUS

BASE = load_embodiment("mobile_base")


class ExpertAhead:
    """The expert's next waypoint, and standing there."""

    def __init__(self, world: RoomsWorld) -> None:
        self.world, self.expert, self.asked = world, None, 0

    def predict(self, observation: Observation) -> ActionChunk:
        if self.expert is None:
            self.expert = NavigationExpert(self.world)
        self.asked += 1
        rows = np.tile(np.asarray(self.expert.action()), (8, 1))
        return ActionChunk(rows, BASE.channels, observation.stamp_ns, BASE.period_s)


@pytest.mark.parametrize("seed", [3, 4])
def test_the_controllers_twist_takes_the_expert_to_its_goal(seed: int) -> None:
    world = RoomsWorld()
    told: list[tuple[float, float]] = []
    plain = world.drive

    def drive(speed: float, turning: float) -> None:
        told.append((speed, turning))
        plain(speed, turning)

    world.drive = drive  # type: ignore[method-assign]
    try:
        result = run_episode_in_time(
            world,
            ExpertAhead(world),
            BASE,
            seed=seed,
            timing=Timing(latency_s=0.05, replan_s=0.5),
            timeout_s=world.limit_s,
        )
    finally:
        world.close()
    assert result.success and world.base.bumps == 0
    twists = np.array(told)
    assert len(twists) > 50 and np.abs(twists[:, 0]).max() <= 0.7 and np.abs(twists[:, 1]).max() <= 1.6
    assert np.abs(np.diff(twists[:, 0])).max() <= 1.2 / world.control_hz + 1e-9


def test_a_twist_is_kept_within_what_the_base_can_do_and_a_stop_is_judged_by_where_it_got() -> None:
    world = RoomsWorld()
    world.reset(1)
    for _ in range(30):
        world.drive(9.0, 0.0)
    assert world.base.speed == pytest.approx(world.base.config.forward)
    np.testing.assert_allclose(world.command(), world.base.odometry)
    for _ in range(60):
        world.drive(0.0, 0.0)
    assert world.ended()
    with pytest.raises(ValueError, match="not finite"):
        world.drive(math.nan, 0.0)


def test_the_scanner_sees_what_stands_around_from_where_it_is_mounted() -> None:
    world = RoomsWorld()
    world.reset(2)
    around = world.scan((0.0, 0.0, 0.0))
    assert around.shape == (360,) and np.isfinite(around).sum() > 300 and around.min() > ROBOT_RADIUS
    for degrees in (-60, 0, 35, 120):
        ahead = world._clearance(math.radians(degrees)) + ROBOT_RADIUS
        assert around[(degrees + 180) % 360] == pytest.approx(ahead, abs=1e-9)
    turned = world.scan((0.0, 0.0, math.pi / 2))
    np.testing.assert_allclose(turned[180], around[270], atol=1e-9)
    if np.isfinite(around[180]):
        assert world.scan((0.1, 0.0, 0.0))[180] == pytest.approx(around[180] - 0.1, abs=1e-6)
    assert np.isinf(world.scan((0.0, 0.0, 0.0), range_max=0.3)).all()
