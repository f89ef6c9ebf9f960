"""Limits, grippers, and what becomes of displacements and hand poses before they are commanded: see ``spec.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen_vla_core.embodiment.spec_base import doc


@dataclass(frozen=True)
class Limits:
    """Limits of one action group in channel units, one value per channel; all but jerk are required: limits are on."""

    lower: tuple[float, ...] = field(metadata=doc("Lower position (or value) limit per channel."))
    upper: tuple[float, ...] = field(metadata=doc("Upper position (or value) limit per channel."))
    velocity: tuple[float, ...] = field(metadata=doc("Largest rate of change per channel, units/s."))
    acceleration: tuple[float, ...] = field(metadata=doc("Largest change of rate per channel, units/s²."))
    jerk: tuple[float, ...] = field(
        default=(), metadata=doc("Largest change of acceleration per channel, units/s³; left out: not limited.")
    )


@dataclass(frozen=True)
class Integration:
    """Displacements are added up to positions before they are commanded, from where the robot is measured."""

    channels: tuple[str, ...] = field(
        metadata=doc("State channels of what is commanded, of one group: the joints, or the hand's whole pose.")
    )
    limits: Limits = field(metadata=doc("Limits of those positions: these hold on what is published."))


@dataclass(frozen=True)
class InverseKinematics:
    """A hand's poses or displacements become joint positions before they are commanded: damped least squares."""

    model: str = field(
        metadata=doc("File: .urdf, or .xml (MJCF, needs mujoco); relative to this YAML or to the shipped embodiments.")
    )
    tip: str = field(metadata=doc("Link (URDF), or site or body (MJCF), that is the hand."))
    channels: tuple[str, ...] = field(metadata=doc("State channels that measure the chain's joints, of one group."))
    limits: Limits = field(metadata=doc("Limits of the joints: these hold on what is published."))
    base: str = field(default="", metadata=doc("Link or body whose frame poses are in; default: the model's root."))
    offset: tuple[float, float, float] = field(
        default=(0.0, 0.0, 0.0), metadata=doc("The hand's point in the tip's frame.", unit="m")
    )
    joints: tuple[str, ...] = field(
        default=(),
        metadata=doc("The model's names of these channels' joints; default: the names in the command message."),
    )
    start: tuple[float, ...] = field(
        default=(), metadata=doc("Joint values at which a mock robot begins; default: 0, or the nearest limit.")
    )
    damping: float = field(
        default=0.1,
        metadata=doc(
            "Largest damping, at a singularity; smaller follows closer and moves joints faster.", minimum=0.001
        ),
    )
    rotation_weight: float = field(
        default=0.2,
        metadata=doc("Metres that one radian counts where a pose cannot be reached whole.", exclusive_minimum=0.0),
    )


@dataclass(frozen=True)
class GripSpec:
    """How hard a gripper may be told to close; on by default for every group of kind gripper."""

    closing_velocity: float = field(
        default=3.0,
        metadata=doc("Largest closing rate in ranges (lower … upper) per second.", exclusive_minimum=0.0),
    )
    max_lead: float = field(
        default=0.5,
        metadata=doc(
            "How far a closing command may lead the measured opening of blocked fingers, as a share of the range: it "
            "is the force. 1 switches this off.",
            exclusive_minimum=0.0,
            maximum=1.0,
        ),
    )
    closed: Literal["lower", "upper"] = field(default="lower", metadata=doc("Which limit is the closed gripper."))
    binary: float | None = field(
        default=None,
        metadata=doc(
            "The policy says open or closed: beyond this share of the range the upper limit is commanded, else the "
            "lower; default: any opening.",
            exclusive_minimum=0.0,
            maximum=1.0,
        ),
    )
