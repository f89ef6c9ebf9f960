"""The serial chain between two bodies of a MuJoCo model; MuJoCo compiles it, nothing of it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.runtime.kinematics import ChainJoint, KinematicsError, cross_matrix, translation, unknown


def mjcf_chain(path: Path, tip: str, base: str) -> tuple[list[ChainJoint], np.ndarray]:
    """Joints from body ``base`` (default: the world) to site or body ``tip``, and (4, 4) from the last one to the tip.

    Raises:
        KinematicsError: MuJoCo is missing or refuses the file, or the model has no such names.
    """
    try:
        import mujoco
    except ImportError:
        problem = f"{path.name} needs MuJoCo to be read"
        raise KinematicsError("model", problem, "pip install mujoco, or name a .urdf") from None
    try:
        model: Any = mujoco.MjModel.from_xml_path(str(path))
    except (ValueError, OSError) as error:
        raise KinematicsError("model", f"{path}: {error}", "name an MJCF that MuJoCo compiles") from None
    return chain_of_model(model, tip, base)


def chain_of_model(model: Any, tip: str, base: str) -> tuple[list[ChainJoint], np.ndarray]:
    """As ``mjcf_chain``, of a compiled ``MjModel``."""
    bodies = [model.body(i).name for i in range(model.nbody)]
    sites = [model.site(i).name for i in range(model.nsite)]
    if tip in sites:
        site = model.site(tip).id
        body = int(model.site_bodyid[site])
        last = _pose(model.site_pos[site], model.site_quat[site])
    elif tip in bodies:
        body, last = model.body(tip).id, np.eye(4)
    else:
        raise unknown("tip", "site or body", tip, [*sites, *bodies])
    if base and base not in bodies:
        raise unknown("base", "body", base, bodies)
    root = model.body(base).id if base else 0
    way: list[int] = []
    while body not in (root, 0):
        way.insert(0, body)
        body = int(model.body_parentid[body])
    if body != root:
        raise KinematicsError("base", f"'{base}' is not on the way from the world to '{tip}'", "name a body above it")
    joints, pending = [], np.eye(4)
    for body in way:
        pending = pending @ _pose(model.body_pos[body], model.body_quat[body])
        for joint in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
            name, kind = model.joint(joint).name, int(model.jnt_type[joint])
            if kind not in (2, 3):  # mjJNT_SLIDE, mjJNT_HINGE
                raise KinematicsError("tip", f"joint '{name}' on the way has several degrees of freedom", "set base")
            place, axis = model.jnt_pos[joint], np.array(model.jnt_axis[joint])
            reference = float(model.qpos0[model.jnt_qposadr[joint]])  # the pose of the file is at this value, not at 0
            origin = pending @ translation(place)
            if kind == 2:
                joints.append(ChainJoint(name, origin @ translation(-reference * axis), axis, True))
            else:
                back = np.eye(4)
                cross = cross_matrix(axis)
                back[:3, :3] += np.sin(-reference) * cross + (1.0 - np.cos(reference)) * cross @ cross
                joints.append(ChainJoint(name, origin @ back, axis, False))
            pending = translation(-np.asarray(place))
    return joints, pending @ last


def _pose(position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """(4, 4) of a position and a quaternion (w, x, y, z)."""
    w, vector = quaternion[0], np.asarray(quaternion[1:])
    cross = cross_matrix(vector)
    matrix = translation(position)
    matrix[:3, :3] += 2.0 * (w * cross + cross @ cross)
    return matrix
