"""The other end of every topic of the nodes under test: drivers, cameras, clock, policy, operator; each may fail.

The bench spins in a thread of its own, so that drivers go on while a fault is being provoked, and every time that is
measured is a stamp of the process that acted: how late this one hears of it is no matter.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from command_trace import Tick, unsafe
from diagnostic_msgs.msg import DiagnosticArray
from graph_support import Graph
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_ros.bringup import NodeSpec
from qwen_vla_ros.messages import chunk_to_message, groups_by_topic, numpy_to_image, state_to_joint_state
from qwen_vla_ros.node_utils import (
    CAMERA_QOS,
    CHUNK_TOPIC,
    COMMAND_QOS,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
    ns_to_stamp,
    stamp_to_ns,
)

ROBOT = load_embodiment("aloha")
START = np.array([value for group in ROBOT.actions for value in group.start])
WATCHDOG_MS = ROBOT.safety.watchdog_ms
STATE_AGE_MS = max(group.max_age_ms for group in ROBOT.state)
CAMERA_AGE_MS = max(camera.max_age_ms for camera in ROBOT.cameras)
TOLERANCE_MS = 500  # processes of a busy test machine may be late by this much: 340 were measured at 7 per core
PAUSE_MS = 1000  # no fault of another process may silence the controller for longer; such a machine alone may for half
STATUS_MS = 500  # nodes report at least this often
SILENT_S = 0.3  # so many periods of the controller that it will not go on
TIMEOUT_S = 60.0  # how long until a wait has failed, on any machine; never how long something should take
SWING, SWING_S = 0.3, 4.0  # the good plan: waists and grippers swing so far around the start pose, in this time
ON_PLAN = 0.05  # the share of the swing by which commands may differ from it, when nothing was wrong for a while
WAISTS, GRIPPERS = [0, 7], [6, 13]
STATE_HZ, CHUNK_HZ, CAMERA_HZ, CLOCK_HZ = 50.0, 5.0, 15.0, 100.0
PICTURE = (120, 160, 3)
EVERY_QOS = QoSProfile(depth=1000)  # the bench may fall behind, but must not miss what it checks
INSTRUCTION = "pick up the red cube"


@dataclass(frozen=True)
class Status:
    """A node's status: when it said so (its own clock) and when that was heard (this process's), in seconds."""

    at_s: float
    heard_s: float
    message: str
    values: Mapping[str, str]

    def count(self, key: str) -> int:
        return int(self.values.get(key, 0))


def robot_yaml(folder: Path) -> Path:
    """The shipped robot, commanded with messages that carry positions and rates."""
    path = folder / "robot.yaml"
    text = ROBOT.source_text.replace("simulation_kind: forward_command", "simulation_kind: joint_trajectory")
    assert text.count("simulation_kind: joint_trajectory") == len(ROBOT.actions)
    path.write_text(text)
    return path


def swing_at(time_s: np.ndarray) -> np.ndarray:
    """How far the good plan is from the start pose, in rad."""
    return SWING * np.sin(2 * np.pi * time_s / SWING_S)


class Bench:
    """Runs ``specs`` and surrounds them.

    Args:
        specs: the nodes under test; the first is the one ``healthy`` looks at.
        folder: for logs.
        drivers: publish joint states that follow the commands; a simulator in the graph does it otherwise.
        clock: publish /clock; the nodes follow it.
        cameras: publish pictures; the nodes hold a policy.
        starts: whether the nodes start now; otherwise ``start`` does it.

    Attributes:
        mangle, plan, picture, clock_step: what the drivers, the policy, the cameras and the clock send; a fault puts
            its own in place, ``healthy`` puts them right again.
        rounds: how often joint states were published.
        ticks: group name → every command heard since ``healthy``.
    """

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        folder: Path,
        *,
        drivers: bool = True,
        clock: bool = False,
        cameras: bool = False,
        starts: bool = True,
    ) -> None:
        self.robot: Embodiment = ROBOT
        self.folder = folder
        self.specs = {spec.name: spec for spec in specs}
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("bench", context=self.context)
        self.statuses: dict[str, list[Status]] = {}
        self.chunks: list[tuple[float, JointTrajectory]] = []
        self.ticks: dict[str, list[Tick]] = {group.name: [] for group in ROBOT.actions}
        self.pose = dict(zip(ROBOT.channels, START.tolist(), strict=True))
        self.clock_ns = 1_000_000_000_000
        self.simulated = clock
        self._drivers, self._cameras = drivers, cameras
        self._lets_go = not drivers
        self.rounds = 0
        self.heal()
        self._publish_everything()
        self._listen()
        self.graph = Graph(specs if starts else [], folder)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="bench", daemon=True)
        self._thread.start()

    # --- what surrounds the nodes ----------------------------------------------------------------------------------

    def heal(self) -> None:
        self.mangle: Callable[[str, JointState], JointState | None] = lambda _topic, msg: msg
        self.plan: Callable[[], ActionChunk | JointTrajectory | None] = self.chunk
        self.picture: Callable[[str, int], Image | None] = noise
        self.clock_step: Callable[[int], int] = lambda elapsed_ns: elapsed_ns
        self.follows = True

    def _publish_everything(self) -> None:
        node = self.node
        self.topics = groups_by_topic(ROBOT.state) if self._drivers else {}
        self.state_publishers = {topic: node.create_publisher(JointState, topic, COMMAND_QOS) for topic in self.topics}
        self.instructions = node.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
        if self._drivers:
            node.create_timer(1.0 / STATE_HZ, self._publish_states)
        if self._drivers and not self._cameras:
            self.chunk_publisher = node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
            node.create_timer(1.0 / CHUNK_HZ, self._publish_plan)
        if self._cameras:
            self.camera_publishers = {c.view: node.create_publisher(Image, c.topic, CAMERA_QOS) for c in ROBOT.cameras}
            node.create_timer(1.0 / CAMERA_HZ, self._publish_pictures)
            self.instructions.publish(String(data=INSTRUCTION))
        if self.simulated:
            self._ticked = time.monotonic_ns()
            self._clock_publisher = node.create_publisher(Clock, "/clock", COMMAND_QOS)
            node.create_timer(1.0 / CLOCK_HZ, self._publish_clock)

    def hang_up(self, *topics: str) -> None:
        """Takes the publishers of state topics off the graph: drivers that ended."""
        for topic in topics:
            self.node.destroy_publisher(self.state_publishers.pop(topic))

    def show_up(self, *topics: str) -> float:
        """Puts them on the graph (again), with everything that must be discovered anew; returns when."""
        for topic in topics:
            self.state_publishers[topic] = self.node.create_publisher(JointState, topic, COMMAND_QOS)
        return time.time()

    def heard_of(self, rounds: int = 25) -> None:
        """Waits until so many more rounds of joint states are out: the nodes know what the drivers say now."""
        before = self.rounds
        self.wait(lambda: self.rounds > before + rounds, "joint states")

    def _publish_states(self) -> None:
        self.rounds += 1
        for topic, publisher in list(self.state_publishers.items()):
            msg = state_to_joint_state(self.topics[topic], self.pose, ns_to_stamp(self.now_ns()))
            changed = self.mangle(topic, msg)
            if changed is not None:
                publisher.publish(changed)

    def _publish_plan(self) -> None:
        planned = self.plan()
        if planned is not None:
            self.send(planned)

    def _publish_pictures(self) -> None:
        stamp_ns = self.now_ns()
        for view, publisher in self.camera_publishers.items():
            msg = self.picture(view, stamp_ns)
            if msg is not None:
                publisher.publish(msg)

    def _publish_clock(self) -> None:
        now = time.monotonic_ns()
        self.clock_ns += self.clock_step(now - self._ticked)
        self._ticked = now
        self._clock_publisher.publish(Clock(clock=ns_to_stamp(self.clock_ns)))

    def _listen(self) -> None:
        node = self.node
        node.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)
        node.create_subscription(JointTrajectory, CHUNK_TOPIC, self._on_chunk, EVERY_QOS)
        for group in ROBOT.actions:
            callback = partial(self._on_command, group.name)
            node.create_subscription(JointTrajectory, group.command.topic, _informed(callback), EVERY_QOS)

    def _on_command(self, name: str, msg: JointTrajectory, info: Mapping[str, Any]) -> None:
        group = next(group for group in ROBOT.actions if group.name == name)
        position = np.asarray(group.command.map.to_channel(np.array(msg.points[0].positions)))
        rate = np.array(msg.points[0].velocities) / group.command.map.scale
        number, at_s = int(info["publication_sequence_number"]), info["source_timestamp"] * 1e-9
        self.ticks[name].append(Tick(number, at_s, position, rate))
        if self.follows:
            self.pose.update(zip(group.channels, position.tolist(), strict=True))

    def _on_status(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            values = {pair.key: pair.value for pair in status.values}
            heard = Status(stamp_to_ns(msg.header.stamp) * 1e-9, time.time(), status.message, values)
            self.statuses.setdefault(status.name, []).append(heard)

    def _on_chunk(self, msg: JointTrajectory) -> None:
        self.chunks.append((time.time(), msg))

    def _spin(self) -> None:
        while not self._stopping.is_set():
            self.executor.spin_once(timeout_sec=0.1)

    # --- what a fault uses -----------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The nodes' ROS time."""
        return self.clock_ns if self.simulated else time.time_ns()

    def chunk(self, *, age_s: float = 0.0) -> ActionChunk:
        """A good plan, observed ``age_s`` ago: waists and grippers swing, always in the same phase."""
        stamp_ns = self.now_ns() - round(age_s * 1e9)
        actions = np.tile(START, (ROBOT.control.horizon, 1))
        swing = swing_at(stamp_ns * 1e-9 + ROBOT.period_s * np.arange(1, ROBOT.control.horizon + 1))
        actions[:, WAISTS] += swing[:, None]
        actions[:, GRIPPERS] += swing[:, None] - SWING
        return ActionChunk(actions, ROBOT.channels, stamp_ns, ROBOT.period_s)

    def send(self, planned: ActionChunk | JointTrajectory) -> float:
        """Publishes a chunk; returns when, in seconds of the system clock."""
        msg = chunk_to_message(planned) if isinstance(planned, ActionChunk) else planned
        self.chunk_publisher.publish(msg)
        return time.time()

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Waits until ``condition()`` is true and returns its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                last = {name: told[-1].message for name, told in self.statuses.items()}
                raise AssertionError(f"timed out waiting for {what}; last: {last}\n{self.graph.log()}")
            time.sleep(0.005)
        return value

    def told(self, name: str, text: str, after_s: float = 0.0) -> Status:
        """The first status of ``name`` heard after ``after_s`` (system clock) whose message holds ``text``."""

        def found() -> Status | None:
            statuses = self.statuses.get(name, [])
            return next((s for s in statuses if s.heard_s > after_s and text in s.message), None)

        return self.wait(found, f"{name}: {text}")

    def last(self, name: str = "controller") -> Status:
        return self.statuses[name][-1]

    def count(self, key: str, name: str = "controller") -> int:
        """A counter of the newest status."""
        return self.last(name).count(key)

    def counted(self, key: str, more_than: int, name: str = "controller") -> Status:
        return self.wait(lambda: self.count(key, name) > more_than and self.last(name), f"{key} > {more_than}")

    def goes_on(self, since_s: float, chunks: int = 5) -> None:
        """Waits until so many more chunks were accepted and the robot moves."""
        self.counted("chunks_accepted", self.count("chunks_accepted") + chunks)
        self.wait(lambda: self.running_since(since_s), "the plan to go on")

    def call(self, service: str, service_type: type = Trigger, request: Any = None) -> Any:
        """Calls a service and returns its answer."""
        client = self.node.create_client(service_type, service)
        try:
            self.wait(client.service_is_ready, f"service {service}")
            future = client.call_async(request or service_type.Request())
            self.wait(future.done, f"the answer of {service}")
            return future.result()
        finally:
            self.node.destroy_client(client)

    def set_text(self, node: str, name: str, value: str) -> Any:
        """Sets a string parameter of a node and returns the result."""
        wanted = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
        request = SetParameters.Request(parameters=[Parameter(name=name, value=wanted)])
        return self.call(f"{node}/set_parameters", SetParameters, request).results[0]

    def refuses_another_robot(self, node: str) -> float:
        """Asks an active node to become another robot; returns in ms how soon it refused, the plan going on."""
        now_s = time.time()
        answer = self.set_text(node, "embodiment", "widowx")
        took_ms = (time.time() - now_s) * 1e3
        assert not answer.successful and "active: deactivate first" in answer.reason
        self.goes_on(now_s)
        return took_ms

    def moving(self, since_s: float = 0.0) -> list[Tick]:
        """Commands of all groups since a time of the system clock that moved something."""
        return [t for ticks in self.ticks.values() for t in ticks if t.at_s > since_s and t.rate.any()]

    def at_rest(self) -> bool:
        """Whether the last 15 commands of every group stood still."""
        return all(len(t) >= 15 and not any(tick.rate.any() for tick in t[-15:]) for t in self.ticks.values())

    def silent(self) -> bool:
        """Whether no group has been commanded for a while, and what it was told last was to stand."""
        last = [ticks[-1] for ticks in self.ticks.values() if ticks]
        return all(time.time() > tick.at_s + SILENT_S and not tick.rate.any() for tick in last)

    def rested_s(self, since_s: float) -> float:
        """Waits for rest; returns when the last moving command was sent, at least ``since_s`` (system clock)."""
        self.wait(lambda: self.ticks_since(since_s) > 15 and self.at_rest(), "rest")
        return max([t.at_s for t in self.moving(since_s)], default=since_s)

    def ticks_since(self, since_s: float) -> int:
        """Commands of the group that had fewest."""
        return min(sum(t.at_s > since_s for t in ticks) for ticks in self.ticks.values())

    def command(self, channel: str) -> np.ndarray:
        """(n,) all commands of one channel since ``healthy``."""
        group = next(group for group in ROBOT.actions if channel in group.channels)
        return np.array([tick.position[group.channels.index(channel)] for tick in list(self.ticks[group.name])])

    def on_plan(self) -> bool:
        """Whether the left waist has swung as planned for 15 commands.

        Position and rate of a swing lie on a circle, whatever the time: a controller that is late is on it, one that
        still comes back from somewhere else is not.
        """
        last = self.ticks["left_arm"][-15:]
        away = np.array([tick.position[0] - START[0] for tick in last]) / SWING
        rate = np.array([tick.rate[0] for tick in last]) / (2 * np.pi * SWING / SWING_S)
        return len(last) == 15 and bool(np.all(np.abs(np.hypot(away, rate) - 1.0) < ON_PLAN))

    def off_plan(self) -> float:
        """How far the left waist's commands since ``healthy`` were from the good plan, in rad.

        Whatever the plan said in the ``TOLERANCE_MS`` before a command counts as right, for a busy machine may be so
        late. For nodes on the system clock.
        """
        ticks = list(self.ticks["left_arm"])
        due_s = np.array([tick.at_s for tick in ticks])[:, None] - np.linspace(-0.1, TOLERANCE_MS * 1e-3, 61)
        plan = START[0] + swing_at(due_s)
        position = np.array([tick.position[0] for tick in ticks])
        return float(np.maximum(plan.min(axis=1) - position, position - plan.max(axis=1)).max())

    # --- life ------------------------------------------------------------------------------------------------------

    def healthy(self) -> None:
        """Puts everything right, waits until the robot moves as planned, and forgets what was heard."""
        self.heal()
        self.revive()
        self.bring_back()
        now_s = time.time()
        self.wait(lambda: self.mode_since(now_s), "the controller's status")
        if self._drivers and self.mode_since(now_s) in ("idle", "estopped", "fault"):  # an earlier fault went wrong
            self.call("qwen_vla/reset")
            self.call("qwen_vla/start")
        self.wait(lambda: self.running_since(now_s), "motion")
        if self._drivers and not self._cameras:  # else somebody else plans
            self.wait(self.on_plan, "the plan")
        for ticks in self.ticks.values():
            ticks.clear()
        self.wait(lambda: len(self.moving()) > 20, "commands that move something")

    def bring_back(self) -> None:
        """What a person does where nonsense has driven the arms far off, perhaps against the wall of their box."""
        if not self._drivers or max(abs(self.pose[c] - x) for c, x in zip(ROBOT.channels, START, strict=True)) < 0.7:
            return
        self.call("qwen_vla/reset")
        now_s = time.time()
        self.call("qwen_vla/stop")
        self.told("controller", "idle", now_s)
        self.wait(self.silent, "silence")  # and not rest: who stands already says nothing more
        self.pose.update(zip(ROBOT.channels, START.tolist(), strict=True))
        self.heard_of()
        self.call("qwen_vla/start")

    def revive(self) -> None:
        """Starts what an earlier fault left dead: its row says so, and the next ones are none the worse."""
        for name, process in self.graph.processes.items():
            if process.poll() is not None:
                self.start(name)

    def running_since(self, now_s: float) -> bool:
        """Whether the controller has said since ``now_s`` that it plays chunks, and nothing else after that."""
        return self.mode_since(now_s) == "running"

    def mode_since(self, now_s: float) -> str:
        """The controller's mode as it said last, if it has said anything since ``now_s``."""
        last = self.statuses["controller"][-1] if self.statuses.get("controller") else None
        return last.values.get("mode", "") if last is not None and last.heard_s > now_s else ""

    def unsafe(self) -> list[str]:
        """What was wrong with the commands since ``healthy``."""
        found = []
        for name, ticks in self.ticks.items():
            found += unsafe(ROBOT, name, list(ticks), lets_go=self._lets_go)
        return found

    def start(self, name: str) -> None:
        """Starts a node again that has ended; what its predecessor said is forgotten."""
        spec = self.specs[name]
        self.statuses.pop(name.removesuffix("_node"), None)
        again = Graph([replace(spec)], self.folder)
        self.graph.processes[name], self.graph.logs[name] = again.processes[name], again.logs[name]

    def signal(self, name: str, number: int) -> float:
        """Sends a signal to a node; returns when, in seconds of the system clock."""
        now_s = time.time()
        os.kill(self.graph.processes[name].pid, number)
        return now_s

    def kill(self, name: str) -> float:
        """SIGKILL; returns when."""
        now_s = self.signal(name, signal.SIGKILL)
        self.graph.processes[name].wait(timeout=TIMEOUT_S)
        return now_s

    def close(self) -> None:
        self.graph.close()
        self._stopping.set()
        self._thread.join(timeout=5.0)
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def _informed(callback: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A function of exactly two arguments: rclpy looks at the signature to decide whether to hand over the info."""

    def on_message(msg: Any, info: Any) -> None:
        callback(msg, info)

    return on_message


def noise(view: str, stamp_ns: int, seed: int | None = None) -> Image:
    """A picture as of a working camera: never twice the same."""
    rng = np.random.default_rng(seed if seed is not None else stamp_ns)
    return numpy_to_image(rng.integers(30, 220, PICTURE, dtype=np.uint8), "rgb8", ns_to_stamp(stamp_ns), view)
