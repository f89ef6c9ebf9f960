"""What a robot is, as data: the frozen dataclasses that one embodiment YAML is parsed into.

Training, serving, safety, recording and the ROS graph all read these and nothing else. Field documentation lives in
``doc`` metadata: the parser's errors, the JSON Schema and ``docs/embodiment.md`` are generated from it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from qwen_vla_core.embodiment.spec_base import ObstacleStopSpec, TrackerSpec
from qwen_vla_core.embodiment.spec_base import doc as doc
from qwen_vla_core.embodiment.spec_policy import DEFAULT_EXECUTE_STEPS as DEFAULT_EXECUTE_STEPS
from qwen_vla_core.embodiment.spec_policy import ControlSpec as ControlSpec
from qwen_vla_core.embodiment.spec_policy import Convention as Convention
from qwen_vla_core.embodiment.spec_policy import PromptSpec as PromptSpec
from qwen_vla_core.embodiment.spec_positions import GripSpec as GripSpec
from qwen_vla_core.embodiment.spec_positions import Integration as Integration
from qwen_vla_core.embodiment.spec_positions import InverseKinematics as InverseKinematics
from qwen_vla_core.embodiment.spec_positions import Limits as Limits

GroupKind = Literal[
    "joint_position", "joint_delta", "eef_pose", "eef_delta", "gripper", "base_twist", "waypoint", "hand"
]
CommandKind = Literal[
    "joint_trajectory",  # trajectory_msgs/JointTrajectory, one point, velocities filled
    "forward_command",  # std_msgs/Float64MultiArray (ros2_control forward_command_controller)
    "interbotix_group",  # interbotix_xs_msgs/JointGroupCommand
    "interbotix_single",  # interbotix_xs_msgs/JointSingleCommand
    "twist",  # geometry_msgs/Twist
    "twist_stamped",  # geometry_msgs/TwistStamped
    "pose_stamped",  # geometry_msgs/PoseStamped
]
Frame = Literal["", "base", "tool"]
TimeoutBehaviour = Literal["hold_measured", "zero"]
StateSource = Literal["joint_state", "odometry", "pose"]
Transport = Literal["raw", "compressed"]
# A displacement per action period: an action of these kinds is held for its period, and not repeated after the last.
DELTA_KINDS: frozenset[str] = frozenset({"joint_delta", "eef_delta"})
VELOCITY_KINDS: frozenset[str] = frozenset({"base_twist", "joint_delta", "eef_delta"})
ARM_KINDS: frozenset[str] = frozenset({"joint_position", "joint_delta", "eef_pose", "eef_delta", "gripper", "hand"})
BASE_KINDS: frozenset[str] = frozenset({"base_twist", "waypoint"})
MAX_CHANNELS = 64  # K [I]

# A pose group names its rotation's representation in the unit, because 6 numbers may be axis-angle or Euler angles.
_POSE_UNITS = ("m,axis_angle", "m,euler_xyz", "m,quaternion", "m,rot6d", "m")
UNITS_BY_KIND: dict[str, tuple[str, ...]] = {
    "joint_position": ("rad", "m"),
    "joint_delta": ("rad", "m"),
    "eef_pose": _POSE_UNITS,
    "eef_delta": _POSE_UNITS,
    "gripper": ("fraction", "m", "rad"),
    "base_twist": ("m/s,rad/s", "m/s", "rad/s"),
    "waypoint": ("m,rad", "m"),
    "hand": ("rad", "fraction", "eigengrasp"),
}
_JOINT_COMMANDS = ("joint_trajectory", "forward_command", "interbotix_group")  # of a hand: through `command.ik`
COMMAND_KINDS_BY_GROUP: dict[str, tuple[str, ...]] = {
    "joint_position": (*_JOINT_COMMANDS, "interbotix_single"),
    "joint_delta": ("joint_trajectory", "forward_command", "interbotix_group"),
    "eef_pose": ("pose_stamped", *_JOINT_COMMANDS),
    "eef_delta": ("twist_stamped", "twist", "pose_stamped", *_JOINT_COMMANDS),
    "gripper": ("joint_trajectory", "forward_command", "interbotix_single", "interbotix_group"),
    "base_twist": ("twist", "twist_stamped"),
    "waypoint": ("twist", "twist_stamped", "pose_stamped"),
    "hand": ("joint_trajectory", "forward_command"),
}
# convention → (the group kind it needs, kinds that contradict it)
CONVENTION_KINDS: dict[str, tuple[str, frozenset[str]]] = {
    "absolute_joint": ("joint_position", frozenset({"joint_delta", "eef_pose", "eef_delta"})),
    "delta_joint": ("joint_delta", frozenset({"joint_position", "eef_pose", "eef_delta"})),
    "absolute_eef": ("eef_pose", frozenset({"joint_position", "joint_delta", "eef_delta"})),
    "delta_eef": ("eef_delta", frozenset({"joint_position", "joint_delta", "eef_pose"})),
    "base_velocity": ("base_twist", ARM_KINDS),
    "waypoint": ("waypoint", ARM_KINDS),
    # The policy's chunk is relative to the state at its first frame; data and commands are absolute (conventions.py).
    "relative_joint": ("joint_position", frozenset({"joint_delta", "eef_pose", "eef_delta"})),
    "relative_eef": ("eef_pose", frozenset({"joint_position", "joint_delta", "eef_delta"})),
}
POSE_FIELDS = ("x", "y", "z", "qx", "qy", "qz", "qw")
ODOMETRY_FIELDS = ("x", "y", "z", "yaw", "vx", "vy", "wz")
TWIST_FIELDS = ("vx", "vy", "vz", "wx", "wy", "wz")
TWIST_KINDS: frozenset[str] = frozenset({"twist", "twist_stamped"})
COMMAND_MESSAGES: dict[str, str] = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_command": "std_msgs/msg/Float64MultiArray",
    "interbotix_group": "interbotix_xs_msgs/msg/JointGroupCommand",
    "interbotix_single": "interbotix_xs_msgs/msg/JointSingleCommand",
    "twist": "geometry_msgs/msg/Twist",
    "twist_stamped": "geometry_msgs/msg/TwistStamped",
    "pose_stamped": "geometry_msgs/msg/PoseStamped",
}
STATE_MESSAGES: dict[str, str] = {
    "joint_state": "sensor_msgs/msg/JointState",
    "odometry": "nav_msgs/msg/Odometry",
    "pose": "geometry_msgs/msg/PoseStamped",
}
# The fields that a source's message has; those of a JointState are the robot's joint names.
STATE_FIELDS: dict[str, tuple[str, ...]] = {"odometry": ODOMETRY_FIELDS, "pose": POSE_FIELDS}
IMAGE_MESSAGES: dict[str, str] = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}


@dataclass(frozen=True)
class CameraSpec:
    """One view of the policy and the topic it comes from."""

    view: str = field(
        metadata=doc("View name; becomes boundary tokens, so only lower-case letters, digits, underscores.")
    )
    topic: str = field(default="", metadata=doc("Image topic (absolute or relative to the namespace).", robot=True))
    transport: Transport = field(
        default="raw", metadata=doc("raw (sensor_msgs/Image) or compressed (CompressedImage).")
    )
    size: tuple[int, int] = field(default=(640, 480), metadata=doc("Expected [width, height] in pixels.", unit="px"))
    max_age_ms: float = field(
        default=200.0, metadata=doc("An image older than this is stale: the policy holds.", exclusive_minimum=0.0)
    )
    reference: bool = field(default=False, metadata=doc("Exactly one camera is the time reference of an observation."))


@dataclass(frozen=True)
class LinearMap:
    """``message = scale * channel + offset``; invertible because scale ≠ 0 is checked at load.

    Written in YAML either as {scale, offset} or as {from: [c0, c1], to: [m0, m1]} (channel range → message range).
    """

    scale: float = field(default=1.0, metadata=doc("Factor from channel units to message units."))
    offset: float = field(default=0.0, metadata=doc("Offset in message units."))

    def to_message(self, channel: Any) -> Any:
        """Channel units → message units (scalar or array)."""
        return channel * self.scale + self.offset

    def to_channel(self, message: Any) -> Any:
        """Message units → channel units (scalar or array)."""
        return (message - self.offset) / self.scale


@dataclass(frozen=True)
class StateGroup:
    """Channels read from one message topic."""

    name: str = field(metadata=doc("Group name, unique among the state groups."))
    kind: GroupKind = field(metadata=doc("What the channels are."))
    channels: tuple[str, ...] = field(metadata=doc("Channel names, unique in the embodiment's state."))
    unit: str = field(metadata=doc("Unit of the channels; which ones fit depends on the kind, see 'Units'."))
    topic: str = field(default="", metadata=doc("Topic the state comes from.", robot=True))
    fields: tuple[str, ...] = field(
        default=(),
        metadata=doc(
            "One per channel: joint name in the JointState, odometry field (x, y, z, yaw, vx, vy, wz), or field of the "
            "pose (x, y, z, qx, qy, qz, qw).",
            robot=True,
        ),
    )
    source: StateSource = field(
        default="joint_state", metadata=doc("Message type: JointState, Odometry or PoseStamped.")
    )
    map: LinearMap = field(default=LinearMap(), metadata=doc("Map between channel units and the state message's."))
    max_age_ms: float = field(default=100.0, metadata=doc("Older state is stale.", exclusive_minimum=0.0))
    shown: bool = field(
        default=True,
        metadata=doc(
            "Whether the policy sees it; false for what only the conventions need, such as a pose in a frame that "
            "begins anywhere."
        ),
    )


@dataclass(frozen=True)
class CommandSpec:
    """Where and as what a group's commands are published."""

    kind: CommandKind = field(metadata=doc("Command adapter."))
    topic: str = field(metadata=doc("Command topic."))
    fields: tuple[str, ...] = field(
        default=(),
        metadata=doc(
            "Joint names in message order (default: the channels), or twist fields (vx, vy, vz, wx, wy, wz; "
            "waypoints: vx, wz)."
        ),
    )
    group_name: str = field(
        default="", metadata=doc("Interbotix group or joint name; required for interbotix_* kinds.")
    )
    frame_id: str = field(
        default="", metadata=doc("Frame of stamped commands; required for pose_stamped/twist_stamped.")
    )
    simulation_kind: CommandKind | None = field(
        default=None,
        metadata=doc(
            "Adapter used instead in simulation, on the same topic, where the robot's own message package is absent."
        ),
    )
    map: LinearMap = field(default=LinearMap(), metadata=doc("Map from channel units to the command message's."))
    ik: InverseKinematics | None = field(
        default=None,
        metadata=doc("For eef_pose and eef_delta groups that command joints: how the hand's pose becomes joints."),
    )
    integrate: Integration | None = field(
        default=None,
        metadata=doc("For joint_delta groups that command joint positions, and eef_delta groups that command poses."),
    )
    tracker: TrackerSpec | None = field(
        default=None,
        metadata=doc("For waypoints commanded as a twist: the base's limits and the law that follows them."),
    )


@dataclass(frozen=True)
class ActionGroup:
    """Channels of the action tensor that are commanded together."""

    name: str = field(metadata=doc("Group name, unique among the action groups."))
    kind: GroupKind = field(metadata=doc("What the channels are."))
    channels: tuple[str, ...] = field(
        metadata=doc("Channel names; their order over all groups is the tensor's column order.")
    )
    unit: str = field(metadata=doc("Unit of the channels; which ones fit depends on the kind, see 'Units'."))
    limits: Limits = field(
        default=Limits((), (), (), ()),
        metadata=doc("Position, velocity and acceleration limits in channel units.", robot=True),
    )
    command: CommandSpec = field(
        default=CommandSpec(kind="forward_command", topic=""),
        metadata=doc("Topic, message and map of the command.", robot=True),
    )
    on_timeout: TimeoutBehaviour = field(
        default="hold_measured",
        metadata=doc(
            "hold_measured (arms, grippers) or zero (velocities only; refused on position groups).", robot=True
        ),
    )
    start: tuple[float, ...] = field(default=(), metadata=doc("Start pose per channel, inside the limits; optional."))
    watchdog_ms: float | None = field(
        default=None,
        metadata=doc(
            "No fresh chunk for this long: this group times out, whatever the others do; default: safety.watchdog_ms.",
            exclusive_minimum=0.0,
        ),
    )
    grip: GripSpec | None = field(
        default=None, metadata=doc("Closing rate and force of a gripper group; default: its defaults.")
    )
    frame: Frame = field(
        default="",
        metadata=doc(
            "Axes of displacements (eef_delta; default: base) and of relative poses (relative_eef; default: tool): "
            "those of the base, or those of the hand itself."
        ),
    )

    def command_kind(self, simulated: bool) -> CommandKind:
        """The kind it is commanded with on the robot, or in simulation."""
        command = self.command
        return command.simulation_kind if simulated and command.simulation_kind is not None else command.kind

    def tracked(self, simulated: bool = False) -> bool:
        """Whether its waypoints become a twist here, instead of being told to something that follows poses."""
        return self.kind == "waypoint" and self.command_kind(simulated) in TWIST_KINDS

    @property
    def twist_fields(self) -> tuple[str, ...]:
        """Fields of the twist that its waypoints become."""
        return self.command.fields or ("vx", "wz")


@dataclass(frozen=True)
class Kinematics:
    """How joints move a point of the robot: a serial chain in a URDF, or in a MuJoCo model."""

    model: str = field(
        metadata=doc("File: .urdf, or .xml (MJCF, needs mujoco); relative to this YAML or to the shipped embodiments.")
    )
    tip: str = field(metadata=doc("Link (URDF), or site or body (MJCF), that carries the point."))
    base: str = field(default="", metadata=doc("Link or body whose frame the box is in; default: the model's root."))
    offset: tuple[float, float, float] = field(
        default=(0.0, 0.0, 0.0), metadata=doc("The point in the tip's frame.", unit="m")
    )
    channels: tuple[str, ...] = field(
        default=(),
        metadata=doc(
            "Action channels of the chain's joints, of any joint_position group; default: those of the group."
        ),
    )
    joints: tuple[str, ...] = field(
        default=(),
        metadata=doc("The model's names of these channels' joints; default: the names in the command message."),
    )


@dataclass(frozen=True)
class Workspace:
    """An axis-aligned box that a point of the robot must not leave. What is known of the point depends on the group's
    kind: eef_pose commands it, eef_delta has it measured (``position``), joint_position needs ``kinematics``.
    """

    group: str = field(metadata=doc("Action group that moves the point."))
    lower: tuple[float, float, float] = field(metadata=doc("x, y, z minimum.", unit="m"))
    upper: tuple[float, float, float] = field(metadata=doc("x, y, z maximum.", unit="m"))
    frame_id: str = field(default="base_link", metadata=doc("Frame of the box, for humans."))
    kinematics: Kinematics | None = field(
        default=None, metadata=doc("For joint_position groups: from joints to point.")
    )
    position: tuple[str, ...] = field(
        default=(), metadata=doc("For eef_delta groups: the three state channels that measure x, y, z.")
    )


@dataclass(frozen=True)
class SafetySpec:
    """Everything here is on by default; switching off is explicit in the YAML and printed by `show`."""

    watchdog_ms: float = field(
        default=300.0, metadata=doc("No fresh chunk for this long: time out.", exclusive_minimum=0.0)
    )
    max_jump: float = field(
        default=0.5,
        metadata=doc(
            "Largest |command − measured| per position channel, channel units; beyond it the command is clamped.",
            exclusive_minimum=0.0,
        ),
    )
    soft_start_s: float = field(
        default=1.0, metadata=doc("Velocity limit ramps up over this time after start.", minimum=0.0)
    )
    max_skew_ms: float = field(
        default=100.0, metadata=doc("Largest stamp difference of the views.", exclusive_minimum=0.0)
    )
    max_observation_age_ms: float | None = field(
        default=None,
        metadata=doc(
            "The observation behind the plan is older than this: time out, however often chunks arrive; default: "
            "watchdog_ms and half the time that a chunk covers.",
            exclusive_minimum=0.0,
        ),
    )
    workspace: tuple[Workspace, ...] = field(
        default=(), metadata=doc("Boxes that points of the robot must not leave; optional, several per robot.")
    )
    obstacle_stop: ObstacleStopSpec | None = field(
        default=None, metadata=doc("A laser scanner that stops the base; without one nothing looks where it drives.")
    )


@dataclass(frozen=True)
class SimulationSpec:
    """Which shipped world stands in for the robot, and at which rates it publishes."""

    world: str = field(metadata=doc("World name, see `qwen-vla sim --help`."))
    camera_rate_hz: float = field(default=10.0, metadata=doc("Camera rate of the simulator.", exclusive_minimum=0.0))
    camera_size: tuple[int, int] | None = field(
        default=None, metadata=doc("[width, height] the simulator renders; default: each camera's size.", unit="px")
    )


@dataclass(frozen=True)
class Embodiment:
    """One robot. Build it with ``load_embodiment``; it is validated there, once."""

    name: str = field(metadata=doc("Short identifier, e.g. 'aloha'; letters, digits, underscores."))
    prompt: PromptSpec = field(metadata=doc("Fields of the embodiment prompt."))
    control: ControlSpec = field(metadata=doc("Frequency, horizon, controller rate, convention."))
    cameras: tuple[CameraSpec, ...] = field(metadata=doc("Views in the order the model sees them."))
    state: tuple[StateGroup, ...] = field(metadata=doc("State groups in the order of the state vector."))
    actions: tuple[ActionGroup, ...] = field(metadata=doc("Action groups in the order of the tensor's columns."))
    safety: SafetySpec = field(default=SafetySpec(), metadata=doc("Watchdog, jump limit, soft start, skew, workspace."))
    simulation: SimulationSpec | None = field(
        default=None, metadata=doc("World that stands in for the robot; optional.")
    )
    training_only: bool = field(
        default=False,
        metadata=doc("Nothing to run: no topics, limits or commands. Data and training take it, launching refuses it."),
    )
    description: str = field(default="", metadata=doc("For humans."))
    source_text: str = field(default="", repr=False, compare=False, metadata=doc("", internal=True))
    source_path: str = field(default="", repr=False, compare=False, metadata=doc("", internal=True))

    @property
    def views(self) -> tuple[str, ...]:
        """View names in model order."""
        return tuple(camera.view for camera in self.cameras)

    @property
    def reference_camera(self) -> CameraSpec:
        """The camera whose stamp is the observation's."""
        return next(camera for camera in self.cameras if camera.reference)

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """The c action channels, in column order of the H×K tensor."""
        return tuple(channel for group in self.actions for channel in group.channels)

    @cached_property
    def state_channels(self) -> tuple[str, ...]:
        """Channels of the state vector."""
        return tuple(channel for group in self.state for channel in group.channels)

    @property
    def period_s(self) -> float:
        """Seconds between two actions of a chunk."""
        return 1.0 / self.control.frequency_hz

    @property
    def execute_steps(self) -> int:
        """Actions between two looks, also where the YAML leaves it to the default."""
        given = self.control.execute_steps
        return min(DEFAULT_EXECUTE_STEPS, self.control.horizon) if given is None else given

    @property
    def max_observation_age_ms(self) -> float:
        """Oldest observation whose plan may still be played, also where the YAML leaves it to the default."""
        given = self.safety.max_observation_age_ms
        return self.safety.watchdog_ms + 500.0 * self.control.horizon * self.period_s if given is None else given

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the YAML text: which file this is, to the letter. See ``policy_hash`` for what a policy needs."""
        return hashlib.sha256(self.source_text.encode()).hexdigest()

    @cached_property
    def policy_contract(self) -> dict[str, Any]:
        """What a policy has learned about its robot, field by field: editing any of it needs a new training.

        Everything else (topics, maps to messages, ages, limits, watchdog, controller rate, simulation) belongs to the
        robot at hand and may differ from the YAML a checkpoint was trained with. Numbers are floats and channels keep
        their column, so that equal contracts compare and hash equal however the YAML is written.
        """
        prompt = {f"prompt.{key}": value for key, value in asdict(self.prompt).items()}
        control = {
            "control.frequency_hz": float(self.control.frequency_hz),
            "control.horizon": self.control.horizon,
            "control.convention": self.control.convention,
        }
        views = {f"cameras[{i}].view": view for i, view in enumerate(self.views)}
        groups: tuple[tuple[str, tuple[StateGroup, ...] | tuple[ActionGroup, ...]], ...] = (
            ("state", self.state),
            ("action", self.actions),
        )
        channels: dict[str, str] = {}
        for what, members in groups:
            described = [f"{channel} ({group.kind}, {group.unit})" for group in members for channel in group.channels]
            channels |= {f"{what} channel {i}": text for i, text in enumerate(described)}
        frames = {f"actions[{i}].frame": group.frame for i, group in enumerate(self.actions) if group.frame}
        return {**prompt, **control, **views, **channels, **frames}

    @cached_property
    def policy_hash(self) -> str:
        """SHA-256 of ``policy_contract``: equal wherever the same checkpoint may drive."""
        return hashlib.sha256(json.dumps(self.policy_contract, sort_keys=True).encode()).hexdigest()
