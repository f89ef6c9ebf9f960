"""What a robot is told that has arrived and shall stay: the last target again, and no further displacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_vla_core.actions.conventions import Group
from qwen_vla_core.actions.rotations import join_pose
from qwen_vla_core.embodiment.spec import VELOCITY_KINDS


def rest(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of an action that are rates or displacements, and the values in them that mean standing still.

    All other columns are targets: repeating the last one is standing still.

    Args:
        groups: of the action, in column order.

    Returns:
        columns (n,) int64 and values (n,) float32.
    """
    columns: list[int] = []
    values: list[float] = []
    first = 0
    for group in groups:
        count = len(group.channels)
        if group.kind in VELOCITY_KINDS:
            columns += range(first, first + count)
            still = np.zeros(count)
            if group.kind == "eef_delta":  # no turn is not always zeros: quaternions, two columns of a matrix
                still = join_pose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]), group.unit)
            values += still.tolist()
        first += count
    return np.array(columns, np.int64), np.array(values, np.float32)


def stay(groups: Sequence[Group], state_channels: Sequence[str], state_c: np.ndarray) -> np.ndarray | None:
    """(c,) float32, the action that means staying where the robot is; None where it is not known.

    Targets are the measured values of the channels with the same names, rates and displacements as in ``rest``.

    Args:
        groups: of the action, in column order.
        state_channels: names of the state's columns.
        state_c: measured, in channel units.
    """
    columns, still = rest(groups)
    names = [name for group in groups for name in group.channels]
    measured = {name: float(value) for name, value in zip(state_channels, state_c, strict=True)}
    action_c = np.array([measured.get(name, np.nan) for name in names], np.float32)
    action_c[columns] = still
    return action_c if np.isfinite(action_c).all() else None
