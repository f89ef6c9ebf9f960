"""The robot, simulated: the same topics as the real one, a MuJoCo world behind them.

Three threads share one world. Physics steps it in real time and publishes state; the cameras render a twin of it; the
director runs episodes (reset, instruction, judge, result). Commands and services arrive on the executor.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import LaserScan

from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.spec import ActionGroup, CameraSpec
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION
from qwen_vla_core.runtime.mock_robot import SERVO_TIMEOUT_S
from qwen_vla_core.runtime.obstacles import Scan
from qwen_vla_core.sim.registry import make_world, world_class
from qwen_vla_ros.commands import TWIST_FIELD_PATHS, adapter_for, command_kind
from qwen_vla_ros.messages import (
    groups_by_topic,
    image_message_type,
    numpy_to_image,
    rgb_to_compressed,
    scan_to_message,
    state_message_type,
    state_to_message,
)
from qwen_vla_ros.node_utils import (
    CAMERA_QOS,
    COMMAND_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
    declare,
    declare_robot,
    heartbeat,
    load_robot,
    ns_to_stamp,
    run_node,
    status_message,
)
from qwen_vla_ros.sim_camera import TwinCamera
from qwen_vla_ros.sim_episodes import Director, EpisodeSettings
from qwen_vla_ros.suite_runner import WatchedEpisode, episode_row

SCAN_HZ, SCAN_BEAMS, SCAN_RANGE_M = 10.0, 360, 10.0  # of the simulated laser scanner
MAX_LAG_S = 0.1  # further behind real time than this, the schedule starts anew instead of catching up in a burst


class SimNode(Node):
    """See the module's text. Parameters are described where they are declared."""

    def __init__(self) -> None:
        super().__init__("sim_node")
        name = declare_robot(self, "aloha")
        self._factor = declare(
            self, "real_time_factor", 1.0, "Simulated seconds per second", read_only=True, minimum=0.05, maximum=10.0
        )
        self._publish_clock = declare(self, "publish_clock", False, "Publish /clock and stamp with it", read_only=True)
        run_episodes = declare(
            self,
            "run_episodes",
            True,
            "Reset, instruct and judge; false: only a robot, which any stack may drive",
            read_only=True,
        )
        declare(self, "mute_views", "", "Views that publish nothing, comma separated: a fault drill")
        task = declare(self, "task", "", "Task the world draws from; empty: its first; all: all", read_only=True)
        suite = declare(self, "suite", "", "Suite whose worlds are used (qwen-vla eval run --ros)", read_only=True)
        axis = declare(self, "axis", "", "Axis of that suite; empty: in distribution", read_only=True)
        settings = EpisodeSettings(
            instruction=declare(self, "instruction", "", "What to do; empty: the world chooses", read_only=True),
            episodes=declare(self, "episodes", 0, "End after so many; 0: never", read_only=True, minimum=0),
            seed=declare(self, "seed", 0, "Seed of the first episode; the next count up", read_only=True, minimum=0),
            timeout_s=declare(
                self,
                "episode_timeout_s",
                0.0,
                "Simulated seconds from the first chunk until an episode has failed; 0: the world's own limit",
                read_only=True,
                minimum=0.0,
                maximum=86400.0,
            ),
            startup_timeout_s=declare(
                self, "startup_timeout_s", 300.0, "Wait this long for the other nodes", read_only=True, minimum=1.0
            ),
            wait_for_recorder=declare(self, "wait_for_recorder", False, "Start with the recorder only", read_only=True),
            summary_file=declare(self, "summary_file", "", "JSON with all outcomes", read_only=True),
        )
        self.embodiment = commanded_robot(load_robot(self, name))
        simulation = self.embodiment.simulation
        if simulation is None:
            raise UserError(f"parameter 'embodiment': '{self.embodiment.name}' has no simulation section")
        known = world_class(simulation.world).task_names
        if task not in ("", "all", *known):
            raise UserError(f"parameter 'task': {task!r} is none of {', '.join(known)}, all")
        options: dict[str, Any] = {"tasks": known if task == "all" else (task or known[0],)}
        self._watched = WatchedEpisode(suite, axis or IN_DISTRIBUTION, task or known[0]) if suite else None
        if self._watched is not None:
            options = self._watched.world_options
        self._world: Any = make_world(simulation.world, **options)
        if self.embodiment.channels != tuple(self._world.channels):
            self._world.command_by(self.embodiment.channels)
        if settings.timeout_s == 0.0:
            settings = replace(settings, timeout_s=float(self._world.limit_s))
        self._camera = TwinCamera(simulation.world, self._world, **options)
        self._camera_rate_hz = simulation.camera_rate_hz
        self._camera_size = simulation.camera_size
        self._period_s = 1.0 / self._world.control_hz / self._factor
        self.lock = threading.Lock()  # the world and the target
        self._stop = threading.Event()
        self._sim_ns = 0
        self._rendered = 0
        self._overruns = 0
        self._bad_commands = 0
        self._died = False
        self._commanded_at = 0.0
        self._steps = 0
        self._rate_window = (time.monotonic(), 0, 0)
        self._tracked = next((group for group in self.embodiment.actions if group.tracked(simulated=True)), None)
        if self._tracked is not None and not hasattr(self._world, "drive"):
            raise UserError(
                f"actions: '{self._tracked.name}' is commanded with a twist, which world '{simulation.world}' "
                "does not take; set command.simulation_kind: pose_stamped"
            )
        self._twist = dict.fromkeys(TWIST_FIELD_PATHS, 0.0)
        self._index = {channel: i for i, channel in enumerate(self.embodiment.channels)}
        self._world.reset(settings.seed, settings.instruction or None)
        self._camera.reset(settings.seed, self._world.instruction)
        self._target_c: np.ndarray = np.array(self._world.command())
        self._make_topics()
        self.director = Director(self, settings) if run_episodes else None
        self._threads = [
            threading.Thread(target=self._step_forever, name="physics", daemon=True),
            threading.Thread(target=self._render_forever, name="cameras", daemon=True),
        ]
        if self.director is not None:
            self._threads.append(threading.Thread(target=self.director.run, name="director", daemon=True))
        for thread in self._threads:
            thread.start()

    def _make_topics(self) -> None:
        self._clock_publisher = self.create_publisher(Clock, "/clock", COMMAND_QOS) if self._publish_clock else None
        self._state_topics = groups_by_topic(self.embodiment.state)
        self._state_publishers = {
            topic: self.create_publisher(state_message_type(groups), topic, COMMAND_QOS)
            for topic, groups in self._state_topics.items()
        }
        self._camera_publishers = {
            camera.view: self.create_publisher(image_message_type(camera), camera.topic, CAMERA_QOS)
            for camera in self.embodiment.cameras
        }
        for group in self.embodiment.actions:
            adapter = adapter_for(command_kind(group, simulated=True))
            self.create_subscription(
                adapter.message_type, group.command.topic, self._command_callback(group, adapter.decode), COMMAND_QOS
            )
        stop = self.embodiment.safety.obstacle_stop
        if stop is not None:
            if not hasattr(self._world, "scan"):
                raise UserError("safety.obstacle_stop: this world has no laser scanner; delete it to simulate")
            self._scan_publisher = self.create_publisher(LaserScan, stop.topic, CAMERA_QOS)
            self._steps_per_scan = max(1, round(self._world.control_hz / SCAN_HZ))
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        heartbeat(self, 1.0, self._publish_status)

    # --- what the director uses ------------------------------------------------------------------------------------

    def reset_world(self, seed: int, instruction: str | None) -> str:
        """Starts the episode of ``seed``; returns its instruction once every camera has shown the new scene."""
        with self.lock:
            self._world.reset(seed, instruction)
            self._camera.reset(seed, self._world.instruction)
            self._target_c = np.array(self._world.command())
            if self._watched is not None:
                self._watched.begin()
            self._twist.update(vx=0.0, wz=0.0)
            rendered = self._rendered
            chosen = str(self._world.instruction)
        # The round of pictures that was under way may still show the old scene: wait for the end of the next one.
        while self._rendered < rendered + 2 and not self._stop.wait(0.005):
            pass
        return chosen

    def succeeded(self) -> bool:
        """Whether the task's condition holds."""
        with self.lock:
            return bool(self._world.success())

    def ended(self) -> bool:
        """Whether the episode is over, also without success."""
        with self.lock:
            return bool(self._world.ended())

    def judgement(self) -> dict[str, Any]:
        """What is measured of the episode so far, for the summary."""
        with self.lock:
            return episode_row(self._world) if self._watched is None else self._watched.row(self._world)

    def sim_time_s(self) -> float:
        """Simulated seconds since the node started; never goes back."""
        return self._sim_ns * 1e-9

    def seconds_since_command(self) -> float:
        """Seconds since the last command arrived."""
        return time.monotonic() - self._commanded_at

    def stopping(self) -> bool:
        """Whether the node is being closed."""
        return self._stop.is_set()

    # --- threads ---------------------------------------------------------------------------------------------------

    def _step_forever(self) -> None:
        due = time.monotonic()
        step_ns = round(1e9 / self._world.control_hz)
        while not self._stop.is_set():
            with self.lock:
                if self.seconds_since_command() > SERVO_TIMEOUT_S / self._factor:
                    self._target_c[self._world.held_c] = 0.0
                    self._twist.update(vx=0.0, wz=0.0)
                if self._tracked is None:
                    self._world.step(self._target_c)
                else:
                    self._world.drive(self._twist["vx"], self._twist["wz"])
                if self._watched is not None:
                    self._watched.step(self._world)
                state_c = self._world.state()
                self._sim_ns += step_ns
                self._steps += 1
                scan = self._scan()
            self._publish_state(state_c)
            if scan is not None:
                self._scan_publisher.publish(scan)
            due += self._period_s
            wait = due - time.monotonic()
            if wait < -MAX_LAG_S:
                self._overruns += 1
                due = time.monotonic()
            elif wait > 0:
                self._stop.wait(wait)

    def _scan(self) -> LaserScan | None:
        """The scanner that the robot's obstacle stop listens to, when its next round is due."""
        stop = self.embodiment.safety.obstacle_stop
        if stop is None or self._steps % self._steps_per_scan:
            return None
        ranges = self._world.scan(stop.mount, SCAN_BEAMS, SCAN_RANGE_M)
        step = 2 * math.pi / SCAN_BEAMS
        return scan_to_message(Scan(-math.pi, step, 0.02, SCAN_RANGE_M, ranges, self._stamp_ns()), "laser")

    def _publish_state(self, state_c: np.ndarray) -> None:
        stamp_ns = self._stamp_ns()
        if self._clock_publisher is not None:
            self._clock_publisher.publish(Clock(clock=ns_to_stamp(stamp_ns)))
        values = dict(zip(self._world.state_channels, state_c.tolist(), strict=True))
        stamp = ns_to_stamp(stamp_ns)
        for topic, groups in self._state_topics.items():
            self._state_publishers[topic].publish(state_to_message(groups, values, stamp))

    def _render_forever(self) -> None:
        period_s = 1.0 / self._camera_rate_hz / self._factor
        due = time.monotonic()
        while not self._stop.is_set():
            with self.lock:
                self._camera.snapshot()
                stamp_ns = self._stamp_ns()
            muted = {view.strip() for view in str(self.get_parameter("mute_views").value).split(",")}
            for camera in self.embodiment.cameras:
                if camera.view not in muted and not self._stop.is_set():
                    self._publish_picture(camera, stamp_ns)
            self._rendered += 1
            due = max(due + period_s, time.monotonic() - period_s)
            self._stop.wait(max(0.0, due - time.monotonic()))
        self._camera.close()

    def _publish_picture(self, camera: CameraSpec, stamp_ns: int) -> None:
        width, height = self._camera_size or camera.size
        pixels = self._camera.render(camera.view, width, height)
        stamp, frame = ns_to_stamp(stamp_ns), f"{camera.view}_optical_frame"
        if camera.transport == "compressed":
            self._camera_publishers[camera.view].publish(rgb_to_compressed(pixels, stamp, frame))
        else:
            self._camera_publishers[camera.view].publish(numpy_to_image(pixels, "rgb8", stamp, frame))

    def _stamp_ns(self) -> int:
        return self._sim_ns if self._publish_clock else int(self.get_clock().now().nanoseconds)

    # --- executor --------------------------------------------------------------------------------------------------

    def _command_callback(
        self, group: ActionGroup, decode: Callable[[ActionGroup, Any], np.ndarray]
    ) -> Callable[[Any], None]:
        columns = [self._index[channel] for channel in group.channels]

        def on_command(msg: Any) -> None:
            try:
                values = group.command.map.to_channel(decode(group, msg))
            except ValueError as error:
                self._refuse(str(error))
                return
            if not np.all(np.isfinite(values)):
                self._refuse(f"command for {group.name} is not finite")
                return
            with self.lock:
                if group is self._tracked:
                    self._twist.update(zip(group.twist_fields, values.tolist(), strict=True))
                else:
                    self._target_c[columns] = values
                self._commanded_at = time.monotonic()

        return on_command

    def _refuse(self, reason: str) -> None:
        self._bad_commands += 1
        self.get_logger().warning(f"command ignored: {reason}", throttle_duration_sec=5.0)

    def _publish_status(self) -> None:
        then, steps, rendered = self._rate_window
        now = time.monotonic()
        self._rate_window = (now, self._steps, self._rendered)
        values = {
            "state": "running",
            "physics_hz": (self._steps - steps) / (now - then),
            "camera_hz": (self._rendered - rendered) / (now - then),
            "overruns": self._overruns,
            "bad_commands": self._bad_commands,
            **(self.director.status() if self.director is not None else {}),
        }
        self._status_publisher.publish(status_message(self, "sim", "ok", "running", values))

    # --- life ------------------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Whether all asked episodes are over, or a thread has died."""
        return self._episodes_done() or self._thread_died()

    @property
    def exit_code(self) -> int:
        """0 after the asked episodes or a signal, 1 where a thread died or the other nodes never came."""
        return 1 if self._died else self.director.exit_code if self.director is not None else 0

    def close(self) -> None:
        """Stops the threads."""
        self._died = self._thread_died()
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _episodes_done(self) -> bool:
        return self.director is not None and self.director.done.is_set()

    def _thread_died(self) -> bool:
        return not self._episodes_done() and not all(thread.is_alive() for thread in self._threads)


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    return run_node(SimNode, argv)


if __name__ == "__main__":
    sys.exit(main())
