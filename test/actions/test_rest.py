"""Standing still: targets are held, displacements are none, whatever writes their rotation."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vla_core.actions.rest import rest, stay
from qwen_vla_core.actions.rotations import pose_size
from qwen_vla_core.data.contract import ChannelGroup


def group(kind: str, unit: str, count: int) -> ChannelGroup:
    return ChannelGroup(kind, kind, unit, tuple(f"{kind}{i}" for i in range(count)))


def test_targets_are_left_alone_and_rates_are_zero() -> None:
    groups = [
        group("joint_position", "rad", 2),
        group("joint_delta", "rad", 2),
        group("gripper", "fraction", 1),
        group("base_twist", "m/s,rad/s", 3),
        group("waypoint", "m,rad", 3),
    ]
    columns, values = rest(groups)
    assert columns.tolist() == [2, 3, 5, 6, 7] and not values.any()
    assert rest(groups[:1])[0].size == 0


@pytest.mark.parametrize(
    ("unit", "turn"),
    [("m", []), ("m,axis_angle", [0, 0, 0]), ("m,quaternion", [0, 0, 0, 1]), ("m,rot6d", [1, 0, 0, 0, 1, 0])],
)
def test_no_turn_is_written_as_the_unit_writes_it(unit: str, turn: list[float]) -> None:
    columns, values = rest([group("gripper", "m", 1), group("eef_delta", unit, pose_size(unit))])
    assert columns.tolist() == list(range(1, 1 + pose_size(unit)))
    np.testing.assert_allclose(values, [0, 0, 0, *turn], atol=1e-7)


def test_staying_is_the_measured_pose_and_no_displacement() -> None:
    groups = [group("joint_position", "rad", 2), group("joint_delta", "rad", 1)]
    still = stay(groups, ("other", "joint_position1", "joint_position0"), np.array([9.0, 0.2, 0.1]))
    assert still is not None
    np.testing.assert_allclose(still, [0.1, 0.2, 0.0], atol=1e-7)
    assert stay(groups, ("other",), np.array([9.0])) is None
