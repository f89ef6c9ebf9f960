"""Headings, clocks, sampling and the stop of recorded walks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.conventions import relative_parts, to_absolute, to_relative
from qwen_vla_core.data.waypoints import (
    FORWARD,
    HORIZON,
    LEFT,
    LOOK_UP,
    RIGHT,
    STOP,
    heading,
    navigation_contract,
    planar,
    rows_of,
    sample_times,
    walk_along,
    walk_of_actions,
)

TURN, PACE = np.deg2rad(15), {"speed": 0.5, "turn_rate": np.deg2rad(30)}


def turned(yaw: float, *more: tuple[str, float]) -> list[float]:
    """Habitat's x, y, z, w of a turn about +y, up."""
    rotation = Rotation.from_euler("y", yaw)
    for axis, angle in more:
        rotation = rotation * Rotation.from_euler(axis, angle)
    return list(rotation.as_quat())


@pytest.mark.parametrize("yaw", [0.0, 0.3, -2.0, 3.1, np.pi / 2])
def test_headings_follow_the_simulators_axes(yaw: float) -> None:
    quaternion = turned(yaw)
    assert heading(quaternion) == pytest.approx(yaw)
    assert heading([-value for value in quaternion]) == pytest.approx(yaw)  # the same rotation
    assert heading(turned(yaw, ("x", 0.5))) == pytest.approx(yaw)  # the head's pitch is no turn
    # Walking forward is −z turned by the rotation; in the plane, that is along the heading.
    forward = planar(Rotation.from_quat(quaternion).apply([0.0, 0.0, -1.0]))
    np.testing.assert_allclose(forward, [np.cos(yaw), np.sin(yaw)], atol=1e-12)
    # The simulator's left is −x turned by the rotation.
    left = planar(Rotation.from_quat(quaternion).apply([-1.0, 0.0, 0.0]))
    np.testing.assert_allclose(left, [-np.sin(yaw), np.cos(yaw)], atol=1e-12)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0], [0, 0, 0, np.nan], turned(0.0, ("x", np.pi / 2))])
def test_no_heading(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rotation|straight up"):
        heading(bad)


def locations(actions: list[int], course: float = 0.0, start: tuple[float, float] = (1.0, 2.0)) -> np.ndarray:
    """Positions before every action and at the end, as a simulator without walls gives them."""
    places = [np.array(start)]
    for action in actions:
        course += {LEFT: TURN, RIGHT: -TURN}.get(action, 0.0)
        step = 0.25 if action == FORWARD else 0.0
        places.append(places[-1] + step * np.array([np.cos(course), np.sin(course)]))
    return np.array(places)


ACTIONS = [FORWARD, FORWARD, LEFT, LEFT, FORWARD, LOOK_UP, RIGHT, FORWARD, STOP]


def test_one_action_is_one_sample_at_the_stated_pace() -> None:
    moves = ACTIONS[:-1]
    places = locations(moves)
    every = walk_of_actions(places[0], 0.0, ACTIONS, places, TURN, **PACE)
    steps = places[[0, 1, 2, 5, 8]]  # the start and after each step forward
    forward = walk_of_actions(places[0], 0.0, ACTIONS, steps, TURN, **PACE)
    for walk in (every, forward):
        times = sample_times(walk)
        assert walk.seconds == 3.5 and len(times) == 8  # seven moves of 0.5 s; looking up takes none
        poses = walk.at(times)
        np.testing.assert_allclose(poses[:, :2], np.delete(places, 5, axis=0), atol=1e-12)
        np.testing.assert_allclose(poses[:, 2], np.cumsum([0, 0, 0, TURN, TURN, 0, -TURN, 0]), atol=1e-12)
        assert walk.corner_at(times).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]  # the picture after the look is the newest


def test_another_pace_resamples_between_the_corners() -> None:
    places = locations([FORWARD] * 4)
    walk = walk_of_actions(places[0], 0.0, [FORWARD] * 4, places, TURN, speed=0.2, turn_rate=1.0)
    times = sample_times(walk)
    assert walk.seconds == pytest.approx(5.0) and len(times) == 11
    np.testing.assert_allclose(np.diff(walk.at(times)[:, 0]), 0.1, atol=1e-9)
    assert walk.corner_at(times).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]


def test_positions_that_belong_to_other_actions_are_refused() -> None:
    moves, start = ACTIONS[:-1], np.array([1.0, 2.0])
    for places, message in (
        (locations(moves)[:-1], "8 locations fit neither 8 moves nor 4 steps"),
        (locations(moves) + 5, "from the start position"),
        (locations([LEFT, FORWARD, FORWARD, FORWARD, FORWARD, FORWARD, FORWARD, FORWARD]), r"during action"),
    ):
        with pytest.raises(ValueError, match=message):
            walk_of_actions(start, 0.0, ACTIONS, places, TURN, **PACE)
    with pytest.raises(ValueError, match="unknown action 7"):
        walk_of_actions(start, 0.0, [7], locations([FORWARD]), TURN, **PACE)


def test_reference_paths_turn_on_the_spot_the_short_way() -> None:
    walk = walk_along(np.array([[0.0, 0], [0, 0], [-1, 0], [-1, -1]]), 3.0, 0.5, 1.0)
    np.testing.assert_allclose(walk.poses[:, 2], [3.0, np.pi, np.pi, 1.5 * np.pi, 1.5 * np.pi])
    np.testing.assert_allclose(walk.times, np.cumsum([0, np.pi - 3, 2, np.pi / 2, 2]))
    with pytest.raises(ValueError, match="goes nowhere"):
        walk_along(np.zeros((3, 2)), 0.0, 0.5, 1.0)


def test_chunks_are_relative_and_end_in_a_valid_stop() -> None:
    places = locations([LEFT, FORWARD] * 8, course=3.0)
    walk = walk_of_actions(places[0], 3.0, [LEFT, FORWARD] * 8, places, TURN, **PACE)
    rows, sample = rows_of(walk.at(sample_times(walk)))
    assert len(rows) == 16 + HORIZON and sample.tolist() == [*range(16), *[16] * HORIZON]
    contract = navigation_contract("Habitat agent", ())
    assert (contract.frequency_hz, contract.horizon, contract.convention) == (2.0, 8, "waypoint")
    parts = relative_parts(contract.convention, contract.action, contract.state)
    for t in range(17):
        actions, valid = rows.chunk(t, HORIZON)
        assert valid.all()  # every chunk up to the goal is whole
        chunk = to_relative(parts, actions, rows.state[t])
        if t % 2 == 0 and t < 16:
            np.testing.assert_allclose(chunk[0], [0, 0, TURN], atol=1e-5)
            np.testing.assert_allclose(chunk[1], [0.25 * np.cos(TURN), 0.25 * np.sin(TURN), TURN], atol=1e-5)
            assert np.abs(np.diff(chunk[:, 2])).max() < 0.5  # no jump where the heading passes half a turn
        back = to_absolute(parts, chunk, rows.state[t])
        np.testing.assert_allclose(back[:, :2], actions[:, :2], atol=1e-6)
    np.testing.assert_allclose(to_relative(parts, rows.chunk(16, HORIZON)[0], rows.state[16]), 0, atol=1e-6)
