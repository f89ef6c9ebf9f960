"""Walks through a building → planar poses at a fixed rate, and the rows that a waypoint policy learns from.

Habitat's axes are x right, y up, −z forward; planar poses are x forward, y left, heading counter-clockwise from above
(REP-103), so that a waypoint is (forward, left, turn). The datasets hold absolute poses; the loader makes a chunk
relative to the pose at its first frame (convention ``waypoint``, H = 8 at 2 Hz [P]).

A simulator's walk has no clock. [O] It gets one from a walking speed and a turning rate: a step takes its length over
the speed, a turn its angle over the rate, looking up or down no time. With the defaults one simulator action of the
corpus (0.25 m, or its turn angle) is exactly one period of 2 Hz.

Stop [O]: after the last pose come H rows that stay there. The chunk at the goal is H waypoints of zero, all valid:
standing still is the answer, and a policy that emits only zeros has stopped. Chunks before the goal see the end of the
walk and then the standing still.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.embodiment.spec import PromptSpec

RATE_HZ, HORIZON = 2.0, 8  # [P]
CHANNELS = ("x", "y", "heading")
STOP, FORWARD, LEFT, RIGHT, LOOK_UP, LOOK_DOWN = range(6)  # Habitat's action numbers
STEP_M = 0.25  # one step forward in both corpora
_STILL = 1e-6


@dataclass(frozen=True)
class Walk:
    """A walk as corners in time; between them, position and heading change evenly.

    Attributes:
        times: (n,) seconds, increasing or equal (a look costs no time).
        poses: (n, 3) x, y in metres, heading in radians without jumps by a turn.
    """

    times: np.ndarray
    poses: np.ndarray

    @property
    def seconds(self) -> float:
        """Duration."""
        return float(self.times[-1])

    def at(self, times: np.ndarray) -> np.ndarray:
        """(m, 3) poses at times; the last one after the end."""
        return np.stack([np.interp(times, self.times, self.poses[:, i]) for i in range(3)], axis=1)

    def corner_at(self, times: np.ndarray) -> np.ndarray:
        """(m,) number of the last corner at or before each time: whose picture is the newest then."""
        return np.searchsorted(self.times, times + _STILL, side="right") - 1


def planar(position: np.ndarray) -> np.ndarray:
    """(…, 3) Habitat position → (…, 2) x forward, y left."""
    position = np.asarray(position, np.float64)
    return np.stack([-position[..., 2], -position[..., 0]], axis=-1)


def heading(quaternion: Sequence[float]) -> float:
    """Habitat rotation x, y, z, w → heading in radians, 0 looking along −z, growing to the left.

    Raises:
        ValueError: no rotation, or one that looks straight up or down.
    """
    x, y, z, w = (float(value) for value in quaternion)
    norm = x * x + y * y + z * z + w * w
    if not np.isfinite(norm) or norm < 0.25:
        raise ValueError(f"{list(quaternion)} is no rotation")
    # R · (0, 0, −1)
    forward_x, forward_z = -2 * (x * z + w * y) / norm, -(1 - 2 * (x * x + y * y) / norm)
    if np.hypot(forward_x, forward_z) < 1e-3:
        raise ValueError(f"{list(quaternion)} looks straight up or down")
    return float(np.arctan2(-forward_x, -forward_z))


def walk_of_actions(
    start: np.ndarray, course: float, actions: Sequence[int], locations: np.ndarray, turn_rad: float, speed: float,
    turn_rate: float,
) -> Walk:  # fmt: skip
    """A recorded walk: headings from the turns, positions from the simulator.

    Args:
        start: (2,) planar start.
        course: heading at the start, radians.
        actions: Habitat's numbers; what follows a STOP does not count.
        locations: (m, 2) planar positions: one before every move and one at the end (STOP moves nothing), or the start
            and one after every step forward.
        turn_rad: angle of a turn.
        speed: metres per second.
        turn_rate: radians per second.

    Raises:
        ValueError: the positions fit the actions in neither way, jump, or move during a turn; an action is unknown.
    """
    moves = list(actions[: list(actions).index(STOP)]) if STOP in actions else list(actions)
    unknown = sorted({move for move in moves if move not in (FORWARD, LEFT, RIGHT, LOOK_UP, LOOK_DOWN)})
    if unknown:
        raise ValueError(f"unknown action {unknown[0]}")
    places = _places(start, moves, locations)
    times, poses = [0.0], [(*places[0], course)]
    for i, move in enumerate(moves):
        course += {LEFT: turn_rad, RIGHT: -turn_rad}.get(move, 0.0)
        # A step that a wall cut short took its time all the same: the nominal one.
        step = STEP_M / speed if move == FORWARD else turn_rad / turn_rate if move in (LEFT, RIGHT) else 0.0
        times.append(times[-1] + step)
        poses.append((*places[i + 1], course))
    return Walk(np.array(times), np.array(poses, np.float64))


def walk_along(points: np.ndarray, course: float, speed: float, turn_rate: float) -> Walk:
    """A walk along a polyline: turn to the next corner, walk there, and so on.

    Args:
        points: (m, 2) planar corners.
        course: heading at the start, radians.
        speed: metres per second.
        turn_rate: radians per second.

    Raises:
        ValueError: fewer than two different corners.
    """
    times, poses = [0.0], [(*points[0], course)]
    for here, there in itertools.pairwise(points):
        dx, dy = there - here
        length = float(np.hypot(dx, dy))
        if length < _STILL:
            continue
        turn = (np.arctan2(dy, dx) - course + np.pi) % (2 * np.pi) - np.pi
        if abs(turn) > _STILL:
            course += float(turn)
            times.append(times[-1] + abs(float(turn)) / turn_rate)
            poses.append((*here, course))
        times.append(times[-1] + length / speed)
        poses.append((*there, course))
    if len(times) < 2:
        raise ValueError("goes nowhere")
    return Walk(np.array(times), np.array(poses, np.float64))


def sample_times(walk: Walk, rate_hz: float = RATE_HZ) -> np.ndarray:
    """Times of the samples: a grid from the start that reaches the end."""
    return np.arange(int(np.ceil(walk.seconds * rate_hz - 1e-6)) + 1) / rate_hz


def rows_of(poses: np.ndarray, rate_hz: float = RATE_HZ, horizon: int = HORIZON) -> tuple[EpisodeRows, np.ndarray]:
    """Sampled poses → rows, with the standing still at the end.

    Args:
        poses: (n, 3) at a fixed rate.
        rate_hz: that rate.
        horizon: rows of standing still.

    Returns:
        rows, and (T,) which sample each row's picture belongs to.
    """
    last = len(poses) - 1
    sample = np.concatenate([np.arange(last), np.full(horizon, last)])
    wrapped = poses.copy()
    wrapped[:, 2] = (poses[:, 2] + np.pi) % (2 * np.pi) - np.pi
    steps = len(sample)
    rows = EpisodeRows(
        state=wrapped[sample].astype(np.float32),
        action=wrapped[np.minimum(sample + 1, last)].astype(np.float32),
        timestamp=np.arange(steps) / rate_hz,
        task=np.zeros(steps, np.int64),
        perturbed=np.zeros(steps, bool),
    )
    return rows, sample


def navigation_contract(robot_tag: str, views: tuple[str, ...]) -> DataContract:
    """(Δx, Δy, Δθ) × 8 at 2 Hz [P]."""
    group = ChannelGroup("base", "waypoint", "m,rad", CHANNELS)
    return DataContract(
        prompt=PromptSpec(robot_tag, "no arm", mobile_base=True),
        frequency_hz=RATE_HZ,
        horizon=HORIZON,
        convention="waypoint",
        views=views,
        state=(group,),
        action=(group,),
    )


def _places(start: np.ndarray, moves: Sequence[int], locations: np.ndarray) -> np.ndarray:
    """(len(moves) + 1, 2) position before every move and at the end."""
    count, steps = len(locations), sum(move == FORWARD for move in moves)
    if count and np.hypot(*(locations[0] - start)) > 0.5:
        raise ValueError(f"the first location is {np.hypot(*(locations[0] - start)):.2f} m from the start position")
    if count == len(moves) + 1:
        places = locations
    elif count == steps + 1:
        places = locations[np.concatenate([[0], np.cumsum([move == FORWARD for move in moves])]).astype(int)]
    else:
        raise ValueError(f"{count} locations fit neither {len(moves)} moves nor {steps} steps forward")
    for move, length in zip(moves, np.hypot(*np.diff(places, axis=0).T), strict=True):
        if length > (2 * STEP_M if move == FORWARD else 0.05):
            raise ValueError(f"the locations move {length:.2f} m during action {move}; they belong to other actions")
    return places
