"""A robot without physics: it goes where it is commanded, as fast as its limits allow, and says where it is.

It stands in for hardware wherever topics, types, units and limits matter and forces do not. A robot that is commanded
at its hand moves its hand, and its joints stay where they are; one whose YAML names a kinematic chain for its commands
(``command.ik``) moves its joints, and its hand with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import join_pose, to_quaternion
from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.spec import DELTA_KINDS, ActionGroup, Embodiment, StateGroup
from qwen_vla_core.runtime.targets import HandSolver

SERVO_TIMEOUT_S = 0.25  # a velocity or displacement not commanded afresh for this long stops, as drivers do [X]
_QUATERNION = ("qx", "qy", "qz", "qw")


class MockRobot:
    """State channels that follow commands.

    Position groups move towards their last command at no more than ``limits.velocity``. Displacements and base twists
    are velocities: they are integrated into the state they change (see ``_moved_by``), and end when not repeated. So do
    the twists that tracked waypoints become.
    A base's pose and twist always fit each other, whichever of the two is commanded.

    Attributes:
        values: state channel → value in channel units.
        commands: action group → how many commands it got.
    """

    def __init__(self, embodiment: Embodiment, simulated: bool = True) -> None:
        self.embodiment = commanded_robot(embodiment)
        self._hands = _hands(embodiment)
        embodiment = self.embodiment
        self._twisted = {group.name for group in embodiment.actions if group.tracked(simulated)}
        self.values: dict[str, float] = dict.fromkeys(embodiment.state_channels, 0.0)
        self.commands: dict[str, int] = {group.name: 0 for group in embodiment.actions}
        self._time_s = 0.0
        self._targets: dict[str, np.ndarray] = {}
        self._commanded_s: dict[str, float] = {}
        self._actions = {group.name: group for group in embodiment.actions}
        self._odometry = [group for group in embodiment.state if group.source == "odometry"]
        self._base = dict.fromkeys(("x", "y", "z", "yaw", "vx", "vy", "wz"), 0.0)  # message units: m, rad, per second
        self._rest()
        self._carry_hands()

    def _rest(self) -> None:
        """Where it begins: the start pose where there is one, the middle of its box, else 0 or the nearest limit."""
        for state in self.embodiment.state:
            for channel, field in zip(state.channels, state.fields, strict=True):
                if state.source == "pose" and field == "qw":
                    self.values[channel] = float(state.map.to_channel(1.0))
        for group in self.embodiment.actions:
            limits = group.limits
            start = np.array(group.start or np.zeros(len(group.channels)))
            if group.kind == "eef_pose" and not group.start:  # zeros are no rotation
                start = join_pose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]), group.unit)
            start = np.clip(start, limits.lower, limits.upper)
            for channel, value in zip(group.channels, start.tolist(), strict=True):
                if channel in self.values and group.kind not in DELTA_KINDS and group.kind != "base_twist":
                    self.values[channel] = float(value)
        for box in self.embodiment.safety.workspace:  # a measured hand begins where it may be
            for channel, low, high in zip(box.position, box.lower, box.upper, strict=False):
                self.values[channel] = 0.5 * (low + high)
        self._read_base()

    def _read_base(self) -> None:
        """The base's pose as the state channels have it."""
        for group in self._odometry:
            for channel, field in zip(group.channels, group.fields, strict=True):
                if field in ("x", "y", "z", "yaw"):
                    self._base[field] = float(group.map.to_message(self.values[channel]))

    @property
    def base_pose(self) -> tuple[float, float, float]:
        """x, y (m) and heading (rad) of its base, as its odometry says."""
        return self._base["x"], self._base["y"], self._base["yaw"]

    def command(self, name: str, values: np.ndarray) -> None:
        """Takes a command of the group ``name``: (n,) in channel units, or the twist of a tracked group.

        Raises:
            ValueError: the number of values is not the group's, or one is not finite.
        """
        group = self._actions[name]
        values = np.asarray(values, dtype=np.float64)
        count = len(group.twist_fields if name in self._twisted else group.channels)
        if values.shape != (count,):
            raise ValueError(f"{values.size} values for the {count} channels of {name}")
        if not np.isfinite(values).all():
            raise ValueError(f"command for {name} is not finite")
        lower, upper = group.limits.lower, group.limits.upper
        if name in self._twisted:
            lower, upper = twist_range(group)
        self._targets[name] = np.clip(values, lower, upper)
        self._commanded_s[name] = self._time_s
        self.commands[name] += 1

    def step(self, dt_s: float) -> None:
        """Moves on by ``dt_s`` seconds; zero, negative or NaN changes nothing."""
        if not dt_s > 0:
            return
        self._time_s += dt_s
        before = dict(self._base)
        driven = False
        for name, target in self._targets.items():
            group = self._actions[name]
            fresh = self._time_s - self._commanded_s[name] <= SERVO_TIMEOUT_S
            if group.kind == "base_twist" or name in self._twisted:
                self._drive(group, target if fresh else np.zeros_like(target), dt_s)
                driven = True
            elif group.kind in DELTA_KINDS:
                if fresh:
                    self._displace(group, target * (dt_s / self.embodiment.period_s))
            else:
                self._approach(group, target, dt_s)
        self._keep_odometry(before, driven, dt_s)
        self._carry_hands()

    def _carry_hands(self) -> None:
        """Measured hands go where their joints carry them."""
        for solver, joints, state in self._hands:
            place, rotation = solver.pose(np.array([self.values[channel] for channel in joints]))
            pose = [*place, *Rotation.from_matrix(rotation).as_quat(canonical=True)]
            measured = dict(zip(("x", "y", "z", *_QUATERNION), pose, strict=True))
            for channel, field in zip(state.channels, state.fields, strict=True):
                self.values[channel] = float(state.map.to_channel(measured[field]))

    def _approach(self, group: ActionGroup, target: np.ndarray, dt_s: float) -> None:
        turning = group.channels[-1] if group.kind == "waypoint" and group.unit == "m,rad" else ""
        for channel, goal, speed in zip(group.channels, target.tolist(), group.limits.velocity, strict=True):
            if channel not in self.values:
                continue
            gap = goal - self.values[channel]
            if channel == turning:  # a heading goes the short way round
                gap = math.remainder(gap, 2 * math.pi)
            self.values[channel] += min(max(gap, -speed * dt_s), speed * dt_s)

    def _displace(self, group: ActionGroup, share: np.ndarray) -> None:
        """Adds a share of a displacement to the state that ``group`` moves."""
        state = _moved_by(group, self.embodiment.state)
        if state is None:
            return
        channels = dict(zip(state.fields, state.channels, strict=True))
        if group.kind == "joint_delta":
            for field, amount in zip(group.command.fields or group.channels, share.tolist(), strict=True):
                if field in channels:
                    self.values[channels[field]] += amount
            return
        for axis, amount in zip("xyz", share[:3].tolist(), strict=True):
            if axis in channels:
                self.values[channels[axis]] += amount
        if share.size == 6 and all(field in channels for field in _QUATERNION):
            turn = to_quaternion(share[3:], "axis_angle")
            held = np.array([state.map.to_message(self.values[channels[field]]) for field in _QUATERNION])
            turned = _product(turn, held)
            for field, value in zip(_QUATERNION, (turned / np.linalg.norm(turned)).tolist(), strict=True):
                self.values[channels[field]] = float(state.map.to_channel(value))

    def _drive(self, group: ActionGroup, twist: np.ndarray, dt_s: float) -> None:
        """Integrates a twist in the base's own frame, with the heading of the middle of the step."""
        message = group.command.map.to_message(twist)
        speed = {"vx": 0.0, "vy": 0.0, "wz": 0.0}
        names = group.twist_fields if group.kind == "waypoint" else group.command.fields
        speed |= dict(zip(names, np.asarray(message).tolist(), strict=True))
        base = self._base
        heading = base["yaw"] + 0.5 * speed["wz"] * dt_s
        base["x"] += (math.cos(heading) * speed["vx"] - math.sin(heading) * speed["vy"]) * dt_s
        base["y"] += (math.sin(heading) * speed["vx"] + math.cos(heading) * speed["vy"]) * dt_s
        base["yaw"] += speed["wz"] * dt_s
        base |= {name: speed[name] for name in ("vx", "vy", "wz")}

    def _keep_odometry(self, before: Mapping[str, float], driven: bool, dt_s: float) -> None:
        """Pose from twist where the twist is commanded, twist from pose otherwise; then both into the channels."""
        base = self._base
        if not driven:
            self._read_base()
            dx, dy = (base["x"] - before["x"]) / dt_s, (base["y"] - before["y"]) / dt_s
            cos, sin = math.cos(base["yaw"]), math.sin(base["yaw"])
            base["vx"], base["vy"] = cos * dx + sin * dy, cos * dy - sin * dx
            base["wz"] = math.remainder(base["yaw"] - before["yaw"], 2 * math.pi) / dt_s
        for group in self._odometry:
            for channel, field in zip(group.channels, group.fields, strict=True):
                self.values[channel] = float(group.map.to_channel(base[field]))


def _hands(robot: Embodiment) -> list[tuple[HandSolver, tuple[str, ...], StateGroup]]:
    """Kinematics of each group commanded through its joints, the joints' channels, and the hand they carry."""
    found = []
    for index, group in enumerate(robot.actions):
        states = [state for state in robot.state if state.source == "pose"]
        if group.command.ik is not None and states:
            hand = max(states, key=lambda state: _alike(group, state))
            found.append((HandSolver(robot, index), group.command.ik.channels, hand))
    return found


def twist_range(group: ActionGroup) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest twist that the base of a tracked group takes, in the order of its fields."""
    spec = group.command.tracker
    assert spec is not None
    highest = {"vx": spec.max_speed, "vy": spec.max_speed, "wz": spec.max_turn}
    lowest = {**highest, "vx": spec.max_reverse}
    return tuple(-lowest[name] for name in group.twist_fields), tuple(highest[name] for name in group.twist_fields)


def _moved_by(group: ActionGroup, states: tuple[StateGroup, ...]) -> StateGroup | None:
    """The state a displacement group changes: joints with the same names in the messages, or a measured hand."""
    wanted = {"joint_delta": ("joint_position", "gripper", "hand"), "eef_delta": ("eef_pose",)}[group.kind]
    candidates = [state for state in states if state.kind in wanted]
    if group.kind == "joint_delta":
        names = set(group.command.fields or group.channels)
        candidates = [state for state in candidates if names & set(state.fields)]
    # Two arms: the hand whose names look most like the group's own.
    return max(candidates, key=lambda state: _alike(group, state), default=None)


def _alike(group: ActionGroup, state: StateGroup) -> int:
    words = set("_".join([group.name, *group.channels]).split("_"))
    return len(words & set("_".join([state.name, *state.channels]).split("_")))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion a·b, both (4,) x, y, z, w: the turn ``a`` in the fixed frame, after ``b``."""
    x, y, z, w = a
    matrix = np.array([[w, -z, y, x], [z, w, -x, y], [-y, x, w, z], [-x, -y, -z, w]])
    return np.asarray(matrix @ b)


def pattern_background(width: int, height: int) -> np.ndarray:
    """(height, 2·width, 3) uint8 colour bars, repeated after ``width`` columns: background of ``moving_pattern``."""
    column = np.arange(width)
    bars = np.array(
        [[230, 230, 230], [220, 220, 40], [40, 200, 220], [40, 190, 60], [200, 60, 200], [210, 50, 40], [40, 70, 210]],
        dtype=np.uint8,
    )
    row = bars[column * len(bars) // max(width, 1)]
    shade = np.linspace(1.0, 0.55, height)[:, None, None]
    return np.tile((row[None] * shade).astype(np.uint8), (1, 2, 1))


def moving_pattern(background: np.ndarray, time_s: float, period_s: float = 4.0) -> np.ndarray:
    """(height, width, 3) uint8 RGB: the bars wander once across the picture in ``period_s``, a white square bounces.

    It changes with every picture, is never black, and shows at a glance whether it runs, how fast, and which way is up.
    """
    height, width = background.shape[0], background.shape[1] // 2
    phase = (time_s / period_s) % 1.0
    offset = int(phase * width)
    pixels = background[:, offset : offset + width].copy()
    side = max(2, min(width, height) // 8)
    left = int((width - side) * phase)
    top = int((height - side) * abs(2.0 * ((time_s / period_s * 3.0) % 1.0) - 1.0))
    pixels[top : top + side, left : left + side] = 255
    return pixels
