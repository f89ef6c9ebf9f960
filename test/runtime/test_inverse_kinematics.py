"""Inverse kinematics: what is reachable is reached, limits hold always, singularities make no jump, misses are told."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.resources import resource_dir
from qwen_vla_core.runtime.inverse_kinematics import NEAR, ChainPose, InverseKinematics, rotation_vector
from qwen_vla_core.runtime.kinematics import SerialChain, load_chain
from qwen_vla_core.runtime.kinematics_mjcf import chain_of_model
from qwen_vla_core.sim.worlds.widowx_scene import build_model

LIMITS = load_embodiment("widowx_joints").actions[0].command.ik.limits  # type: ignore[union-attr]
LOWER, UPPER, VELOCITY = np.array(LIMITS.lower), np.array(LIMITS.upper), np.array(LIMITS.velocity)
HOME = np.array([0.0, -0.4, 0.5, 0.0, 1.4, 0.0])
DT = 0.02


@pytest.fixture(scope="module")
def chain() -> SerialChain:
    return load_chain(resource_dir("embodiments") / "wx250s.urdf", "ee_gripper_link")


@pytest.fixture
def arm(chain: SerialChain) -> InverseKinematics:
    solver = InverseKinematics(chain, LOWER, UPPER, VELOCITY)
    solver.reset(HOME)
    return solver


def off(chain: ChainPose, q: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> tuple[float, float]:
    place, turn = chain.pose(q)
    return float(np.linalg.norm(place - position)), float(np.linalg.norm(rotation_vector(rotation @ turn.T)))


def test_the_shipped_urdf_is_the_arm_of_the_simulator(chain: SerialChain) -> None:
    joints, tip = chain_of_model(build_model(materials=False), "tool", "")
    ours, theirs = ChainPose(chain), ChainPose(SerialChain(tuple(joints), tip))
    assert [joint.name for joint in joints] == [joint.name for joint in chain.joints]
    for q in np.random.default_rng(0).uniform(LOWER, UPPER, (20, 6)):
        for mine, other in zip(ours.pose(q), theirs.pose(q), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-6)


def test_the_jacobian_is_the_derivative_also_of_sliding_joints() -> None:
    xml = """<mujoco><worldbody><body pos="0 0 .1"><joint name="turn" axis="0 0 1"/><geom size=".01"/>
      <body pos=".2 0 0" euler="10 20 30"><joint name="slide" type="slide" axis="0 1 0"/><geom size=".01"/>
      <body pos="0 .1 .1"><joint name="tilt" axis="1 0 0"/><geom size=".01"/><site name="tip" pos="0 0 .2"/>
      </body></body></body></worldbody></mujoco>"""
    joints, tip = chain_of_model(mujoco.MjModel.from_xml_string(xml), "tip", "")
    pose, q, h = ChainPose(SerialChain(tuple(joints), tip)), np.array([0.3, -0.05, 0.7]), 1e-6
    jacobian = pose.jacobian(*pose.frames(q))
    for j in range(3):
        ahead, behind = pose.pose(q + h * np.eye(3)[j]), pose.pose(q - h * np.eye(3)[j])
        turned = rotation_vector(ahead[1] @ behind[1].T) / (2 * h)
        np.testing.assert_allclose(jacobian[:, j], [*(ahead[0] - behind[0]) / (2 * h), *turned], atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), apart=st.sampled_from([0.0, 0.01, 0.05]))
def test_a_reachable_pose_is_reached_from_nearby(chain: SerialChain, seed: int, apart: float) -> None:
    rng = np.random.default_rng(seed)
    q = rng.uniform(LOWER, UPPER)
    solver = InverseKinematics(chain, LOWER, UPPER, VELOCITY, iterations=30)
    position, rotation = solver.chain.pose(q)
    found = solver.solve(position, rotation, q + rng.uniform(-apart, apart, 6))
    assert (found.q >= LOWER).all() and (found.q <= UPPER).all()
    jacobian = solver.chain.jacobian(*solver.chain.frames(q)) * np.array([1, 1, 1, 0.2, 0.2, 0.2])[:, None]
    if np.linalg.svd(jacobian, compute_uv=False)[-1] > NEAR:
        assert found.position_m < 2e-5 and found.rotation_rad < 2e-4
    else:  # at a singularity the last bit goes slowly: there damping rules
        assert found.position_m < 1e-3 and found.rotation_rad < 1e-2
    assert off(solver.chain, found.q, position, rotation) == pytest.approx(
        (found.position_m, found.rotation_rad), abs=1e-9
    )


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), far=st.sampled_from([0.3, 1.0, 5.0]))
def test_whatever_is_asked_limits_and_speeds_hold_and_it_comes_to_rest(
    chain: SerialChain, seed: int, far: float
) -> None:
    """Random poses, most of them out of reach, one after the other and then one that stays."""
    rng = np.random.default_rng(seed)
    solver = InverseKinematics(chain, LOWER, UPPER, VELOCITY)
    solver.reset(rng.uniform(LOWER, UPPER))
    q, goals = solver.q, [(rng.normal(0, far, 3), Rotation.random(random_state=rng).as_matrix()) for _ in range(3)]
    for position, rotation in goals:
        for _ in range(6):
            found = solver.follow(position, rotation, DT)
            assert (found.q >= LOWER).all() and (found.q <= UPPER).all()
            assert (np.abs(found.q - q) <= VELOCITY * DT + 1e-12).all()
            q = found.q
    rests = [solver.follow(*goals[-1], DT) for _ in range(220)]
    assert max(float(np.abs(a.q - b.q).max()) for a, b in zip(rests[-5:-1], rests[-4:], strict=True)) < 1e-3
    told = rests[-1]
    assert (told.position_m, told.rotation_rad) == pytest.approx(off(solver.chain, told.q, *goals[-1]), abs=1e-9)


def test_a_pose_out_of_reach_is_told_and_held(arm: InverseKinematics) -> None:
    position, rotation = arm.chain.pose(HOME)
    ahead = position + np.array([1.0, 0.0, 0.0])
    answers = [arm.follow(ahead, rotation, DT) for _ in range(200)]
    assert answers[-1].position_m > 0.3 and not answers[-1].limited
    np.testing.assert_allclose(answers[-1].q, answers[-2].q, atol=1e-9)
    back = [arm.follow(position, rotation, DT) for _ in range(200)][-1]
    assert back.position_m < 1e-4 and back.rotation_rad < 1e-3


@pytest.mark.parametrize("way", ["stretched", "wrist", "shoulder"])
def test_through_singularities_no_joint_jumps(arm: InverseKinematics, way: str) -> None:
    """Out to the edge of the workspace and back; wrist axes in line; the hand above the waist."""
    start = {
        "stretched": HOME,
        "wrist": np.array([0, -0.3, 0.3, 0, 0.35, 0]),
        "shoulder": np.array([0.2, -1.3, 1.2, 0, 0.4, 0]),
    }
    arm.reset(start[way])
    position, rotation = arm.chain.pose(start[way])
    q, speeds, missed = arm.q, [], []
    for step in range(300):
        phase = np.sin(np.pi * step / 300)
        if way == "stretched":
            goal = position + np.array([0.35 * phase, 0, 0]), rotation
        elif way == "wrist":
            goal = position, Rotation.from_euler("yz", [-0.7 * phase, 0.05 * np.sin(step / 15)]).as_matrix() @ rotation
        else:
            goal = position * [1 - 2 * phase, 1 - 2 * phase, 1], rotation
        found = arm.follow(*goal, DT)
        speeds.append(float(np.max(np.abs(found.q - q) / VELOCITY)) / DT)
        missed.append((found.position_m, found.rotation_rad))
        q = found.q
    assert max(speeds) <= 1.0 + 1e-9
    if way == "wrist":  # never out of reach: followed closely all the way
        assert np.max(missed, axis=0)[0] < 0.01
    for _ in range(100):
        found = arm.follow(*goal, DT)
    assert found.position_m < 1e-3 and found.rotation_rad < 1e-2


def test_joints_at_their_limits_let_the_others_make_up_for_it(chain: SerialChain) -> None:
    lower, upper = LOWER.copy(), UPPER.copy()
    lower[4], upper[4] = 1.3, 1.45  # the wrist can hardly move
    solver = InverseKinematics(chain, lower, upper, VELOCITY, iterations=60)
    position, _ = solver.chain.pose(HOME)
    found = solver.solve(position + np.array([0.05, 0.0, -0.05]), None, HOME)
    assert found.position_m < 1e-4 and lower[4] <= found.q[4] <= upper[4]


def test_a_redundant_arm_leans_to_the_middle_of_its_ranges() -> None:
    chain = load_chain(resource_dir("embodiments").parent / "docs" / "examples" / "reach7.urdf", "wrist_roll_link")
    count = len(chain.joints)
    lower, upper = np.full(count, -2.0), np.full(count, 2.0)
    solver = InverseKinematics(chain, lower, upper, np.full(count, 10.0))
    q = np.array([1.2, 0.6, -1.0, 1.1, 0.5, 0.7, -0.4])[:count]
    position, rotation = solver.chain.pose(q)
    solver.reset(q)
    for _ in range(200):
        found = solver.follow(position + np.array([0.0, 0.0, 1e-3]), rotation, DT)
        solver.follow(position, rotation, DT)
    assert np.linalg.norm(found.q) < np.linalg.norm(q) and found.position_m < 1e-3


def test_a_pose_that_is_no_number_is_refused(arm: InverseKinematics) -> None:
    with pytest.raises(ValueError, match="finite"):
        arm.solve(np.array([np.nan, 0, 0]), None, HOME)


def test_rotation_vectors_are_those_of_scipy() -> None:
    for angle in (0.0, 1e-9, 1e-3, 1.0, 3.0, np.pi - 1e-7, np.pi):
        for axis in np.eye(3):
            vector = rotation_vector(Rotation.from_rotvec(axis * angle).as_matrix())
            assert min(np.abs(vector - axis * angle).max(), np.abs(vector + axis * angle).max()) < 1e-6
