"""A point of the robot never leaves its box, whatever is commanded; one that starts outside only comes in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vla_core.embodiment import EmbodimentError, load_embodiment, parse_embodiment
from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.resources import resource_dir
from qwen_vla_core.runtime import workspace
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.safety import SafetyLimiter
from qwen_vla_core.runtime.workspace import MeasuredFence, load_bounded

ALOHA, WIDOWX = load_embodiment("aloha"), load_embodiment("widowx")
START = np.array([value for group in ALOHA.actions for value in group.start])
NOTHING = np.full(14, np.nan)
DT = 0.02


def boxed(lower: tuple[float, float, float], upper: tuple[float, float, float], jerk: bool = True) -> Embodiment:
    """ALOHA with other boxes, with or without its jerk limits."""
    boxes = tuple(dataclasses.replace(box, lower=lower, upper=upper) for box in ALOHA.safety.workspace)
    actions = tuple(
        dataclasses.replace(g, limits=dataclasses.replace(g.limits, jerk=g.limits.jerk if jerk else ()))
        for g in ALOHA.actions
    )
    return dataclasses.replace(ALOHA, actions=actions, safety=dataclasses.replace(ALOHA.safety, workspace=boxes))


TIGHT = ((0.25, -0.15, 0.05), (0.55, 0.15, 0.40))
drive = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 25), st.floats(0.002, 0.04), st.booleans()), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(drive=drive, jerk=st.booleans())
def test_no_commanded_pose_puts_the_point_outside(drive: list, jerk: bool) -> None:
    limiter = SafetyLimiter(boxed(*TIGHT, jerk=jerk))
    limiter.reset(START)
    assert limiter.fence is not None
    low, high = (np.array(side) for side in TIGHT)
    for seed, ticks, dt, stop in drive:
        target = np.random.default_rng(seed).uniform(limiter.lower_c, limiter.upper_c)
        for tick in range(ticks):
            command = limiter.stop(dt) if stop and tick > 15 else limiter.step(target, NOTHING, dt)
            points = limiter.fence.points(command)
            assert (points >= low - 1e-8).all() and (points <= high + 1e-8).all()


def test_the_bounds_hold_every_point_that_a_stop_may_pass() -> None:
    """Joint vectors anywhere in the box of what a stop may reach: the point is where the bounds say it may be."""
    fence, rng = SafetyLimiter(ALOHA).fence, np.random.default_rng(0)
    assert fence is not None
    lower, upper = SafetyLimiter(ALOHA).lower_c, SafetyLimiter(ALOHA).upper_c
    tight = np.inf
    for size in (0.01, 0.1, 0.5):
        for _ in range(100):
            command = rng.uniform(lower, upper)
            below, above = (
                size * rng.random(14) * rng.integers(0, 2, 14),
                size * rng.random(14) * rng.integers(0, 2, 14),
            )
            _, low, high = fence._fits(command, below, above)
            corners = np.where(rng.random((30, 14)) < 0.5, -below, above)
            reached = fence.points(command + np.vstack([corners, corners * rng.random((30, 1))]))
            assert (reached >= low - 1e-12).all() and (reached <= high + 1e-12).all()
            if size == 0.01:
                tight = min(tight, float(np.min([reached.min(axis=0) - low, high - reached.max(axis=0)])))
    assert tight < 2e-4  # metres: they are bounds, not walls far away


def test_the_box_is_reached_and_braked_for_and_the_arm_that_is_inside_goes_on() -> None:
    limiter = SafetyLimiter(boxed(*TIGHT))
    limiter.reset(START)
    assert limiter.fence is not None
    target = START.copy()
    target[0], target[7] = 1.5, 0.2  # the left arm would turn to its side, far out of the box
    for _ in range(150):
        command = limiter.step(target, NOTHING, DT)
    left, right = limiter.fence.points(command)
    assert 0.14 < left[1] <= 0.15
    assert command[7] == 0.2
    np.testing.assert_allclose(right, limiter.fence.points(target)[1], atol=1e-12)
    assert limiter.tally.report("limited")["limited.workspace.left_arm.worst"] == "left_waist"
    assert "limited.workspace.right_arm" not in limiter.tally.report("limited")
    for _ in range(100):  # and it can leave the wall again
        command = limiter.step(START, NOTHING, DT)
    np.testing.assert_array_equal(command, START)


def test_what_starts_outside_may_only_come_in() -> None:
    wall = 0.26  # the point starts at x = 0.29
    limiter = SafetyLimiter(boxed((0.15, -0.15, 0.05), (wall, 0.15, 0.60)))
    limiter.reset(START)
    assert limiter.fence is not None
    start = limiter.fence.points(START)[:, 0]
    assert (start > wall + 0.02).all()
    out = START.copy()
    out[[2, 9]] -= 0.5  # elbow up: further out
    for _ in range(50):
        command = limiter.step(out, NOTHING, DT)
    assert (limiter.fence.points(command)[:, 0] <= start + 1e-8).all()
    nearest, inside = start.copy(), START.copy()
    inside[[1, 8]] = -1.5
    for tick in range(200):
        command = limiter.step(inside if tick % 40 < 30 else out, NOTHING, DT)
        points = limiter.fence.points(command)[:, 0]
        assert (points <= np.maximum(nearest, wall) + 1e-8).all()
        nearest = np.minimum(nearest, points)
    assert (nearest < wall).all()


@pytest.mark.parametrize("name", ["aloha"])
def test_the_expert_never_meets_the_shipped_box_and_loses_no_episode_to_the_filter(name: str) -> None:
    """Jerk, closing rate, grip and box together: the shipped values leave the tasks as they are."""
    pytest.importorskip("mujoco")
    pytest.importorskip("gym_aloha")
    from qwen_vla_core.sim.registry import make_expert, make_world

    world, limiter = make_world(name), SafetyLimiter(ALOHA)
    for seed in range(3):
        world.reset(seed)
        expert = make_expert(name, world)
        limiter.reset(world.command())
        while not world.ended() and world.time_s < world.limit_s:
            for command in world.play(expert.action()):
                world.step(limiter.step(command, world.state(), DT))
        assert world.success(), f"seed {seed}"
    assert limiter.interventions["workspace"] == 0
    assert limiter.interventions["grip"] > 0  # it closes on a cube: the command was pulled back to what holds it


def test_a_measured_hand_is_slowed_before_its_box_and_stopped_beyond_it() -> None:
    fence = MeasuredFence(WIDOWX)
    (box,) = WIDOWX.safety.workspace
    column = WIDOWX.state_channels.index("hand_x")
    state = np.zeros(len(WIDOWX.state_channels))
    state[[column, column + 1, column + 2]] = 0.3, 0.0, 0.2
    out, back = np.full(7, 0.09), np.full(7, -0.09)
    target, changed = fence.clip(out, state)
    assert target is out and not changed.any()  # far inside: not touched
    speeds = []
    for x in np.linspace(box.upper[0] - 0.2, box.upper[0], 9):
        state[column] = x
        target, changed = fence.clip(out, state)
        speeds.append(target[0] * 5)  # 5 Hz: metres per second
        assert speeds[-1] * 0.15 + speeds[-1] ** 2 / (2 * 7.5) <= max(box.upper[0] - x, 0) + 1e-9
        np.testing.assert_array_equal(target[1:], 0.09)
        np.testing.assert_array_equal(fence.clip(back, state)[0], back)
    assert speeds[-1] == 0.0 and changed.tolist() == [True] + 6 * [False]
    state[column] = box.upper[0] + 0.1
    assert fence.clip(out, state)[0][0] == 0.0 and fence.clip(back, state)[0][0] == -0.09
    state[column] = np.nan
    assert fence.clip(out, state)[0][0] == 0.0 and fence.clip(back, state)[0][0] == 0.0


def with_text(old: str, new: str) -> Embodiment:
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    assert old in text
    return parse_embodiment(text.replace(old, new), source="/nowhere/robot.yaml")


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ("model: vx300s.urdf", "model: vx301s.urdf", "model", "no file 'vx301s.urdf'"),
        ("tip: pinch", "tip: pinsh", "tip", "no link 'pinsh'; fix: did you mean 'pinch'?"),
        ("tip: pinch", "tip: wrist_link", "joints[5]", "'wrist_rotate' is not on the way"),
        (
            "tip: pinch",
            "tip: pinch, channels: [left_waist, left_shoulder]",
            "joints",
            "'elbow' moves 'pinch', but no channel commands it",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_one_line_with_file_line_and_key(
    old: str, new: str, key: str, problem: str
) -> None:
    robot = with_text(old, new)
    line = 1 + next(i for i, text in enumerate(robot.source_text.splitlines()) if new in text)
    with pytest.raises(EmbodimentError) as caught:
        load_bounded(robot)
    message = str(caught.value)
    assert message.startswith(f"/nowhere/robot.yaml:{line}: safety.workspace[0].kinematics.{key}: "), message
    assert problem in message and "; fix: " in message


def test_joints_may_have_other_names_signs_and_units_in_the_model(tmp_path: Path) -> None:
    urdf = (resource_dir("embodiments") / "vx300s.urdf").read_text()
    (tmp_path / "mine.urdf").write_text(urdf.replace('name="waist"', 'name="hip"').replace("0 0 1", "0 0 -1"))
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    joints = "joints: [hip, shoulder, elbow, forearm_roll, wrist_angle, wrist_rotate]"
    text = text.replace("model: vx300s.urdf,", f"model: mine.urdf, {joints},")
    (tmp_path / "mine.yaml").write_text(text)
    fence, mine = SafetyLimiter(ALOHA).fence, SafetyLimiter(load_embodiment(tmp_path / "mine.yaml")).fence
    assert fence is not None and mine is not None
    turned = START.copy()
    turned[0] = -0.7
    mirrored = START.copy()
    mirrored[0] = 0.7
    np.testing.assert_allclose(mine.points(turned)[0], fence.points(mirrored)[0], atol=1e-12)


def test_two_points_of_one_arm_share_its_steps() -> None:
    boxes = ALOHA.safety.workspace
    names = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle")
    assert boxes[0].kinematics is not None
    kinematics = dataclasses.replace(boxes[0].kinematics, tip="wrist_link", channels=ALOHA.channels[:5], joints=names)
    wrist = dataclasses.replace(boxes[0], lower=(-1, -0.05, 0), upper=(1, 0.05, 1), kinematics=kinematics)
    robot = dataclasses.replace(ALOHA, safety=dataclasses.replace(ALOHA.safety, workspace=(*boxes, wrist)))
    limiter = SafetyLimiter(robot)
    limiter.reset(START)
    assert limiter.fence is not None
    target = START.copy()
    target[[0, 5]] = 1.0
    for _ in range(200):
        points = limiter.fence.points(limiter.step(target, NOTHING, DT))
        assert abs(points[2, 1]) <= 0.05 + 1e-8
    assert points[2, 1] > 0.045 and points[0, 1] > 0.05


def good_plan(t_ns: int) -> np.ndarray:
    """(H, c) from now on: waists and grippers swing around the start pose."""
    due_s = t_ns * 1e-9 + ALOHA.period_s * np.arange(1, ALOHA.control.horizon + 1)
    actions = np.tile(START, (len(due_s), 1))
    actions[:, [0, 7]] += 0.3 * np.sin(2 * np.pi * due_s / 4)[:, None]
    actions[:, [6, 13]] += 0.3 * np.sin(2 * np.pi * due_s / 4)[:, None] - 0.3
    return actions


def far_after_nonsense(seed: int) -> float:
    """Four seconds of a good plan, four of actions of ±1e6, twelve of the good plan: how far from it, rad."""
    rng, loop, t_ns, next_ns = np.random.default_rng(seed), ControlLoop(ALOHA), 10**12, 10**12
    pose = dict(zip(ALOHA.channels, START.tolist(), strict=True))
    loop.start(t_ns)
    for tick in range(1000):
        t_ns += int(2e7 * (1 + (rng.random() * 0.2 - 0.1)))
        loop.update_state(pose, t_ns)
        if t_ns >= next_ns:
            next_ns = t_ns + 200_000_000
            actions = good_plan(t_ns)
            if 200 <= tick < 400:
                actions = np.full_like(actions, 1e6)
                actions[1::2] *= -1
            loop.feed(ActionChunk(actions, ALOHA.channels, t_ns, ALOHA.period_s), t_ns)
        if loop.tick(t_ns).commands:
            pose = dict(zip(ALOHA.channels, loop.limiter.position_c.tolist(), strict=True))
    planned_c = loop.buffer.sample(t_ns)
    assert planned_c is not None
    return float(np.abs(loop.limiter.position_c - planned_c).max())


def test_joint_by_joint_an_arm_comes_back_where_no_share_of_the_whole_step_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert far_after_nonsense(2) < 0.05
    monkeypatch.setattr(workspace, "ALONE", np.array([1e-9]))
    assert far_after_nonsense(2) > 1.0
