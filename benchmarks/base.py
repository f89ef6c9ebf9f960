#!/usr/bin/env python3
"""How closely waypoints are followed by a twist, where obstacles stop the base, and what both cost per tick.

    python benchmarks/base.py [--json] [--plot docs/images/mobile_base.png]

Protocol: the control law of the shipped base in simulated time (20 Hz, a chunk every half second from where the base
is, no latency), driving a base that does what it is told. ``tracking``: distance to the plan, in the last 10 of 20 s.
``stopping``: a plan of so many m/s through a wall; metres left before it, footprint 0.2 m on every side, stop distance
0.15 m, scans at 10 Hz. ``tick_us``: median of a whole tick, one of each after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.embodiment.spec_base import FootprintSpec, ObstacleStopSpec
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.controller import ControlLoop
from qwen_vla_core.runtime.mock_scanner import scan_of_boxes

SIDE, STOP_M, DT = 0.2, 0.15, 0.05
STOP = ObstacleStopSpec("/scan", FootprintSpec(SIDE, SIDE, SIDE), STOP_M, 0.8)
Way = Callable[[np.ndarray], np.ndarray]


def guarded(robot: Embodiment) -> Embodiment:
    """The robot with an obstacle stop."""
    return dataclasses.replace(robot, safety=dataclasses.replace(robot.safety, obstacle_stop=STOP))


class Drive:
    """A control law, and a base that does what it is told."""

    def __init__(self, robot: Embodiment, boxes_n4: np.ndarray | None = None) -> None:
        self.robot, self.loop, self.t, self.boxes = robot, ControlLoop(robot), 10**12, boxes_n4
        self.pose, self.twist = np.zeros(3), np.zeros(2)
        self.rows: list[tuple[float, float, float, float, float, float]] = []
        self.tick_s: list[float] = []
        self.loop.start(self.t)

    def run(self, seconds: float, way: Way) -> Drive:
        """``way``: seconds from now → (n, 3) poses."""
        for tick in range(round(seconds / DT)):
            self.t += round(DT * 1e9)
            x, y, yaw = self.pose
            state = (x, y, math.remainder(yaw, 2 * math.pi), *self.twist)
            self.loop.update_state(dict(zip(self.robot.state_channels, state, strict=True)), self.t)
            if self.boxes is not None and tick % 2 == 0:
                self.loop.update_scan(scan_of_boxes(self.boxes, (x, y, yaw), (0.0, 0.0, 0.0), self.t), self.t)
            if tick % 10 == 0:
                due = self.robot.period_s * np.arange(1, self.robot.control.horizon + 1)
                self.loop.feed(ActionChunk(way(due), self.robot.channels, self.t, self.robot.period_s), self.t)
            began = time.perf_counter()
            output = self.loop.tick(self.t)
            self.tick_s.append(time.perf_counter() - began)
            if output.commands:
                self.twist = output.commands[self.robot.actions[0].name].values
            course = yaw + 0.5 * self.twist[1] * DT
            step = (math.cos(course) * self.twist[0], math.sin(course) * self.twist[0], self.twist[1])
            self.pose = self.pose + DT * np.array(step)
            self.rows.append((tick * DT, *self.pose, *self.twist))
        return self

    def straight(self, speed: float) -> Way:
        """Ahead from where it is."""

        def way(due: np.ndarray) -> np.ndarray:
            x, y, yaw = self.pose
            far = speed * due
            return np.column_stack([x + far * math.cos(yaw), y + far * math.sin(yaw), np.full(len(due), yaw)])

        return way


def eight(at: np.ndarray, seconds: float = 20.0) -> np.ndarray:
    """(n, 3) where a plan around a figure eight is, 2 m × 1 m."""
    a = 2 * math.pi * at / seconds
    x, y = np.sin(a), 0.5 * np.sin(2 * a)
    dx, dy = np.cos(a), np.cos(2 * a)
    return np.column_stack([x, y, np.unwrap(np.arctan2(dy, dx))])


def circle(at: np.ndarray) -> np.ndarray:
    """(n, 3) around a circle of 1 m at 0.4 m/s."""
    a = 0.4 * at
    return np.column_stack([np.sin(a), 1 - np.cos(a), a])


def follow(plan: Way) -> tuple[dict[str, float], Drive]:
    """Distances to the plan in metres, and the drive."""
    drive = Drive(load_embodiment("mobile_base"))
    drive.pose = plan(np.zeros(1))[0].copy()
    drive.run(20.0, lambda due: plan(due + (drive.t - 10**12) * 1e-9))
    rows = np.array(drive.rows)
    times = np.linspace(0.0, 20.0, 2001)
    path = plan(times)[:, :2]
    late = rows[rows[:, 0] > 10.0]
    off = np.array([np.hypot(*(path - row[1:3]).T).min() for row in late])
    return {"beside_plan_mean_m": float(off.mean()), "beside_plan_max_m": float(off.max())}, drive


def brake(speed: float) -> tuple[dict[str, float], Drive]:
    """What is left before a wall."""
    wall_x = 3.0
    drive = Drive(guarded(load_embodiment("mobile_base")), np.array([[wall_x, -2.0, wall_x + 0.1, 2.0]]))
    drive.run(20.0, drive.straight(speed))
    gap = wall_x - SIDE - drive.pose[0]
    return {"speed": speed, "gap_m": float(gap), "left_of_stop_distance_m": float(gap - STOP_M)}, drive


def cost(ticks: int = 600) -> dict[str, float]:
    """Median microseconds of a tick: told poses, tracked, and tracked with an obstacle stop and a wall in sight."""
    robot = load_embodiment("mobile_base")
    (group,) = robot.actions
    poses = dataclasses.replace(group.command, kind="pose_stamped", frame_id="odom", fields=(), tracker=None)
    told = dataclasses.replace(robot, actions=(dataclasses.replace(group, command=poses),))
    wall = np.array([[3.0, -2.0, 3.1, 2.0]])
    loops = {"poses": Drive(told), "tracked": Drive(robot), "tracked, obstacle stop": Drive(guarded(robot), wall)}
    for drive in loops.values():
        if drive.loop.base.tracks:
            drive.run(ticks * DT, drive.straight(0.4))
        else:  # nobody follows the poses here; the cost is the same
            _stand(drive, ticks)
    return {name: float(np.median(drive.tick_s) * 1e6) for name, drive in loops.items()}


def _stand(drive: Drive, ticks: int) -> None:
    """Ticks of a robot that is told to be where it is."""
    rows = np.zeros((drive.robot.control.horizon, 3))
    for tick in range(ticks):
        drive.t += round(DT * 1e9)
        drive.loop.update_state(dict.fromkeys(drive.robot.state_channels, 0.0), drive.t)
        if tick % 10 == 0:
            drive.loop.feed(ActionChunk(rows, drive.robot.channels, drive.t, drive.robot.period_s), drive.t)
        began = time.perf_counter()
        drive.loop.tick(drive.t)
        drive.tick_s.append(time.perf_counter() - began)


def plot(path: Path, eight_drive: Drive, walls: dict[float, Drive]) -> None:
    """The figure eight from above, and speeds before a wall."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    planned, rows = eight(np.linspace(0, 20, 400)), np.array(eight_drive.rows)
    left.plot(planned[:, 0], planned[:, 1], color="0.75", linewidth=5, label="plan")
    left.plot(rows[:, 1], rows[:, 2], color="tab:blue", linewidth=1.5, label="driven by twist")
    left.set(xlabel="x [m]", ylabel="y [m]", aspect="equal", title="waypoints followed as a twist")
    left.legend(loc="upper center", ncols=2)
    left.set_ylim(-0.6, 0.8)
    for speed, drive in walls.items():
        rows = np.array(drive.rows)
        right.plot(3.0 - SIDE - rows[:, 1], rows[:, 4], label=f"plan of {speed:g} m/s")
    right.axvspan(0, STOP_M, color="tab:red", alpha=0.15)
    right.text(STOP_M / 2, 0.35, "stop distance", rotation=90, ha="center", va="center")
    right.axvline(STOP.slow_distance, color="0.6", linestyle="--")
    right.text(STOP.slow_distance, 0.02, " slow distance", ha="left", color="0.4")
    right.set(xlabel="metres left before the wall", ylabel="speed [m/s]", xlim=(1.3, 0), ylim=(0, 0.75))
    right.set_title("a plan through a wall")
    right.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the figure eight and the braking")
    args = parser.parse_args()
    round_, _ = follow(circle)
    crossed, drive = follow(eight)
    stops = [brake(speed) for speed in (0.2, 0.4, 0.6, 0.7)]
    result = {
        "tracking": {"circle": round_, "figure eight": crossed},
        "stopping": [row for row, _ in stops],
        "tick_us": cost(),
    }
    if args.plot:
        plot(args.plot, drive, {row["speed"]: stopped for row, stopped in stops[1:]})
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, row in result["tracking"].items():
        print(
            f"{name:14} beside the plan: mean {row['beside_plan_mean_m']:.3f} m, max {row['beside_plan_max_m']:.3f} m"
        )
    for row in result["stopping"]:
        print(f"wall at {row['speed']:.1f} m/s: {row['gap_m']:.3f} m left, stop distance {STOP_M} m")
    print("tick:", ", ".join(f"{name} {value:.0f} µs" for name, value in result["tick_us"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
