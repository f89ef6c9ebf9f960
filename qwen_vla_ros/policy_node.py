"""The policy as a lifecycle node: cameras, state and an instruction in, action chunks out.

Configure loads the model and subscribes, activate publishes, deactivate stops. Inference runs in a worker thread, so
that images keep arriving while the model thinks; everything else runs on a single-threaded executor. When an
observation is missing or stale nothing is published but the reason: the controller's watchdog then holds the robot.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_msgs.msg import Float64, String
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment.spec import CameraSpec, StateGroup
from qwen_vla_core.engine.neutral import neutral_observation
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk, Committed, Observation, Request
from qwen_vla_core.runtime.commitment import PlanHistory
from qwen_vla_core.runtime.continuity import DEFAULT_STRATEGY, STRATEGIES, find_strategy
from qwen_vla_core.runtime.controller import held_channels
from qwen_vla_core.runtime.latency import LatencyWindow
from qwen_vla_core.runtime.plan_clock import NANO
from qwen_vla_core.runtime.schedule import LookSchedule
from qwen_vla_ros.engines import EngineSetup, EngineShelf, make_engine
from qwen_vla_ros.inference_log import LATENCIES, Asked, Held, Look, noise_of, record_of
from qwen_vla_ros.messages import (
    chunk_to_message,
    compressed_to_rgb,
    groups_by_topic,
    image_message_type,
    image_to_rgb,
    plan_from_message,
    state_from_message,
    state_message_type,
)
from qwen_vla_ros.node_utils import (
    CAMERA_QOS,
    CHUNK_TOPIC,
    COMMAND_QOS,
    INFERENCE_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    LATENCY_TOPIC,
    PLAN_TOPIC,
    STATE_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
    another_robot,
    heartbeat,
    run_node,
    stamp_to_ns,
    status_message,
)
from qwen_vla_ros.observation import ObservationBuffer
from qwen_vla_ros.policy_parameters import declare_policy

STATUS_PERIOD_S = 0.5
JOIN_TIMEOUT_S = 5.0  # a supervisor that stops this node waits twice as long before it uses force
POLL_S = 0.01  # how soon a new image or the end of a problem is noticed
RETRY_S = 0.1  # between two questions to a server that is away
IDLE_REASONS = ("no instruction", "not active")
LONGEST_WAIT_S = 0.05  # how soon a changed plan or parameter is noticed between two looks


class PolicyNode(LifecycleNode):
    """See the module's text. Parameters are described where they are declared."""

    def __init__(self, shelf: EngineShelf | None = None, **options: Any) -> None:
        """
        Args:
            shelf: models that are shared with other nodes of this process.
            options: of ``rclpy.node.Node``.
        """
        super().__init__("policy_node", **options)
        declare_policy(self)
        self._strategy_name = str(self.get_parameter("strategy").value)
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        self._latency_publisher = self.create_publisher(Float64, LATENCY_TOPIC, COMMAND_QOS)
        self._inference_publisher = self.create_publisher(String, INFERENCE_TOPIC, COMMAND_QOS)
        self._chunk_publisher = self.create_lifecycle_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
        heartbeat(self, STATUS_PERIOD_S, self._publish_status)
        self._subscriptions_made: list[Any] = []
        self._shelf = EngineShelf() if shelf is None else shelf
        self._engine: Any = None
        self._robot = ""
        self._source: str | None = None  # parameter embodiment as it was configured
        self._checkpoint_id: Callable[[], str] = str
        self._noise_shape: tuple[int, int] | None = None
        self._seed: int | None = None  # of the last inference's noise
        self._held: Held | None = None  # what the last inference knew of the plan
        self._seconds: dict[str, float] = {}  # where the engine spent the last inference's time
        self._buffer: ObservationBuffer | None = None
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._strategy = STRATEGIES[DEFAULT_STRATEGY]
        self._plans: PlanHistory | None = None
        self._lock = threading.Lock()  # guards instruction, generation, plans and the publication of a chunk
        self._instruction = str(self.get_parameter("instruction").value).strip()
        self._generation = 0
        self._not_before_ns = 0  # what was seen before this belongs to another instruction
        self._continuing = False  # whether the plan being played is one for this instruction
        self._problem: str | None = "not configured"
        self._problem_since = time.monotonic()
        self._reported = ""
        self._counts = {"inferences": 0, "discarded": 0, "failures": 0}
        self._latency = {name: LatencyWindow() for name in LATENCIES}
        self.add_on_set_parameters_callback(self._on_parameters)

    # --- lifecycle -------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads checkpoint and embodiment, warms the model up and subscribes."""
        try:
            self._configure()
        except UserError as error:
            self._set_problem(str(error))
            self._publish_status()
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # rclpy would turn it into a failed transition without a word
            self._set_problem(f"internal error: {error!r}")
            self.get_logger().error(traceback.format_exc())
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts inference; refused while a worker told to stop is still in an inference."""
        if self._worker is not None and self._worker.is_alive():
            self.get_logger().error("activate refused: the last inference has not ended yet; try again")
            return TransitionCallbackReturn.FAILURE
        if str(self.get_parameter("embodiment").value) != self._source:  # another robot since it was configured
            result = self.on_configure(state)
            if result != TransitionCallbackReturn.SUCCESS:
                return result
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        result = super().on_activate(state)
        self._worker.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stops inference; the controller holds when the last chunk runs out."""
        self._stop_worker()
        self._set_problem("not active")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribes and forgets the robot; the weights stay in memory, unless ``keep_weights`` is false."""
        self._forget_robot()
        if not self._shelf.shared and not self.get_parameter("keep_weights").value:
            self._shelf.clear()
        self._set_problem("not configured")
        return TransitionCallbackReturn.SUCCESS

    def _forget_robot(self) -> None:
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        self._subscriptions_made.clear()
        self._close_engine()
        self._buffer = self._plans = self._source = None

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Another robot only while this one is not being driven, and only one that can be read."""
        for parameter in parameters:
            if parameter.name == "embodiment":
                return another_robot(str(parameter.value), self._worker is not None)
        return SetParametersResult(successful=True)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stops inference from any state."""
        self._stop_worker()
        return TransitionCallbackReturn.SUCCESS

    def ask_to_stop(self) -> None:
        """The worker ends after the inference it is in; ``close`` waits for that."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Ends the worker before the process does."""
        self._stop_worker()
        self._close_engine()

    def start(self) -> None:
        """Configures and activates at once.

        Raises:
            UserError: Configuring failed; the message says why.
        """
        if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
            raise UserError(f"policy_node cannot start: {self._problem}")
        self.trigger_activate()

    def _configure(self) -> None:
        self._strategy = find_strategy(self._strategy_name)
        self._forget_robot()
        source = str(self.get_parameter("embodiment").value)
        began = time.monotonic()
        setup = self._make_engine()
        self._engine, embodiment, self._checkpoint_id = setup.engine, setup.embodiment, setup.checkpoint_id
        self._robot, self._noise_shape = embodiment.name, setup.noise_shape
        started = time.monotonic()
        if not setup.warm:  # the first inference is slow; it must not cost the first chunk
            self._predict(neutral_observation(embodiment))
        self.get_logger().info(
            f"{setup.description} in {started - began:.2f} s, embodiment {embodiment.name}, "
            f"warm-up {time.monotonic() - started:.2f} s"
        )
        if self._strategy.conditioning == "prefix" and setup.trained_prefix == 0:
            self.get_logger().warning(
                f"strategy '{self._strategy.name}': {setup.description} was trained without a prefix (loss.prefix)"
            )
        self._buffer = ObservationBuffer(embodiment, float(self.get_parameter("frozen_after_s").value))
        self._plans = PlanHistory(embodiment.period_s, held_channels(embodiment))
        for camera in embodiment.cameras:
            self._subscribe(image_message_type(camera), camera.topic, self._camera_callback(camera), CAMERA_QOS)
        for topic, groups in groups_by_topic(embodiment.state).items():
            self._subscribe(state_message_type(groups), topic, self._state_callback(groups), STATE_QOS)
        self._subscribe(String, INSTRUCTION_TOPIC, self._on_instruction, LATCHED_QOS)
        self._subscribe(JointTrajectory, PLAN_TOPIC, self._on_plan, COMMAND_QOS)
        self._latency = {name: LatencyWindow() for name in LATENCIES}  # another robot's say nothing of this one's
        self._source = source
        self._set_problem("not active")

    def _make_engine(self) -> EngineSetup:
        return make_engine(self, self._shelf)

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if hasattr(engine, "close"):  # a connection
            engine.close()

    def _subscribe(self, message_type: type, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        self._subscriptions_made.append(self.create_subscription(message_type, topic, callback, qos))

    # --- inputs (executor thread) ----------------------------------------------------------------------------------

    def _camera_callback(self, camera: CameraSpec) -> Callable[[Any], None]:
        to_rgb: Callable[[Any], np.ndarray] = compressed_to_rgb if camera.transport == "compressed" else image_to_rgb

        def on_image(msg: Any) -> None:
            if self._instruction and self._buffer is not None:
                self._buffer.add_image(camera.view, self._stamp_ns(msg), lambda: to_rgb(msg))

        return on_image

    def _state_callback(self, groups: tuple[StateGroup, ...]) -> Callable[[Any], None]:
        def on_state(msg: Any) -> None:
            if self._instruction and self._buffer is not None:
                self._buffer.add_state(state_from_message(groups, msg), self._stamp_ns(msg))

        return on_state

    def _on_instruction(self, msg: String) -> None:
        with self._lock:
            previous, self._instruction = self._instruction, msg.data.strip()
            self._generation += 1
            if hasattr(self._engine, "new_epoch"):  # a server must not finish what nobody waits for
                self._engine.new_epoch()
            self._not_before_ns = self._now_ns()
            self._continuing = False
            # Nothing seen before a pause (an episode's reset, an operator's break) may steer what follows it.
            if self._buffer is not None and not (previous and self._instruction):
                self._buffer.clear()
        self.get_logger().info(f"instruction: '{self._instruction}'" if self._instruction else "instruction withdrawn")
        self._wake.set()

    def _on_plan(self, msg: JointTrajectory) -> None:
        if self._buffer is None or self._plans is None:
            return
        try:
            rest = plan_from_message(msg, self._buffer.embodiment.channels)
        except ValueError as error:
            self.get_logger().warning(f"plan ignored: {error}", throttle_duration_sec=5.0)
            return
        with self._lock:
            self._plans.add(rest)

    def _stamp_ns(self, msg: Any) -> int:
        return stamp_to_ns(msg.header.stamp) or self._now_ns()  # drivers that stamp nothing: time of arrival

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    # --- inference (worker thread) ---------------------------------------------------------------------------------

    def _work(self) -> None:
        last_stamp_ns = -1
        while not self._stop.is_set():
            self._wake.clear()
            look = self._look(last_stamp_ns)
            if look is None:
                self._wake.wait(POLL_S)
                continue
            last_stamp_ns = look.observation.stamp_ns
            if self._infer(look):
                self._wait_for_next_look(look.look_ns, self._now_ns())

    def _look(self, last_stamp_ns: int = -1) -> Look | None:
        """The observation to infer from; None where there is nothing new, or a reason to hold, which is then told."""
        started_s, look_ns = time.monotonic(), self._now_ns()
        with self._lock:
            generation, instruction, not_before_ns = self._generation, self._instruction, self._not_before_ns
        assert self._buffer is not None
        observation = self._buffer.observe(look_ns, instruction)
        if isinstance(observation, str):
            self._set_problem(observation)
            return None
        if observation.stamp_ns == last_stamp_ns or observation.stamp_ns < not_before_ns:
            return None
        cameras_ns, states_ns = self._buffer.cameras_ns, self._buffer.states_ns
        return Look(observation, generation, not_before_ns, look_ns, started_s, cameras_ns, states_ns)

    def _wait_for_next_look(self, look_ns: int, chunk_ns: int) -> None:
        """Waits until the next inference has to start; a new instruction or the end wakes it up."""
        assert self._buffer is not None and self._plans is not None
        while not self._wake.is_set():
            steps = int(self.get_parameter("execute_steps").value)
            schedule = LookSchedule.of(self._buffer.embodiment, steps if steps >= 0 else None)
            with self._lock:
                end_ns = self._plans.end_ns
            if end_ns is not None and end_ns < chunk_ns:
                end_ns = None  # of a plan that this chunk is to replace
            due_s = schedule.next_look_s(
                look_ns / NANO, chunk_ns / NANO, None if end_ns is None else end_ns / NANO, self._latency["inference"]
            )
            left_s = due_s - self._now_ns() / NANO
            if left_s <= 0:
                return
            self._wake.wait(min(left_s, LONGEST_WAIT_S))

    def _infer(self, look: Look) -> bool:
        observation, generation = look.observation, look.generation
        decoded = time.monotonic()
        image_age_s = (self._now_ns() - observation.stamp_ns) * 1e-9
        committed = self._committed(observation.stamp_ns)
        try:
            chunk = self._predict(observation, committed)
        except ConnectionError as error:  # no server, or no answer in time: it is looked for, and asked again
            if generation != self._generation:
                self._counts["discarded"] += 1
                return False
            self._counts["failures"] += 1
            self._set_problem(str(error))
            self._stop.wait(RETRY_S)
            return False
        except Exception as error:  # a model's failure must be seen and must not silence the node
            self.get_logger().error("inference failed:\n" + traceback.format_exc())
            self._counts["failures"] += 1
            self._set_problem(f"inference failed: {error}")
            self._stop.wait(1.0)
            return False
        message = chunk_to_message(chunk)
        with self._lock:
            if generation != self._generation or self._stop.is_set():
                self._counts["discarded"] += 1  # computed for another instruction
                return False
            self._chunk_publisher.publish(message)
            self._continuing = True
        chunk_ns = self._now_ns()
        total_s = (chunk_ns - observation.stamp_ns) * 1e-9
        self._counts["inferences"] += 1
        spent_s = {
            "image_age": image_age_s,
            "decode": decoded - look.started_s,
            "inference": time.monotonic() - look.started_s,
            "observation_to_chunk": total_s,
        }
        for name, seconds in spent_s.items():
            self._latency[name].add(seconds)
        self._latency_publisher.publish(Float64(data=total_s))
        self._set_problem(None)
        # After the chunk, which does not wait for it.
        asked = Asked(self._robot, committed, int(self.get_parameter("flow_steps").value), self._held, self._seed)
        about = {"checkpoint": self._checkpoint_id(), "strategy": self._strategy_name, "chunk_ns": chunk_ns}
        record = record_of(look, asked, chunk, self._seconds | spent_s, **about)
        self._inference_publisher.publish(String(data=record.to_text()))
        return True

    def _committed(self, stamp_ns: int) -> Committed | None:
        """What the robot will be doing until this inference is done; None: nothing that the chunk should continue."""
        self._held = None
        use = self._strategy.conditioning
        if use == "none" or self._plans is None or self._buffer is None:
            return None
        horizon = self._buffer.embodiment.control.horizon
        latency_s = self._expected_latency_s()
        with self._lock:
            self._held = Held(latency_s, self._plans.times_ns, self._continuing)
            return self._plans.committed(stamp_ns, horizon, latency_s, use) if self._continuing else None

    def _expected_latency_s(self) -> float:
        """From an observation to its chunk; one period before anything was measured."""
        assert self._buffer is not None
        latency_s = self._latency["observation_to_chunk"].p95
        return self._buffer.embodiment.period_s if latency_s is None else latency_s

    def _draw_seed(self) -> int:
        """Of the next inference's noise: a new one each time, so that robots do not repeat their mistakes."""
        return secrets.randbits(48)

    def _predict(self, observation: Observation, committed: Committed | None = None) -> ActionChunk:
        """Asks the engine, and keeps where the time went for the status."""
        self._engine.steps = int(self.get_parameter("flow_steps").value) or None
        self._seed = self._draw_seed() if self._noise_shape is not None else None
        noise_hk = noise_of(self._seed, self._noise_shape)
        (prediction,) = self._engine.predict([Request(observation, self._robot, committed, noise_hk)])
        self._seconds = dict(prediction.seconds)
        for name, seconds in prediction.seconds.items():
            if name in self._latency:  # a server may measure more
                self._latency[name].add(seconds)
        chunk: ActionChunk = prediction.chunk
        return chunk

    def _stop_worker(self) -> None:
        self.ask_to_stop()
        if self._worker is not None:
            self._worker.join(timeout=JOIN_TIMEOUT_S)
            if not self._worker.is_alive():
                self._worker = None

    # --- status ----------------------------------------------------------------------------------------------------

    def _set_problem(self, problem: str | None) -> None:
        before, self._problem = _phase(self._problem), problem
        if _phase(problem) != before:
            self._problem_since = time.monotonic()
            self._publish_status()

    def _state(self) -> tuple[str, str, str]:
        """(level, state, message) of the status."""
        problem = self._problem
        if problem is None:
            return "ok", "running", "running"
        if _phase(problem) == "idle":
            return "ok", "idle", f"idle: {problem}"
        failed = problem.startswith("inference failed")
        if failed or time.monotonic() - self._problem_since > float(self.get_parameter("fault_after_s").value):
            return "error", "fault", f"fault: {problem}"
        return "warn", "holding", f"holding: {problem}"

    def _publish_status(self) -> None:
        level, state, message = self._state()
        values: dict[str, object] = {"state": state, "reason": self._problem or "", "instruction": self._instruction}
        values["embodiment"] = self._robot
        values["ready"] = str(self._worker is not None and not self._stop.is_set()).lower()
        values["checkpoint"] = self._checkpoint_id()
        values["strategy"] = self._strategy_name
        values.update(self._counts)
        for name, window in self._latency.items():
            if window.p50 is not None and window.p95 is not None:
                values[f"{name}_p50_ms"] = window.p50 * 1e3
                values[f"{name}_p95_ms"] = window.p95 * 1e3
        self._status_publisher.publish(status_message(self, "policy", level, message, values))
        if state != self._reported:
            self._reported = state
            if level == "ok":
                self.get_logger().info(message)
            else:
                self.get_logger().warning(message)


def _phase(problem: str | None) -> str:
    """running, idle (nothing to do, no one to blame) or held up by a problem."""
    if problem is None:
        return "running"
    return "idle" if problem.startswith(IDLE_REASONS) else "held up"


def main(argv: list[str] | None = None) -> int:
    """Console entry point: one robot's policy, or with the parameter ``robots`` those of several."""
    from qwen_vla_ros.fleet import Fleet, asked_for

    def create() -> PolicyNode | Fleet:
        robots = asked_for()
        if robots:
            return Fleet(robots)
        node = PolicyNode()
        if node.get_parameter("autostart").value:
            node.start()
        return node

    return run_node(create, argv)


if __name__ == "__main__":
    sys.exit(main())
