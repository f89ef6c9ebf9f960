"""From what the plan says to the positions that are commanded: displacements are added up, hand poses become joints.

It stands between plan and safety filter, so that the filter's limits hold on what is published. The policy's own
channels are limited first (their bounds and rates), then turned into positions. A sum of displacements never runs away
from the robot: what cannot be reached, what the limits hold back and what a workspace box stops makes the sum give way,
so that the next displacement counts from where the robot is told to be, and turning back works at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.continuous import nearest
from qwen_vla_core.actions.displacements import advance, share_of_turn
from qwen_vla_core.actions.rotations import join_pose, split_pose
from qwen_vla_core.embodiment.load import mistake
from qwen_vla_core.embodiment.spec import DELTA_KINDS, ActionGroup, Embodiment
from qwen_vla_core.runtime.inverse_kinematics import InverseKinematics
from qwen_vla_core.runtime.kinematics import KinematicsError, SerialChain, find_model, load_chain
from qwen_vla_core.runtime.safety import SafetyLimiter

LOST = (0.003, 0.03)  # a pose that is missed by more (metres, radians) is out of reach [O]


class HandSolver:
    """The inverse kinematics of one group, between channel units of its joints and poses.

    Raises:
        EmbodimentError: the model cannot be used; names file, line and key.
    """

    def __init__(self, embodiment: Embodiment, index: int) -> None:
        spec = embodiment.actions[index].command.ik
        assert spec is not None
        self._map = embodiment.actions[index].command.map
        try:
            chain = load_chain(find_model(spec.model, embodiment.source_path), spec.tip, spec.base, spec.offset)
            fields = embodiment.actions[index].command.fields or spec.channels
            self.order = _order(chain, spec.joints or fields)
        except KinematicsError as error:
            key = f"actions[{index}].command.ik.{error.key}"
            raise mistake(embodiment, key, error.problem, error.fix) from None
        ends = self._map.to_message(np.array([spec.limits.lower, spec.limits.upper]))[:, self.order]
        velocity = np.array(spec.limits.velocity)[self.order] * abs(self._map.scale)
        self.ik = InverseKinematics(
            chain, ends.min(axis=0), ends.max(axis=0), velocity,
            damping=spec.damping, rotation_weight=spec.rotation_weight,
        )  # fmt: skip

    def to_chain(self, command: np.ndarray) -> np.ndarray:
        """(n,) joints in channel units and order → those of the chain."""
        return np.asarray(self._map.to_message(command)[self.order])

    def to_command(self, q: np.ndarray) -> np.ndarray:
        """The inverse of ``to_chain``."""
        command = np.empty_like(q)
        command[self.order] = self._map.to_channel(q)
        return command

    def pose(self, command: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(3,) position and (3, 3) rotation of the hand for (n,) joints in channel units."""
        return self.ik.chain.pose(self.to_chain(command))


def _order(chain: SerialChain, names: Sequence[str]) -> np.ndarray:
    """(n,) which of the named joints is each joint of the chain."""
    in_chain = [joint.name for joint in chain.joints]
    for column, name in enumerate(names):
        if name not in in_chain:
            problem = f"joint '{name}' is not on the way to the tip ({', '.join(in_chain)})"
            raise KinematicsError(f"joints[{column}]", problem, "give the model's joint names, one per channel")
    for name in in_chain:
        if name not in names:
            problem = f"joint '{name}' moves the tip, but no channel commands it"
            raise KinematicsError("joints", problem, "add its channel, or choose another base or tip")
    return np.array([list(names).index(name) for name in in_chain], dtype=np.intp)


@dataclass(frozen=True)
class Miss:
    """How far a hand is from the pose that was asked for."""

    position_m: float = 0.0
    rotation_rad: float = 0.0

    @property
    def unreachable(self) -> bool:
        """Whether it is more than the search's own tolerance."""
        return self.position_m > LOST[0] or self.rotation_rad > LOST[1]


class _Group:
    """One group that is not commanded as the policy says. Columns are those of plan and command."""

    def __init__(self, embodiment: Embodiment, commanded: Embodiment, index: int, plan: slice, command: slice) -> None:
        self.group: ActionGroup = embodiment.actions[index]
        self.told: ActionGroup = commanded.actions[index]
        self.plan, self.command = plan, command
        self.lower, self.upper = np.array(self.told.limits.lower), np.array(self.told.limits.upper)
        self.period_s = embodiment.period_s
        self.adds = self.group.kind in DELTA_KINDS
        self.frame = self.group.frame or "base"
        self.hand = HandSolver(embodiment, index) if self.group.command.ik is not None else None
        velocity, acceleration = np.array(self.told.limits.velocity), np.array(self.told.limits.acceleration)
        jerk = np.array(self.told.limits.jerk or [np.inf] * len(velocity))
        # What a command at its limits needs to catch up: the sum is never further ahead than that.
        self._lead = velocity * (velocity / (2 * acceleration) + acceleration / (2 * jerk))
        self._velocity = velocity
        self.miss = Miss()
        self.short = 0  # steps in which the pose was out of reach
        self._sum = np.zeros(len(self.told.channels))
        self._place, self._rotation = np.zeros(3), np.eye(3)

    def reset(self, command: np.ndarray) -> None:
        """Begins at what is commanded (channel units)."""
        self._sum = np.array(command, np.float64)
        self.miss = Miss()
        if self.hand is not None:
            self.hand.ik.reset(self.hand.to_chain(command))
            self._place, self._rotation = self.hand.pose(command)
        elif self.told.kind == "eef_pose":
            self._place, self._rotation = _pose(command, self.told.unit)

    def plan_now(self, command: np.ndarray) -> np.ndarray:
        """(n,) the policy's channels that mean: stay at this command."""
        if self.adds:
            if self.group.kind == "joint_delta":
                return np.zeros(len(self.group.channels))
            return join_pose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]), self.group.unit)
        assert self.hand is not None
        place, rotation = self.hand.pose(command)
        return join_pose(place, Rotation.from_matrix(rotation).as_quat(), self.group.unit)

    def step(self, plan: np.ndarray, command: np.ndarray, dt_s: float) -> np.ndarray:
        """(n,) the position to go to, for what the plan says and what was commanded last."""
        ahead = self._lead + 2.0 * self._velocity * dt_s
        if self.hand is not None:
            return self._reach(self.hand, plan, command, ahead, dt_s)
        share = dt_s / self.period_s
        if self.group.kind == "joint_delta":
            self._sum = np.clip(self._sum + plan * share, self.lower, self.upper)
            self._sum = np.clip(self._sum, command - ahead, command + ahead)
            return self._sum
        self._move(plan, share)
        pose = self._written(command)
        held = np.clip(np.clip(pose, self.lower, self.upper), command - ahead, command + ahead)
        if not np.array_equal(held, pose):
            self._place, self._rotation = _pose(held, self.told.unit)
        return held

    def _move(self, plan: np.ndarray, share: float) -> None:
        turn = share_of_turn(plan, self.group.unit, share)
        self._place, self._rotation = advance(self._place, self._rotation, plan[:3] * share, turn, self.frame)

    def _written(self, near: np.ndarray) -> np.ndarray:
        pose = join_pose(self._place, Rotation.from_matrix(self._rotation).as_quat(), self.told.unit)
        if self.told.unit != "m":
            pose[3:] = nearest(pose[3:], near[3:], self.told.unit.removeprefix("m,"))
        return pose

    def _reach(
        self, hand: HandSolver, plan: np.ndarray, command: np.ndarray, ahead: np.ndarray, dt_s: float
    ) -> np.ndarray:
        free = self.group.unit == "m" and not self.adds  # where the hand points is not said
        if self.adds:
            self._move(plan, dt_s / self.period_s)
        else:
            try:
                self._place, rotation = _pose(plan, self.group.unit)
            except ValueError:  # numbers that are no rotation: as before
                rotation = self._rotation
            self._rotation = rotation
        found = hand.ik.follow(self._place, None if free else self._rotation, dt_s)
        joints = hand.to_command(found.q)
        held = np.clip(joints, command - ahead, command + ahead)
        self.miss = Miss(found.position_m, found.rotation_rad)
        if not np.array_equal(held, joints):
            hand.ik.reset(hand.to_chain(held))
        if self.miss.unreachable and not found.limited:
            self.short += 1
        if self.adds and (self.miss.unreachable or not np.array_equal(held, joints)):
            self._place, self._rotation = hand.pose(held)
        return held


def _pose(values: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    place, quaternion = split_pose(values, unit)
    return place, np.asarray(Rotation.from_quat(quaternion).as_matrix())


class Targets:
    """Turns (p,) channels of the plan into (c,) positions of the commanded robot.

    Args:
        embodiment: as the policy sees it.
        commanded: ``commanded_robot(embodiment)``.

    Attributes:
        limiter: of the policy's own channels that are not commanded as they are.

    Raises:
        EmbodimentError: a model cannot be used.
    """

    def __init__(self, embodiment: Embodiment, commanded: Embodiment) -> None:
        self._groups: list[_Group] = []
        through: list[tuple[slice, slice]] = []
        plan = command = 0
        for index, (ours, told) in enumerate(zip(embodiment.actions, commanded.actions, strict=True)):
            mine, theirs = slice(plan, plan + len(ours.channels)), slice(command, command + len(told.channels))
            plan, command = mine.stop, theirs.stop
            if ours.command.ik is None and ours.command.integrate is None:
                through.append((mine, theirs))
            else:
                self._groups.append(_Group(embodiment, commanded, index, mine, theirs))
        self._through, self._count, self._planned = through, command, plan
        own = replace(embodiment, actions=tuple(part.group for part in self._groups))
        self.limiter = SafetyLimiter(replace(own, safety=replace(own.safety, workspace=())))
        self._own = np.concatenate([np.arange(plan)[part.plan] for part in self._groups])
        self._unmeasured = np.full(len(self._own), np.nan)

    def reset(self, command_c: np.ndarray) -> None:
        """Begins at (c,) what is commanded."""
        for part in self._groups:
            part.reset(command_c[part.command])
        self.limiter.reset(self.plan_now(command_c)[self._own])

    def plan_now(self, command_c: np.ndarray) -> np.ndarray:
        """(p,) what the plan would say where it meant to stay at (c,) this command."""
        plan_p = np.zeros(self._planned)
        for mine, theirs in self._through:
            plan_p[mine] = command_c[theirs]
        for part in self._groups:
            plan_p[part.plan] = part.plan_now(command_c[part.command])
        return plan_p

    def step(
        self, plan_p: np.ndarray, command_c: np.ndarray, late_c: np.ndarray, dt_s: float, scale: float
    ) -> np.ndarray:
        """(c,) what to ask of the safety filter.

        Args:
            plan_p: (p,) what the plan says; displacements per period.
            command_c: (c,) the last command.
            late_c: (c,) bool, groups that have timed out and are held: their sums begin anew.
            dt_s: seconds since the last step.
            scale: 0…1, the soft start's share of the rates.
        """
        target_c = np.empty(self._count)
        for mine, theirs in self._through:
            target_c[theirs] = plan_p[mine]
        dt_s = min(max(dt_s, 0.0), self.limiter.max_dt_s)
        limited = self.limiter.step(plan_p[self._own], self._unmeasured, dt_s, scale)
        first = 0
        for part in self._groups:
            count = part.plan.stop - part.plan.start
            command = command_c[part.command]
            if late_c[part.command].any():
                part.reset(command)
                target_c[part.command] = command
            else:
                target_c[part.command] = part.step(limited[first : first + count], command, dt_s)
            first += count
        return target_c

    def mask(self, plan_p: np.ndarray) -> np.ndarray:
        """(p,) bool → (c,) bool, of the groups that are commanded as the plan says."""
        mask_c = np.zeros(self._count, bool)
        for mine, theirs in self._through:
            mask_c[theirs] = plan_p[mine]
        return mask_c

    @property
    def misses(self) -> dict[str, Miss]:
        """Group → how far its hand is from the pose that was asked for, where that is out of reach."""
        return {part.group.name: part.miss for part in self._groups if part.miss.unreachable}

    def report(self, prefix: str) -> dict[str, int | float | str]:
        """Diagnostics: steps out of reach, how far off now, and what limited the policy's own channels."""
        values: dict[str, int | float | str] = {}
        counts: Counter[str] = Counter({part.group.name: part.short for part in self._groups if part.hand is not None})
        for part in self._groups:
            if part.hand is not None:
                name = f"{prefix}.{part.group.name}"
                values |= {f"{name}.out_of_reach": counts[part.group.name]}
                values |= {f"{name}.off_m": part.miss.position_m, f"{name}.off_rad": part.miss.rotation_rad}
        return values | self.limiter.tally.report(f"{prefix}.limited")
