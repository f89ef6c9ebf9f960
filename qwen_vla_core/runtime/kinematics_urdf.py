"""The serial chain between two links of a URDF, with the standard library's XML parser."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from qwen_vla_core.runtime.kinematics import ChainJoint, KinematicsError, unknown

_SLIDES = {"revolute": False, "continuous": False, "prismatic": True}


def urdf_chain(path: Path, tip: str, base: str) -> tuple[list[ChainJoint], np.ndarray]:
    """Movable joints from ``base`` (default: the root link) to link ``tip``, and (4, 4) from the last one to the tip.

    Raises:
        KinematicsError: the file is no URDF, or has no such links, or a joint on the way has no serial kinematics.
    """
    try:
        robot = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise KinematicsError("model", f"{path}: {error}", "name a readable URDF") from None
    if robot.tag != "robot":
        raise KinematicsError("model", f"{path} is no URDF: its root is <{robot.tag}>", "expand a xacro first")
    links = [link.get("name", "") for link in robot.findall("link")]
    parents: dict[str, tuple[str, ElementTree.Element]] = {}
    for joint in robot.findall("joint"):
        ends = [joint.find("parent"), joint.find("child")]
        names = [end.get("link", "") if end is not None else "" for end in ends]
        parents[names[1]] = (names[0], joint)
    for key, name in (("tip", tip), ("base", base)):
        if name and name not in links:
            raise unknown(key, "link", name, links)
    way: list[ElementTree.Element] = []
    link = tip
    while link != base and link in parents:
        link, joint = parents[link]
        way.insert(0, joint)
        if len(way) > len(links):
            raise KinematicsError("model", f"{path}: its joints form a loop", "give every link one parent")
    if base and link != base:
        raise KinematicsError(
            "base", f"'{base}' is not on the way from the root to '{tip}'", "name a link above the tip"
        )
    joints, pending = [], np.eye(4)
    for joint in way:
        name, kind = joint.get("name", ""), joint.get("type", "")
        pending = pending @ _origin(joint)
        if kind == "fixed":
            continue
        if kind not in _SLIDES:
            raise KinematicsError("tip", f"joint '{name}' on the way is {kind}", "choose a tip before it")
        if joint.find("mimic") is not None:
            raise KinematicsError("tip", f"joint '{name}' on the way mimics another", "choose a tip before it")
        axis = joint.find("axis")
        vector = _vector(axis.get("xyz", "1 0 0") if axis is not None else "1 0 0", name)
        if not np.linalg.norm(vector) > 0:
            raise KinematicsError("model", f"joint '{name}' has no axis", "correct the URDF")
        joints.append(ChainJoint(name, pending, vector / np.linalg.norm(vector), _SLIDES[kind]))
        pending = np.eye(4)
    return joints, pending


def _vector(text: str, where: str) -> np.ndarray:
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        values = np.zeros(0)
    if values.shape != (3,) or not np.isfinite(values).all():
        raise KinematicsError("model", f"joint '{where}': '{text}' are not three numbers", "correct the URDF")
    return values


def _origin(joint: ElementTree.Element) -> np.ndarray:
    """(4, 4) of a joint's <origin>: fixed-axis roll, pitch, yaw."""
    origin = joint.find("origin")
    matrix = np.eye(4)
    if origin is None:
        return matrix
    name = joint.get("name", "")
    roll, pitch, yaw = _vector(origin.get("rpy", "0 0 0"), name)
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(x), math.sin(x)) for x in (roll, pitch, yaw))
    matrix[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    matrix[:3, 3] = _vector(origin.get("xyz", "0 0 0"), name)
    return matrix
