#!/usr/bin/env python3
"""Period jitter of the real controller process beside a bare monotonic loop, measured at the same time.

    python benchmarks/controller.py [--embodiment aloha] [--seconds 12] [--json]

Protocol: the controller node runs as its own process, fed with joint states at its own rate and a chunk at the
policy's rate through real ROS 2, and publishes every command. A second process runs the same pacing loop with nothing
in it, on the same machine at the same time: the ratio is what the node's work costs, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

BARE_LOOP = """
import json, sys, time
period, count = float(sys.argv[1]), int(sys.argv[2])
due = last = time.monotonic()
periods = []
for _ in range(count):
    due += period
    time.sleep(max(0.0, due - time.monotonic()))
    now = time.monotonic()
    periods.append(now - last)
    last = now
print(json.dumps(periods[5:]))
"""


def environment(domain: int) -> dict[str, str]:
    """The child's environment: its own ROS domain, and a fresh start of the wheels' loader."""
    values = {**os.environ, "ROS_DOMAIN_ID": str(domain), "OMP_NUM_THREADS": "1"}
    if values.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None):
        values.pop("LD_LIBRARY_PATH", None)
    return values


def node_figures(source: str, domain: int, seconds: float) -> tuple[dict[str, float], list[float]]:
    """Runs node and bare loop together; returns the node's own statistics (its last 500 periods) and the bare periods.

    Raises:
        RuntimeError: The controller never played a chunk.
    """
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from trajectory_msgs.msg import JointTrajectory

    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_core.interfaces import ActionChunk
    from qwen_vla_ros.messages import chunk_to_message, state_to_message
    from qwen_vla_ros.node_utils import CHUNK_TOPIC, COMMAND_QOS, STATUS_QOS, STATUS_TOPIC

    robot = load_embodiment(source)
    pose = {c: v for group in robot.actions for c, v in zip(group.channels, group.start, strict=False)}
    pose = dict.fromkeys(robot.state_channels, 0.0) | pose
    rows = np.tile([pose.get(channel, 0.0) for channel in robot.channels], (robot.control.horizon, 1))
    rclpy.init(domain_id=domain)
    node = rclpy.create_node("controller_benchmark")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    topics = {group.topic: [g for g in robot.state if g.topic == group.topic] for group in robot.state}
    publishers = {}
    for topic, groups in topics.items():
        message_type = type(state_to_message(groups, pose, node.get_clock().now().to_msg()))
        publishers[topic] = node.create_publisher(message_type, topic, 5)
    chunks = node.create_publisher(JointTrajectory, CHUNK_TOPIC, COMMAND_QOS)
    latest: dict[str, str] = {}

    def publish_states() -> None:
        stamp = node.get_clock().now().to_msg()
        for topic, groups in topics.items():
            publishers[topic].publish(state_to_message(groups, pose, stamp))

    def publish_chunk() -> None:
        stamp_ns = node.get_clock().now().nanoseconds
        chunks.publish(chunk_to_message(ActionChunk(rows, robot.channels, stamp_ns, robot.period_s)))

    def on_status(msg: DiagnosticArray) -> None:
        latest.update({item.key: item.value for item in msg.status[0].values})

    node.create_subscription(DiagnosticArray, STATUS_TOPIC, on_status, STATUS_QOS)
    node.create_timer(1.0 / robot.control.controller_rate_hz, publish_states)
    node.create_timer(robot.period_s, publish_chunk)
    command = [sys.executable, "-m", "qwen_vla_ros.controller_node", "--ros-args", "-p", f"embodiment:={source}"]
    controller = subprocess.Popen([*command, "-p", "simulated:=true"], env=environment(domain))
    bare = None
    try:
        deadline = time.monotonic() + 20.0
        while latest.get("mode") != "running":
            executor.spin_once(timeout_sec=0.1)
            if time.monotonic() > deadline or controller.poll() is not None:
                raise RuntimeError(f"the controller did not play chunks; its last status was {latest}")
        count = int(seconds * robot.control.controller_rate_hz)
        arguments = [str(1.0 / robot.control.controller_rate_hz), str(count)]
        bare = subprocess.Popen([sys.executable, "-c", BARE_LOOP, *arguments], stdout=subprocess.PIPE, text=True)
        while bare.poll() is None:
            executor.spin_once(timeout_sec=0.1)
        assert bare.stdout is not None
        periods: list[float] = json.loads(bare.stdout.read())
    finally:
        controller.terminate()
        controller.wait(timeout=10)
        if bare is not None and bare.poll() is None:
            bare.kill()
        node.destroy_node()
        rclpy.try_shutdown()
    figures = {name: float(latest[f"period_ms.{name}"]) for name in ("p50", "p99", "max")}
    return {**figures, "overruns": float(latest["overruns"]), "rate_hz": robot.control.controller_rate_hz}, periods


def measure(source: str, seconds: float) -> dict[str, Any]:
    """Both loops' periods in milliseconds, and the ratio of their p99 lateness."""
    from domain_coordinator import domain_id

    with domain_id() as domain:
        node, periods = node_figures(source, int(domain), seconds)
    nominal = 1000.0 / node.pop("rate_hz")
    bare_ms = 1000.0 * np.array(periods[-500:])
    bare = {"p50": float(np.median(bare_ms)), "p99": float(np.percentile(bare_ms, 99)), "max": float(bare_ms.max())}
    return {
        "nominal_ms": nominal,
        "node_ms": {name: node[name] for name in ("p50", "p99", "max")},
        "bare_ms": bare,
        "node_overruns": int(node["overruns"]),
        "p99_lateness_ratio": (node["p99"] - nominal) / max(bare["p99"] - nominal, 1e-3),
    }


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embodiment", default="aloha", help="shipped name or YAML path (default: aloha)")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the run; the last 500 periods count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = measure(args.embodiment, args.seconds)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{'period, ms':24s}{'p50':>9s}{'p99':>9s}{'max':>9s}   (nominal {result['nominal_ms']:.2f})")
    for label, key in (("controller node", "node_ms"), ("bare loop", "bare_ms")):
        print(f"{label:24s}" + "".join(f"{result[key][name]:9.3f}" for name in ("p50", "p99", "max")))
    print(f"p99 lateness, node / bare: {result['p99_lateness_ratio']:.2f}   overruns: {result['node_overruns']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
