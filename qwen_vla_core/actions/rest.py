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
