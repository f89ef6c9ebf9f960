"""Single-arm kinematic models as compact tables: all that planning needs of a robot.

Every arm here has joint axes that are parallel to the axes of its base frame at the zero pose, so a joint is one line:
its axis, and where it lies from the joint before. The tables were derived by hand from the published parameters named
in ``source``; ``test/data/test_t2a_kinematics.py`` compares them with the makers' zero poses and with MuJoCo.

Frames: x forward, y left, z up, origin where the arm stands on the table (z = 0). The tool frame has x along the
fingers, y across them. Gripper openings are fractions: 0 is the narrowest gap, 1 the widest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import pi, radians

import numpy as np

from qwen_vla_core.errors import UserError

Vector = tuple[float, float, float]
# axis name → (index of the axis, sign)
AXES: dict[str, tuple[int, float]] = {f"{sign}{'xyz'[i]}": (i, float(sign + "1")) for i in range(3) for sign in "+-"}
_HALF = 0.5**0.5


@dataclass(frozen=True)
class Joint:
    """One revolute joint.

    Attributes:
        axis: direction at the zero pose, base frame: ``+x`` … ``-z``.
        offset: from the joint before (or the base) to this one at the zero pose, metres, base frame.
        lower: smallest angle, radians.
        upper: largest angle, radians.
        velocity: largest speed, rad/s.
        acceleration: largest acceleration, rad/s².
    """

    axis: str
    offset: Vector
    lower: float
    upper: float
    velocity: float
    acceleration: float


@dataclass(frozen=True)
class Arm:
    """An arm with a parallel gripper.

    Attributes:
        name: key of the command line and folder name.
        tag: name in the prompt.
        joints: from the base outwards.
        tool: from the last joint to the point between the finger pads at the zero pose, metres.
        approach: direction of the fingers at the zero pose.
        closing: direction in which the fingers close at the zero pose.
        home: joint angles every trajectory starts from, radians [O]; the gripper points down in front of the arm.
        gap: narrowest and widest distance of the fingers, metres.
        reach: horizontal distances from the base between which scenes are drawn, metres [O].
        source: where the numbers come from.
    """

    name: str
    tag: str
    joints: tuple[Joint, ...]
    tool: Vector
    approach: Vector
    closing: Vector
    home: tuple[float, ...]
    gap: tuple[float, float]
    reach: tuple[float, float]
    source: str

    @property
    def dof(self) -> int:
        """Number of joints n."""
        return len(self.joints)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the n joints and the gripper, in column order."""
        return (*(f"joint_{i + 1}" for i in range(self.dof)), "gripper")

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(n,) arrays: lower, upper (radians), velocity (rad/s), acceleration (rad/s²)."""
        table = np.array([[j.lower, j.upper, j.velocity, j.acceleration] for j in self.joints])
        return table[:, 0], table[:, 1], table[:, 2], table[:, 3]

    @cached_property
    def tool_axes(self) -> np.ndarray:
        """(3, 3) orientation of the tool frame at the zero pose, axes as columns."""
        x, y = np.array(self.approach), np.array(self.closing)
        return np.column_stack([x, y, np.cross(x, y)])

    def opening(self, gap: float) -> float:
        """Gripper fraction at which the fingers are ``gap`` metres apart, clipped to what the gripper can do."""
        low, high = self.gap
        return min(max((gap - low) / (high - low), 0.0), 1.0)


def _joints(*rows: tuple[str, Vector, float, float, float, float]) -> tuple[Joint, ...]:
    return tuple(Joint(*row) for row in rows)


GRIPPER_SPEED = 2.0  # fractions per second [O]
GRIPPER_ACCELERATION = 20.0  # fractions per second² [O]
_2F85 = (0.0, 0.085)  # Robotiq 2F-85, metres between the fingers

# Accelerations of ViperX, WidowX, UR5e and iiwa are not published: [O].
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            name="viperx300s",
            tag="ViperX 300s",
            joints=_joints(
                ("+z", (0, 0, 0.079), -3.14158, 3.14158, 2.5, 20),
                ("+y", (0, 0, 0.04805), -1.85005, 1.25664, 2.5, 20),
                ("+y", (0.05955, 0, 0.3), -1.76278, 1.6057, 2.5, 20),
                ("+x", (0.2, 0, 0), -3.14158, 3.14158, 3.0, 25),
                ("+y", (0.1, 0, 0), -1.8675, 2.23402, 3.0, 25),
                ("+x", (0.069744, 0, 0), -3.14158, 3.14158, 3.0, 25),
            ),
            tool=(0.1072, 0, 0),
            approach=(1, 0, 0),
            closing=(0, 1, 0),
            home=(0, -0.3, 0.4, 0, pi / 2 - 0.1, 0),
            gap=(0.042, 0.114),
            reach=(0.22, 0.58),
            source="Interbotix X-Series documentation: vx300s product-of-exponentials matrices and joint limits",
        ),
        Arm(
            name="widowx250s",
            tag="WidowX 250s",
            joints=_joints(
                ("+z", (0, 0, 0.072), -3.14158, 3.14158, 2.5, 20),
                ("+y", (0, 0, 0.03865), -1.88496, 1.98968, 2.5, 20),
                ("+y", (0.04975, 0, 0.25), -2.14675, 1.6057, 2.5, 20),
                ("+x", (0.175, 0, 0), -3.14158, 3.14158, 3.0, 25),
                ("+y", (0.075, 0, 0), -1.74533, 2.14675, 3.0, 25),
                ("+x", (0.065, 0, 0), -3.14158, 3.14158, 3.0, 25),
            ),
            tool=(0.093575, 0, 0),
            approach=(1, 0, 0),
            closing=(0, 1, 0),
            home=(0, -0.3, 0.4, 0, pi / 2 - 0.1, 0),
            gap=(0.030, 0.074),
            reach=(0.18, 0.48),
            source="Interbotix X-Series documentation: wx250s product-of-exponentials matrices and joint limits",
        ),
        Arm(
            name="panda",
            tag="Franka Panda",
            joints=_joints(
                ("+z", (0, 0, 0.333), -2.8973, 2.8973, 2.175, 15),
                ("+y", (0, 0, 0), -1.7628, 1.7628, 2.175, 7.5),
                ("+z", (0, 0, 0.316), -2.8973, 2.8973, 2.175, 10),
                ("-y", (0.0825, 0, 0), -3.0718, -0.0698, 2.175, 12.5),
                ("+z", (-0.0825, 0, 0.384), -2.8973, 2.8973, 2.61, 15),
                ("-y", (0, 0, 0), -0.0175, 3.7525, 2.61, 20),
                ("-z", (0.088, 0, 0), -2.8973, 2.8973, 2.61, 20),
            ),
            tool=(0, 0, -0.2104),  # flange 0.107 + hand 0.1034
            approach=(0, 0, -1),
            closing=(-_HALF, _HALF, 0),  # the hand is mounted at -45 degrees
            home=(0, -pi / 4, 0, -3 * pi / 4, 0, pi / 2, pi / 4),
            gap=(0.0, 0.08),
            reach=(0.3, 0.72),
            source="Franka Control Interface documentation: Denavit-Hartenberg parameters, limits, hand",
        ),
        Arm(
            name="ur5e",
            tag="UR5e",
            joints=_joints(
                ("+z", (0, 0, 0.1625), -2 * pi, 2 * pi, pi, 10),
                ("+y", (0, 0, 0), -2 * pi, 2 * pi, pi, 10),
                ("+y", (0.425, 0, 0), -pi, pi, pi, 10),
                ("+y", (0.3922, 0, 0), -2 * pi, 2 * pi, pi, 10),
                ("-z", (0, 0.1333, 0), -2 * pi, 2 * pi, pi, 10),
                ("+y", (0, 0, -0.0997), -2 * pi, 2 * pi, pi, 10),
            ),
            tool=(0, 0.0996 + 0.145, 0),  # flange + Robotiq 2F-85 [O]
            approach=(0, 1, 0),
            closing=(1, 0, 0),
            home=(0, -1.7, 1.9, -pi / 2 - 0.2, -pi / 2, 0),
            gap=_2F85,
            reach=(0.3, 0.75),
            source="Universal Robots: DH parameters of the e-Series and UR5e technical data",
        ),
        Arm(
            name="xarm6",
            tag="xArm 6",
            joints=_joints(
                ("+z", (0, 0, 0.267), -2 * pi, 2 * pi, pi, 20),
                ("+y", (0, 0, 0), -2.059, 2.0944, pi, 20),
                ("+y", (0.0535, 0, 0.2845), -3.927, 0.19198, pi, 20),
                ("-z", (0.0775, 0, -0.3425), -2 * pi, 2 * pi, pi, 20),
                ("+y", (0, 0, 0), -1.69297, pi, pi, 20),
                ("-z", (0.076, 0, -0.097), -2 * pi, 2 * pi, pi, 20),
            ),
            tool=(0, 0, -0.172),  # xArm gripper
            approach=(0, 0, -1),
            closing=(0, 1, 0),
            home=(0, -0.3, -0.9, 0, 1.2, 0),
            gap=(0.0, 0.084),
            reach=(0.25, 0.62),
            source="UFACTORY: kinematic parameters of xArm 6 (standard DH) and user manual",
        ),
        Arm(
            name="xarm7",
            tag="xArm 7",
            joints=_joints(
                ("+z", (0, 0, 0.267), -2 * pi, 2 * pi, pi, 20),
                ("+y", (0, 0, 0), -2.059, 2.0944, pi, 20),
                ("+z", (0, 0, 0.293), -2 * pi, 2 * pi, pi, 20),
                ("-y", (0.0525, 0, 0), -0.19198, 3.927, pi, 20),
                ("-z", (0.0775, 0, -0.3425), -2 * pi, 2 * pi, pi, 20),
                ("+y", (0, 0, 0), -1.69297, pi, pi, 20),
                ("-z", (0.076, 0, -0.097), -2 * pi, 2 * pi, pi, 20),
            ),
            tool=(0, 0, -0.172),
            approach=(0, 0, -1),
            closing=(0, 1, 0),
            home=(0, -0.3, 0, 0.9, 0, 1.2, 0),
            gap=(0.0, 0.084),
            reach=(0.25, 0.62),
            source="UFACTORY: kinematic parameters of xArm 7 and user manual",
        ),
        Arm(
            name="iiwa14",
            tag="KUKA iiwa 14",
            joints=_joints(
                ("+z", (0, 0, 0.36), -radians(170), radians(170), radians(85), 10),
                ("+y", (0, 0, 0), -radians(120), radians(120), radians(85), 10),
                ("+z", (0, 0, 0.42), -radians(170), radians(170), radians(100), 10),
                ("-y", (0, 0, 0), -radians(120), radians(120), radians(75), 10),
                ("+z", (0, 0, 0.4), -radians(170), radians(170), radians(130), 10),
                ("+y", (0, 0, 0), -radians(120), radians(120), radians(135), 10),
                ("+z", (0, 0, 0), -radians(175), radians(175), radians(135), 10),
            ),
            tool=(0, 0, 0.126 + 0.145),  # flange + Robotiq 2F-85 [O]
            approach=(0, 0, 1),
            closing=(0, 1, 0),
            home=(0, 0.4, 0, -1.75, 0, pi - 2.15, 0),
            gap=_2F85,
            reach=(0.45, 0.85),
            source="KUKA: LBR iiwa 14 R820 specification (dimensions, axis ranges, speeds at rated payload)",
        ),
        Arm(
            name="gen3",
            tag="Kinova Gen3",
            joints=_joints(
                ("-z", (0, 0, 0.15643), -2 * pi, 2 * pi, 1.3963, 5.2),
                ("+y", (0, -0.005375, 0.12838), -2.2497, 2.2497, 1.3963, 5.2),
                ("-z", (0, -0.006375, 0.21038), -2 * pi, 2 * pi, 1.3963, 5.2),
                ("+y", (0, -0.006375, 0.21038), -2.5796, 2.5796, 1.3963, 5.2),
                ("-z", (0, -0.006375, 0.20843), -2 * pi, 2 * pi, 1.2218, 10),
                ("+y", (0, -0.000175, 0.10593), -2.0996, 2.0996, 1.2218, 10),
                ("-z", (0, -0.000175, 0.10593), -2 * pi, 2 * pi, 1.2218, 10),
            ),
            tool=(0, 0, 0.061525 + 0.12),  # interface + Robotiq 2F-85
            approach=(0, 0, 1),
            closing=(0, 1, 0),
            home=(0, 0.2, 0, 1.9, 0, pi - 2.1, 0),
            gap=_2F85,
            reach=(0.28, 0.68),
            source="Kinova Gen3 user guide: frames and limits of the 7 DoF arm with spherical wrist",
        ),
    )
}


def find_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        UserError: there is none.
    """
    if name not in ARMS:
        raise UserError(f"--robots {name}: no such kinematic model; use some of {', '.join(ARMS)}")
    return ARMS[name]
