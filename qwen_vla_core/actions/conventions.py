"""Chunks relative to the state at their first frame, and back: what the policy learns and what a robot is told.

Datasets and commands hold absolute values. Where the convention is ``relative_joint``, ``relative_eef`` or
``waypoint``, the loader subtracts the state that belongs to the chunk's first frame and the policy's output has it
added again [P: each dataset keeps its native convention]. Everything else, grippers and hands above all, stays as it
is. ``to_absolute(to_relative(a))`` is ``a`` to 1e-9, rotations as rotations: q and -q, or angles a full turn apart, are
the same pose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import join_pose, pose_size, split_pose
from qwen_vla_core.errors import UserError

# convention → the kind of group that is relative in it
RELATIVE_KINDS: dict[str, str] = {
    "relative_joint": "joint_position",
    "relative_eef": "eef_pose",
    "waypoint": "waypoint",
}


class Group(Protocol):
    """Neighbouring channels of one kind, from an embodiment or from a dataset's contract."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def channels(self) -> tuple[str, ...]: ...


class FramedGroup(Group, Protocol):
    """A group of the action: poses that are relative have axes."""

    @property
    def frame(self) -> str: ...


@dataclass(frozen=True)
class RelativePart:
    """One group that is relative.

    Attributes:
        kind: of the group.
        unit: of the group; says how a pose's rotation is written.
        columns: its columns in the action.
        state_columns: the columns of the same channels in the state.
        frame: axes of a relative pose: ``tool``, those of the measured pose, or ``base``.
    """

    kind: str
    unit: str
    columns: tuple[int, ...]
    state_columns: tuple[int, ...]
    frame: str = "tool"


def relative_parts(convention: str, action: Sequence[FramedGroup], state: Sequence[Group]) -> tuple[RelativePart, ...]:
    """What is relative under a convention; nothing where the convention is absolute or a rate.

    Raises:
        UserError: a channel that is to be relative is not measured by any state group, or in another unit, or a pose
            group does not hold exactly one pose.
    """
    measured = {channel: group.unit for group in state for channel in group.channels}
    state_columns = {channel: i for i, channel in enumerate(channel for group in state for channel in group.channels)}
    parts, first = [], 0
    for group in action:
        columns = tuple(range(first, first + len(group.channels)))
        first += len(columns)
        if group.kind != RELATIVE_KINDS.get(convention):
            continue
        for channel in group.channels:
            if measured.get(channel) != group.unit:
                found = f"is in {measured[channel]}" if channel in measured else "is missing"
                raise UserError(
                    f"convention {convention}: action channel '{channel}' of group '{group.name}' is relative to the "
                    f"state, but its state channel {found}; add a state channel '{channel}' in {group.unit}"
                )
        if group.kind != "joint_position" and len(columns) != pose_size(group.unit):
            raise UserError(
                f"convention {convention}: group '{group.name}' has {len(columns)} channels, but a pose in "
                f"'{group.unit}' has {pose_size(group.unit)}; make one group per pose"
            )
        own = tuple(state_columns[channel] for channel in group.channels)
        parts.append(RelativePart(group.kind, group.unit, columns, own, group.frame or "tool"))
    return tuple(parts)


def to_relative(parts: Sequence[RelativePart], actions_hc: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Absolute chunk → chunk relative to its first frame; undone by ``to_absolute``.

    Joints: target minus measured angle. Poses: in the frame of the measured pose, so that "5 cm forward" is the same
    numbers wherever the hand points; with ``frame: base``, and in a group without rotation (unit ``m``), in the axes
    that the poses are measured in, the turn about the hand's own point. Headings are counted from the measured one
    without jumping by a turn inside the chunk.

    Args:
        parts: from ``relative_parts``.
        actions_hc: (…, H, c) in channel units.
        state: (…, c_s) at the chunk's first frame.

    Returns:
        (…, H, c) float64, a copy.

    Raises:
        ValueError: the numbers of a pose are no rotation.
    """
    result = np.array(actions_hc, dtype=np.float64)
    origin = np.asarray(state, dtype=np.float64)[..., None, :]
    for part in parts:
        here, target = origin[..., list(part.state_columns)], result[..., list(part.columns)]
        result[..., list(part.columns)] = _OF_KIND[part.kind][0](target, here, part)
    return result


def to_absolute(parts: Sequence[RelativePart], actions_hc: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The inverse of ``to_relative``: (…, H, c) relative to ``state`` → (…, H, c) absolute, float64.

    Raises:
        ValueError: the numbers of a pose are no rotation.
    """
    result = np.array(actions_hc, dtype=np.float64)
    origin = np.asarray(state, dtype=np.float64)[..., None, :]
    for part in parts:
        here, target = origin[..., list(part.state_columns)], result[..., list(part.columns)]
        result[..., list(part.columns)] = _OF_KIND[part.kind][1](target, here, part)
    return result


def continue_headings(actions_hc: np.ndarray, from_c: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """The same poses with headings counted on from ``from_c``: no step between two rows is more than half a turn.

    Args:
        actions_hc: (H, c).
        from_c: (c,) what was commanded, or measured, before.
        columns: those that are angles; without any the chunk comes back as it is.
    """
    if not columns:
        return actions_hc
    result = np.array(actions_hc, dtype=np.float64)
    for column in columns:
        course = np.concatenate([from_c[column : column + 1], result[:, column]])
        result[:, column] = np.unwrap(course)[1:]
    return result


def _subtract(target: np.ndarray, here: np.ndarray, part: RelativePart) -> np.ndarray:
    return target - here


def _add(offset: np.ndarray, here: np.ndarray, part: RelativePart) -> np.ndarray:
    return offset + here


def _pose_in(target: np.ndarray, here: np.ndarray, part: RelativePart) -> np.ndarray:
    """(…, H, n) and (…, 1, n) → the targets in the frame of the pose ``here``."""
    unit = part.unit
    if unit == "m,rad":
        return _planar_in(target, here)
    place, turn = split_pose(target, unit)
    here_place, here_turn = split_pose(here, unit)
    undo = _rotations(np.broadcast_to(here_turn, turn.shape)).inv()
    if part.frame == "base":
        turned = _rotations(turn) * undo
        return join_pose(place - here_place, turned.as_quat().reshape(turn.shape), unit)
    moved = undo.apply((place - here_place).reshape(-1, 3))
    turned = undo * _rotations(turn)
    return join_pose(moved.reshape(place.shape), turned.as_quat().reshape(turn.shape), unit)


def _pose_out(offset: np.ndarray, here: np.ndarray, part: RelativePart) -> np.ndarray:
    """The inverse of ``_pose_in``."""
    unit = part.unit
    if unit == "m,rad":
        return _planar_out(offset, here)
    place, turn = split_pose(offset, unit)
    here_place, here_turn = split_pose(here, unit)
    frame = _rotations(np.broadcast_to(here_turn, turn.shape))
    if part.frame == "base":
        turned = _rotations(turn) * frame
        return join_pose(place + here_place, turned.as_quat().reshape(turn.shape), unit)
    moved = frame.apply(place.reshape(-1, 3)).reshape(place.shape) + here_place
    turned = frame * _rotations(turn)
    return join_pose(moved, turned.as_quat().reshape(turn.shape), unit)


def _planar_in(target: np.ndarray, here: np.ndarray) -> np.ndarray:
    """x, y, heading → forward, left, change of heading, as seen from ``here``."""
    yaw = here[..., 2]
    x, y = target[..., 0] - here[..., 0], target[..., 1] - here[..., 1]
    cos, sin = np.cos(yaw), np.sin(yaw)
    # Unwrapped from the present heading on: a chunk that turns past half a turn has no jump in it.
    first = np.broadcast_to(yaw, (*target.shape[:-2], 1))
    course = np.unwrap(np.concatenate([first, target[..., 2]], axis=-1), axis=-1)
    return np.stack([cos * x + sin * y, cos * y - sin * x, course[..., 1:] - yaw], axis=-1)


def _planar_out(offset: np.ndarray, here: np.ndarray) -> np.ndarray:
    """The inverse of ``_planar_in``; headings stay unwrapped, so that they can be interpolated."""
    yaw = here[..., 2]
    forward, left, cos, sin = offset[..., 0], offset[..., 1], np.cos(yaw), np.sin(yaw)
    x = here[..., 0] + cos * forward - sin * left
    y = here[..., 1] + sin * forward + cos * left
    return np.stack([x, y, offset[..., 2] + yaw], axis=-1)


def _rotations(quaternion: np.ndarray) -> Rotation:
    return Rotation.from_quat(np.array(quaternion).reshape(-1, 4))  # SciPy refuses read-only views


_OF_KIND = {
    "joint_position": (_subtract, _add),
    "eef_pose": (_pose_in, _pose_out),
    "waypoint": (_pose_in, _pose_out),
}
