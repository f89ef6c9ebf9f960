"""Whatever a policy publishes, and whenever: bad chunks are refused and counted, the rest stays inside all limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fault_bench import PAUSE_MS, ROBOT, START, STATUS_MS, SWING, TOLERANCE_MS, WATCHDOG_MS, Bench, robot_yaml
from fault_support import Fault, Ledger
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.messages import chunk_to_message
from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS

HORIZON, WIDTH = ROBOT.control.horizon, len(ROBOT.channels)
AWAY = 0.8  # a bad chunk wants the left waist here; the good plan never goes beyond SWING
OVERSHOOT = 0.1  # where one plan turns back and the next does not, jerk limits carry the arm so far beyond both
HOLD_MS = WATCHDOG_MS + TOLERANCE_MS
REFUSED_MS = 2 * STATUS_MS + TOLERANCE_MS
WHOLE = 1.0 + 1e-9  # all of a range or limit, and what floating-point division adds to it
RESEND_S = 1.0  # a queue of one may lose a chunk to the next good one


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A controller that plays good chunks."""
    yaml = robot_yaml(tmp_path_factory.mktemp("robot"))
    spec = next(spec for spec in build_graph(str(yaml)) if spec.name == "controller_node")
    return make_bench([replace(spec, parameters={**spec.parameters, "start_on_activate": True})])


def bad(b: Bench) -> ActionChunk:
    """A chunk that would swing the left waist out, observed now."""
    actions = np.tile(START, (HORIZON, 1))
    actions[:, 0] = AWAY
    return ActionChunk(actions, ROBOT.channels, b.now_ns(), ROBOT.period_s)


def poisoned(b: Bench, value: float) -> ActionChunk:
    chunk = bad(b)
    chunk.actions_hc[5, 3] = value
    return chunk


def renamed(b: Bench, *names: str) -> ActionChunk:
    return replace(bad(b), channels=names)


def edited(b: Bench, edit: Callable[[JointTrajectory], None]) -> JointTrajectory:
    msg = chunk_to_message(bad(b))
    edit(msg)
    return msg


def _uneven(msg: JointTrajectory) -> None:
    msg.points[4].time_from_start.sec += 1


def refused(name: str, reason: str, done: str, make: Callable[[Bench], ActionChunk | JointTrajectory]) -> Fault:
    """A chunk that must be refused and counted as ``reason`` while the good plan goes on."""

    def provoke(b: Bench) -> float:
        key = f"rejected.{reason}"
        before, accepted = b.count(key), b.count("chunks_accepted")
        sent_s = 0.0

        def counted() -> bool:
            nonlocal sent_s
            if time.time() > sent_s + RESEND_S:
                sent_s = b.send(make(b))
            return b.count(key) > before

        b.wait(counted, key)
        took_ms = (b.last().at_s - sent_s) * 1e3
        b.counted("chunks_accepted", accepted)
        b.wait(lambda: b.running_since(sent_s), "the plan to go on")
        assert b.off_plan() <= OVERSHOOT, "a refused chunk moved the robot"
        return took_ms

    return Fault(name, done, f"refused whole, counted as {reason}; the plan goes on", REFUSED_MS, "ms", provoke)


# --- when chunks do not come, or not in time -------------------------------------------------------------------------


def policy_hangs(b: Bench) -> float:
    b.plan = lambda: None
    silent_s = b.wait(lambda: b.chunks, "a chunk") and b.chunks[-1][0]
    status = b.told("controller", "watchdog: no chunk for", silent_s)
    b.rested_s(status.at_s)
    return (status.at_s - b.chunks[-1][0]) * 1e3


def policy_slow(b: Bench) -> float:
    b.plan = lambda: None
    worst_ms = 0.0
    for _ in range(2):
        held = b.told("controller", "watchdog: no chunk for", b.chunks[-1][0])
        worst_ms = max(worst_ms, (held.at_s - b.chunks[-1][0]) * 1e3)
        sent_s = b.send(b.chunk())
        b.told("controller", "running", sent_s)
    return worst_ms


def partly_late(b: Bench) -> float:
    begun_s = time.time()

    def plan() -> ActionChunk:
        # Later by half of what time passes: every stamp is newer than the one before, so the plan never stops.
        chunk = b.chunk(age_s=min(1.0, (time.time() - begun_s) / 2))
        if time.time() > begun_s + 2.5:
            chunk.actions_hc[:2, 0] = AWAY  # played by then
        return chunk

    b.plan = plan
    b.wait(lambda: time.time() > begun_s + 2.5, "chunks a second late")
    b.counted("chunks_accepted", b.count("chunks_accepted") + 6)
    return float(np.abs(b.command("left_waist")).max())


def last_stamp(b: Bench) -> int:
    stamp = b.wait(lambda: b.chunks, "a chunk") and b.chunks[-1][1].header.stamp
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def before_a_pause(b: Bench) -> float:
    observed = bad(b)
    assert b.call("qwen_vla/stop").success and b.call("qwen_vla/start").success
    b.plan = lambda: None
    before = b.count("rejected.before_epoch")
    sent_s = b.send(observed)
    status = b.counted("rejected.before_epoch", before)
    b.plan = b.chunk
    b.told("controller", "running", sent_s)
    assert np.abs(b.command("left_waist")).max() <= SWING + OVERSHOOT
    return (status.at_s - sent_s) * 1e3


def stopped_mid_chunk(b: Bench) -> float:
    now_s = time.time()
    assert b.call("qwen_vla/stop", Trigger).success
    b.told("controller", "idle: stopped", now_s)
    seen = b.count("count.chunks_ignored")
    b.counted("count.chunks_ignored", seen + 2)  # the policy goes on; nobody plays it
    took_ms = (max(t.at_s for ticks in b.ticks.values() for t in ticks) - now_s) * 1e3
    again_s = time.time()
    assert b.call("qwen_vla/start", Trigger).success
    b.told("controller", "running", again_s)
    return took_ms


# --- when chunks come and are nonsense that can be played ------------------------------------------------------------


def reach(b: Bench) -> float:
    """How far the commands went, as a share of the way from the middle of each range to its limit."""
    worst = 0.0
    for group in ROBOT.actions:
        lower, upper = np.array(group.limits.lower), np.array(group.limits.upper)
        for tick in list(b.ticks[group.name]):
            worst = max(worst, float(np.abs((tick.position - (lower + upper) / 2) / ((upper - lower) / 2)).max()))
    return worst


def speed(b: Bench) -> float:
    """The largest rate commanded, as a share of its channel's limit."""
    return max(
        float(np.abs(tick.rate / np.array(group.limits.velocity)).max())
        for group in ROBOT.actions
        for tick in list(b.ticks[group.name])
    )


def played(make: Callable[[Bench, int], np.ndarray], measure: Callable[[Bench], float]) -> Callable[[Bench], float]:
    """Plays six chunks of ``make(bench, number)`` (H, c) and measures."""

    def provoke(b: Bench) -> float:
        made = 0

        def plan() -> ActionChunk:
            nonlocal made
            made += 1
            return ActionChunk(make(b, made), ROBOT.channels, b.now_ns(), ROBOT.period_s)

        b.plan = plan
        b.counted("chunks_accepted", b.count("chunks_accepted") + 6)
        return measure(b)

    return provoke


def alternating(size: float) -> np.ndarray:
    return np.where(np.arange(HORIZON)[:, None] % 2 == 0, size, -size) * np.ones((1, WIDTH))


def contradicting(_b: Bench, number: int) -> np.ndarray:
    return np.tile(START, (HORIZON, 1)) + (0.5 if number % 2 else -0.5)


def reordered(b: Bench) -> float:
    order = np.random.default_rng(0).permutation(WIDTH)

    def plan() -> ActionChunk:
        chunk = b.chunk()
        names = tuple(chunk.channels[i] for i in order)
        return replace(chunk, channels=names, actions_hc=chunk.actions_hc[:, order])

    b.plan = plan
    b.counted("chunks_accepted", b.count("chunks_accepted") + 6)
    still = [c for i, c in enumerate(ROBOT.channels) if c not in ("left_waist", "right_waist") and "gripper" not in c]
    return max(float(np.ptp(b.command(channel))) for channel in still)


def two_policies(b: Bench) -> float:
    other = b.node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    try:
        now_s = time.time()
        accepted = b.count("chunks_accepted")
        timer = b.node.create_timer(0.15, lambda: other.publish(chunk_to_message(bad(b))))
        status = b.told("controller", "2 publishers on qwen_vla/chunk", now_s)
        b.counted("chunks_accepted", accepted + 10)
        b.node.destroy_timer(timer)
        assert np.abs(b.command("left_waist")).max() <= AWAY + OVERSHOOT
    finally:
        b.node.destroy_publisher(other)
    b.wait(lambda: b.count("chunk_publishers") == 1, "one policy left")
    return (status.at_s - now_s) * 1e3


def flood(b: Bench) -> float:
    for i in range(300):
        b.send(poisoned(b, np.nan) if i % 2 else b.chunk())
    b.counted("chunks_accepted", b.count("chunks_accepted") + 3)
    ticks = [tick.at_s for tick in list(b.ticks["left_arm"])]
    return float(np.diff(ticks).max() * 1e3)


FAULTS = [
    Fault(
        "policy hung",
        "no chunk is published any more",
        "arms hold the measured pose, reason published",
        HOLD_MS,
        "ms",
        policy_hangs,
    ),
    Fault(
        "policy slow",
        "a chunk only after the watchdog, twice",
        "holds between chunks, plays each",
        HOLD_MS,
        "ms",
        policy_slow,
    ),
    Fault(
        "chunk 1 s late",
        "chunks arrive 1 s after their observation, their first two actions wrong",
        "what was played since the observation is skipped",
        SWING + 0.05,
        "rad",
        partly_late,
    ),
    refused(
        "chunk too late", "expired", "observed 3 s ago", lambda b: replace(bad(b), stamp_ns=b.now_ns() - 3_000_000_000)
    ),
    refused("chunk without stamp", "expired", "its stamp is 0", lambda b: replace(bad(b), stamp_ns=0)),
    refused(
        "chunk from the future",
        "future_stamp",
        "stamped 1 s ahead",
        lambda b: replace(bad(b), stamp_ns=b.now_ns() + 1_000_000_000),
    ),
    refused("chunk duplicated", "not_newer", "sent again", lambda b: replace(bad(b), stamp_ns=last_stamp(b))),
    refused(
        "chunks out of order",
        "not_newer",
        "older than the one being played",
        lambda b: replace(bad(b), stamp_ns=last_stamp(b) - 150_000_000),
    ),
    Fault(
        "chunk from before a pause",
        "observed before stop and start, arrives after",
        "refused, counted as before_epoch",
        REFUSED_MS,
        "ms",
        before_a_pause,
    ),
    Fault(
        "stopped mid-chunk",
        "qwen_vla/stop while a chunk plays and more come",
        "brakes, then silence: last command",
        STATUS_MS + TOLERANCE_MS,
        "ms",
        stopped_mid_chunk,
    ),
    refused("chunk with NaN", "non_finite", "one value is NaN", lambda b: poisoned(b, np.nan)),
    refused("chunk with Inf", "non_finite", "one value is infinite", lambda b: poisoned(b, -np.inf)),
    Fault(
        "chunk with huge values",
        "every value is 1e300",
        "commands stop at their limits",
        WHOLE,
        "of the range",
        played(lambda _b, _n: np.full((HORIZON, WIDTH), 1e300), reach),
    ),
    Fault(
        "chunk with huge steps",
        "every action is 1e6, then -1e6",
        "commands keep their velocity limits",
        WHOLE,
        "of the limit",
        played(lambda _b, _n: alternating(1e6), speed),
    ),
    Fault(
        "contradicting chunks",
        "each chunk is 1 rad away from the one before",
        "they join without a jump, inside all limits",
        WHOLE,
        "of the limit",
        played(contradicting, speed),
    ),
    refused(
        "chunk too short",
        "wrong_length",
        "one action is missing",
        lambda b: replace(bad(b), actions_hc=bad(b).actions_hc[:-1]),
    ),
    refused(
        "chunk too long",
        "wrong_length",
        "ten times as many actions",
        lambda b: replace(bad(b), actions_hc=np.repeat(bad(b).actions_hc, 10, axis=0)),
    ),
    refused(
        "chunk with unknown channel",
        "wrong_channels",
        "a channel of another robot",
        lambda b: renamed(b, *ROBOT.channels[:-1], "tail"),
    ),
    refused(
        "chunk with doubled channel",
        "wrong_channels",
        "one name twice, one missing",
        lambda b: renamed(b, *ROBOT.channels[:-1], ROBOT.channels[0]),
    ),
    refused(
        "chunk without a channel",
        "wrong_channels",
        "only 13 of 14 channels",
        lambda b: ActionChunk(bad(b).actions_hc[:, :-1], ROBOT.channels[:-1], b.now_ns(), ROBOT.period_s),
    ),
    Fault(
        "chunk with reordered channels",
        "columns in another order, named",
        "names decide: channels the plan keeps still stay so",
        0.01,
        "rad",
        reordered,
    ),
    refused("chunk of another rate", "wrong_period", "actions 20 ms apart", lambda b: replace(bad(b), period_s=0.02)),
    refused("chunk without actions", "malformed", "no points", lambda b: edited(b, lambda msg: msg.points.clear())),
    refused(
        "chunk with ragged rows",
        "malformed",
        "one action lacks a value",
        lambda b: edited(b, lambda msg: msg.points[3].positions.pop()),
    ),
    refused("chunk unevenly spaced", "malformed", "one action is due a second later", lambda b: edited(b, _uneven)),
    Fault(
        "two policies at once",
        "a second publisher of contradicting chunks",
        "inside all limits, and the status says so",
        3000,
        "ms",
        two_policies,
    ),
    Fault(
        "flood of chunks",
        "300 chunks at once",
        "commands go on: longest pause between two",
        PAUSE_MS,
        "ms",
        flood,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: Bench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
