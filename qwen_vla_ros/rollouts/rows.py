"""A recorded episode at the policy's rate: what it saw at every step, and what was commanded after it.

A step belongs to one picture of the reference camera. As when the policy looked, every other view gives its picture
nearest to that, and every state group its reading nearest to it. The action is what had been commanded one period
later, whoever commanded it: a chunk's first action is due then. Steps for which something is missing end a segment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qwen_vla_core.embodiment.spec import VELOCITY_KINDS, ActionGroup
from qwen_vla_core.errors import UserError
from qwen_vla_ros.commands import adapter_for, command_kind
from qwen_vla_ros.messages import (
    groups_by_topic,
    state_from_joint_state,
    state_from_odometry,
    state_from_pose,
)
from qwen_vla_ros.node_utils import HUMAN_TOPIC, INSTRUCTION_TOPIC, PLAYING_TOPIC
from qwen_vla_ros.rollouts.episode import Episode
from qwen_vla_ros.rollouts.feed import header_stamp_ns

Keep = Literal["all", "human", "policy"]
NEAR_NS = 100_000_000  # how far a measured pose may lie from the moment it stands for
FROM_STATE = {"joint_state": state_from_joint_state, "odometry": state_from_odometry, "pose": state_from_pose}


@dataclass(frozen=True)
class Segment:
    """Neighbouring steps of an episode for which everything was there; T steps.

    Attributes:
        stamps_ns: (T,) of the reference camera's pictures.
        state: (T, c_s), action: (T, c), in channel units.
        task: (T,) index into ``instructions``.
        human: (T,) bool, whether a person gave the action.
        pictures: view → (T,) arrival times of the pictures' messages, which name them in the bag.
    """

    stamps_ns: np.ndarray
    state: np.ndarray
    action: np.ndarray
    task: np.ndarray
    human: np.ndarray
    pictures: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.stamps_ns)


@dataclass(frozen=True)
class Rows:
    """An episode's segments, and why steps were left out.

    Attributes:
        instructions: in the order they were given.
        segments: in order.
        left_out: reason → steps.
    """

    instructions: tuple[str, ...]
    segments: tuple[Segment, ...]
    left_out: Counter[str]


class Series:
    """Values by time, ascending; ``values`` has one row per entry."""

    def __init__(self, times_ns: Sequence[int], values: Sequence[Any], dtype: type = np.float64) -> None:
        order = np.argsort(np.array(times_ns, np.int64), kind="stable")
        self.times = np.array(times_ns, np.int64)[order]
        self.values: np.ndarray = np.array(values, dtype=dtype)[order]

    def __len__(self) -> int:
        return len(self.times)

    def nearest(self, at_ns: np.ndarray) -> np.ndarray:
        """(T,) index of the entry nearest to each time."""
        right = np.clip(np.searchsorted(self.times, at_ns), 1, max(len(self) - 1, 1))
        left = right - 1
        right = np.minimum(right, len(self) - 1)
        return np.where(np.abs(self.times[left] - at_ns) <= np.abs(self.times[right] - at_ns), left, right)

    def before(self, at_ns: np.ndarray) -> np.ndarray:
        """(T,) index of the last entry at or before each time; −1: none."""
        return np.searchsorted(self.times, at_ns, "right") - 1


def rows_of(episode: Episode, keep: Keep = "all", shortest: int = 5) -> Rows:
    """Cuts an episode into rows.

    Args:
        episode: open.
        keep: all steps, or those that a person, or the policy, commanded.
        shortest: segments of fewer steps are left out.

    Raises:
        UserError: a camera, a state or a command never came.
    """
    robot = episode.robot
    period_ns = round(robot.period_s * 1e9)
    pictures = {camera.view: _picture_times(episode, camera.topic) for camera in robot.cameras}
    reference = pictures[robot.reference_camera.view]
    begin = int(np.searchsorted(reference.times, episode.start_ns))
    first = int(reference.times[min(begin, len(reference) - 1)])
    count = int((int(reference.times[-1]) - first) // period_ns) + 1
    grid = first + np.arange(max(count, 0), dtype=np.int64) * period_ns
    stamps = reference.times[reference.nearest(grid)]
    due = stamps + period_ns
    why = np.full(len(grid), "", dtype=object)

    def leave_out(where: np.ndarray, reason: str) -> None:
        why[where & (why == "")] = reason

    leave_out(np.abs(stamps - grid) > 0.75 * period_ns, f"no picture of {robot.reference_camera.view}")
    shown = {}
    for camera in robot.cameras:
        series = pictures[camera.view]
        index = series.nearest(stamps)
        leave_out(np.abs(series.times[index] - stamps) > camera.max_age_ms * 1e6, f"no picture of {camera.view}")
        shown[camera.view] = series.values[index]
    state = np.zeros((len(grid), len(robot.state_channels)))
    readings: dict[str, tuple[Series, int]] = {}  # channel → where it is measured
    for columns, series, name, max_age_ms in state_series(episode):
        index = series.nearest(stamps)
        leave_out(np.abs(series.times[index] - stamps) > max_age_ms * 1e6, f"no state {name}")
        state[:, columns] = series.values[index]
        readings |= {robot.state_channels[column]: (series, i) for i, column in enumerate(columns)}
    action = np.zeros((len(grid), len(robot.channels)))
    start = 0
    for group in robot.actions:
        stop = start + len(group.channels)
        if group.tracked(bool(episode.about.get("simulated"))):
            values, silent = _reached(group, robot.state_channels, readings, due)
        else:
            values, silent = _commanded(episode, group, stamps, due)
        leave_out(silent, f"nothing commanded {group.name}")
        action[:, start:stop] = values
        start = stop
    instructions, task = _tasks(episode, stamps, due)
    leave_out(task < 0, "no instruction")
    human = _human(episode, due)
    if keep != "all":
        leave_out(human != (keep == "human"), "driven by a person" if keep == "policy" else "driven by the policy")
    segments = []
    for part in _runs(why == ""):
        if part.stop - part.start < shortest:
            why[part] = f"fewer than {shortest} steps in a row"
            continue
        names = {view: times[part] for view, times in shown.items()}
        segments.append(Segment(stamps[part], state[part], action[part], task[part], human[part], names))
    return Rows(instructions, tuple(segments), Counter(str(reason) for reason in why if reason))


def pictures_of(episode: Episode, view: str, arrivals_ns: np.ndarray) -> Iterator[np.ndarray]:
    """(h, w, 3) uint8 RGB of a view, one per step; a picture may serve several steps in a row.

    Raises:
        UserError: one cannot be read.
    """
    camera = next(camera for camera in episode.robot.cameras if camera.view == view)
    topic = episode.topic(camera.topic)
    assert topic is not None
    wanted = iter(arrivals_ns.tolist())
    due = next(wanted, None)
    for _, arrived_ns, data in episode.bag.messages([topic]):
        if due is None:
            return
        if arrived_ns != due:
            continue
        pixels = episode.picture(topic, camera, data)
        while due == arrived_ns:
            yield pixels
            due = next(wanted, None)
    if due is not None:
        raise UserError(f"{episode.rollout.name}: a picture of {view} is missing from the bag")


def _picture_times(episode: Episode, name: str) -> Series:
    """Stamps of a camera's pictures, with the arrival that names each in the bag."""
    topic = episode.topic(name)
    stamps: list[int] = []
    arrivals: list[int] = []
    if topic is not None and episode.bag.topics[topic].count:
        for _, arrived_ns, data in episode.bag.messages([topic]):
            if arrivals and arrived_ns <= arrivals[-1]:
                continue  # two in one instant of the recorder's clock: the first is as good
            stamps.append(header_stamp_ns(data) or arrived_ns)
            arrivals.append(arrived_ns)
    if not stamps:
        raise UserError(f"{episode.rollout.name}: has no picture on {name}, which the robot's YAML names as a camera")
    # Stamps come from one clock; one that goes back would put pictures out of the bag's order.
    newest = np.maximum.accumulate(np.array(stamps, np.int64))
    kept = np.flatnonzero(np.concatenate([[True], newest[1:] > newest[:-1]])).tolist()
    return Series([stamps[i] for i in kept], [arrivals[i] for i in kept], np.int64)


def state_series(episode: Episode) -> Iterator[tuple[list[int], Series, str, float]]:
    """(columns of the state vector, readings by stamp, name, longest age in ms) of every state group.

    Raises:
        UserError: one was never heard.
    """
    columns = {channel: i for i, channel in enumerate(episode.robot.state_channels)}
    for name, groups in groups_by_topic(episode.robot.state).items():
        topic = episode.topic(name)
        times: dict[str, list[int]] = {group.name: [] for group in groups}
        values: dict[str, list[list[float]]] = {group.name: [] for group in groups}
        if topic is not None and episode.bag.topics[topic].count:
            for _, arrived_ns, data in episode.bag.messages([topic]):
                read = FROM_STATE[groups[0].source](groups, episode.bag.decode(topic, data))
                for group in groups:
                    if all(channel in read for channel in group.channels):
                        times[group.name].append(header_stamp_ns(data) or arrived_ns)
                        values[group.name].append([read[channel] for channel in group.channels])
        for group in groups:
            if not times[group.name]:
                raise UserError(f"{episode.rollout.name}: has no state of {group.name} on {name}")
            series = Series(times[group.name], values[group.name])
            yield [columns[channel] for channel in group.channels], series, group.name, group.max_age_ms


def command_series(episode: Episode, group: ActionGroup) -> Series:
    """What a group was commanded, in channel units, by arrival.

    Raises:
        UserError: nothing.
    """
    adapter = adapter_for(command_kind(group, bool(episode.about.get("simulated"))))
    times, values = [], []
    for arrived_ns, message in episode.told(group.command.topic):
        try:
            decoded = group.command.map.to_channel(adapter.decode(group, message))
        except (ValueError, AttributeError):
            continue  # another group's on the same topic
        times.append(arrived_ns)
        values.append(np.asarray(decoded, np.float64))
    if not times:
        raise UserError(f"{episode.rollout.name}: nothing was commanded to {group.name} on {group.command.topic}")
    return Series(times, values)


def _commanded(
    episode: Episode, group: ActionGroup, stamps: np.ndarray, due: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(T, c_g) what a group was commanded, in channel units, and (T,) bool, where nobody commanded it.

    Positions count as they were one period after the picture; velocities and displacements as their mean until then.
    """
    series = command_series(episode, group)
    last = series.before(due)
    silent = (last < 0) | (due - series.times[np.maximum(last, 0)] > episode.robot.safety.watchdog_ms * 1e6)
    result = series.values[np.maximum(last, 0)]
    if group.kind in VELOCITY_KINDS:
        first = series.before(stamps) + 1
        total = np.concatenate([np.zeros((1, series.values.shape[1])), np.cumsum(series.values, axis=0)])
        span = last + 1 - first
        mean = (total[last + 1] - total[np.minimum(first, last + 1)]) / np.maximum(span, 1)[:, None]
        result = np.where((span > 0)[:, None], mean, result)
    return result, silent


def _reached(
    group: ActionGroup, channels: tuple[str, ...], readings: dict[str, tuple[Series, int]], due: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(T, c_g) where a base that is told twists was one period later, and (T,) bool, where that was not measured.

    Its waypoints never leave the controller as such, and where it got to is what they are about.

    Raises:
        UserError: a channel is not measured.
    """
    values = np.zeros((len(due), len(group.channels)))
    unknown = np.zeros(len(due), bool)
    for column, channel in enumerate(group.channels):
        if channel not in readings:
            raise UserError(f"waypoint channel '{channel}' is not among the measured ones: {', '.join(channels)}")
        series, place = readings[channel]
        index = series.nearest(due)
        unknown |= np.abs(series.times[index] - due) > NEAR_NS
        values[:, column] = series.values[index, place]
    return values, unknown


def _tasks(episode: Episode, stamps: np.ndarray, due: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The instructions, and (T,) which one each step follows; −1: none.

    Where the controller told which instruction it plays (``qwen_vla/playing``), that counts for the action: the plan of
    an old one is played until the first chunk for the new one has come.
    """
    told = [(time_ns, str(msg.data).strip()) for time_ns, msg in episode.told(INSTRUCTION_TOPIC)]
    if not told and episode.rollout.instruction:
        told = [(episode.start_ns, episode.rollout.instruction)]
    texts: dict[str, int] = {}
    task = _at(told, stamps, texts)
    played = []
    for time_ns, msg in episode.told(PLAYING_TOPIC):
        try:
            event = dict(json.loads(str(msg.data)))
        except (ValueError, TypeError):
            continue
        played.append((time_ns, str(event.get("instruction") or "").strip()))
    if played:
        playing = _at(played, due, texts)
        task = np.where((playing >= 0) & (task >= 0), playing, task)
    return tuple(texts), task


def _at(told: Sequence[tuple[int, str]], times: np.ndarray, texts: dict[str, int]) -> np.ndarray:
    """(T,) number in ``texts``, which grows, of the sentence told last before each time; −1: none, or an empty one."""
    if not told:
        return np.full(len(times), -1)
    numbers = np.array([texts.setdefault(text, len(texts)) if text else -1 for _, text in told])
    at = np.searchsorted(np.array([time_ns for time_ns, _ in told]), times, "right") - 1
    return np.where(at >= 0, numbers[np.maximum(at, 0)], -1)


def _human(episode: Episode, due: np.ndarray) -> np.ndarray:
    """(T,) bool, whether a person drove when the action was due."""
    told = [(time_ns, bool(msg.data)) for time_ns, msg in episode.told(HUMAN_TOPIC)]
    if not told:
        return np.zeros(len(due), bool)
    at = np.searchsorted(np.array([time_ns for time_ns, _ in told]), due, "right") - 1
    return np.where(at >= 0, np.array([on for _, on in told])[np.maximum(at, 0)], False)


def _runs(good: np.ndarray) -> Iterator[slice]:
    """Slices of neighbouring True entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(np.int8), [0]])))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(begin), int(end))
