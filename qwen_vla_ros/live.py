"""Looks at a running graph: for ``qwen-vla embodiment check --live`` and ``new --from-graph``. It only listens."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import rclpy
from rcl_interfaces.srv import GetParameters
from rclpy.duration import Infinite
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState, LaserScan

from qwen_vla_core.embodiment.draft import GraphTopic
from qwen_vla_core.embodiment.findings import Finding
from qwen_vla_core.embodiment.spec import (
    COMMAND_MESSAGES,
    IMAGE_MESSAGES,
    STATE_MESSAGES,
    CameraSpec,
    Embodiment,
    StateGroup,
)
from qwen_vla_core.embodiment.spec_base import ObstacleStopSpec
from qwen_vla_core.errors import UserError
from qwen_vla_core.runtime.obstacles import ObstacleStop
from qwen_vla_ros.bringup import node_environment
from qwen_vla_ros.live_report import SCAN_MESSAGE, Endpoint, Evidence, Picture, ScanEvidence, TopicEvidence, judge
from qwen_vla_ros.losses import LossCounter
from qwen_vla_ros.messages import (
    compressed_to_rgb,
    groups_by_topic,
    image_message_type,
    image_to_rgb,
    scan_from_message,
    state_from_message,
    state_message_type,
)
from qwen_vla_ros.node_utils import CAMERA_QOS, COMMAND_QOS, STATE_QOS
from qwen_vla_ros.observation import BLACK_LEVEL, BLACK_SHARE

DISCOVERY_S = 8.0  # how long to wait for what the YAML names; a graph on one machine is known in a fraction of it
QUIET_S = 3.5  # a graph that has not grown for so long is complete: who was missed announces itself every 3 s
ASK_S = 1.5  # a controller has this long to say which joints it moves
LOOK_S = 0.3  # pictures are decoded this often: looking at each would make this listener the slow one
UNKNOWN, UNNAMED = "NODE_NAME_UNKNOWN", "an unnamed node"  # heard of the endpoint, not (yet) of its node
# Deep and best effort: what this listener is too slow for must not look like a loss of the transport.
LISTEN_QOS = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=50,
)


@contextlib.contextmanager
def _shipped_profiles() -> Iterator[None]:
    """A participant made here hears what the policy would hear; no later graph takes that for the user's choice."""
    ours = {key: value for key, value in node_environment().items() if "PROFILES" in key}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            del os.environ[key]


class Listener:
    """A node of its own context, so that a command line may come and go."""

    def __init__(self, namespace: str = "", use_sim_time: bool = False) -> None:
        self.context = rclpy.Context()
        overrides = [Parameter("use_sim_time", value=True)] if use_sim_time else []
        with _shipped_profiles():
            rclpy.init(context=self.context)
            self.node: Node = rclpy.create_node(
                f"embodiment_check_{os.getpid()}",
                namespace=namespace,
                context=self.context,
                parameter_overrides=overrides,
            )
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def close(self) -> None:
        """Leaves the graph."""
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def spin(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Spins for ``seconds``, or until something holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until():
            self.executor.spin_once(timeout_sec=0.02)

    def settle(self) -> None:
        """Spins until the graph has not grown for a while, at most ``DISCOVERY_S``; two topics are this node's own."""
        known: dict[str, tuple[str, ...]] = {}
        end = time.monotonic() + DISCOVERY_S
        quiet_since = time.monotonic()
        while time.monotonic() < end and (len(known) < 3 or time.monotonic() - quiet_since < QUIET_S):
            self.spin(0.1)
            if self.topics() != known:
                known, quiet_since = self.topics(), time.monotonic()

    def now_ns(self) -> int:
        """ROS time."""
        return int(self.node.get_clock().now().nanoseconds)

    def topics(self) -> dict[str, tuple[str, ...]]:
        """Topic → its types."""
        return {name: tuple(types) for name, types in self.node.get_topic_names_and_types()}

    def publishers(self, topic: str, ours: QoSProfile | None = None) -> tuple[Endpoint, ...]:
        """Who publishes, and whether a subscription with the profile ``ours`` would hear it."""
        infos = self.node.get_publishers_info_by_topic(topic)
        return tuple(_endpoint(i, ours and _conflict(i.qos_profile, ours)) for i in infos if self._other(i))

    def subscribers(self, topic: str, ours: QoSProfile | None = None) -> tuple[Endpoint, ...]:
        """Who listens, and whether it would hear a publisher with the profile ``ours``."""
        infos = self.node.get_subscriptions_info_by_topic(topic)
        return tuple(_endpoint(i, ours and _conflict(ours, i.qos_profile)) for i in infos if self._other(i))

    def _other(self, info: Any) -> bool:
        return bool(info.node_name != self.node.get_name())

    def joints_of(self, nodes: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Node → its parameter ``joints``, as ros2_control's controllers have it; nodes without one are left out."""
        clients = {name: self.node.create_client(GetParameters, f"{name}/get_parameters") for name in nodes}
        self.spin(ASK_S, lambda: all(client.service_is_ready() for client in clients.values()))
        request = GetParameters.Request(names=["joints"])
        futures = {name: client.call_async(request) for name, client in clients.items() if client.service_is_ready()}
        self.spin(ASK_S, lambda: all(future.done() for future in futures.values()))
        found: dict[str, tuple[str, ...]] = {}
        for name, future in futures.items():
            if future.done() and future.exception() is None and future.result().values:
                joints = tuple(future.result().values[0].string_array_value)
                if joints:
                    found[name] = joints
        for client in clients.values():
            self.node.destroy_client(client)
        return found


@contextlib.contextmanager
def listening(namespace: str = "", use_sim_time: bool = False) -> Iterator[Listener]:
    """A listener for as long as the context lasts."""
    listener = Listener(namespace, use_sim_time)
    try:
        yield listener
    finally:
        listener.close()


def _endpoint(info: Any, conflict: str | None) -> Endpoint:
    known = UNKNOWN not in info.node_name
    name = f"{info.node_namespace.rstrip('/')}/{info.node_name}" if known else UNNAMED
    return Endpoint(name, info.topic_type, conflict or "")


def _conflict(publisher: QoSProfile, subscription: QoSProfile) -> str:
    """Why the two would not talk; empty where they would, or where the middleware does not say."""
    compatibility, reason = qos_check_compatible(_spelt_out(publisher), _spelt_out(subscription))
    return str(reason).strip(" ;") if compatibility == QoSCompatibility.ERROR else ""


def _spelt_out(profile: QoSProfile) -> QoSProfile:
    """The profile with "no limit" where a duration is left at its default, which the comparison takes for 0 s."""
    durations = {"deadline": profile.deadline, "liveliness_lease_duration": profile.liveliness_lease_duration}
    return QoSProfile(
        reliability=profile.reliability,
        durability=profile.durability,
        liveliness=LivelinessPolicy.AUTOMATIC if profile.liveliness.value == 0 else profile.liveliness,
        depth=profile.depth or 1,
        **{name: value if value.nanoseconds else Infinite for name, value in durations.items()},
    )


def stamp_of(data: bytes) -> int:
    """Nanoseconds of ``header.stamp`` of a serialised message that begins with a std_msgs/Header.

    Deserialising a picture only to read its stamp would cost more than its transport.
    """
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


class _Probe:
    """Hears one topic, and writes into its evidence; looks into a message every ``look_s`` seconds."""

    look_s = 0.0

    def __init__(self, listener: Listener, evidence: TopicEvidence, message_type: type) -> None:
        self._listener, self._evidence, self._type = listener, evidence, message_type
        self._losses = LossCounter()
        self._looked = 0.0
        listener.node.create_subscription(message_type, evidence.name, self._on_message, LISTEN_QOS, raw=True)

    def _on_message(self, data: bytes, info: dict[str, Any]) -> None:
        evidence = self._evidence
        evidence.arrivals_ns.append(self._listener.now_ns())
        evidence.stamps_ns.append(stamp_of(data))
        number = info.get("publication_sequence_number")
        self._losses.heard(evidence.name, evidence.name, number, lambda: len(evidence.publishers) == 1)
        evidence.lost = self._losses.lost.total()
        if time.monotonic() - self._looked >= self.look_s:
            self._looked = time.monotonic()
            self.look(deserialize_message(data, self._type))

    def look(self, msg: Any) -> None:
        """Looks into one message."""
        raise NotImplementedError


class _CameraProbe(_Probe):
    look_s = LOOK_S

    def look(self, msg: Any) -> None:
        self._evidence.pictures.append(picture_of(msg))


class _StateProbe(_Probe):
    def __init__(
        self, listener: Listener, evidence: TopicEvidence, message_type: type, groups: Sequence[StateGroup]
    ) -> None:
        self._groups = groups
        super().__init__(listener, evidence, message_type)

    def look(self, msg: Any) -> None:
        if isinstance(msg, JointState):
            # Arm and gripper may be published apart, by turns on one topic.
            self._evidence.names = tuple(dict.fromkeys([*self._evidence.names, *msg.name]))
            self._evidence.short = tuple(dict.fromkeys([*self._evidence.short, *msg.name[len(msg.position) :]]))
        self._evidence.values.update(state_from_message(self._groups, msg))


class _ScanProbe(_Probe):
    """Judges scans as the controller's obstacle stop does."""

    look_s = LOOK_S

    def __init__(self, listener: Listener, evidence: TopicEvidence, stop: ObstacleStopSpec) -> None:
        self._stop = stop
        super().__init__(listener, evidence, LaserScan)

    def look(self, msg: Any) -> None:
        now_ns = self._listener.now_ns()
        guard = ObstacleStop(self._stop, (1.0, 1.0), 1.0, 0.05)
        guard.take(replace(scan_from_message(msg), stamp_ns=0), now_ns)
        ways = {"ahead": 0.0, "behind": math.pi}
        unseen = tuple(name for name, direction in ways.items() if not guard.sees(direction))
        self._evidence.scan = ScanEvidence(len(msg.ranges), guard.problem(now_ns) or "", unseen)


def picture_of(msg: Image | CompressedImage) -> Picture:
    """What a picture is, and why the policy could not use it."""
    encoding = msg.encoding if isinstance(msg, Image) else (msg.format or "compressed")
    try:
        pixels = image_to_rgb(msg) if isinstance(msg, Image) else compressed_to_rgb(msg)
    except (ValueError, UserError) as error:
        width, height = (msg.width, msg.height) if isinstance(msg, Image) else (0, 0)
        return Picture(encoding, width, height, problem=str(error))
    dark = np.count_nonzero(pixels[::4, ::4] > BLACK_LEVEL) <= BLACK_SHARE * pixels[::4, ::4].size
    return Picture(encoding, pixels.shape[1], pixels.shape[0], bool(dark))


def check_live(
    robot: Embodiment, *, seconds: float = 3.0, namespace: str = "", use_sim_time: bool = False
) -> list[Finding]:
    """Compares a robot's YAML with what runs now.

    Args:
        robot: the embodiment.
        seconds: how long to listen.
        namespace: of the graph; topics in the YAML that begin with "/" stay where they are.
        use_sim_time: judge stamps by /clock.
    """
    with listening(namespace, use_sim_time) as listener:
        resolve = listener.node.resolve_topic_name
        inputs = [camera.topic for camera in robot.cameras] + [group.topic for group in robot.state]
        stop = robot.safety.obstacle_stop
        inputs += [stop.topic] if stop is not None else []
        outputs = [group.command.topic for group in robot.actions]

        def complete() -> bool:
            ends = [listener.publishers(resolve(t)) for t in inputs] + [
                listener.subscribers(resolve(t)) for t in outputs
            ]
            return all(ends) and all(endpoint.node != UNNAMED for found in ends for endpoint in found)

        listener.spin(DISCOVERY_S, complete)
        graph = listener.topics()
        seen = {topic: _see(listener, resolve(topic), topic, robot) for topic in {*inputs, *outputs}}
        _ask_joints(listener, [seen[topic] for topic in outputs])
        probes = _probes(listener, robot, seen)
        listener.spin(seconds)
        for topic, evidence in seen.items():  # by now also those are named that were only just found at the beginning
            later = _see(listener, resolve(topic), topic, robot)
            told = {endpoint.node: endpoint.joints for endpoint in evidence.subscribers}
            evidence.publishers = later.publishers or evidence.publishers
            evidence.subscribers = tuple(replace(e, joints=told.get(e.node, ())) for e in later.subscribers)
        clock = bool(listener.publishers("/clock"))
        del probes
        return judge(robot, Evidence(graph, seen, seconds, clock, use_sim_time))


def _see(listener: Listener, name: str, topic: str, robot: Embodiment) -> TopicEvidence:
    ours = CAMERA_QOS if any(camera.topic == topic for camera in robot.cameras) else STATE_QOS
    commanded = any(group.command.topic == topic for group in robot.actions)
    return TopicEvidence(
        name,
        listener.publishers(name, None if commanded else ours),
        listener.subscribers(name, COMMAND_QOS if commanded else None),
    )


def _ask_joints(listener: Listener, topics: Sequence[TopicEvidence]) -> None:
    nodes = sorted({endpoint.node for topic in topics for endpoint in topic.subscribers} - {UNNAMED})
    joints = listener.joints_of(nodes)
    for topic in topics:
        topic.subscribers = tuple(replace(e, joints=joints.get(e.node, ())) for e in topic.subscribers)


def _probes(listener: Listener, robot: Embodiment, seen: Mapping[str, TopicEvidence]) -> list[_Probe]:
    probes: list[_Probe] = []
    for camera in robot.cameras:
        if _carries(seen[camera.topic], IMAGE_MESSAGES[camera.transport]):
            probes.append(_CameraProbe(listener, seen[camera.topic], image_message_type(camera)))
    for topic, groups in groups_by_topic(robot.state).items():
        if _carries(seen[topic], STATE_MESSAGES[groups[0].source]):
            probes.append(_StateProbe(listener, seen[topic], state_message_type(groups), groups))
    stop = robot.safety.obstacle_stop
    if stop is not None and _carries(seen[stop.topic], SCAN_MESSAGE):
        probes.append(_ScanProbe(listener, seen[stop.topic], stop))
    return probes


def _carries(seen: TopicEvidence, message: str) -> bool:
    return message in seen.published


def graph_topics(seconds: float = 3.0, namespace: str = "") -> tuple[GraphTopic, ...]:
    """Every topic of the running graph, with joint names, sizes of pictures and joints of controllers where it tells.

    Raises:
        UserError: nothing runs.
    """
    with listening(namespace) as listener:
        listener.settle()
        names: dict[str, tuple[str, ...]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        graph = {n: types for n, types in listener.topics().items() if n not in ("/rosout", "/parameter_events")}
        for name, types in graph.items():
            _listen_once(listener, name, types, names, sizes)
        commands = [name for name, types in graph.items() if set(types) & set(COMMAND_MESSAGES.values())]
        listeners = {name: listener.subscribers(name) for name in commands}
        asked = sorted({endpoint.node for endpoints in listeners.values() for endpoint in endpoints} - {UNNAMED})
        joints = listener.joints_of(asked)
        listener.spin(seconds)
        topics = []
        for name, types in sorted(graph.items()):
            told = [joints[e.node] for e in listeners.get(name, ()) if e.node in joints]
            published, subscribed = bool(listener.publishers(name)), bool(listener.subscribers(name))
            heard = names.get(name) or (told[0] if told else ())
            topics.append(GraphTopic(name, types, published, subscribed, heard, sizes.get(name)))
    if not any(topic.published or topic.subscribed for topic in topics):
        raise UserError("--from-graph: nothing runs here; fix: start the drivers, and compare ROS_DOMAIN_ID")
    return tuple(topics)


def _listen_once(
    listener: Listener,
    name: str,
    types: Sequence[str],
    names: dict[str, tuple[str, ...]],
    sizes: dict[str, tuple[int, int]],
) -> None:
    def on_joints(msg: JointState) -> None:
        # Several drivers may share a topic, each with its own joints.
        names[name] = tuple(dict.fromkeys([*names.get(name, ()), *msg.name]))

    def on_picture(msg: Image | CompressedImage) -> None:
        if name not in sizes:
            picture = picture_of(msg)
            if picture.width and not picture.problem:
                sizes[name] = (picture.width, picture.height)

    if STATE_MESSAGES["joint_state"] in types:
        listener.node.create_subscription(JointState, name, on_joints, LISTEN_QOS)
    for transport, message in IMAGE_MESSAGES.items():
        if message in types:
            camera = CameraSpec(view="any", topic=name, transport=transport)  # type: ignore[arg-type]
            listener.node.create_subscription(image_message_type(camera), name, on_picture, CAMERA_QOS)
