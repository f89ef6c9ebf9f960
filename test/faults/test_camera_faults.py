"""Cameras and what else the policy sees: nothing it may not act on ever becomes a picture; the arms hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_bench import (
    CAMERA_AGE_MS,
    INSTRUCTION,
    PAUSE_MS,
    PICTURE,
    STATUS_MS,
    WATCHDOG_MS,
    Bench,
    noise,
    robot_yaml,
)
from fault_support import Fault, Ledger
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.messages import numpy_to_image
from qwen_vla_ros.node_utils import ns_to_stamp

VIEW = "cam_left_wrist"
LEFT = "/follower_left/joint_states"
FROZEN_MS = 1000  # the default of policy_node's frozen_after_s
SLOW_MS = 900  # an inference under load, and what is on its way to the controller
MS = 1_000_000


@pytest.fixture(scope="module")
def bench(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Bench:
    """A policy and its controller, with cameras and drivers that all work, as on a robot."""
    yaml = robot_yaml(tmp_path_factory.mktemp("robot"))
    specs = {spec.name: spec for spec in build_graph(str(yaml), checkpoint=str(checkpoint))}
    controller, policy = specs["controller_node"], specs["policy_node"]
    policy_parameters = {**policy.parameters, "instruction": INSTRUCTION, "frozen_after_s": FROZEN_MS / 1000}
    return make_bench(
        [
            replace(controller, parameters={**controller.parameters, "start_on_activate": True}),
            replace(policy, parameters=policy_parameters),
        ],
        cameras=True,
    )


Picture = Callable[[str, int], Image | None]


def holds(name: str, done: str, reason: str, after_ms: float, spoil: Callable[[Bench], None]) -> Fault:
    """The policy says ``reason`` and falls silent, the controller holds; all goes on when the cause is gone."""

    def provoke(b: Bench) -> float:
        now_s = time.time()
        spoil(b)
        b.told("policy", reason, now_s)
        held = b.told("controller", "watchdog: no chunk for", now_s)
        b.rested_s(held.at_s)
        told = b.told("policy", reason, held.heard_s)  # and still says so
        assert told.values["state"] in ("holding", "fault")
        assert not [at_s for at_s, _ in b.chunks if at_s > held.heard_s], "a chunk in spite of it"
        b.heal()
        b.told("controller", "running", held.heard_s)
        return (held.at_s - now_s) * 1e3

    bound_ms = after_ms + WATCHDOG_MS + SLOW_MS
    return Fault(name, done, f"arms hold, “{reason}” published; goes on by itself", bound_ms, "ms", provoke)


def camera(name: str, done: str, reason: str, after_ms: float, change: Callable[[str, int], Image | None]) -> Fault:
    """``change`` makes the pictures of one view."""

    def spoil(b: Bench) -> None:
        b.picture = lambda view, stamp_ns: change(view, stamp_ns) if view == VIEW else noise(view, stamp_ns)

    return holds(name, done, reason, after_ms, spoil)


def shown(pixels: np.ndarray, encoding: str = "rgb8") -> Picture:
    return lambda view, stamp_ns: numpy_to_image(pixels, encoding, ns_to_stamp(stamp_ns), view)


def spoilt(**fields: object) -> Picture:
    """A good picture with wrong header fields."""

    def change(view: str, stamp_ns: int) -> Image:
        msg = noise(view, stamp_ns)
        for field, value in fields.items():
            setattr(msg, field, value)
        return msg

    return change


def shifted(by_ms: int) -> Picture:
    return lambda view, stamp_ns: noise(view, stamp_ns + by_ms * MS)


def same_stamp() -> Picture:
    first: list[int] = []

    def change(view: str, stamp_ns: int) -> Image:
        first.append(stamp_ns)
        return noise(view, first[0])

    return change


def states(name: str, done: str, reason: str, after_ms: float, change: Callable[[JointState], JointState]) -> Fault:
    """``change`` makes the left arm's joint states; stamps count for the policy, arrival for the controller."""

    def spoil(b: Bench) -> None:
        b.mangle = lambda topic, msg: change(msg) if topic == LEFT else msg

    return holds(name, done, reason, after_ms, spoil)


def _old(msg: JointState) -> JointState:
    stamp_ns = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
    msg.header.stamp = ns_to_stamp(stamp_ns - 2_000_000_000)
    return msg


def out_of_step(b: Bench) -> float:
    """One camera's stamps lag by less than their age limit, but more than the views may be apart."""

    def picture(view: str, stamp_ns: int) -> Image:
        return noise(view, stamp_ns - (220 * MS if view == VIEW else 0))

    now_s = time.time()
    b.picture = picture
    held = b.told("controller", "watchdog: no chunk for", now_s)
    reasons = [s.message for s in b.statuses["policy"] if s.heard_s > now_s]
    assert any("away from the reference camera" in message for message in reasons), reasons
    b.heal()
    b.told("controller", "running", held.heard_s)
    return (held.at_s - now_s) * 1e3


def unstamped(b: Bench) -> float:
    """Drivers that stamp nothing: the time of arrival counts, and the robot moves on."""
    b.picture = lambda view, stamp_ns: noise(view, 0, seed=stamp_ns)
    b.goes_on(time.time(), chunks=8)
    ticks = [tick.at_s for tick in list(b.ticks["left_arm"])]
    return float(np.diff(ticks).max() * 1e3)


def instruction_withdrawn(b: Bench) -> float:
    now_s = time.time()
    b.instructions.publish(String(data=""))
    idle = b.told("policy", "idle: no instruction", now_s)
    b.told("controller", "holding", now_s)
    late = [at_s for at_s, _ in b.chunks if at_s > idle.heard_s]
    again_s = time.time()
    b.instructions.publish(String(data=INSTRUCTION))
    b.told("controller", "running", again_s)
    return len(late)


def instruction_changed(b: Bench) -> float:
    """The chunk being computed for the old one is discarded; what was observed for the old one is not replayed."""
    now_s = time.time()
    b.instructions.publish(String(data="pick up the green cube"))
    status = b.wait(
        lambda: next(
            (s for s in b.statuses["policy"] if s.heard_s > now_s and "green" in s.values.get("instruction", "")), None
        ),
        "the new instruction",
    )
    before = status.count("inferences")
    b.wait(lambda: b.count("inferences", "policy") > before, "a chunk for it")
    b.instructions.publish(String(data=INSTRUCTION))
    b.goes_on(status.heard_s)
    return (status.at_s - now_s) * 1e3


def refused_robot(b: Bench) -> float:
    return b.refuses_another_robot("policy_node")


DEPTH = np.full(PICTURE[:2], 800, np.uint16)
FROZEN = shown(np.random.default_rng(7).integers(30, 220, PICTURE, dtype=np.uint8))
FAULTS = [
    camera("camera dropped", "one camera falls silent", "is stale", CAMERA_AGE_MS, lambda _view, _stamp_ns: None),
    holds(
        "all cameras dropped",
        "no camera sends any more",
        "is stale",
        CAMERA_AGE_MS,
        lambda b: setattr(b, "picture", lambda _view, _stamp_ns: None),
    ),
    camera("camera frozen, old stamp", "the same picture and stamp again", "is stale", CAMERA_AGE_MS, same_stamp()),
    camera("camera frozen, new stamps", "bit-identical pictures with new stamps", "is frozen", FROZEN_MS, FROZEN),
    camera("camera black", "a lens is covered", "is black", 0, shown(np.full(PICTURE, 3, np.uint8))),
    camera(
        "camera of wrong size",
        "upright pictures instead of landscape",
        "another shape",
        0,
        lambda view, stamp_ns: numpy_to_image(
            np.random.default_rng(stamp_ns).integers(30, 220, (160, 120, 3), dtype=np.uint8),
            "rgb8",
            ns_to_stamp(stamp_ns),
        ),
    ),
    camera("camera of wrong encoding", "a depth picture", "not a colour or grey picture", 0, shown(DEPTH, "16UC1")),
    camera("camera of unknown encoding", "encoding “h264”", "cannot be read", 0, spoilt(encoding="h264")),
    camera("picture cut off", "more rows announced than sent", "cannot be read", 0, spoilt(height=PICTURE[0] + 8)),
    camera("picture with wrong step", "rows shorter than their pixels", "cannot be read", 0, spoilt(step=8)),
    camera("camera late", "pictures 400 ms old on arrival", "is stale", 0, shifted(-400)),
    camera("camera's clock ahead", "stamps 2 s in the future", "in the future", 0, shifted(2000)),
    Fault(
        "cameras out of sync",
        "one camera 220 ms behind the others",
        "arms hold, the skew is published; goes on by itself",
        WATCHDOG_MS + SLOW_MS,
        "ms",
        out_of_step,
    ),
    Fault(
        "cameras without stamps",
        "all stamps are 0",
        "arrival counts; commands go on: longest pause",
        PAUSE_MS,
        "ms",
        unstamped,
    ),
    states("state with old stamps", "joint states stamped 2 s ago", "is stale", 0, _old),
    Fault(
        "instruction withdrawn",
        "an empty instruction mid-chunk",
        "arms hold; chunks after the policy said so",
        0,
        "chunks",
        instruction_withdrawn,
    ),
    Fault(
        "instruction changed mid-chunk",
        "another instruction while a chunk plays",
        "taken over, the next chunk is for it",
        STATUS_MS + SLOW_MS,
        "ms",
        instruction_changed,
    ),
    Fault(
        "embodiment changed on the policy",
        "its parameter is set to another robot while active",
        "refused, the plan goes on",
        2000,
        "ms",
        refused_robot,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, bench: Bench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
