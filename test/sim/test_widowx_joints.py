"""The WidowX through joint commands: the same policy, the same outcome, joint limits on what is published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.real_time import Timing, run_episode_in_time
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.sim.registry import make_expert, make_world
from qwen_vla_core.sim.worlds.widowx import JOINTS, WidowXWorld


class ExpertPolicy:
    """The scripted expert, one displacement at a time, whatever its world is commanded by."""

    def __init__(self, world: WidowXWorld) -> None:
        self.world, self.last = world, np.array([0.0] * 6 + [1.0])
        self.expert: Any = None
        world.command = lambda: self.last.copy()  # type: ignore[method-assign]
        self.robot = load_embodiment("widowx")

    def predict(self, observation: Observation) -> ActionChunk:
        if self.expert is None:  # it is made for a world that has been reset, which the episode does
            self.expert = make_expert("widowx", self.world)
        self.last = self.expert.action()
        rows = np.tile(self.last, (self.robot.control.horizon, 1))
        rows[1:, :6] = 0.0
        return ActionChunk(rows, self.robot.channels, observation.stamp_ns, self.robot.period_s)


def test_a_demonstration_by_joint_commands_succeeds_as_by_twists(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, list[float]] = {}
    told: list[np.ndarray] = []
    tick = ControlLoop.tick

    def listened(loop: ControlLoop, t_ns: int):  # type: ignore[no-untyped-def]
        output = tick(loop, t_ns)
        if loop.targets is not None and output.commands:
            told.append(output.commands["arm"].values)
        return output

    monkeypatch.setattr(ControlLoop, "tick", listened)
    for name in ("widowx", "widowx_joints"):
        world = make_world("widowx", tasks=("place",))
        world.render = lambda *_: np.zeros((4, 4, 3), np.uint8)
        robot = load_embodiment(name)
        timing = Timing(latency_s=0.0, replan_s=robot.period_s)
        for seed in (0,):
            told.clear()
            result = run_episode_in_time(world, ExpertPolicy(world), robot, seed=seed, timing=timing, timeout_s=15.0)
            assert result.success
            seconds.setdefault(name, []).append(result.seconds)
        world.close()
    np.testing.assert_allclose(seconds["widowx_joints"], seconds["widowx"], atol=0.5)
    limits = load_embodiment("widowx_joints").actions[0].command.ik.limits  # type: ignore[union-attr]
    joints = np.array(told)
    rates = np.diff(joints, axis=0) / 0.02
    assert len(joints) > 100 and np.abs(rates).max() > 0.3
    assert (joints >= limits.lower).all() and (joints <= limits.upper).all()
    assert (np.abs(rates) <= np.array(limits.velocity) * (1 + 1e-9)).all()
    assert (np.abs(np.diff(rates, axis=0)) / 0.02 <= np.array(limits.acceleration) * (1 + 1e-6)).all()


def test_a_world_refuses_commands_it_does_not_know() -> None:
    world = make_world("widowx")
    world.command_by((*JOINTS, "gripper"))
    assert world.channels == (*JOINTS, "gripper") and not world.held_c.any()
    world.reset(0)
    np.testing.assert_allclose(world.command()[:6], world.state()[:6], atol=1e-6)
    for _ in range(25):
        world.step(world.command())
    np.testing.assert_allclose(world.state()[:6], world.command()[:6], atol=0.01)
    with pytest.raises(UserError, match=r"is commanded by .*, not by x"):
        make_world("aloha").command_by(("x",))
    world.close()
