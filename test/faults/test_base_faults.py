"""A mobile base and what may be in its way: obstacles, a scanner that fails, odometry that stops."""

from __future__ import annotations

import array
import math
import os
from collections.abc import Callable, Iterator

import pytest
from base_bench import SCAN_AGE_MS, SIDE, STOP_M, BaseBench, now_s
from fault_bench import TOLERANCE_MS
from fault_support import Fault, Ledger
from sensor_msgs.msg import LaserScan

ROUNDING_M = 0.03  # of the corridor's steps and of rays 1 degree apart
ODOMETRY_AGE_MS = 300


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseBench]:
    """Controller and mock of a base, in a ROS domain of their own."""
    from domain_coordinator import domain_id

    before = os.environ["ROS_DOMAIN_ID"]
    with domain_id() as domain:
        os.environ["ROS_DOMAIN_ID"] = str(domain)
        made = BaseBench(tmp_path_factory.mktemp("base"))
        try:
            yield made
        finally:
            made.close()
            os.environ["ROS_DOMAIN_ID"] = before


def used_up(b: BaseBench, wall_x: float) -> float:
    """Metres of the stop distance that are gone where it came to a stand before a wall across its way."""
    b.says("stopped: obstacle")
    b.stands()
    left = wall_x - SIDE - float(b.pose[0])
    assert left > 0.0, "it has touched the wall"
    return max(STOP_M - left, 0.0)


def wall_ahead(b: BaseBench) -> float:
    b.place((2.5, -2.0, 2.6, 2.0))
    return used_up(b, 2.5)


def appears(b: BaseBench) -> float:
    """Something steps in front of it, 0.9 m ahead of its front; a stop and its reaction take 0.5 m."""
    wall_x = float(b.pose[0]) + SIDE + 0.9
    b.place((wall_x, -0.1, wall_x + 0.1, 0.1))
    return used_up(b, wall_x)


def goes_away(b: BaseBench) -> float:
    wall_x = float(b.pose[0]) + SIDE + 0.9
    b.place((wall_x, -0.1, wall_x + 0.1, 0.1))
    used_up(b, wall_x)
    b.place()
    began_s = now_s()
    b.wait(lambda: b.speed > 0.3, "it to go on")
    return (b.ticks[-1][0] - began_s) * 1e3


def scan_fault(name: str, done: str, says: str, spoil: Callable[[LaserScan], LaserScan | None]) -> Fault:
    """A scanner that says nothing that may be believed: the base stands, and drives again when it does."""

    def provoke(b: BaseBench) -> float:
        began_s, seen = now_s(), len(b.ticks)
        b.spoil_scan = spoil
        b.says(says)
        assert b.status["mode"] == "holding"
        b.stands()
        moving = [t for t, v, _ in b.ticks[seen:] if v]
        b.heal()
        b.wait(lambda: b.speed > 0.3 and b.status["mode"] == "running", "it to go on")
        return (max(moving) - began_s) * 1e3

    return Fault(name, done, "stands, reason published; goes on by itself", STANDS_MS, "ms", provoke)


# From the fault to the last command that moves: the age limit, and braking from 0.6 m/s at 1.2 m/s².
STANDS_MS = SCAN_AGE_MS + 550 + TOLERANCE_MS


def _filled(value: float) -> Callable[[LaserScan], LaserScan]:
    def spoil(msg: LaserScan) -> LaserScan:
        msg.ranges = array.array("f", [value] * len(msg.ranges))
        return msg

    return spoil


def _empty(msg: LaserScan) -> LaserScan:
    msg.ranges = array.array("f")
    return msg


def _frozen() -> Callable[[LaserScan], LaserScan]:
    kept: list[LaserScan] = []

    def spoil(msg: LaserScan) -> LaserScan:
        kept.append(msg)
        return kept[0]

    return spoil


def blind_ahead(b: BaseBench) -> float:
    """Tape over the front of the scanner: what is ahead is not measured, and not taken for free."""

    def spoil(msg: LaserScan) -> LaserScan:
        msg.ranges = array.array("f", [math.nan if 130 <= i <= 230 else r for i, r in enumerate(msg.ranges)])
        return msg

    began_s, seen = now_s(), len(b.ticks)
    b.spoil_scan = spoil
    b.says("stopped: the scan does not see ahead")
    b.stands()
    return (max(t for t, v, _ in b.ticks[seen:] if v) - began_s) * 1e3


def odometry_silent(b: BaseBench) -> float:
    began_s, seen = now_s(), len(b.ticks)
    b.spoil_odometry = lambda _msg: None
    b.says("stale state: pose")
    b.stands()
    moving = [t for t, v, _ in b.ticks[seen:] if v]
    b.heal()
    b.wait(lambda: b.speed > 0.3 and b.status["mode"] == "running", "it to go on")
    return (max(moving) - began_s) * 1e3


STANDS = "stands before the stop distance, reason published"
FAULTS = [
    Fault("wall ahead of a base", "the plan drives through a wall", STANDS, ROUNDING_M, "m used up", wall_ahead),
    Fault("obstacle at speed", "appears 0.9 m ahead at 0.6 m/s", STANDS, ROUNDING_M, "m used up", appears),
    Fault("obstacle goes away", "as above, and away again", "drives on by itself", 3000, "ms", goes_away),
    scan_fault("scanner silent", "no scan is published any more", "stale scan", lambda _msg: None),
    scan_fault("scan repeated", "the same scan and stamp again", "stale scan", _frozen()),
    scan_fault("scan of NaN", "every range is NaN", "no measurement", _filled(math.nan)),
    scan_fault("scan of zeros", "every range is 0", "no measurement", _filled(0.0)),
    scan_fault("scan without ranges", "an empty message", "no ranges", _empty),
    Fault(
        "scanner blind ahead",
        "a third of the ranges, ahead, is NaN",
        "not taken for free: stands, reason published",
        STANDS_MS,
        "ms",
        blind_ahead,
    ),
    Fault(
        "odometry silent",
        "no odometry is published any more",
        "stands, reason published; goes on by itself",
        ODOMETRY_AGE_MS + 550 + TOLERANCE_MS,
        "ms",
        odometry_silent,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_of_a_base(fault: Fault, bench: BaseBench, ledger: Ledger) -> None:
    ledger.judge(fault, bench)
