"""Every convention, named in a YAML, moves a mock robot to where the policy meant; sums never run away from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from convention_support import ROTATED, robot
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.conventions import relative_parts, to_absolute, to_relative
from qwen_vla_core.actions.displacements import to_displacements
from qwen_vla_core.actions.rotations import join_pose, split_pose
from qwen_vla_core.embodiment import Embodiment, EmbodimentError, load_embodiment, parse_embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.resources import resource_dir
from qwen_vla_core.runtime.continuity import STRATEGIES
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.inverse_kinematics import ChainPose
from qwen_vla_core.runtime.kinematics import load_chain
from qwen_vla_core.runtime.mock_robot import MockRobot

TICK_NS, START_NS = 20_000_000, 1_000_000_000_000
CHAIN = ChainPose(load_chain(resource_dir("embodiments") / "wx250s.urdf", "ee_gripper_link"))
HOME = np.array([0, -0.4, 0.5, 0, 1.4, 0])
AWAY = HOME + np.array([0.3, 0.15, -0.1, 0.1, -0.2, 0.4])  # where the joints are to be in the end


class Bench:
    """A control loop and a mock robot in fake time."""

    def __init__(self, arm: Embodiment) -> None:
        # Played as it is: the default strategy would fade the first displacements in.
        self.loop = ControlLoop(arm, strategy=STRATEGIES["replace"])
        self.arm, self.mock, self.now_ns = arm, MockRobot(arm), START_NS
        self.published: list[np.ndarray] = []
        self.loop.start(self.now_ns)

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_ns += TICK_NS
            self.loop.update_state(self.mock.values, self.now_ns)
            output = self.loop.tick(self.now_ns)
            for group in self.loop.commanded.actions:
                if group.name in output.commands:
                    told = output.commands[group.name].values
                    self.mock.command(group.name, group.command.map.to_channel(told))
                    self.published.append(np.array(told))
            self.mock.step(TICK_NS * 1e-9)

    def play(self, rows_hc: np.ndarray) -> None:
        """One chunk, from its first action to where the plan, for want of another, has slowed down to its last."""
        assert (
            self.loop.feed(ActionChunk(rows_hc, self.arm.channels, self.now_ns, self.arm.period_s), self.now_ns) is None
        )
        self.tick(round(len(rows_hc) * self.arm.period_s / (TICK_NS * 1e-9)) + 40)

    @property
    def joints(self) -> np.ndarray:
        return np.array(
            [
                self.mock.values[name]
                for name in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
            ]
        )

    @property
    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        return split_pose(
            np.array([self.mock.values[name] for name in ("x", "y", "z", "qx", "qy", "qz", "qw")]), "m,quaternion"
        )


def way(unit: str, start: np.ndarray = HOME, end: np.ndarray = AWAY, steps: int = 8) -> np.ndarray:
    """(1 + steps, n) hand poses on the way between two joint vectors."""
    rows = []
    for share in np.linspace(0, 1, steps + 1):
        place, rotation = CHAIN.pose(start + share * (end - start))
        rows.append(join_pose(place, Rotation.from_matrix(rotation).as_quat(), unit))
    return np.array(rows)


def assert_hand(bench: Bench, joints: np.ndarray, metres: float = 2e-3, radians: float = 2e-2) -> None:
    place, rotation = CHAIN.pose(joints)
    here, quaternion = bench.hand
    assert np.linalg.norm(here - place) < metres
    assert (Rotation.from_quat(quaternion) * Rotation.from_matrix(rotation).inv()).magnitude() < radians


@pytest.mark.parametrize("convention", ["absolute_joint", "relative_joint", "delta_joint"])
def test_conventions_of_joints_reach_the_same_pose(convention: str) -> None:
    bench = Bench(robot(convention))
    bench.tick(2)
    targets = HOME + np.linspace(0, 1, 9)[1:, None] * (AWAY - HOME)
    state = np.array([bench.mock.values[name] for name in bench.arm.state_channels])
    if convention == "delta_joint":
        start = bench.joints  # a mock without a start pose begins at zero
        bench.play(to_displacements(targets - HOME + start, start, "rad", "joint"))
        np.testing.assert_allclose(bench.joints, start + AWAY - HOME, atol=1e-6)
        return
    parts = relative_parts(convention, bench.arm.actions, bench.arm.state)
    bench.play(to_absolute(parts, to_relative(parts, targets, state), state))
    np.testing.assert_allclose(bench.joints, AWAY, atol=1e-6)


@pytest.mark.parametrize("unit", ROTATED)
@pytest.mark.parametrize("frame", ["base", "tool"])
def test_displaced_hands_reach_the_pose_that_their_displacements_add_up_to(unit: str, frame: str) -> None:
    poses = way(unit)
    moves = to_displacements(poses[1:], poses[0], unit, frame)
    for command in ("ik", "integrate"):
        bench = Bench(robot("delta_eef", unit, frame, command))
        if command == "integrate":
            place, quaternion = split_pose(poses[0], unit)
            bench.mock.values |= dict(zip(("x", "y", "z", "qx", "qy", "qz", "qw"), [*place, *quaternion], strict=True))
        bench.tick(2)
        bench.play(moves)
        assert_hand(bench, AWAY)


@pytest.mark.parametrize("unit", ROTATED)
def test_absolute_and_relative_hand_poses_become_joints(unit: str) -> None:
    bench = Bench(robot("absolute_eef", unit, command="ik"))
    bench.tick(2)
    bench.play(way(unit)[1:])
    assert_hand(bench, AWAY)
    assert np.abs(bench.joints - AWAY).max() < 0.05  # the same branch, not another way to hold the hand


@pytest.mark.parametrize("frame", ["", "base"])
def test_hand_poses_relative_to_the_first_frame_become_poses(frame: str) -> None:
    arm = robot("relative_eef", "m,quaternion", frame, "pose_stamped")
    bench = Bench(arm)
    poses = way("m,quaternion")
    bench.mock.values |= dict(zip(("x", "y", "z", "qx", "qy", "qz", "qw"), poses[0].tolist(), strict=True))
    bench.tick(2)
    state = np.array([bench.mock.values[name] for name in arm.state_channels])
    parts = relative_parts("relative_eef", arm.actions, arm.state)
    bench.play(to_absolute(parts, to_relative(parts, poses[1:], state), state))
    assert_hand(bench, AWAY)


def test_a_position_without_an_orientation_leaves_it_free() -> None:
    bench = Bench(robot("absolute_eef", "m", command="ik"))
    bench.tick(2)
    bench.play(way("m")[1:])
    assert np.linalg.norm(bench.hand[0] - CHAIN.pose(AWAY)[0]) < 1e-3


@pytest.mark.parametrize("unit", ["m,quaternion", "m,axis_angle", "m,euler_xyz"])
def test_no_spin_where_the_numbers_of_a_rotation_wrap(unit: str) -> None:
    """The hand turns about the vertical past half a turn; every other row is written with the other sign."""
    arm = robot("absolute_eef", unit, command="ik")
    bench = Bench(arm)
    bench.tick(2)
    place, rotation = CHAIN.pose(HOME)
    start = Rotation.from_matrix(rotation)
    rows = []
    for index, angle in enumerate(np.linspace(0, 0.8, 9)[1:]):
        turned = Rotation.from_rotvec([0, 0, angle]) * start
        pose = join_pose(Rotation.from_rotvec([0, 0, angle]).apply(place), turned.as_quat(), unit)
        if unit == "m,quaternion" and index % 2:
            pose[3:] *= -1
        if unit == "m,axis_angle" and index % 2:
            length = np.linalg.norm(pose[3:])
            pose[3:] *= (length - 2 * np.pi) / length
        if unit == "m,euler_xyz" and index % 2:
            pose[3:] = [pose[3] + np.pi, np.pi - pose[4], pose[5] - np.pi]
        rows.append(pose)
    bench.play(np.array(rows))
    told = np.array(bench.published)
    assert np.abs(np.diff(told, axis=0)).max() < 0.05  # no joint turned by more than what it was asked to
    assert (Rotation.from_quat(bench.hand[1]) * (Rotation.from_rotvec([0, 0, 0.8]) * start).inv()).magnitude() < 0.02


def test_numbers_that_are_no_rotation_are_refused_and_counted() -> None:
    bench = Bench(robot("absolute_eef", "m,quaternion", command="ik"))
    bench.tick(2)
    chunk = ActionChunk(np.zeros((8, 7)), bench.arm.channels, bench.now_ns, 0.2)
    assert bench.loop.feed(chunk, bench.now_ns) == "no_rotation"
    assert bench.loop.buffer.rejections["no_rotation"] == 1


def test_what_is_out_of_reach_is_told_and_does_not_wind_up() -> None:
    bench = Bench(robot("delta_eef", "m,axis_angle", command="ik"))
    bench.tick(2)
    ahead = np.zeros((8, 6))
    ahead[:, 0] = 0.1
    for _ in range(3):  # 2.4 m, of which the arm has less than half a metre
        bench.play(ahead)
    assert bench.loop.targets is not None
    far, report = bench.hand[0][0], bench.loop.targets.report("ik")
    assert report["ik.arm.out_of_reach"] > 20
    at_rest = np.array(bench.published[-10:])
    assert np.abs(np.diff(at_rest, axis=0)).max() < 0.02
    bench.play(-ahead[:3].repeat(3, axis=0)[:8] * 0.5)
    assert bench.hand[0][0] < far - 0.2  # turning back begins at once


def test_a_held_arm_goes_on_from_where_it_is_and_a_late_plan_slows_it() -> None:
    bench = Bench(robot("delta_eef", "m,quaternion", command="ik"))
    bench.tick(2)
    moves = to_displacements(way("m,quaternion")[1:], way("m,quaternion")[0], "m,quaternion")
    bench.play(moves[[0, 1, 2, 3, 4, 5, 6, 7]])
    before = bench.hand[0].copy()
    bench.tick(300)  # the watchdog
    assert bench.loop.mode == "holding"
    np.testing.assert_allclose(bench.hand[0], before, atol=1e-3)
    again = np.zeros_like(moves)
    again[:, 6] = 1.0
    bench.play(again)  # displacements that are none
    np.testing.assert_allclose(bench.hand[0], before, atol=1e-3)


def test_a_box_is_kept_by_the_joints() -> None:
    text = robot("delta_eef", "m,axis_angle", command="ik").source_text
    box = "workspace: [{group: arm, lower: [0.1, -0.3, 0.05], upper: [0.33, 0.3, 0.5]}], watchdog_ms"
    bench = Bench(parse_embodiment(text.replace("watchdog_ms", box), "convention.yaml"))
    bench.tick(2)
    down = np.zeros((8, 6))
    down[:, 0], down[:, 2] = 0.04, -0.04
    bench.play(down)
    bench.play(down)
    assert bench.loop.limiter.tally.steps["workspace"] > 0
    for told in bench.published:
        place = CHAIN.pose(told)[0]
        assert (place >= [0.1 - 1e-6, -0.3, 0.05 - 1e-6]).all() and place[0] <= 0.33 + 1e-6


def test_a_binary_gripper_is_open_or_closed() -> None:
    text = load_embodiment("widowx").source_text.replace("start: [1.0]", "start: [1.0]\n    grip: {binary: 0.5}")
    arm = parse_embodiment(text)
    loop, rows = ControlLoop(arm), np.zeros((8, 7))
    rows[:, 6] = [0.9, 0.6, 0.51, 0.49, 0.2, -3.0, 2.0, 0.5]
    loop.start(START_NS)
    loop.update_state(MockRobot(arm).values, START_NS)
    loop.tick(START_NS)
    assert loop.feed(ActionChunk(rows, arm.channels, START_NS, arm.period_s), START_NS) is None
    rest = loop.buffer.rest()
    assert rest is not None and rest[1:, 6].tolist() == [1, 1, 1, 0, 0, 0, 1, 1]


def test_a_robot_that_is_commanded_as_the_policy_says_has_no_stage() -> None:
    loop = ControlLoop(load_embodiment("widowx"))
    assert loop.targets is None and loop.commanded is loop.embodiment
    other = ControlLoop(load_embodiment("widowx_joints"))
    assert other.commanded.channels[:6] == other.embodiment.state_channels[:6] and other.targets is not None
    assert loop.embodiment.policy_hash == other.embodiment.policy_hash


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("tip: ee_gripper_link", "tip: nose", "actions[0].command.ik.tip"),
        ("model: wx250s.urdf", "model: nothing.urdf", "actions[0].command.ik.model"),
        ("tip: ee_gripper_link", "tip: wrist_link", "actions[0].command.ik.joints[5]"),
    ],
)
def test_a_model_that_does_not_fit_is_named_by_its_key(old: str, new: str, key: str) -> None:
    arm = load_embodiment("widowx_joints")
    with pytest.raises(EmbodimentError) as error:
        ControlLoop(parse_embodiment(arm.source_text.replace(old, new), "mine.yaml"))
    assert error.value.key == key and error.value.line > 0
    assert dataclasses.replace(arm) == arm
