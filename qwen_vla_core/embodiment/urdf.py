"""What a URDF says that an embodiment needs: joints, limits, mimics, and the command interfaces of ros2_control."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vla_core.errors import UserError

MAX_BYTES = 20_000_000
MOVABLE = ("revolute", "continuous", "prismatic")


@dataclass(frozen=True)
class UrdfJoint:
    """One joint. ``lower``, ``upper``: rad or m, NaN where the file has none; ``velocity``: 0 where it has none.

    Attributes:
        mimics: joint that this one follows; such a joint is not commanded.
        commands: command interfaces in ros2_control (position, velocity, effort); None without such a tag.
    """

    name: str
    kind: str
    lower: float
    upper: float
    velocity: float
    mimics: str = ""
    commands: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Urdf:
    """A parsed robot: its movable joints in the order of the file."""

    name: str
    joints: tuple[UrdfJoint, ...]
    has_ros2_control: bool
    links: tuple[str, ...] = ()


def read_urdf(path: str | Path) -> Urdf:
    """Reads a URDF file.

    Raises:
        UserError: not readable, no XML, a xacro that was not expanded, or no movable joint.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"--urdf {path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"--urdf {path}: is larger than {MAX_BYTES} bytes; fix: name the URDF, not a mesh")
    return parse_urdf(data, str(path))


def parse_urdf(data: bytes | str, source: str) -> Urdf:
    """Parses URDF text; see ``read_urdf``."""
    raw = data.encode() if isinstance(data, str) else data
    if b"<!ENTITY" in raw:  # nothing in a robot needs them, and nested ones can fill any memory
        raise UserError(f"--urdf {source}: has XML entities; fix: expand them first")
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise UserError(f"--urdf {source}: no XML ({error})") from None
    if root.tag != "robot":
        raise UserError(f"--urdf {source}: the outermost tag is <{root.tag}>, not <robot>")
    if any("{http" in element.tag and "xacro" in element.tag for element in root.iter()) or b"${" in raw:
        raise UserError(f"--urdf {source}: is a xacro; fix: xacro {source} > robot.urdf, and name that file")
    control = root.findall("ros2_control")
    commands = {
        joint.get("name", ""): joint.findall("command_interface") for tag in control for joint in tag.findall("joint")
    }
    joints = []
    for element in root.findall("joint"):
        if element.get("type") in MOVABLE:
            joint = _joint(element, source)
            if control:
                joint = _controlled(joint, commands.get(joint.name, []), source)
            joints.append(joint)
    if not joints:
        raise UserError(f"--urdf {source}: no movable joint ({', '.join(MOVABLE)})")
    links = tuple(link.get("name", "") for link in root.findall("link"))
    return Urdf(root.get("name", "robot"), tuple(joints), bool(control), links)


def _joint(element: ElementTree.Element, source: str) -> UrdfJoint:
    name, kind = element.get("name", ""), element.get("type", "")
    limit, soft, mimic = element.find("limit"), element.find("safety_controller"), element.find("mimic")
    lower = _number(limit, "lower", source, name, 0.0 if kind != "continuous" else math.nan)
    upper = _number(limit, "upper", source, name, 0.0 if kind != "continuous" else math.nan)
    if kind == "continuous" or limit is None or lower >= upper:
        lower = upper = math.nan
    elif soft is not None:  # the driver stops there, before the mechanical limit
        lower = max(lower, _number(soft, "soft_lower_limit", source, name, lower))
        upper = min(upper, _number(soft, "soft_upper_limit", source, name, upper))
    velocity = _number(limit, "velocity", source, name, 0.0)
    return UrdfJoint(name, kind, lower, upper, velocity, "" if mimic is None else mimic.get("joint", ""))


def _controlled(joint: UrdfJoint, interfaces: list[ElementTree.Element], source: str) -> UrdfJoint:
    """The joint with its command interfaces; the limits of the position interface narrow its own."""
    lower, upper = joint.lower, joint.upper
    for interface in interfaces:
        if interface.get("name") != "position":
            continue
        bounds = {param.get("name", ""): (param.text or "").strip() for param in interface.findall("param")}
        if "min" in bounds:
            lower = max(_parsed(bounds["min"], source, joint.name), lower if math.isfinite(lower) else -math.inf)
        if "max" in bounds:
            upper = min(_parsed(bounds["max"], source, joint.name), upper if math.isfinite(upper) else math.inf)
    names = tuple(interface.get("name", "") for interface in interfaces)
    return replace(joint, lower=lower, upper=upper, commands=names)


def _number(element: ElementTree.Element | None, key: str, source: str, joint: str, default: float) -> float:
    text = None if element is None else element.get(key)
    return default if text is None else _parsed(text, source, joint)


def _parsed(text: str, source: str, joint: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--urdf {source}: joint '{joint}': {text!r} is no number") from None
