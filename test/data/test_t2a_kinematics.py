"""The kinematic tables agree with what the makers publish, in the makers' own form, and with MuJoCo."""

from __future__ import annotations

from math import pi

import numpy as np
import pytest
from scipy.linalg import expm

from qwen_vla_core.data.t2a.kinematics import forward, jacobian, rotation_vector, solve
from qwen_vla_core.data.t2a.robots import ARMS, Arm, find_arm
from qwen_vla_core.errors import UserError

Row = tuple[float, float, float, float]  # alpha, a, d, theta offset


def postures(arm: Arm, count: int = 20) -> np.ndarray:
    """(count, n) random joint vectors inside the limits, the zero pose first."""
    low, high, _, _ = arm.limits
    q = np.random.default_rng(5).uniform(np.maximum(low, -pi), np.minimum(high, pi), (count, arm.dof))
    q[0] = 0.0
    return q


def turn_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def turn_x(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])


def shift(x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
    moved = np.eye(4)
    moved[:3, 3] = x, y, z
    return moved


def standard_dh(rows: list[Row], q: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    for (alpha, a, d, offset), angle in zip(rows, q, strict=True):
        pose = pose @ turn_z(angle + offset) @ shift(a, 0, d) @ turn_x(alpha)
    return pose


def modified_dh(rows: list[Row], q: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    for (alpha, a, d, offset), angle in zip(rows, q, strict=True):
        pose = pose @ turn_x(alpha) @ shift(a) @ turn_z(angle + offset) @ shift(0, 0, d)
    return pose


def exponentials(screws: list[list[float]], home: np.ndarray, q: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    for (x, y, z, *v), angle in zip(screws, q, strict=True):
        twist = np.array([[0, -z, y, v[0]], [z, 0, -x, v[1]], [-y, x, 0, v[2]], [0, 0, 0, 0]])
        pose = pose @ expm(twist * angle)
    return pose @ home


def interbotix(z: float, elbow_z: float, elbow_x: float, wrist_x: float, tool_x: float) -> tuple[list, np.ndarray]:
    """Screw axes and home matrix as in the X-Series documentation."""
    screws = [
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, -z, 0, 0],
        [0, 1, 0, -elbow_z, 0, elbow_x],
        [1, 0, 0, 0, elbow_z, 0],
        [0, 1, 0, -elbow_z, 0, wrist_x],
        [1, 0, 0, 0, elbow_z, 0],
    ]
    return screws, shift(tool_x, 0, elbow_z)


def published(arm: Arm, q: np.ndarray) -> tuple[np.ndarray, float]:
    """(4, 4) pose of the maker's flange (z outwards) or gripper, and metres from there to our tool point."""
    half = pi / 2
    if arm.name == "viperx300s":
        return exponentials(*interbotix(0.12705, 0.42705, 0.05955, 0.35955, 0.536494), q), 0.0
    if arm.name == "widowx250s":
        return exponentials(*interbotix(0.11065, 0.36065, 0.04975, 0.29975, 0.458325), q), 0.0
    if arm.name == "panda":
        rows = [(0, 0, 0.333, 0), (-half, 0, 0, 0), (half, 0, 0.316, 0), (half, 0.0825, 0, 0)]
        rows += [(-half, -0.0825, 0.384, 0), (half, 0, 0, 0), (half, 0.088, 0, 0)]
        return modified_dh(rows, q) @ shift(0, 0, 0.107), 0.1034
    if arm.name == "ur5e":  # its DH base is turned by half a turn against the mounting frame
        rows = [(half, 0, 0.1625, 0), (0, -0.425, 0, 0), (0, -0.3922, 0, 0)]
        rows += [(half, 0, 0.1333, 0), (-half, 0, 0.0997, 0), (0, 0, 0.0996, 0)]
        return turn_z(pi) @ standard_dh(rows, q), 0.145
    if arm.name == "xarm6":
        link, lean = np.hypot(0.2845, 0.0535), np.arctan(284.5 / 53.5)
        rows = [(-half, 0, 0.267, 0), (0, link, 0, -lean), (-half, 0.0775, 0, lean)]
        rows += [(half, 0, 0.3425, 0), (-half, 0.076, 0, 0), (0, 0, 0.097, 0)]
        return standard_dh(rows, q), 0.172
    if arm.name == "xarm7":
        rows = [(0, 0, 0.267, 0), (-half, 0, 0, 0), (half, 0, 0.293, 0), (half, 0.0525, 0, 0)]
        rows += [(half, 0.0775, 0.3425, 0), (half, 0, 0, 0), (-half, 0.076, 0.097, 0)]
        return modified_dh(rows, q), 0.172
    if arm.name == "iiwa14":
        rows = [(-half, 0, 0.36, 0), (half, 0, 0, 0), (half, 0, 0.42, 0), (-half, 0, 0, 0)]
        rows += [(-half, 0, 0.4, 0), (half, 0, 0, 0), (0, 0, 0.126, 0)]
        return standard_dh(rows, q), 0.145
    assert arm.name == "gen3"
    rows = [(half, 0, -(0.1564 + 0.1284), 0), (half, 0, -(0.0054 + 0.0064), pi)]
    rows += [(half, 0, -(0.2104 + 0.2104), pi), (half, 0, -(0.0064 + 0.0064), pi)]
    rows += [(half, 0, -(0.2084 + 0.1059), pi), (half, 0, 0, pi), (pi, 0, -(0.1059 + 0.0615), pi)]
    return turn_x(pi) @ standard_dh(rows, q), 0.12


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_every_posture_agrees_with_the_makers_own_parameters(arm: Arm) -> None:
    q = postures(arm)
    ours = forward(arm, q)
    outwards = 0 if arm.name in ("viperx300s", "widowx250s") else 2
    rounding = 1e-3 if arm.name == "gen3" else 1e-6  # its guide gives tenths of millimetres
    for i, angles in enumerate(q):
        pose, tool = published(arm, angles)
        np.testing.assert_allclose(ours.rotation[i, :, 0], pose[:3, outwards], atol=1e-9)
        np.testing.assert_allclose(ours.position[i], pose[:3, 3] + tool * pose[:3, outwards], atol=rounding)


def test_known_zero_poses() -> None:
    """The numbers the makers print for the zero pose; ours have a gripper further out."""
    for name, flange in (
        ("xarm6", (0.207, 0, 0.112)),
        ("xarm7", (0.206, 0, 0.1205)),
        ("iiwa14", (0, 0, 1.306)),
        ("ur5e", (0.8172, 0.2329, 0.0628)),
    ):
        chain = forward(ARMS[name], np.zeros((1, ARMS[name].dof)))
        tool = 0.172 if name.startswith("xarm") else 0.145
        np.testing.assert_allclose(chain.position[0] - tool * chain.rotation[0, :, 0], flange, atol=1e-9)
    ready = forward(ARMS["panda"], np.array([[0, -pi / 4, 0, -3 * pi / 4, 0, pi / 2, pi / 4]]))
    np.testing.assert_allclose(ready.position[0], (0.3069, 0, 0.4869), atol=2e-4)
    np.testing.assert_allclose(np.abs(ready.rotation[0, :, 1]), (0, 1, 0), atol=1e-9)


def test_viperx_agrees_with_mujoco() -> None:
    import qwen_vla_core.sim  # noqa: F401 - before mujoco: it chooses the GL back-end

    mujoco = pytest.importorskip("mujoco")
    from qwen_vla_core.sim.worlds.aloha import JOINTS
    from qwen_vla_core.sim.worlds.scene import build_model

    arm, model = ARMS["viperx300s"], build_model()
    data = mujoco.MjData(model)
    joints = [model.joint(f"vx300s_left/{name}") for name in JOINTS]
    low, high, _, _ = arm.limits
    np.testing.assert_allclose(np.column_stack([low, high]), [joint.range for joint in joints], atol=1e-9)
    base = data.body("vx300s_left")
    for q, position, rotation in zip(postures(arm), *forward(arm, postures(arm))[:2], strict=True):
        data.qpos[[joint.qposadr[0] for joint in joints]] = q
        mujoco.mj_kinematics(model, data)
        link = data.body("vx300s_left/gripper_link")
        turn = base.xmat.reshape(3, 3).T @ link.xmat.reshape(3, 3)
        np.testing.assert_allclose(rotation, turn, atol=1e-9)
        place = base.xmat.reshape(3, 3).T @ (link.xpos - base.xpos) + 0.1072 * turn[:, 0]
        np.testing.assert_allclose(position, place, atol=1e-9)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_jacobian_is_the_derivative_of_forward_kinematics(arm: Arm) -> None:
    q, h = postures(arm, 5), 1e-6
    j = jacobian(forward(arm, q))
    for i in range(arm.dof):
        step = np.zeros(arm.dof)
        step[i] = h
        after, before = forward(arm, q + step), forward(arm, q - step)
        np.testing.assert_allclose(j[:, :3, i], (after.position - before.position) / (2 * h), atol=1e-7)
        np.testing.assert_allclose(j[:, 3:, i], rotation_vector(before.rotation, after.rotation) / (2 * h), atol=1e-7)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_inverse_kinematics_finds_poses_near_home_and_admits_the_others(arm: Arm) -> None:
    low, high, _, _ = arm.limits
    rng = np.random.default_rng(1)
    there = np.clip(np.array(arm.home) + rng.uniform(-0.4, 0.4, (50, arm.dof)), low, high)
    wanted = forward(arm, there)
    found = solve(arm, wanted.position, wanted.rotation, np.tile(arm.home, (50, 1)))
    assert found.ok.mean() > 0.9
    assert (found.q >= low).all() and (found.q <= high).all()
    reached = forward(arm, found.q[found.ok])
    np.testing.assert_allclose(reached.position, wanted.position[found.ok], atol=1e-5)
    np.testing.assert_allclose(reached.rotation, wanted.rotation[found.ok], atol=3e-5)
    far = solve(arm, wanted.position + np.array([2.0, 0, 0]), wanted.rotation, np.tile(arm.home, (50, 1)))
    assert not far.ok.any()


def test_a_pose_does_not_feel_its_neighbours_in_the_batch() -> None:
    arm = ARMS["panda"]
    wanted = forward(arm, np.clip(np.array(arm.home) + 0.2, *arm.limits[:2])[None])
    seeds = np.tile(arm.home, (9, 1))
    alone = solve(arm, wanted.position, wanted.rotation, seeds[:1])
    place = np.tile(wanted.position, (9, 1))
    place[::2, 0] += np.linspace(0, 0.5, 5)
    together = solve(arm, place, np.tile(wanted.rotation, (9, 1, 1)), seeds)
    np.testing.assert_allclose(together.q[1], alone.q[0], atol=1e-12)


def test_rotation_vectors_turn_one_orientation_into_the_other() -> None:
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(30, 3))
    axis *= (rng.uniform(0, 3.1, 30) / np.linalg.norm(axis, axis=1))[:, None]
    axis[0] = 0
    x, y, z = axis.T
    zero = np.zeros(30)
    skew = np.stack([np.stack([zero, -z, y], 1), np.stack([z, zero, -x], 1), np.stack([-y, x, zero], 1)], 1)
    turned = np.stack([expm(one) for one in skew])
    np.testing.assert_allclose(rotation_vector(np.tile(np.eye(3), (30, 1, 1)), turned), axis, atol=1e-9)


def test_homes_are_inside_the_limits_with_the_gripper_down_over_the_table() -> None:
    assert len(ARMS) >= 6 and {arm.dof for arm in ARMS.values()} == {6, 7}
    for arm in ARMS.values():
        low, high, velocity, acceleration = arm.limits
        home = np.array(arm.home)
        assert (home > low).all() and (home < high).all() and (velocity > 0).all() and (acceleration > 0).all()
        chain = forward(arm, home[None])
        np.testing.assert_allclose(chain.rotation[0, :, 0], (0, 0, -1), atol=1e-9)
        assert chain.position[0, 2] > 0.15 and chain.position[0, 0] > 0.15
        assert abs(arm.tool_axes[:, 0] @ arm.tool_axes[:, 1]) < 1e-9
        assert arm.opening(arm.gap[0]) == 0.0 and arm.opening(arm.gap[1]) == 1.0 and arm.opening(9.0) == 1.0


def test_an_unknown_arm_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"--robots puma.*panda"):
        find_arm("puma")
