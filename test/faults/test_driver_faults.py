"""Joint states that stop, lie or lose their order, and an operator's requests: no state, no motion."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fault_bench import PAUSE_MS, ROBOT, START, STATE_AGE_MS, STATUS_MS, SWING, TOLERANCE_MS, Bench, robot_yaml
from fault_support import Fault, Ledger
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.estop import ESTOP_REQUEST_TOPIC
from qwen_vla_ros.node_utils import LATCHED_QOS

LEFT, RIGHT = "/follower_left/joint_states", "/follower_right/joint_states"
STALE_MS = STATE_AGE_MS + TOLERANCE_MS
RECOVERY_MS = 5000
WAIST = ROBOT.actions[0].limits
BRAKING_MS = 1e3 * max(
    v / a for g in ROBOT.actions for v, a in zip(g.limits.velocity, g.limits.acceleration, strict=True)
)


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A controller that plays good chunks."""
    yaml = robot_yaml(tmp_path_factory.mktemp("robot"))
    spec = next(spec for spec in build_graph(str(yaml)) if spec.name == "controller_node")
    return make_bench([replace(spec, parameters={**spec.parameters, "start_on_activate": True})])


Mangle = Callable[[str, JointState], JointState | None]


def stale(name: str, done: str, mangle: Mangle) -> Fault:
    """A state that must count as not measured: the robot brakes to rest, and moves again when it is back."""

    def provoke(b: Bench) -> float:
        last_s = time.time()
        b.mangle = mangle
        status = b.told("controller", "stale state", last_s)
        took_ms = (status.at_s - last_s) * 1e3
        b.rested_s(status.at_s)
        b.mangle = lambda _topic, msg: msg
        b.told("controller", "running", status.heard_s)
        return took_ms

    promised = "everything brakes to rest, reason published; goes on by itself"
    return Fault(name, done, promised, STALE_MS, "ms", provoke)


def only_left(change: Callable[[JointState], None]) -> Mangle:
    def mangle(topic: str, msg: JointState) -> JointState:
        if topic == LEFT:
            change(msg)
        return msg

    return mangle


def _drop_joint(msg: JointState) -> None:
    del msg.name[2], msg.position[2]


def _cut(msg: JointState) -> None:
    msg.position = msg.position[:3]


def _rename(msg: JointState) -> None:
    msg.name = [f"other_{name}" for name in msg.name]


def _set(value: float) -> Callable[[JointState], None]:
    def change(msg: JointState) -> None:
        msg.position[1] = value

    return change


def reordered(b: Bench) -> float:
    def mangle(_topic: str, msg: JointState) -> JointState:
        return JointState(header=msg.header, name=msg.name[::-1], position=msg.position[::-1])

    b.mangle = mangle
    b.goes_on(time.time())
    still = [c for c in ROBOT.channels if not c.endswith(("waist", "gripper"))]
    return max(float(np.ptp(b.command(channel))) for channel in still)


def driver_restarts(b: Bench) -> float:
    now_s = time.time()
    b.hang_up(LEFT)
    status = b.told("controller", "stale state", now_s)
    again_s = b.show_up(LEFT)
    return (b.told("controller", "running", max(again_s, status.heard_s)).at_s - again_s) * 1e3


def encoder_glitch(b: Bench) -> float:
    """Single messages in which the waist is 2 rad away; the command must not follow them."""
    sent = 0

    def mangle(topic: str, msg: JointState) -> JointState:
        nonlocal sent
        if topic == LEFT:
            sent += 1
            msg.position[0] += 2.0 if sent % 10 == 0 else 0.0
        return msg

    b.mangle = mangle
    b.wait(lambda: sent > 60, "six glitches")
    return float(np.abs(b.command("left_waist")).max())


def blocked_joint(b: Bench) -> float:
    """The arm does not follow; the command may lead it by max_jump and no more."""
    b.follows = False
    blocked_at = b.pose["left_waist"]
    actions = np.tile(START, (ROBOT.control.horizon, 1))
    actions[:, 0] = 2.5
    b.plan = lambda: ActionChunk(actions, ROBOT.channels, b.now_ns(), ROBOT.period_s)
    b.counted("limited.max_jump", b.count("limited.max_jump"))
    b.wait(lambda: b.ticks_since(0) > 25 and b.at_rest(), "the command to stop")
    return float(np.abs(b.command("left_waist") - blocked_at).max())


def start_outside(b: Bench) -> float:
    """The pose at start is beyond its limit: a sensor fault, not a place to start from."""
    assert b.call("qwen_vla/stop").success
    b.wait(lambda: b.last().values["mode"] == "idle", "silence")
    outside = float(WAIST.upper[1]) + 0.5  # left shoulder; its velocity limit allows 0.25 at start
    b.mangle = only_left(_set(outside))
    b.heard_of()
    now_s = time.time()
    commands = b.ticks_since(0)
    b.call("qwen_vla/start")
    status = b.told("controller", "fault: measured left_shoulder", now_s)
    assert "outside its limits" in status.message
    assert not b.call("qwen_vla/start").success
    assert b.ticks_since(0) == commands, "it commanded a robot it cannot place"
    b.mangle = lambda _topic, msg: msg
    b.heard_of()
    assert b.call("qwen_vla/reset").success and b.call("qwen_vla/start").success
    b.told("controller", "running", status.heard_s)
    return (status.at_s - now_s) * 1e3


# --- requests --------------------------------------------------------------------------------------------------------


def estop(b: Bench) -> float:
    now_s = time.time()
    assert b.call("qwen_vla/estop").success
    took_ms = (b.rested_s(now_s) - now_s) * 1e3
    assert not b.call("qwen_vla/start").success
    accepted = b.count("chunks_accepted")
    b.counted("count.chunks_ignored", b.count("count.chunks_ignored") + 2)
    assert b.last().values["mode"] == "estopped" and b.count("chunks_accepted") == accepted
    assert b.call("qwen_vla/reset").success
    idle = b.told("controller", "idle: reset", now_s)
    assert b.call("qwen_vla/start").success
    b.told("controller", "running", idle.heard_s)
    return took_ms


def estop_topic(b: Bench) -> float:
    """A button: pressed it stops, released it does not start; reset is refused while it is pressed."""
    button = b.node.create_publisher(Bool, ESTOP_REQUEST_TOPIC, LATCHED_QOS)
    b.wait(lambda: button.get_subscription_count() >= 1, "the controller to hear the button")
    now_s = time.time()
    button.publish(Bool(data=True))
    took_ms = (b.told("controller", "emergency stop requested", now_s).at_s - now_s) * 1e3
    b.rested_s(now_s)
    assert not b.call("qwen_vla/reset").success and not b.call("qwen_vla/start").success
    button.publish(Bool(data=False))
    b.wait(lambda: b.call("qwen_vla/reset").success, "the button's release")
    idle = b.told("controller", "idle: reset", now_s)
    assert b.call("qwen_vla/start").success
    b.told("controller", "running", idle.heard_s)
    b.node.destroy_publisher(button)
    return took_ms


def change_embodiment(b: Bench) -> float:
    return b.refuses_another_robot("controller_node")


def change_state(b: Bench, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return bool(b.call("controller_node/change_state", ChangeState, request).success)


def impossible_transition(b: Bench) -> float:
    """rclpy raises out of the executor instead of answering; without care that would end the process."""
    client = b.node.create_client(ChangeState, "controller_node/change_state")
    b.wait(client.service_is_ready, "the service")
    now_s = time.time()
    client.call_async(ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE)))
    b.wait(lambda: "request refused" in b.graph.log(), "the refusal")
    b.goes_on(now_s)
    b.node.destroy_client(client)
    return float(np.diff([tick.at_s for tick in list(b.ticks["left_arm"])]).max() * 1e3)


def lifecycle_under_estop(b: Bench) -> float:
    """A lifecycle manager that restarts the node's cycle must not undo an operator's emergency stop."""
    now_s = time.time()
    assert b.call("qwen_vla/estop").success
    rested_s = b.rested_s(now_s)
    assert change_state(b, Transition.TRANSITION_DEACTIVATE)
    assert not change_state(b, Transition.TRANSITION_CLEANUP)
    assert change_state(b, Transition.TRANSITION_ACTIVATE)
    b.wait(lambda: b.last().values["mode"] == "estopped", "the latch")
    moved = len(b.moving(rested_s))
    idle_s = time.time()
    assert b.call("qwen_vla/reset").success and b.call("qwen_vla/start").success
    b.told("controller", "running", idle_s)
    return moved


FAULTS = [
    stale("both drivers silent", "no joint state is published any more", lambda _topic, _msg: None),
    stale("one driver silent", "the left arm's joint states stop", lambda topic, msg: None if topic == LEFT else msg),
    stale("joint state partial", "one joint is missing in every message", only_left(_drop_joint)),
    stale("joint state cut off", "fewer positions than names", only_left(_cut)),
    stale("joint state of others", "unknown joint names", only_left(_rename)),
    stale("joint state NaN", "one position is NaN", only_left(_set(np.nan))),
    stale("joint state Inf", "one position is infinite", only_left(_set(np.inf))),
    Fault(
        "joint state reordered",
        "names and positions in another order",
        "names decide: joints the plan keeps still stay so",
        0.01,
        "rad",
        reordered,
    ),
    Fault(
        "driver restarted",
        "the left driver's publisher leaves the graph and comes back",
        "brakes, then goes on by itself",
        RECOVERY_MS,
        "ms",
        driver_restarts,
    ),
    Fault(
        "encoder glitch",
        "every tenth message is 2 rad off at one joint",
        "the command does not follow",
        SWING + 0.05,
        "rad",
        encoder_glitch,
    ),
    Fault(
        "joint blocked",
        "the arm does not follow a plan 2.5 rad away",
        "the command leads it by max_jump at most",
        ROBOT.safety.max_jump + 1e-6,
        "rad",
        blocked_joint,
    ),
    Fault(
        "start pose impossible",
        "the measured pose is 0.5 rad outside its limits at start",
        "fault that names the joint, no command, until reset and start",
        STATUS_MS + TOLERANCE_MS,
        "ms",
        start_outside,
    ),
    Fault(
        "emergency stop mid-chunk",
        "qwen_vla/estop while a chunk plays and more come",
        "at rest, and stays so until reset and start",
        BRAKING_MS + TOLERANCE_MS,
        "ms",
        estop,
    ),
    Fault(
        "emergency stop by topic",
        "true on qwen_vla/estop_request, later false",
        "latched at once; reset refused while pressed; released moves nothing",
        STATUS_MS + TOLERANCE_MS,
        "ms",
        estop_topic,
    ),
    Fault(
        "lifecycle cycled under estop",
        "deactivate, cleanup, activate while estopped",
        "the stop stays latched: commands that moved",
        0,
        "commands",
        lifecycle_under_estop,
    ),
    Fault(
        "embodiment changed while active",
        "the parameter is set to another robot",
        "refused, the plan goes on",
        2000,
        "ms",
        change_embodiment,
    ),
    Fault(
        "impossible transition",
        "configure while active",
        "refused; commands go on: longest pause between two",
        PAUSE_MS,
        "ms",
        impossible_transition,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: Bench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
