"""Forward kinematics read from URDF and MJCF agree with MuJoCo, with a Jacobian that is its derivative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.resources import resource_dir
from qwen_vla_core.runtime.kinematics import ChainSet, KinematicsError, find_model, load_chain

mujoco = pytest.importorskip("mujoco")

MJCF = """<mujoco><compiler angle="radian"/><worldbody>
<body name="stand" pos="0.1 -0.2 0.3" euler="0.3 0 0.2">
 <geom size="0.01"/>
 <body name="lift" pos="0 0 0.2" quat="0.9 0.1 -0.2 0.3">
  <joint name="lift" type="slide" axis="0.2 1 0" range="0 0.5" ref="0.1"/>
  <geom size="0.01"/>
  <body name="link" pos="0.1 0 0.3" euler="0 0.4 0"><joint name="turn" axis="1 1 0" pos="0.02 0.03 -0.05" ref="0.3"/>
   <joint name="bend" axis="0 1 0"/><geom size="0.01"/>
   <body name="hand" pos="0.25 0.02 0"><geom size="0.01"/><site name="tool" pos="0.05 0 0.01" euler="0 0 1"/></body>
  </body></body></body></worldbody></mujoco>"""

URDF = """<robot name="r"><link name="base"/><link name="a"/><link name="b"/><link name="c"/><link name="loose"/>
<joint name="mount" type="fixed"><parent link="base"/><child link="a"/>
 <origin xyz="0.1 0 0.2" rpy="0.3 -0.2 0.5"/></joint>
<joint name="j1" type="continuous"><parent link="a"/><child link="b"/><origin xyz="0 0.1 0.3" rpy="0 0.4 0.1"/>
 <axis xyz="0 2 1"/></joint>
<joint name="j2" type="prismatic"><parent link="b"/><child link="c"/><origin xyz="0.2 0 0" rpy="1 0 0"/>
 <axis xyz="0 0 1"/><limit lower="0" upper="0.3" effort="1" velocity="1"/></joint>
<joint name="free" type="floating"><parent link="c"/><child link="loose"/></joint></robot>"""


@pytest.fixture
def mjcf(tmp_path: Path) -> Path:
    path = tmp_path / "robot.xml"
    path.write_text(MJCF)
    return path


@pytest.fixture
def urdf(tmp_path: Path) -> Path:
    path = tmp_path / "robot.urdf"
    path.write_text(URDF)
    return path


def test_mjcf_with_offset_joints_references_and_slides_agrees_with_mujoco(mjcf: Path) -> None:
    model = mujoco.MjModel.from_xml_path(str(mjcf))
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    chain = load_chain(mjcf, "tool", offset=(0.01, 0.02, 0.03))
    assert [joint.name for joint in chain.joints] == ["lift", "turn", "bend"]
    chains = ChainSet([chain, load_chain(mjcf, "hand", base="stand")], [[0.5, 0, 0]] * 2)
    for q in rng.uniform(-2, 2, (20, 3)):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        tool = data.site("tool").xpos + data.site("tool").xmat.reshape(3, 3) @ [0.01, 0.02, 0.03]
        stand = data.body("stand")
        hand = stand.xmat.reshape(3, 3).T @ (data.body("hand").xpos - stand.xpos)
        np.testing.assert_allclose(chains.forward(np.tile(q, (2, 1)))[0], [tool, hand], atol=1e-12)


def test_urdf_agrees_with_mujoco(urdf: Path) -> None:
    whole = URDF.replace("floating", "fixed")
    for link in ("base", "a", "b", "c", "loose"):  # MuJoCo wants masses, and merges fixed links without it
        inertial = '<inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial>'
        whole = whole.replace(f'<link name="{link}"/>', f'<link name="{link}">{inertial}</link>')
    whole = whole.replace('<robot name="r">', '<robot name="r"><mujoco><compiler fusestatic="false"/></mujoco>')
    model = mujoco.MjModel.from_xml_string(whole)
    data, rng = mujoco.MjData(model), np.random.default_rng(1)
    chains = ChainSet([load_chain(urdf, "c")], [[0, 0.3]])
    for q in rng.uniform(-2, 2, (20, 2)):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(chains.forward(q[None])[0][0], data.body("c").xpos, atol=1e-12)


def test_the_jacobian_is_the_derivative_and_reach_bounds_how_it_changes(mjcf: Path) -> None:
    chains = ChainSet([load_chain(mjcf, "tool"), load_chain(mjcf, "link")], [[0.5, 0, 0]] * 2)
    rng, step = np.random.default_rng(2), 1e-6
    q = rng.uniform(-0.5, 0.5, (30, 2, 3))
    _, jacobian = chains.forward(q)
    for j in range(3):
        moved = q + step * np.eye(3)[j]
        ahead, back = chains.forward(moved), chains.forward(q - step * np.eye(3)[j])
        np.testing.assert_allclose(jacobian[..., j], (ahead[0] - back[0]) / (2 * step), atol=1e-8)
        bend = np.linalg.norm(ahead[1] - back[1], axis=-2) / (2 * step)  # (30, 2, 3): of column k by joint j
        distal = np.maximum(np.arange(3), j)
        assert (bend <= chains.reach[:, distal] + 1e-6).all()


def test_chains_of_different_length_do_not_disturb_each_other(mjcf: Path, urdf: Path) -> None:
    long, short = load_chain(mjcf, "tool"), load_chain(urdf, "c")
    both = ChainSet([long, short], [[0.5, 0, 0], [0, 0.3]])
    q_long, q_short = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.2])
    points, jacobians = both.forward(np.array([q_long, [*q_short, 9.0]]))
    np.testing.assert_allclose(points[0], ChainSet([long], [[0.5, 0, 0]]).forward(q_long[None])[0][0])
    np.testing.assert_allclose(points[1], ChainSet([short], [[0, 0.3]]).forward(q_short[None])[0][0])
    np.testing.assert_array_equal(jacobians[1, :, 2], 0.0)


def test_the_shipped_viperx_is_the_arm_of_the_simulated_aloha() -> None:
    pytest.importorskip("gym_aloha")
    from qwen_vla_core.runtime.kinematics_mjcf import chain_of_model
    from qwen_vla_core.sim.worlds.scene import build_model

    shipped = load_chain(find_model("vx300s.urdf", ""), "pinch")
    joints, tip = chain_of_model(build_model(), "right_pinch", "vx300s_right")
    assert [f"vx300s_right/{joint.name}" for joint in shipped.joints] == [joint.name for joint in joints]
    for ours, theirs in zip(shipped.joints, joints, strict=True):
        np.testing.assert_allclose(ours.origin, theirs.origin, atol=1e-9)
        np.testing.assert_allclose(ours.axis, theirs.axis, atol=1e-9)
    np.testing.assert_allclose(shipped.tip, tip, atol=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "tip", "base", "key", "problem"),
    [
        ("", "", "hand", "", "tip", "no link 'hand'"),
        ("", "", "c", "bass", "base", "no link 'bass'"),
        ("", "", "a", "c", "base", "not on the way"),
        ("", "", "a", "", "tip", "no joint moves 'a'"),
        ("", "", "loose", "", "tip", "joint 'free' on the way is floating"),
        ("0 2 1", "0 0 0", "c", "", "model", "joint 'j1' has no axis"),
        ("0 2 1", "0 x 1", "c", "", "model", "are not three numbers"),
        ("0 2 1", "0 nan 1", "c", "", "model", "are not three numbers"),
        ("</robot>", "", "c", "", "model", "no element found"),
        ('<robot name="r">', "<sdf>", "c", "", "model", "mismatched tag"),
        ('<axis xyz="0 0 1"/>', '<mimic joint="j1"/>', "c", "", "tip", "mimics another"),
        ('<parent link="a"/><child link="b"/>', '<parent link="c"/><child link="b"/>', "c", "", "model", "form a loop"),
    ],
)
def test_a_urdf_that_cannot_be_used_is_refused_with_its_key(
    urdf: Path, old: str, new: str, tip: str, base: str, key: str, problem: str
) -> None:
    assert old in URDF
    urdf.write_text(URDF.replace(old, new) if old else URDF)
    with pytest.raises(KinematicsError, match=problem) as caught:
        load_chain(urdf, tip, base)
    assert caught.value.key == key and caught.value.fix


def test_an_mjcf_that_cannot_be_used_is_refused_with_its_key(mjcf: Path) -> None:
    for tip, base, key, problem in (
        ("tol", "", "tip", "no site or body 'tol'"),
        ("tool", "stnd", "base", "no body 'stnd'"),
        ("stand", "hand", "base", "not on the way"),
    ):
        with pytest.raises(KinematicsError, match=problem) as caught:
            load_chain(mjcf, tip, base)
        assert caught.value.key == key
    mjcf.write_text(MJCF.replace("<joint name", "<joint nam"))
    with pytest.raises(KinematicsError, match=r"robot\.xml"):
        load_chain(mjcf, "tool")
    mjcf.write_text(MJCF.replace('type="slide" axis="0.2 1 0" range="0 0.5" ref="0.1"', 'type="ball"'))
    with pytest.raises(KinematicsError, match="several degrees of freedom"):
        load_chain(mjcf, "tool")


def test_a_model_is_looked_for_beside_the_yaml_then_among_the_shipped_ones(tmp_path: Path) -> None:
    assert find_model("vx300s.urdf", str(tmp_path / "mine.yaml")) == resource_dir("embodiments") / "vx300s.urdf"
    (tmp_path / "vx300s.urdf").write_text(URDF)
    assert find_model("vx300s.urdf", str(tmp_path / "mine.yaml")) == tmp_path / "vx300s.urdf"
    with pytest.raises(KinematicsError, match=r"no file 'none\.urdf'"):
        find_model("none.urdf", "")
