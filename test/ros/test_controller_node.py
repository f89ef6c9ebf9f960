"""The controller as a real process on real ROS 2: commands flow, stop, hold and stay safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from domain_coordinator import domain_id  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from rclpy.client import Client  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Bool, Float64MultiArray, String  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from qwen_vla_core.embodiment import Embodiment, load_embodiment  # noqa: E402
from qwen_vla_core.interfaces import ActionChunk  # noqa: E402
from qwen_vla_ros.commands import adapter_for  # noqa: E402
from qwen_vla_ros.estop import ANY_QOS, ESTOP_REQUEST_TOPIC, ESTOPPED_TOPIC  # noqa: E402
from qwen_vla_ros.messages import (  # noqa: E402
    chunk_to_message,
    groups_by_topic,
    plan_from_message,
    state_to_joint_state,
)
from qwen_vla_ros.node_utils import (  # noqa: E402
    CHUNK_TOPIC,
    COMMAND_QOS,
    CONSUMED_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    PLAN_TOPIC,
    STATUS_QOS,
    STATUS_TOPIC,
)

ROOT = Path(__file__).resolve().parents[2]
ALOHA = load_embodiment("aloha")
START = np.array([value for group in ALOHA.actions for value in group.start])
PERIOD_S = 1.0 / ALOHA.control.controller_rate_hz
TIMEOUT_S = 60.0  # how long until a wait has failed, on any machine; never how long something should take
LATENCY_NS = 250_000_000  # chunks arrive this long after their observation, as from a real policy
EVERY_QOS = QoSProfile(depth=1000)  # a robot this slow may fall behind, but must not miss what it checks


class FakeRobot:
    """The other end of every topic: publishes joint states that follow the commands, and keeps what it saw."""

    def __init__(self, domain: int, embodiment: Embodiment) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("fake_robot", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.embodiment = embodiment
        self.pose = dict(zip(embodiment.channels, START, strict=True))
        self.commands: dict[str, list[tuple[float, np.ndarray]]] = {group.name: [] for group in embodiment.actions}
        self.statuses: list[dict[str, str]] = []
        self.consumed: list[JointTrajectory] = []
        self.plans: list[JointTrajectory] = []
        self.clients: dict[str, Client] = {}
        self.publish_states = True
        self.chunk_action: np.ndarray | None = None
        self.latency_ns = 0
        adapter = adapter_for("forward_command")
        for group in embodiment.actions:

            def on_command(msg: Float64MultiArray, group=group) -> None:
                values = group.command.map.to_channel(adapter.decode(group, msg))
                self.commands[group.name].append((time.monotonic(), values))
                self.pose.update(zip(group.channels, values, strict=True))

            self.node.create_subscription(Float64MultiArray, group.command.topic, on_command, EVERY_QOS)
        self.node.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)
        self.node.create_subscription(JointTrajectory, CONSUMED_TOPIC, self.consumed.append, COMMAND_QOS)
        self.node.create_subscription(JointTrajectory, PLAN_TOPIC, self.plans.append, EVERY_QOS)
        self.instruction_publisher = self.node.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
        self.topics = groups_by_topic(embodiment.state)
        self.state_publishers = {topic: self.node.create_publisher(JointState, topic, 5) for topic in self.topics}
        self.chunk_publisher = self.node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
        self.node.create_timer(0.02, self._publish_states)
        self.node.create_timer(0.1, self._publish_chunk)

    def _publish_states(self) -> None:
        if self.publish_states:
            for topic, groups in self.topics.items():
                stamp = self.node.get_clock().now().to_msg()
                self.state_publishers[topic].publish(state_to_joint_state(groups, self.pose, stamp))

    def _publish_chunk(self) -> None:
        if self.chunk_action is not None:
            self.chunk_publisher.publish(chunk_to_message(self.chunk(self.chunk_action)))

    def _on_status(self, msg: DiagnosticArray) -> None:
        self.statuses += [{v.key: v.value for v in s.values} | {"message": s.message} for s in msg.status]

    def chunk(self, action: np.ndarray) -> ActionChunk:
        actions = np.tile(action, (self.embodiment.control.horizon, 1))
        stamp = self.node.get_clock().now().nanoseconds - self.latency_ns
        return ActionChunk(actions, self.embodiment.channels, stamp, self.embodiment.period_s)

    def wait(self, condition: Callable[[], object], what: str = "") -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"timed out: {what}; last status {self.statuses[-1:]}"
            self.executor.spin_once(timeout_sec=0.05)

    def wait_mode(self, mode: str, reason: str = "") -> dict[str, str]:
        seen = len(self.statuses) - 1
        self.wait(
            lambda: any(self._is(s, mode, reason) for s in self.statuses[max(seen, 0) :]), what=f"{mode} {reason}"
        )
        return next(s for s in reversed(self.statuses) if self._is(s, mode, reason))

    def wait_statuses(self, number: int) -> None:
        """Half a second each."""
        seen = len(self.statuses)
        self.wait(lambda: len(self.statuses) >= seen + number, what=f"{number} more statuses")

    @staticmethod
    def _is(status: dict[str, str], mode: str, reason: str) -> bool:
        return status.get("mode") == mode and reason in status.get("reason", "")

    def find(self, name: str, service_type: type = Trigger) -> Client:
        """The client of a service that has been discovered: done ahead, a call costs no more than its answer."""
        if name not in self.clients:
            self.clients[name] = self.node.create_client(service_type, name)
        self.wait(self.clients[name].service_is_ready, what=name)
        return self.clients[name]

    def call(self, name: str, service_type: type = Trigger, request: object = None) -> object:
        client = self.find(name, service_type)
        future = client.call_async(request or service_type.Request())
        self.wait(future.done, what=f"answer of {name}")
        return future.result()

    def count(self) -> int:
        return min(len(commands) for commands in self.commands.values())

    def latest(self) -> np.ndarray:
        return np.concatenate([self.commands[group.name][-1][1] for group in self.embodiment.actions])

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def start_controller(domain: int, *parameters: str, embodiment: str = "aloha") -> subprocess.Popen:
    arguments = [f"embodiment:={embodiment}", *parameters]
    flags = [word for argument in arguments for word in ("-p", argument)]
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "LD_LIBRARY_PATH"):
        environment.pop(name, None) if "_ROS_WHEELS_BOOTSTRAP_COMPLETE" in os.environ else None
    command = [sys.executable, "-m", "qwen_vla_ros.controller_node", "--ros-args", *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def domain() -> Iterator[int]:
    """A fresh ROS domain per test: the latched status of an earlier test's controller must not be heard."""
    with domain_id() as number:
        yield int(number)


@pytest.fixture
def robot(domain: int) -> Iterator[FakeRobot]:
    fake = FakeRobot(domain, ALOHA)
    yield fake
    fake.close()


@pytest.fixture
def controller(domain: int, robot: FakeRobot) -> Iterator[subprocess.Popen]:
    process = start_controller(domain, "simulated:=true")
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_follows_chunks_holds_when_they_stop_and_recovers(robot: FakeRobot, controller: subprocess.Popen) -> None:
    target = START.copy()
    target[0], target[8], target[6] = 0.4, -0.7, 0.3
    robot.wait_mode("holding", "waiting for the first chunk")
    robot.wait(lambda: robot.count() > 3, what="commands")
    np.testing.assert_allclose(robot.latest(), START, atol=1e-3)  # the first command is the measured pose

    # Chunks arrive later than their first actions are due, so that part of every plan is consumed: with fresh stamps a
    # prefix would only show when a chunk happens to come late.
    robot.latency_ns = LATENCY_NS
    robot.chunk_action = target
    robot.wait_mode("running")
    robot.wait(lambda: np.allclose(robot.latest(), target, atol=1e-3), what="the arms to arrive")
    robot.wait(lambda: robot.consumed, what="consumed prefix")
    robot.wait(lambda: robot.plans and len(robot.plans[-1].points) > 10, what="the rest of the plan")
    rest = plan_from_message(robot.plans[-1], ALOHA.channels)
    np.testing.assert_allclose(rest.rows_tc[-1], target)
    assert tuple(robot.consumed[-1].joint_names) == ALOHA.channels and robot.consumed[-1].points

    robot.chunk_action = None
    status = robot.wait_mode("holding", "watchdog: no chunk for")
    robot.wait(lambda: len(robot.plans[-1].points) == 1, what="the end of the plan")
    assert int(status["count.slowed"]) >= 1 and any("chunk late by" in s.get("reason", "") for s in robot.statuses)
    assert PERIOD_S * 1e3 * 0.5 < float(status["period_ms.p50"]) < PERIOD_S * 1e3 * 1.5  # benchmarks measure jitter
    held = robot.latest()
    np.testing.assert_allclose(held, target, atol=2e-3)
    count = robot.count()
    robot.wait(lambda: robot.count() > count + 10, what="hold commands")
    np.testing.assert_allclose(robot.latest(), held, atol=1e-3)

    robot.chunk_action = START
    robot.wait_mode("running")
    robot.wait(lambda: np.allclose(robot.latest(), START, atol=1e-3), what="recovery")


def test_estop_latches_until_reset_and_start(robot: FakeRobot, controller: subprocess.Popen) -> None:
    target = START.copy()
    target[0] = 3.0  # more than a second away from where it is stopped
    robot.find("qwen_vla/estop")
    robot.chunk_action = target
    robot.wait_mode("running")
    robot.wait(lambda: robot.count() and robot.latest()[0] > 0.2, what="motion")
    assert robot.call("qwen_vla/estop").success
    robot.wait_mode("estopped")
    robot.wait(
        lambda: robot.count() and np.ptp([c[1][0] for c in robot.commands["left_arm"][-10:]]) == 0, what="standstill"
    )
    assert robot.latest()[0] < 2.9
    assert not robot.call("qwen_vla/start").success
    assert robot.call("qwen_vla/reset").success
    robot.wait_mode("idle", "reset")
    assert robot.call("qwen_vla/start").success
    robot.wait_mode("running")
    robot.wait(lambda: robot.latest()[0] > 2.95, what="motion after start")


def test_estop_by_topic_latches_also_from_a_button_that_was_pressed_before_the_start(
    robot: FakeRobot, domain: int
) -> None:
    told: list[bool] = []
    robot.node.create_subscription(Bool, ESTOPPED_TOPIC, lambda msg: told.append(msg.data), LATCHED_QOS)
    latching = robot.node.create_publisher(Bool, ESTOP_REQUEST_TOPIC, LATCHED_QOS)
    latching.publish(Bool(data=True))
    robot.chunk_action = START
    process = start_controller(domain, "simulated:=true")
    try:
        robot.wait_mode("estopped", ESTOP_REQUEST_TOPIC)
        robot.wait(lambda: told and told[-1], what="the published state")
        refused = robot.call("qwen_vla/reset")
        assert not refused.success and "publish false" in refused.message
        latching.publish(Bool(data=False))
        robot.wait(lambda: robot.call("qwen_vla/reset").success, what="reset after the button was let go")
        robot.wait(lambda: not told[-1], what="the published release")
        robot.wait_mode("idle", "reset")  # letting go and resetting move nothing
        assert robot.call("qwen_vla/start").success
        robot.wait_mode("running")

        fleeting = robot.node.create_publisher(Bool, ESTOP_REQUEST_TOPIC, ANY_QOS)  # best effort, keeps nothing

        def pressed() -> bool:  # nothing is kept for a controller that has not found the button yet: it says it again
            fleeting.publish(Bool(data=True))
            return robot.statuses[-1]["mode"] == "estopped"

        robot.wait(pressed, what="the button that keeps nothing")
        robot.wait_mode("estopped", ESTOP_REQUEST_TOPIC)
        robot.wait(lambda: told[-1], what="the published state")
        fleeting.publish(Bool(data=False))
        robot.wait_statuses(2)
        assert robot.statuses[-1]["mode"] == "estopped"
    finally:
        process.kill()
        process.communicate()


def test_bad_chunks_are_counted_and_move_nothing(robot: FakeRobot, controller: subprocess.Popen) -> None:
    robot.wait_mode("holding", "waiting for the first chunk")
    robot.wait(lambda: robot.chunk_publisher.get_subscription_count() > 0, what="discovery")
    poisoned = START.copy()
    poisoned[3] = np.nan
    robot.chunk_action = poisoned
    robot.wait(lambda: int(robot.statuses[-1].get("rejected.non_finite", 0)) >= 2, what="rejections")
    assert robot.statuses[-1]["rejected.non_finite.left_arm.worst"] == ALOHA.channels[3]
    robot.chunk_action = None
    robot.chunk_publisher.publish(JointTrajectory(joint_names=["left_waist"]))
    robot.wait(lambda: int(robot.statuses[-1].get("rejected.malformed", 0)) == 1, what="malformed")
    assert robot.statuses[-1]["chunks_accepted"] == "0"
    np.testing.assert_allclose(robot.latest(), START, atol=1e-3)


def test_a_new_instruction_refuses_chunks_in_flight_and_a_withdrawn_one_holds(
    robot: FakeRobot, controller: subprocess.Popen
) -> None:
    robot.wait_mode("holding", "waiting for the first chunk")
    robot.wait(lambda: robot.instruction_publisher.get_subscription_count() > 0, what="discovery")
    robot.chunk_action = START
    robot.wait_mode("running")
    epoch = int(robot.statuses[-1]["epoch"])
    robot.chunk_action = None
    for_the_old_one = START.copy()
    for_the_old_one[0] = 2.0
    in_flight = chunk_to_message(robot.chunk(for_the_old_one))
    robot.instruction_publisher.publish(String(data="pick up the red cube"))
    robot.wait(lambda: int(robot.statuses[-1].get("epoch", 0)) == epoch + 1, what="a new epoch")
    robot.chunk_publisher.publish(in_flight)
    refused = ("rejected.before_epoch", "rejected.expired")  # the latter on a machine that is very slow
    robot.wait(lambda: any(key in robot.statuses[-1] for key in refused), what="refusal")
    robot.chunk_action = START
    robot.wait_mode("running")
    assert max(values[0] for _, values in robot.commands["left_arm"]) < 0.1
    robot.instruction_publisher.publish(String(data=""))
    robot.chunk_action = None
    robot.wait(lambda: int(robot.statuses[-1].get("epoch", 0)) == epoch + 2, what="another epoch")
    robot.wait_mode("holding")


def test_silent_drivers_mean_silence_then_a_hold(robot: FakeRobot, controller: subprocess.Popen) -> None:
    robot.publish_states = False
    robot.chunk_action = START
    robot.wait_mode("holding", "no state yet")
    assert robot.count() == 0
    robot.publish_states = True
    robot.wait_mode("running")
    robot.publish_states = False
    robot.wait_mode("holding", "stale state")


def test_another_reason_for_the_same_hold_is_told_at_once(robot: FakeRobot, controller: subprocess.Popen) -> None:
    """The reason says how old the state was when it was first told: a status of its own, not the next regular one."""
    oldest_ms = min(group.max_age_ms for group in ALOHA.state) + 150.0  # the regular one follows half a second after …
    robot.wait_mode("holding", "waiting for the first chunk")
    robot.statuses.clear()
    robot.wait_mode("holding", "waiting for the first chunk")  # … this one
    robot.publish_states = False
    robot.wait_mode("holding", "stale state")
    reason = next(s["reason"] for s in robot.statuses if "stale state" in s["reason"])
    assert float(reason.split(" is ")[1].removesuffix(" ms old")) < oldest_ms, reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_with_a_hold_and_exit_code_0(robot: FakeRobot, controller: subprocess.Popen, number: int) -> None:
    target = START.copy()
    target[0] = 1.5
    robot.chunk_action = target
    robot.wait_mode("running")
    robot.wait(lambda: robot.count() and robot.latest()[0] > 0.6, what="motion")
    controller.send_signal(number)
    controller.send_signal(number)  # Ctrl-C reaches a launched node twice
    robot.wait(lambda: controller.poll() is not None, what="exit")
    assert controller.returncode == 0
    robot.wait(lambda: robot.statuses[-1]["message"] == "idle: stopped", what="last status")
    waist = [values[0] for _, values in robot.commands["left_arm"]]
    # The last step is one of a braking robot (two periods' worth, for jitter); frozen at full speed it would be larger.
    assert abs(waist[-1] - waist[-2]) <= 2 * 20.0 * PERIOD_S**2 < 0.9 * np.max(np.diff(waist))


def test_lifecycle_manager_drives_it_and_impossible_requests_do_not_kill_it(robot: FakeRobot, domain: int) -> None:
    process = start_controller(domain, "simulated:=true", "autostart:=false", "start_on_activate:=false")
    try:

        def change(transition: int) -> bool:
            request = ChangeState.Request(transition=Transition(id=transition))
            return robot.call("controller_node/change_state", ChangeState, request).success

        assert not robot.call("qwen_vla/start").success
        assert change(Transition.TRANSITION_CONFIGURE)
        assert change(Transition.TRANSITION_ACTIVATE)
        robot.chunk_action = START
        robot.wait_mode("idle", "not started")
        assert robot.call("qwen_vla/start").success
        robot.wait_mode("running")
        assert change(Transition.TRANSITION_DEACTIVATE)
        robot.wait_mode("idle", "stopped")
        robot.wait(lambda: robot.statuses[-1].get("active") == "False", what="inactive status")
        robot.wait_statuses(1)  # what was under way has arrived
        count = robot.count()
        robot.wait_statuses(2)
        assert robot.count() == count
        assert change(Transition.TRANSITION_ACTIVATE)
        assert robot.call("qwen_vla/start").success
        robot.wait_mode("running")

        assert robot.call("qwen_vla/estop").success
        assert change(Transition.TRANSITION_DEACTIVATE)
        assert not change(Transition.TRANSITION_CLEANUP)  # or a restart of the node's cycle would undo the latch
        assert change(Transition.TRANSITION_ACTIVATE)
        assert not robot.call("qwen_vla/start").success
        assert robot.call("qwen_vla/reset").success
        assert change(Transition.TRANSITION_DEACTIVATE) and change(Transition.TRANSITION_CLEANUP)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_missing_message_package_or_embodiment_is_one_clear_line(domain: int) -> None:
    for arguments, expected in (
        ({}, "interbotix_xs_msgs is not installed"),
        ({"embodiment": "no_such_robot"}, "no_such_robot"),
    ):
        process = start_controller(domain, "simulated:=false", **arguments)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 2
        assert expected in errors and "Traceback" not in errors
