"""Looks at the robot's topics while a browser does, at the page's rate; subscribes to nothing otherwise."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Set
from typing import Any, Protocol

import numpy as np
import rclpy
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment.spec import ActionGroup, CameraSpec, Embodiment, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_ros.commands import CommandAdapter, adapter_for, command_kind
from qwen_vla_ros.dashboard.board import Board
from qwen_vla_ros.dashboard.pictures import jpeg
from qwen_vla_ros.dashboard.timeline import Timeline
from qwen_vla_ros.dashboard.topics import PolledTopic
from qwen_vla_ros.messages import (
    chunk_from_message,
    groups_by_topic,
    image_message_type,
    plan_from_message,
    state_from_message,
    state_message_type,
)
from qwen_vla_ros.node_utils import CHUNK_TOPIC, CONSUMED_TOPIC, PLAN_TOPIC

IDLE_S = 3.0  # after the last browser has gone
STREAM_DEPTH, TRAJECTORY_DEPTH = 4, 20
STALE_S = 1.0  # a value older than this, and than its topic's limit, is not shown: it may not be true any more


class Viewers(Protocol):
    """The browsers, as seen from this thread."""

    def looking(self) -> bool: ...

    def wanted(self) -> Set[str]:
        """Views of which a browser waits for a picture."""
        ...

    def tick(self, pictures: dict[str, bytes]) -> None:
        """The board has been brought up to date; ``pictures`` holds what was wanted and has come."""
        ...


class Sampler:
    """A thread and its node; ``close`` ends both.

    Args:
        owner: the dashboard's node: its context, namespace and clock are used.
        statuses: puts what another thread has heard from the nodes on the board, and returns their ages by name.
    """

    def __init__(
        self,
        owner: Node,
        embodiment: Embodiment,
        simulated: bool,
        board: Board,
        timeline: Timeline,
        viewers: Viewers,
        rate_hz: float,
        picture_width: int,
        statuses: Callable[[], dict[str, float]],
    ) -> None:
        self._owner = owner
        self._embodiment = embodiment
        self._simulated = simulated
        self._board, self._timeline, self._viewers, self._statuses = board, timeline, viewers, statuses
        self._period_s = 1.0 / rate_hz
        self._width = picture_width
        self._index = {channel: i for i, channel in enumerate(embodiment.channels)}
        self._adapters = self._command_adapters()
        self._node: Node | None = None
        self._stop = threading.Event()
        self._measured: list[float | None] = [None] * len(self._index)
        self._commanded: list[float | None] = [None] * len(self._index)
        self._pending: dict[str, bytes] = {}
        self._picture_problems: dict[str, str] = {}
        self._ticks = 0
        self._now_ns = 0
        self._simulated_time = False
        self._logger = owner.get_logger()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _command_adapters(self) -> list[tuple[ActionGroup, CommandAdapter, type]]:
        """Groups whose command messages can be read here: those of a robot need its message package."""
        found = []
        for group in self._embodiment.actions:
            adapter = adapter_for(command_kind(group, self._simulated))
            try:
                found.append((group, adapter, adapter.message_type))
            except UserError as error:
                self._owner.get_logger().warning(f"commands of {group.name} are not shown: {error}")
        return found

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        looked = -IDLE_S
        due = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if self._viewers.looking():
                looked = now
            try:
                if now - looked < IDLE_S:
                    self._sample()
                else:
                    self._unsubscribe()
            except Exception:  # one odd message must not end the page; a context that is gone ends the thread
                if not rclpy.ok(context=self._owner.context):
                    break
                self._logger.error(traceback.format_exc(), throttle_duration_sec=5.0)
            due = max(due + self._period_s, time.monotonic())
            self._stop.wait(due - time.monotonic())
        with contextlib.suppress(Exception):
            self._unsubscribe()

    def _subscribe(self) -> Node:
        node = rclpy.create_node(
            f"{self._owner.get_name()}_sampler",
            context=self._owner.context,
            namespace=self._owner.get_namespace(),
            use_global_arguments=False,
            start_parameter_services=False,
            enable_rosout=False,
        )
        robot = self._embodiment
        self._cameras = [
            (camera, PolledTopic(node, image_message_type(camera), camera.topic, 1, True)) for camera in robot.cameras
        ]
        self._states: list[tuple[tuple[StateGroup, ...], PolledTopic]] = [
            (groups, PolledTopic(node, state_message_type(groups), topic, STREAM_DEPTH, True))
            for topic, groups in groups_by_topic(robot.state).items()
        ]
        topics = {group.command.topic: message_type for group, _, message_type in self._adapters}
        self._commands = {
            topic: PolledTopic(node, message_type, topic, STREAM_DEPTH) for topic, message_type in topics.items()
        }
        self._chunks = PolledTopic(node, JointTrajectory, CHUNK_TOPIC, TRAJECTORY_DEPTH)
        self._plans = PolledTopic(node, JointTrajectory, PLAN_TOPIC, TRAJECTORY_DEPTH)
        self._consumed = PolledTopic(node, JointTrajectory, CONSUMED_TOPIC, TRAJECTORY_DEPTH)
        return node

    def _unsubscribe(self) -> None:
        node, self._node = self._node, None
        if node is not None:
            node.destroy_node()
            self._pending.clear()

    def _sample(self) -> None:
        if self._node is None:
            self._node = self._subscribe()
        self._now_ns = now_ns = int(self._owner.get_clock().now().nanoseconds)
        self._simulated_time = bool(self._owner.get_parameter("use_sim_time").value)
        self._read_states()
        self._read_commands()
        self._timeline.add_measured(now_ns, tuple(self._measured))
        self._read_trajectories(now_ns)
        pictures = self._read_pictures()
        self._ticks += 1
        self._board.put("channels", {"command": self._commanded, "measured": self._measured})
        self._board.put(
            "ages", {"tick": self._ticks, "now": now_ns * 1e-9, "status": self._statuses(), "topics": self._topics()}
        )
        self._viewers.tick(pictures)

    def _read_states(self) -> None:
        for groups, topic in self._states:
            for data in topic.poll():
                for channel, value in state_from_message(groups, topic.decode(data)).items():
                    if channel in self._index:
                        self._measured[self._index[channel]] = round(value, 5)
            if self._stale(topic, max(group.max_age_ms for group in groups) * 1e-3):
                self._forget(self._measured, [channel for group in groups for channel in group.channels])

    def _read_commands(self) -> None:
        heard = {name: [topic.decode(data) for data in topic.poll()] for name, topic in self._commands.items()}
        for group, adapter, _ in self._adapters:
            for msg in heard[group.command.topic]:
                try:
                    values = group.command.map.to_channel(adapter.decode(group, msg))
                except ValueError:
                    continue  # of another group on the same topic, or of somebody who does not know this robot
                for channel, value in zip(group.channels, np.atleast_1d(values), strict=True):
                    self._commanded[self._index[channel]] = round(float(value), 5)
            if self._stale(self._commands[group.command.topic]):
                self._forget(self._commanded, group.channels)

    def _age_s(self, topic: PolledTopic) -> float | None:
        return topic.age_s(self._now_ns, self._simulated_time)

    def _stale(self, topic: PolledTopic, limit_s: float = 0.0) -> bool:
        age_s = self._age_s(topic)
        return age_s is None or age_s > max(limit_s, STALE_S)

    def _forget(self, values: list[float | None], channels: Iterable[str]) -> None:
        for channel in channels:
            if channel in self._index:
                values[self._index[channel]] = None

    def _read_trajectories(self, now_ns: int) -> None:
        for data in self._chunks.poll():
            with contextlib.suppress(ValueError):
                self._timeline.add_chunk(chunk_from_message(self._chunks.decode(data)), now_ns)
        for data in self._consumed.poll():
            with contextlib.suppress(ValueError):
                self._timeline.add_consumed(chunk_from_message(self._consumed.decode(data)))
        for data in self._plans.poll()[-1:]:
            with contextlib.suppress(ValueError):
                self._timeline.add_plan(plan_from_message(self._plans.decode(data), self._embodiment.channels))

    def _read_pictures(self) -> dict[str, bytes]:
        """JPEGs of the views that somebody waits for; of the others only the newest message is kept, as it came."""
        wanted = self._viewers.wanted()
        pictures: dict[str, bytes] = {}
        for camera, topic in self._cameras:
            taken = topic.poll()
            if taken:
                self._pending[camera.view] = taken[-1]
            if camera.view in wanted and camera.view in self._pending:
                encoded = self._encode(camera, topic.decode(self._pending.pop(camera.view)))
                if encoded is not None:
                    pictures[camera.view] = encoded
        return pictures

    def _encode(self, camera: CameraSpec, msg: Any) -> bytes | None:
        try:
            encoded = jpeg(camera, msg, self._width)
        except (UserError, ValueError) as error:
            self._picture_problems[camera.view] = str(error)
            return None
        self._picture_problems.pop(camera.view, None)
        return encoded

    # --- ages ------------------------------------------------------------------------------------------------------

    def _topics(self) -> list[dict[str, Any]]:
        """Age, rate and limit of every topic, in the order of the page."""
        robot = self._embodiment
        rows = [
            self._row("camera", camera.view, topic, camera.max_age_ms, self._picture_problems.get(camera.view, ""))
            for camera, topic in self._cameras
        ]
        for groups, topic in self._states:
            name = ", ".join(group.name for group in groups)
            rows.append(self._row("state", name, topic, min(group.max_age_ms for group in groups)))
        for name, topic in self._commands.items():
            groups_here = ", ".join(group.name for group, _, _ in self._adapters if group.command.topic == name)
            rows.append(self._row("command", groups_here, topic, None))
        rows.append(self._row("policy", "chunk", self._chunks, robot.safety.watchdog_ms + 1e3 * robot.period_s))
        rows.append(self._row("policy", "plan", self._plans, None))
        return rows

    def _row(
        self, kind: str, name: str, topic: PolledTopic, limit_ms: float | None, problem: str = ""
    ) -> dict[str, Any]:
        age_s = self._age_s(topic)
        return {
            "kind": kind,
            "name": name,
            "topic": topic.name,
            "age_ms": None if age_s is None else round(age_s * 1e3),
            "hz": round(topic.rate_hz, 1),
            "limit_ms": limit_ms,
            "publishers": topic.publishers,
            "problem": problem,
        }
