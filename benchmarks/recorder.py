"""Recorder throughput: three 640×480 cameras at 30 Hz, 50 Hz joint states and 50 Hz commands into one MCAP bag.

    python benchmarks/recorder.py [--seconds 10] [--json]

A publishing process stands in for the drivers, with the shipped Fast DDS profile; `recorder_node` runs as in a real
graph. Drops are counted from the bag against what was sent; CPU is the recorder's own user and system time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen_vla_ros.bringup import build_graph, command_line, node_environment, process_environment  # noqa: E402

CAMERA_HZ, STATE_HZ, SIZE = 30.0, 50.0, (640, 480)  # commands come at the states' rate


def publish(seconds: float) -> dict[str, int]:
    """Publishes on the shipped ALOHA's topics between an episode's start and end; returns how often on each."""
    import numpy as np
    import rclpy
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import String

    from qwen_vla_core.embodiment import load_embodiment
    from qwen_vla_ros.commands import adapter_for, command_kind
    from qwen_vla_ros.messages import groups_by_topic, numpy_to_image, state_to_message
    from qwen_vla_ros.node_utils import CAMERA_QOS, COMMAND_QOS, EPISODE_TOPIC, LATCHED_QOS, ns_to_stamp

    rclpy.init()
    node = rclpy.create_node("drivers")
    robot = load_embodiment("aloha")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8) for _ in range(4)]
    values = dict.fromkeys(robot.state_channels, 0.0)
    groups = groups_by_topic(robot.state)
    cameras = {camera.topic: node.create_publisher(Image, camera.topic, CAMERA_QOS) for camera in robot.cameras}
    states = {topic: node.create_publisher(JointState, topic, COMMAND_QOS) for topic in groups}
    commands = {}
    for group in robot.actions:
        adapter = adapter_for(command_kind(group, True))
        still = np.zeros(len(group.channels))
        message = adapter.encode(group, still, still, ns_to_stamp(0), 1 / STATE_HZ)
        commands[group.command.topic] = (
            node.create_publisher(adapter.message_type, group.command.topic, COMMAND_QOS),
            message,
        )
    episode = node.create_publisher(String, EPISODE_TOPIC, LATCHED_QOS)
    everything = [*cameras.values(), *states.values(), *(publisher for publisher, _ in commands.values()), episode]
    deadline = time.monotonic() + 60
    while not all(publisher.get_subscription_count() for publisher in everything):
        if time.monotonic() > deadline:
            raise SystemExit("the recorder did not subscribe within 60 s")
        time.sleep(0.05)
    episode.publish(String(data=json.dumps({"event": "started", "index": 0, "seed": 0, "instruction": "benchmark"})))
    time.sleep(1.0)  # the bag opens
    sent = dict.fromkeys([*cameras, *states, *commands], 0)
    print("begin", flush=True)
    begin = time.monotonic()
    camera_due, state_due, round_number = begin, begin, 0
    while (now := time.monotonic()) < begin + seconds:
        stamp = ns_to_stamp(time.time_ns())
        if now >= state_due:
            state_due += 1 / STATE_HZ
            for topic, publisher in states.items():
                publisher.publish(state_to_message(groups[topic], values, stamp))
                sent[topic] += 1
            for topic, (publisher, message) in commands.items():
                publisher.publish(message)
                sent[topic] += 1
        if now >= camera_due:
            camera_due += 1 / CAMERA_HZ
            round_number += 1
            for topic, publisher in cameras.items():
                publisher.publish(numpy_to_image(pictures[round_number % len(pictures)], "rgb8", stamp))
                sent[topic] += 1
        time.sleep(max(0.0, min(camera_due, state_due) - time.monotonic()))
    time.sleep(0.5)  # the last messages arrive
    done = {"event": "finished", "index": 0, "seed": 0, "instruction": "benchmark", "outcome": "success"}
    episode.publish(String(data=json.dumps({**done, "seconds": seconds})))
    episode.wait_for_all_acked(rclpy.duration.Duration(seconds=5))
    node.destroy_node()
    rclpy.shutdown()
    return sent


def measure(seconds: float) -> dict[str, Any]:
    """Runs recorder and publisher and compares the bag with what was sent."""
    import psutil
    from rosbags.highlevel import AnyReader

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        spec = next(s for s in build_graph(run_dir=str(run_dir)) if s.name == "recorder_node")
        recorder = subprocess.Popen(command_line(spec), env=process_environment(spec), stdout=subprocess.DEVNULL)
        try:
            watched = psutil.Process(recorder.pid)
            drivers = subprocess.Popen(
                [sys.executable, __file__, "--publish", str(seconds)],
                env={**os.environ, **node_environment()},
                stdout=subprocess.PIPE,
                text=True,
            )
            assert drivers.stdout is not None
            drivers.stdout.readline()  # "begin": the recorder's own start-up is over
            cpu_before = _cpu_s(watched)
            output, _ = drivers.communicate(timeout=seconds + 120)
            cpu_s = _cpu_s(watched) - cpu_before
            bag = run_dir / "episode_000"
            deadline = time.monotonic() + 20
            while not bag.is_dir():
                if time.monotonic() > deadline:
                    raise SystemExit("the recorder did not close its bag")
                time.sleep(0.05)
        finally:
            recorder.send_signal(signal.SIGINT)
            recorder.wait(timeout=20)
        sent: dict[str, int] = json.loads(output.splitlines()[-1])
        with AnyReader([bag]) as reader:
            written = {connection.topic: connection.msgcount for connection in reader.connections}
        size = json.loads((bag / "episode.json").read_text())["bytes"]
    topics = {topic: {"sent": count, "dropped": count - written.get(topic, 0)} for topic, count in sent.items()}
    return {
        "seconds": seconds,
        "mb_per_s": size / 1e6 / seconds,
        "cpu_percent": 100 * cpu_s / seconds,
        "camera_hz_sent": next(count for topic, count in sent.items() if "cam" in topic) / seconds,
        "state_hz_sent": next(count for topic, count in sent.items() if "joint_states" in topic) / seconds,
        "command_hz_sent": next(count for topic, count in sent.items() if "commands" in topic) / seconds,
        "dropped": sum(row["dropped"] for row in topics.values()),
        "topics": topics,
    }


def _cpu_s(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the recording (default: 10)")
    parser.add_argument("--json", action="store_true", help="machine-readable result")
    parser.add_argument("--publish", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish:
        print(json.dumps(publish(args.publish)))
        return 0
    result = measure(args.seconds)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{'topic':<50} {'sent':>6} {'dropped':>8}")
    for topic, row in result["topics"].items():
        print(f"{topic:<50} {row['sent']:>6} {row['dropped']:>8}")
    print(f"{result['mb_per_s']:.1f} MB/s, {result['cpu_percent']:.0f} % of one core, {result['dropped']} dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
