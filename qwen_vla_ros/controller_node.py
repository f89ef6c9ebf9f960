"""``controller_node``: joint state and chunks in, safe commands out, at the controller's rate.

The control loop is a plain thread paced by the monotonic clock; subscriptions and services run on a single-threaded
executor beside it. Nothing heavy lives in this process: neither images nor the model can delay a command.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.subscription import Subscription
from sensor_msgs.msg import JointState, LaserScan
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.embodiment.spec import ActionGroup, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES, find_strategy
from qwen_vla_core.runtime.controller import ControlLoop, ControlOutput
from qwen_vla_core.runtime.latency import LatencyWindow
from qwen_vla_core.runtime.played import PlayedInstruction
from qwen_vla_ros.commands import CommandAdapter, adapter_for, command_kind
from qwen_vla_ros.estop import REASON, EstopTopic
from qwen_vla_ros.messages import (
    chunk_from_message,
    chunk_to_message,
    groups_by_topic,
    plan_to_message,
    scan_from_message,
    state_from_message,
    state_message_type,
)
from qwen_vla_ros.node_utils import (
    CHUNK_TOPIC,
    COMMAND_QOS,
    CONSUMED_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    LEVELS,
    PLAN_TOPIC,
    PLAYING_TOPIC,
    STATE_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
    another_robot,
    declare,
    declare_robot,
    heartbeat,
    load_robot,
    ns_to_stamp,
    run_node,
    status_message,
)

STATUS_PERIOD_S = 0.5
HALT_TIMEOUT_S = 2.0
ON_INSTRUCTION = ("finish", "flush", "hold")  # hold: what flush was called first
NUMBER = re.compile(r"\d")  # what follows in a reason changes with every tick and is no news
LEVEL_BY_MODE = {"idle": "ok", "running": "ok", "holding": "warn", "estopped": "error", "fault": "error"}


class ControllerNode(LifecycleNode):
    """configure = load and subscribe; activate = start playing chunks; deactivate = come to rest, then be silent."""

    def __init__(self) -> None:
        super().__init__("controller_node")
        text = "Embodiment YAML: a path, or the name of a shipped one (aloha). May be changed while inactive."
        declare_robot(self, text=text, fixed=False)
        text = "Use each command's simulation_kind, where set: the robot's own message packages are then not needed."
        self._simulated: bool = declare(self, "simulated", False, text, read_only=True)
        text = "Configure and activate at start-up; false leaves both to a lifecycle manager."
        self.autostart: bool = declare(self, "autostart", True, text, read_only=True)
        text = "Play chunks as soon as active; false waits for the start service (a simulator starts each episode)."
        self._start_on_activate: bool = declare(self, "start_on_activate", True, text, read_only=True)
        text = f"How chunks follow each other: {', '.join(STRATEGIES)}. The policy node needs the same."
        self._strategy: str = declare(self, "strategy", DEFAULT_STRATEGY, text, read_only=True)
        text = "Where the strategy fades the step to a new chunk: over this many seconds."
        self._blend_s: float = declare(self, "blend_s", 0.2, text, read_only=True, minimum=0.0, maximum=5.0)
        text = "A new instruction lets the plan go on until its first chunk comes (finish) or drops it at once (flush)."
        self._on_new: str = declare(self, "on_instruction", "finish", text)
        text = "The instruction that the policy starts with, for what is told about the actions played"
        self._instruction: str = declare(self, "instruction", "", text, read_only=True)
        self._source: str | None = None  # parameter embodiment as it was configured
        self._played = PlayedInstruction()
        self.problem = ""
        self._lock = threading.Lock()
        self._status_lock = threading.Lock()
        self._control: ControlLoop | None = None
        self._thread: threading.Thread | None = None
        self._quit = threading.Event()
        self._period_s = 0.0
        self._periods = LatencyWindow(size=500, warm_up=5)
        self._overruns = 0
        self._malformed = 0
        self._halt_from: tuple[int, float] | None = None
        self._outputs: list[tuple[ActionGroup, CommandAdapter, Publisher]] = []
        self._state_subscriptions: list[Subscription] = []
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        self._consumed_publisher = self.create_publisher(JointTrajectory, CONSUMED_TOPIC, COMMAND_QOS)
        self._plan_publisher = self.create_publisher(JointTrajectory, PLAN_TOPIC, COMMAND_QOS)
        self._plan_told: tuple[int, int] | None = None  # when, and of which chunk; None: that there is none
        self._playing_publisher = self.create_publisher(String, PLAYING_TOPIC, LATCHED_QOS)
        self.add_on_set_parameters_callback(self._on_parameters)
        for name in ("start", "stop", "estop", "reset"):
            self.create_service(Trigger, f"qwen_vla/{name}", partial(self._on_request, name))
        self._estop = EstopTopic(self, self._on_estop_pressed)
        heartbeat(self, STATUS_PERIOD_S, self._publish_status)

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads the embodiment, creates publishers, subscribes. A user's mistake is logged and refused."""
        try:
            self._configure()
        except UserError as error:
            self.problem = str(error)
            self.get_logger().error(self.problem)
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # rclpy would turn it into a failed transition without a word
            self.problem = f"internal error: {error!r}"
            self.get_logger().error(traceback.format_exc())
            return TransitionCallbackReturn.ERROR
        self.problem = ""
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        source = str(self.get_parameter("embodiment").value)
        if not source:
            raise UserError("parameter 'embodiment' is empty; set it to a YAML path or a shipped name, e.g. aloha")
        if self._on_new not in ON_INSTRUCTION:
            raise UserError(f"parameter 'on_instruction' is '{self._on_new}'; use finish or flush")
        self._forget_robot()
        strategy = replace(find_strategy(self._strategy), blend_s=self._blend_s)
        embodiment = load_robot(self, source)
        control = ControlLoop(embodiment, strategy=strategy, simulated=self._simulated)
        adapters = [(group, adapter_for(command_kind(group, self._simulated))) for group in control.commanded.actions]
        types = [adapter.message_type for _, adapter in adapters]
        self._outputs = [
            (group, adapter, self.create_publisher(message_type, group.command.topic, COMMAND_QOS))
            for (group, adapter), message_type in zip(adapters, types, strict=True)
        ]
        self._period_s = 1.0 / embodiment.control.controller_rate_hz
        self._control = control
        if self._estop.pressed:
            self._control.estop(self._now_ns(), REASON)
        self._state_subscriptions = self._subscribe(embodiment)
        self._source = source
        self._played = PlayedInstruction()
        self._played.given(self._instruction, 0, "")

    def _forget_robot(self) -> None:
        for subscription in self._state_subscriptions:
            self.destroy_subscription(subscription)
        for _, _, publisher in self._outputs:
            self.destroy_publisher(publisher)
        self._state_subscriptions, self._outputs, self._control, self._source = [], [], None, None

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Another robot only while this one is at rest; how a new instruction is taken at any time."""
        for parameter in parameters:
            if parameter.name == "embodiment":
                if self._control is not None and self._control.mode == "estopped":
                    reason = "estopped: call qwen_vla/reset first, another robot would forget it"
                    return SetParametersResult(successful=False, reason=reason)
                return another_robot(str(parameter.value), self._thread is not None)
            if parameter.name == "on_instruction":
                if parameter.value not in ON_INSTRUCTION:
                    reason = f"'{parameter.value}' is none of {', '.join(ON_INSTRUCTION)}"
                    return SetParametersResult(successful=False, reason=reason)
                self._on_new = str(parameter.value)
        return SetParametersResult(successful=True)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts the control thread. A latched emergency stop stays latched."""
        if str(self.get_parameter("embodiment").value) != self._source:  # another robot since it was configured
            result = self.on_configure(state)
            if result != TransitionCallbackReturn.SUCCESS:
                return result
        assert self._control is not None
        if self._start_on_activate:
            with self._lock:
                self._control.start(self._now_ns())
        self._halt_from = None
        self._quit.clear()
        # The start-up's objects live for ever: scanning them again would only delay ticks.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brings the robot to rest under its limits, then falls silent."""
        self._halt()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Forgets the embodiment and its topics; refused while an emergency stop is latched, which it would forget."""
        if self._control is not None and self._control.mode == "estopped":
            self.get_logger().error("cleanup refused: estopped; call qwen_vla/reset first")
            return TransitionCallbackReturn.FAILURE
        self._halt()
        self._forget_robot()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As deactivate."""
        self._halt()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As deactivate; the node can be configured again."""
        self._halt()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """The process ends: the last commands bring the robot to rest and hold it there."""
        self._halt()
        self._publish_status()

    def _halt(self) -> None:
        thread, control = self._thread, self._control
        if thread is None or control is None:
            return
        with self._lock:
            control.stop(self._now_ns())
            # The executor is busy with this call, so a simulated clock stands still: count on by the monotonic one.
            self._halt_from = (self._now_ns(), time.monotonic())
        deadline = time.monotonic() + HALT_TIMEOUT_S
        while not control.at_rest and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(self._period_s)
        self._quit.set()
        thread.join(timeout=1.0)
        self._thread = None

    # ---- subscriptions and services ---------------------------------------------------------------------------------

    def _subscribe(self, embodiment: Embodiment) -> list[Subscription]:
        subscriptions = [
            self.create_subscription(state_message_type(groups), topic, partial(self._on_state, groups), STATE_QOS)
            for topic, groups in groups_by_topic(embodiment.state).items()
        ]
        stop = embodiment.safety.obstacle_stop
        if stop is not None:
            subscriptions.append(self.create_subscription(LaserScan, stop.topic, self._on_scan, STATE_QOS))
        return [
            *subscriptions,
            self.create_subscription(JointTrajectory, CHUNK_TOPIC, self._on_chunk, COMMAND_QOS),
            self.create_subscription(String, INSTRUCTION_TOPIC, self._on_instruction, LATCHED_QOS),
        ]

    def _on_instruction(self, msg: String) -> None:
        """What was seen before it is not played any more; one that is withdrawn holds the robot at once."""
        text = msg.data.strip()
        with self._lock:
            self._instruction = text
            if self._control is not None:
                self._control.instruct(self._now_ns(), hold=self._on_new != "finish" or not text)
                self._played.given(text, self._control.buffer.epoch, self._on_new)

    def _on_state(self, groups: Sequence[StateGroup], msg: JointState | Odometry) -> None:
        values = state_from_message(groups, msg)
        with self._lock:
            if self._control is not None:
                self._control.update_state(values, self._now_ns())

    def _on_scan(self, msg: LaserScan) -> None:
        scan = scan_from_message(msg)
        with self._lock:
            if self._control is not None:
                self._control.update_scan(scan, self._now_ns())

    def _on_chunk(self, msg: JointTrajectory) -> None:
        try:
            chunk = chunk_from_message(msg)
        except ValueError as error:
            self._malformed += 1
            self.get_logger().warning(f"chunk refused: {error}", throttle_duration_sec=1.0)
            return
        with self._lock:
            reason = self._control.feed(chunk, self._now_ns()) if self._control is not None else None
        if reason is not None and reason != "not_started":
            self.get_logger().warning(f"chunk refused: {reason}", throttle_duration_sec=1.0)

    def _on_request(self, name: str, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        control = self._control
        if control is None or (self._thread is None and name == "start"):
            response.success, response.message = False, "the controller is not active; activate it first"
            return response
        if name == "reset" and self._estop.pressed:
            response.success, response.message = False, f"{REASON}, and not withdrawn: publish false first"
            return response
        with self._lock:
            response.success, response.message = getattr(control, name)(self._now_ns())
        self._publish_status()
        return response

    def _on_estop_pressed(self) -> None:
        with self._lock:
            if self._control is not None:
                self._control.estop(self._now_ns(), REASON)
        self._publish_status()

    # ---- the control thread -----------------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _run(self) -> None:
        """Ticks at the controller's rate until told to quit; an exception latches a fault instead of ending it."""
        assert self._control is not None
        control = self._control
        mode, told, consumed = control.mode, "", (-1, 0)
        due = last = time.monotonic()
        while not self._quit.is_set():
            due += self._period_s
            delay = due - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            elif delay < -self._period_s:
                self._overruns += 1
                due = time.monotonic()
            now = time.monotonic()
            self._periods.add(now - last)
            last = now
            halt_from = self._halt_from
            t_ns = self._now_ns() if halt_from is None else halt_from[0] + int((now - halt_from[1]) * 1e9)
            try:
                with self._lock:
                    output = control.tick(t_ns)
                self._publish_commands(output, t_ns)
                consumed = self._publish_consumed(control, t_ns, consumed)
                self._publish_played(control, t_ns)
                self._publish_plan(control, t_ns)
                news = NUMBER.split(f"{output.mode}: {output.reason}", maxsplit=1)[0]
                if output.mode != mode:
                    self.get_logger().info(f"{output.mode}: {output.reason}")
                if news != told:
                    mode, told = output.mode, news
                    self._publish_status()
            except Exception as error:
                if not rclpy.ok(context=self.context):
                    return
                with self._lock:
                    control.fault(f"internal error: {error!r}", t_ns)
                self.get_logger().error(f"control loop: {error!r}", throttle_duration_sec=1.0)

    def _publish_commands(self, output: ControlOutput, t_ns: int) -> None:
        if not output.commands:
            return
        stamp = ns_to_stamp(t_ns)
        problem: ValueError | None = None
        for group, adapter, publisher in self._outputs:
            command = output.commands[group.name]
            try:
                message = adapter.encode(group, command.values, command.velocities, stamp, self._period_s)
            except ValueError as error:
                problem = error  # the other groups must still be told to stop
            else:
                publisher.publish(message)
        if problem is not None:
            raise problem

    def _publish_consumed(self, control: ControlLoop, t_ns: int, last: tuple[int, int]) -> tuple[int, int]:
        """Publishes the executed prefix of the plan each time another action falls due; returns what was published."""
        with self._lock:
            here = (control.buffer.stamp_ns or -1, control.buffer.consumed_count(t_ns))
            prefix = control.buffer.consumed(t_ns) if here != last else None
        if prefix is not None:
            self._consumed_publisher.publish(chunk_to_message(prefix))
        return here

    def _publish_played(self, control: ControlLoop, t_ns: int) -> None:
        """Says for which instruction the actions are that are commanded from now on, each time that changes."""
        with self._lock:
            buffer = control.buffer
            playing = control.mode == "running" and not buffer.empty
            event = self._played.now(t_ns, buffer.plan_epoch if playing else None, buffer.stamp_ns)
        if event is not None:
            self._playing_publisher.publish(String(data=event))

    def _publish_plan(self, control: ControlLoop, t_ns: int) -> None:
        """Says what is left of the plan: when it changes, each period, at each tick while it is slowed, and its end."""
        with self._lock:
            buffer = control.buffer
            playing = control.mode == "running" and not buffer.empty
            told = self._plan_told
            if not playing and told is None:
                return
            if playing and told is not None and told[1] == buffer.stamp_ns:
                changing = 0.0 < buffer.clock.rate < 1.0
                if not changing and 0 <= t_ns - told[0] < buffer.period_s * 1e9:
                    return
            rows_tc = buffer.rest() if playing else control.position_c[None]
            self._plan_told = (t_ns, buffer.stamp_ns or 0) if playing else None
        assert rows_tc is not None
        message = plan_to_message(PlanRest(t_ns, rows_tc), buffer.channels, buffer.period_s)
        self._plan_publisher.publish(message)

    def _publish_status(self) -> None:
        with self._status_lock:
            if self._control is None:
                self._estop.tell(self._estop.pressed)
                message = self.problem or "not configured"
                self._status_publisher.publish(
                    status_message(self, "controller", "error" if self.problem else "stale", message)
                )
                return
            with self._lock:
                control = self._control
                mode, reason = control.mode, control.reason
                values: dict[str, object] = {
                    "mode": mode,
                    "reason": reason,
                    "active": self._thread is not None,
                    "embodiment": control.embodiment.name,
                    "strategy": self._strategy,
                    "on_instruction": self._on_new,
                    "played_instruction": self._played.text,
                    "epoch": control.buffer.epoch,
                    "plan_rate": control.buffer.clock.rate,
                    "chunks_accepted": control.buffer.accepted,
                    "chunks_rejected": sum(control.buffer.rejections.values()) + self._malformed,
                }
                rejections = dict(control.buffer.rejections, malformed=self._malformed)
                values.update(control.refused.report("rejected"))
                values.update({f"rejected.{key}": count for key, count in rejections.items() if count})
                values.update(control.limiter.tally.report("limited"))
                if control.base.guard is not None:
                    values["obstacle_m"] = control.base.guard.distance
                values.update({f"count.{key}": count for key, count in control.counters.items()})
                misses = control.targets.misses if control.targets is not None else {}
                values.update(control.targets.report("ik") if control.targets is not None else {})
            self._estop.tell(mode == "estopped")
            for name, seconds in (
                ("p50", self._periods.p50),
                ("p99", self._periods.p99),
                ("max", self._periods.percentile(100)),
            ):
                if seconds is not None:
                    values[f"period_ms.{name}"] = seconds * 1e3
            values["overruns"] = self._overruns
            level, message = LEVEL_BY_MODE[mode], f"{mode}: {reason}"
            for name, miss in misses.items():  # the arm is as near as it can get, and holds there
                level = max(level, "warn", key=LEVELS.__getitem__)
                message += f" ({name} is {miss.position_m * 1e3:.0f} mm, {miss.rotation_rad:.2f} rad off: out of reach)"
            values["chunk_publishers"] = policies = self.count_publishers(CHUNK_TOPIC)
            if policies > 1:  # the newest observation wins, so the plan jumps between them: safe, and no use
                level = max(level, "warn", key=LEVELS.__getitem__)
                message += f" ({policies} publishers on {CHUNK_TOPIC}: end all but one policy)"
            status = status_message(self, "controller", level, message, values)
            self._status_publisher.publish(status)


def _create() -> ControllerNode:
    node = ControllerNode()
    if node.autostart:
        if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            problem = node.problem or "cannot configure the controller"
            node.destroy_node()
            raise UserError(problem)
        node.trigger_activate()
    return node


def main(args: list[str] | None = None) -> int:
    """Console entry. Exit code 0 after SIGINT/SIGTERM (once or twice), 2 for a user's mistake."""
    return run_node(_create, args)


if __name__ == "__main__":
    sys.exit(main())
