"""What every node needs and none should write twice: QoS, parameters, status, stamps, a tolerant way to spin.

Nodes of this package run on a ``SingleThreadedExecutor``: the multi-threaded one delayed a 250 Hz timer by up to 1.2 s.
Anything slow or periodic to the millisecond gets its own plain thread instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import rclpy
from builtin_interfaces.msg import Time as TimeMsg
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.embodiment import load_robot as load_runnable
from qwen_vla_core.embodiment.namespaced import namespaced
from qwen_vla_core.errors import UserError

CHUNK_TOPIC = "qwen_vla/chunk"
CONSUMED_TOPIC = "qwen_vla/consumed"
PLAN_TOPIC = "qwen_vla/plan"
PLAYING_TOPIC = "qwen_vla/playing"
INSTRUCTION_TOPIC = "qwen_vla/instruction"
STATUS_TOPIC = "qwen_vla/status"
EPISODE_TOPIC = "qwen_vla/episode"
LATENCY_TOPIC = "qwen_vla/latency"
INFERENCE_TOPIC = "qwen_vla/inference"  # what each chunk was computed from, as JSON
NOTE_TOPIC = "qwen_vla/note"
OUTCOME_TOPIC = "qwen_vla/outcome"
HUMAN_TOPIC = "qwen_vla/human_control"

_ONE = {"history": HistoryPolicy.KEEP_LAST, "depth": 1}
CAMERA_QOS = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE, **_ONE)
COMMAND_QOS = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE, **_ONE)
LATCHED_QOS = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL, **_ONE)
# Every node publishes on this topic, some on several occasions in a row: a recorder wants all of it.
STATUS_QOS = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
# Best effort: joint states of real drivers are offered either way, and an old one is worth nothing.
STATE_QOS = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=5,
)

LEVELS = {
    "ok": DiagnosticStatus.OK,
    "warn": DiagnosticStatus.WARN,
    "error": DiagnosticStatus.ERROR,
    "stale": DiagnosticStatus.STALE,
}


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    *,
    read_only: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declares a parameter with its description and range and returns its value.

    Integer parameters get an integer range and floating ones a floating range, as ROS requires; a value outside is
    refused by rclpy with the parameter's name.

    Raises:
        UserError: A start-up override has the wrong type or is out of range.
    """
    descriptor = ParameterDescriptor(description=description, read_only=read_only)
    if minimum is not None or maximum is not None:
        if isinstance(default, int) and not isinstance(default, bool):
            low, high = minimum if minimum is not None else -(2**31), maximum if maximum is not None else 2**31
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=0)]
        else:
            low = minimum if minimum is not None else -1e9
            high = maximum if maximum is not None else 1e9
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    try:
        return node.declare_parameter(name, default, descriptor).value
    except Exception as error:
        raise UserError(f"parameter '{name}' of {node.get_name()}: {error}") from error


def declare_robot(node: Node, default: str = "", text: str = "Robot YAML (name or path)", fixed: bool = True) -> str:
    """Declares ``embodiment`` and ``namespaced_topics``, which ``load_robot`` reads, and returns the former.

    ``fixed``: the robot may not be changed later; otherwise the node has to say when it may.
    """
    about = "Topics that the YAML writes with a leading '/' are inside the node's namespace too: for several robots"
    declare(node, "namespaced_topics", False, about, read_only=True)
    return str(declare(node, "embodiment", default, text, read_only=fixed))


def load_robot(node: Node, source: str) -> Embodiment:
    """The embodiment ``source``, with its topics where the node's parameters want them."""
    return in_its_place(node, load_runnable(source))


def another_robot(source: str, active: bool) -> SetParametersResult:
    """Whether a lifecycle node may be given another ``embodiment`` now: not while active, and only one that loads."""
    if active:
        return SetParametersResult(successful=False, reason="active: deactivate first, then set another embodiment")
    if source:
        try:
            load_runnable(source)
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)


def in_its_place(node: Node, robot: Embodiment) -> Embodiment:
    """A robot with its topics where the node's parameters want them."""
    return namespaced(robot) if node.get_parameter("namespaced_topics").value else robot


def stamp_to_ns(stamp: TimeMsg) -> int:
    """builtin_interfaces/Time → nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def ns_to_stamp(stamp_ns: int) -> TimeMsg:
    """Nanoseconds → builtin_interfaces/Time."""
    seconds, nanoseconds = divmod(int(stamp_ns), 1_000_000_000)
    return TimeMsg(sec=seconds, nanosec=nanoseconds)


def status_message(
    node: Node, name: str, level: str, message: str, values: Mapping[str, object] | None = None
) -> DiagnosticArray:
    """One DiagnosticStatus, stamped now. ``level`` is one of ok, warn, error, stale; values are shown as text."""
    array = DiagnosticArray()
    array.header.stamp = node.get_clock().now().to_msg()
    pairs = [KeyValue(key=key, value=_text(value)) for key, value in (values or {}).items()]
    array.status = [
        DiagnosticStatus(
            level=LEVELS[level], name=name, message=message, hardware_id=node.get_namespace(), values=pairs
        )
    ]
    return array


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def heartbeat(node: Node, period_s: float, publish: Callable[[], None]) -> None:
    """Calls ``publish`` every ``period_s`` of real time: a status must not fall silent with a paused simulation."""
    node.create_timer(period_s, publish, clock=Clock(clock_type=ClockType.STEADY_TIME))


def spin_until(executor: SingleThreadedExecutor, stop: Callable[[], bool], period_s: float = 0.2) -> None:
    """Spins until ``stop()`` or shutdown.

    An impossible lifecycle transition request raises RCLError out of ``spin`` in Jazzy; one bad service call must not
    kill a node that holds a robot, so it is logged and spinning goes on.
    """
    logger = rclpy.logging.get_logger("spin")
    while rclpy.ok() and not stop():
        try:
            executor.spin_once(timeout_sec=period_s)
        except (ExternalShutdownException, KeyboardInterrupt):
            return
        except Exception as error:
            if type(error).__name__ != "RCLError":
                raise
            if not rclpy.ok():
                return
            logger.warning(f"request refused: {str(error).splitlines()[0]}")


def run_node(create: Callable[[], Any], argv: list[str] | None = None) -> int:
    """``main`` of a node: init, build, spin until SIGINT/SIGTERM or ``node.finished()``, close, shut down.

    ``create()`` returns a Node that may have ``finished() -> bool``, ``close()`` and ``exit_code``. Signals only set a
    flag (Ctrl-C reaches a launched node twice, so the second one must change nothing) and ``close`` runs with the ROS
    context still valid: a recorder can finish its bag and a controller can send its last command. While ``create()``
    runs (a model may take long to load) the first signal raises KeyboardInterrupt instead.

    Returns:
        Process exit code: 0 after a signal or a finished job, 2 for a user's mistake (one line on stderr).
    """
    stopping = threading.Event()
    created = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        first = not stopping.is_set()
        stopping.set()
        if first and not created.is_set():
            raise KeyboardInterrupt

    rclpy.init(args=argv, signal_handler_options=SignalHandlerOptions.NO)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    node: Any = None
    code = 0
    try:
        node = create()
        created.set()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        finished = getattr(node, "finished", lambda: False)
        spin_until(executor, lambda: stopping.is_set() or finished())
        executor.remove_node(node)
    except UserError as error:
        rclpy.logging.get_logger("qwen_vla").error(str(error))
        code = 2
    except KeyboardInterrupt:
        pass
    finally:
        stopping.set()
        created.set()
        if node is not None:
            if hasattr(node, "close"):
                node.close()
            code = code or int(getattr(node, "exit_code", 0))
            node.destroy_node()
        rclpy.try_shutdown()
    return code
