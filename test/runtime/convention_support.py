"""One arm (the WidowX's chain), written as an embodiment of every convention: each is named in a YAML and run."""

from __future__ import annotations

import textwrap

from qwen_vla_core.actions.rotations import ROTATION_SIZES
from qwen_vla_core.embodiment import Embodiment, parse_embodiment

JOINTS = "[waist, shoulder, elbow, forearm_roll, wrist_angle, wrist_rotate]"
JOINT_LIMITS = (
    "{lower: [-3.1, -1.8, -2.1, -3.1, -1.7, -3.1], upper: [3.1, 1.9, 1.6, 3.1, 2.1, 3.1], "
    "velocity: [3, 3, 3, 3, 3, 3], acceleration: [40, 40, 40, 40, 40, 40]}"
)
START = "[0, -0.4, 0.5, 0, 1.4, 0]"
POSE_FIELDS = "[x, y, z, qx, qy, qz, qw]"
NAMES = {"axis_angle": "rx ry rz", "euler_xyz": "roll pitch yaw", "quaternion": "qx qy qz qw", "rot6d": "a b c d e f"}
IK = f"ik: {{model: wx250s.urdf, tip: ee_gripper_link, channels: {JOINTS}, start: {START}, limits: {JOINT_LIMITS}}}"


def pose_channels(unit: str, prefix: str = "") -> list[str]:
    """Channel names of a pose in a unit."""
    names = [] if unit == "m" else NAMES[unit.removeprefix("m,")].split()
    return [prefix + name for name in ("x", "y", "z", *names)]


def same(value: float, count: int) -> str:
    return f"[{', '.join([str(value)] * count)}]"


def robot(convention: str, unit: str = "rad", frame: str = "", command: str = "", horizon: int = 8) -> Embodiment:
    """The arm under a convention; ``command`` is ``ik``, ``integrate`` or a plain kind of command."""
    return parse_embodiment(text(convention, unit, frame, command, horizon), "convention.yaml")


def text(convention: str, unit: str, frame: str, command: str, horizon: int) -> str:
    """Its YAML."""
    hand = f"""
      - {{name: hand, kind: eef_pose, unit: "m,quaternion", topic: /ee_pose, source: pose, max_age_ms: 500,
         fields: {POSE_FIELDS}, channels: [{", ".join(pose_channels("m,quaternion"))}]}}"""
    return textwrap.dedent(f"""\
    name: arm
    prompt: {{robot_tag: Arm, arms: single arm}}
    control: {{frequency_hz: 5, horizon: {horizon}, controller_rate_hz: 50, convention: {convention}}}
    cameras:
      - {{view: ego, topic: /image, reference: true}}
    state:
      - {{name: arm, kind: joint_position, unit: rad, topic: /joint_states, max_age_ms: 500,
         fields: {JOINTS}, channels: {JOINTS}}}{hand}
    actions:
    {_action(convention, unit, frame, command)}
    safety: {{watchdog_ms: 5000, max_jump: 2.0, soft_start_s: 0.0}}
    """)


def _action(convention: str, unit: str, frame: str, command: str) -> str:
    if convention in ("absolute_joint", "relative_joint"):
        return (
            f"  - {{name: arm, kind: joint_position, unit: rad, channels: {JOINTS}, start: {START}, "
            f"limits: {JOINT_LIMITS}, on_timeout: hold_measured, "
            f"command: {{kind: joint_trajectory, topic: /command}}}}"
        )
    if convention == "delta_joint":
        return (
            f"  - {{name: arm, kind: joint_delta, unit: rad, channels: [d0, d1, d2, d3, d4, d5], "
            f"limits: {{lower: {same(-0.5, 6)}, upper: {same(0.5, 6)}, velocity: {same(20, 6)}, "
            f"acceleration: {same(1000, 6)}}}, on_timeout: hold_measured, "
            f"command: {{kind: joint_trajectory, topic: /command, fields: {JOINTS}, "
            f"integrate: {{channels: {JOINTS}, limits: {JOINT_LIMITS}}}}}}}"
        )
    kind = "eef_pose" if convention in ("absolute_eef", "relative_eef") else "eef_delta"
    measured = kind == "eef_pose" and unit == "m,quaternion"
    channels = pose_channels(unit, "" if measured or convention == "relative_eef" else "to_")
    count = len(channels)
    wide = 7.0 if kind == "eef_pose" else 1.5
    limits = f"{{lower: {same(-wide, count)}, upper: {same(wide, count)}, velocity: {same(20, count)}, "
    limits += f"acceleration: {same(1000, count)}}}"
    told = {
        "ik": f"kind: forward_command, topic: /command, fields: {JOINTS}, {IK}",
        "integrate": f"kind: pose_stamped, topic: /command, frame_id: base_link, integrate: {{"
        f"channels: [{', '.join(pose_channels('m,quaternion'))}], limits: {{lower: {same(-1, 7)}, upper: {same(1, 7)}, "
        f"velocity: {same(5, 7)}, acceleration: {same(100, 7)}}}}}",
        "pose_stamped": "kind: pose_stamped, topic: /command, frame_id: base_link",
        "twist_stamped": "kind: twist_stamped, topic: /command, frame_id: base_link, "
        "fields: [vx, vy, vz, wx, wy, wz], map: {scale: 5}",
    }[command]
    timeout = "zero" if kind == "eef_delta" and command not in ("ik", "integrate") else "hold_measured"
    axes = f"frame: {frame}, " if frame else ""
    return (
        f'  - {{name: arm, kind: {kind}, unit: "{unit}", {axes}channels: [{", ".join(channels)}], limits: {limits}, '
        f"on_timeout: {timeout}, command: {{{told}}}}}"
    )


ROTATED = tuple(f"m,{representation}" for representation in ROTATION_SIZES)
