"""Actions of datasets that have none: finite differences of proprioception [P].

By convention: an absolute action is the next measured state; a delta is the difference of the two. Rotations are
composed, not subtracted: ``eef_delta`` is expressed in the axes of the base frame, the rotation being the one that
turns the present orientation into the next [O: the paper names no frame].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.rotations import join_pose, pose_size, split_pose
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.errors import UserError

# kind of the action → kind of the state it is made from
_MEASURED = {"joint_delta": "joint_position", "eef_delta": "eef_pose"}


def pseudo_actions(rows: EpisodeRows, contract: DataContract) -> EpisodeRows:
    """An episode with actions made from its states; one row shorter, because the last state has no successor.

    Args:
        rows: T rows; whatever actions they have are ignored.
        contract: its state groups are what ``rows.state`` holds, its action groups what is wanted.

    Returns:
        T − 1 rows (none for T ≤ 1).

    Raises:
        UserError: an action group cannot be made from the state; names group and fix.
    """
    sources = sources_of(contract)
    state = np.asarray(rows.state, np.float64)
    now, after = state[:-1], state[1:]
    parts = []
    for group, columns in zip(contract.action, sources, strict=True):
        if group.kind == "joint_delta":
            parts.append(after[:, columns] - now[:, columns])
        elif group.kind == "eef_delta":
            parts.append(_pose_difference(now[:, columns], after[:, columns], group.unit))
        else:
            parts.append(after[:, columns])
    kept = max(len(state) - 1, 0)
    action = np.concatenate(parts, axis=1).astype(np.float32)
    extra = {name: value[:kept] for name, value in rows.extra.items()}
    return replace(
        rows,
        state=rows.state[:kept],
        action=action,
        timestamp=rows.timestamp[:kept],
        task=rows.task[:kept],
        perturbed=rows.perturbed[:kept],
        extra=extra,
    )


def sources_of(contract: DataContract) -> list[list[int]]:
    """State columns that each action group is made from: channels of the same name, or the only pair that fits.

    Raises:
        UserError: see ``pseudo_actions``.
    """
    column = {channel: i for i, channel in enumerate(contract.state_channels)}
    of_channel = {channel: group for group in contract.state for channel in group.channels}
    found = []
    for group in contract.action:
        kind = _MEASURED.get(group.kind, group.kind)
        named = [of_channel.get(channel) for channel in group.channels]
        if all(each is not None and (each.kind, each.unit) == (kind, group.unit) for each in named):
            found.append([column[channel] for channel in group.channels])
            continue
        fitting = [
            each
            for each in contract.state
            if (each.kind, each.unit, len(each.channels)) == (kind, group.unit, len(group.channels))
        ]
        alike = [each for each in contract.action if (each.kind, each.unit) == (group.kind, group.unit)]
        if len(fitting) != 1 or len(alike) != 1:  # with two arms, position alone would take one for the other
            raise UserError(_no_source(group, kind, fitting))
        found.append([column[channel] for channel in fitting[0].channels])
    return found


def _no_source(group: ChannelGroup, kind: str, fitting: Sequence[ChannelGroup]) -> str:
    why = "is not measured under the same channel names" if fitting else "is not measured"
    return (
        f"pseudo-actions: action group '{group.name}' ({group.kind}, {group.unit}) {why}; give the state a {kind} "
        f"group in {group.unit} with the channels {', '.join(group.channels)}"
    )


def _pose_difference(now: np.ndarray, after: np.ndarray, unit: str) -> np.ndarray:
    """(T, n) poses → (T, n) what leads from one to the other, in base axes."""
    if not len(now):
        return np.zeros((0, pose_size(unit)))
    place, turn = split_pose(now, unit)
    next_place, next_turn = split_pose(after, unit)
    between = Rotation.from_quat(next_turn) * Rotation.from_quat(turn).inv()
    return join_pose(next_place - place, between.as_quat(), unit)
