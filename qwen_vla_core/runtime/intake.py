"""What is done to a chunk before it is planned with: rotations without a spin between rows, grippers open or closed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen_vla_core.actions.continuous import continue_poses, nearest
from qwen_vla_core.actions.rotations import join_pose, pose_size, split_pose
from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.interfaces import ActionChunk

_WRITTEN_TWICE = ("m,axis_angle", "m,euler_xyz", "m,quaternion")  # the same rotation has several sets of numbers


class Intake:
    """Knows which columns of a robot are whole poses, displaced poses, and grippers of two positions."""

    def __init__(self, embodiment: Embodiment) -> None:
        self._channels = embodiment.channels
        self._poses: list[tuple[slice, str]] = []
        self._turned: list[tuple[slice, str]] = []
        self._binary: list[tuple[slice, np.ndarray, np.ndarray, float]] = []
        start = 0
        for group in embodiment.actions:
            columns = slice(start, start + len(group.channels))
            start = columns.stop
            if group.grip is not None and group.grip.binary is not None:
                limits = np.array([group.limits.lower, group.limits.upper])
                self._binary.append((columns, *limits, group.grip.binary))
            if "," not in group.unit or group.unit == "m,rad" or not group.kind.startswith("eef"):
                continue
            if len(group.channels) != pose_size(group.unit):
                continue
            if group.kind == "eef_pose":
                self._poses.append((columns, group.unit))
            elif group.unit in ("m,quaternion", "m,rot6d"):
                self._turned.append((columns, group.unit))

    def take(self, chunk: ActionChunk, from_c: np.ndarray | None) -> ActionChunk:
        """The same chunk, ready to be drawn lines through; one of other columns or with gaps comes back as it is.

        Args:
            chunk: absolute actions.
            from_c: (c,) what is being played or commanded; None: unknown.

        Raises:
            ValueError: the numbers of a pose are no rotation.
        """
        if not (self._poses or self._turned or self._binary):
            return chunk
        actions = np.array(chunk.actions_hc, np.float64)
        ours = set(chunk.channels) == set(self._channels) and len(chunk.channels) == len(self._channels)
        if not ours or actions.ndim != 2 or actions.shape[1] != len(self._channels) or not np.isfinite(actions).all():
            return chunk
        actions = actions[:, [chunk.channels.index(name) for name in self._channels]]
        for columns, unit in self._poses:
            actions[:, columns] = continue_poses(actions[:, columns], None if from_c is None else from_c[columns], unit)
        for columns, unit in self._turned:
            actions[:, columns] = join_pose(*split_pose(actions[:, columns], unit), unit)
        for columns, lower, upper, threshold in self._binary:
            opened = actions[:, columns] >= lower + threshold * (upper - lower)
            actions[:, columns] = np.where(opened, upper, lower)
        return replace(chunk, actions_hc=actions, channels=self._channels)

    def near(self, measured_c: np.ndarray, command_c: np.ndarray) -> np.ndarray:
        """(c,) measured poses written as close as can be to what is commanded; others as they are."""
        for columns, unit in self._poses:
            pose = measured_c[columns]
            if unit in _WRITTEN_TWICE and np.isfinite(pose).all():
                pose[3:] = nearest(pose[3:], command_c[columns][3:], unit.removeprefix("m,"))
        return measured_c
