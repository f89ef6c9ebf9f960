"""Longest pause between two commands after a recorder was killed: the controller with and without shared memory.

    python benchmarks/killed_recorder.py [--kills 60] [--json]

Two graphs run side by side, each in a ROS domain of its own: mock robot, recorder and controller; in one of them the
controller has the profile of all other nodes (``config/fastdds.xml``), in the other its own (``fastdds_udp.xml``). The
recorders are killed (SIGKILL) at random times and started again. The controller holds, which takes 50 commands a
second; pauses are differences of its own time stamps. Needs Fast DDS.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen_vla_ros.bringup import (  # noqa: E402
    CONTROLLER_PROFILE,
    PROFILE,
    NodeSpec,
    build_graph,
    command_line,
    node_environment,
    process_environment,
)

READY_S = 60.0
RECORDS_S, AFTER_S = (1.5, 3.0), 4.0  # how long a recorder reads before it is killed, and how long the pause is watched


class Side:
    """One graph and who listens to its commands."""

    def __init__(self, domain: int, profile: str, folder: Path) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile

        from qwen_vla_core.embodiment import load_embodiment
        from qwen_vla_ros.commands import adapter_for, command_kind

        self.domain, self.stamps_s = domain, list[float]()
        specs = build_graph("aloha", sim=False, mock=True, policy=False, run_dir=str(folder / profile))
        wanted = {spec.name: spec for spec in specs}
        chosen = node_environment(profile_file=profile)
        wanted["controller_node"] = replace(wanted["controller_node"], environment=chosen)
        self.recorder_spec = wanted["recorder_node"]
        self.processes = {name: self._start(spec) for name, spec in wanted.items()}
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node(f"listener_{domain}", context=self.context)
        group = load_embodiment("aloha").actions[0]

        def on_command(_message: Any, info: Any) -> None:
            self.stamps_s.append(info["source_timestamp"] * 1e-9)

        message_type = adapter_for(command_kind(group, True)).message_type
        self.node.create_subscription(message_type, group.command.topic, on_command, QoSProfile(depth=1000))
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def _start(self, spec: NodeSpec) -> subprocess.Popen[bytes]:
        environment = {**process_environment(spec), "ROS_DOMAIN_ID": str(self.domain)}
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command_line(spec), env=environment, stdout=quiet, stderr=quiet, start_new_session=True)

    def spin(self) -> None:
        self.executor.spin_once(timeout_sec=0.01)

    def hears(self, name: str) -> bool:
        return name in self.node.get_node_names()

    def kill_recorder(self) -> float:
        now_s = time.time()
        self.processes["recorder_node"].kill()
        self.processes["recorder_node"].wait()
        return now_s

    def start_recorder(self) -> None:
        self.processes["recorder_node"] = self._start(self.recorder_spec)

    def pause_ms(self, since_s: float) -> float:
        """The longest since ``since_s``; one that has not ended counts up to now."""
        stamps_s = [stamp for stamp in self.stamps_s if stamp > since_s - 0.1]
        return float(np.diff([*stamps_s, time.time()]).max() * 1e3)

    def close(self) -> None:
        import rclpy

        for process in self.processes.values():
            process.kill()
            process.wait()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def measure(kills: int, domains: tuple[int, int], seed: int = 0) -> dict[str, list[float]]:
    """Kills the recorder of both graphs ``kills`` times; returns the longest pause after each in ms, by profile."""
    from tqdm import tqdm

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            profile: Side(domain, profile, Path(folder))
            for domain, profile in zip(domains, (PROFILE, CONTROLLER_PROFILE), strict=True)
        }
        pauses: dict[str, list[float]] = {profile: [] for profile in sides}

        def spin(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for side in sides.values():
                    side.spin()

        try:
            deadline = time.monotonic() + READY_S
            while not all(side.stamps_s and side.hears("recorder_node") for side in sides.values()):
                spin(0.1)
                if time.monotonic() > deadline:
                    raise SystemExit(f"no commands within {READY_S:.0f} s")
            for _ in tqdm(range(kills), unit="kill"):
                spin(rng.uniform(*RECORDS_S))
                killed_s = {profile: side.kill_recorder() for profile, side in sides.items()}
                spin(AFTER_S)
                for profile, side in sides.items():
                    pauses[profile].append(round(side.pause_ms(killed_s[profile]), 1))
                    side.stamps_s.clear()
                    side.start_recorder()
                spin(1.0)
        finally:
            for side in sides.values():
                side.close()
    return pauses


def main() -> int:
    """Command line; prints one line for each profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object with every pause")
    args = parser.parse_args()
    for variable in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        os.environ.pop(variable, None)
    pauses = measure(args.kills, (81, 82))
    if args.json:
        print(json.dumps({"kills": args.kills, "pauses_ms": pauses}))
        return 0
    for profile, values in pauses.items():
        long = [value for value in values if value > 200]
        print(f"{profile:<16} longest {max(values):6.0f} ms, median {np.median(values):3.0f} ms, over 200 ms: {long}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
