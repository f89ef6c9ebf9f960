"""Episodes of a simulated robot: pause, reset, instruct, judge, report; over and over.

The order matters. The instruction is withdrawn first (the policy discards what it is computing and forgets what it has
seen), then the controller stops (it refuses everything observed before its next start), and only when it has fallen
silent is the world reset. So no action of one episode can reach the next.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from diagnostic_msgs.msg import DiagnosticArray
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_json
from qwen_vla_ros.node_utils import (
    CHUNK_TOPIC,
    COMMAND_QOS,
    EPISODE_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    STATUS_QOS,
    STATUS_TOPIC,
)

SERVICE_TIMEOUT_S = 5.0
SILENCE_S = 0.2  # no command for this long: the controller has come to rest and let go
POLL_S = 0.01
# What the start of an episode says of the ones before it, for who missed their ends: DDS repeats only the last message.
EARLIER, EARLIER_EPISODES = ("index", "outcome", "seconds"), 8


@dataclass(frozen=True)
class EpisodeSettings:
    """What to run; see the parameters of ``sim_node``."""

    instruction: str
    episodes: int
    seed: int
    timeout_s: float
    startup_timeout_s: float
    wait_for_recorder: bool
    summary_file: str


class Robot(Protocol):
    """The parts of ``SimNode`` an episode needs."""

    def reset_world(self, seed: int, instruction: str | None) -> str: ...

    def succeeded(self) -> bool: ...

    def ended(self) -> bool: ...

    def judgement(self) -> dict[str, Any]: ...

    def sim_time_s(self) -> float: ...

    def seconds_since_command(self) -> float: ...

    def stopping(self) -> bool: ...


class Director:
    """Runs the episodes in its own thread; ``done`` is set after the last, ``exit_code`` says how it went."""

    def __init__(self, robot: Any, settings: EpisodeSettings) -> None:
        self.done = threading.Event()
        self.exit_code = 0
        self._robot: Robot = robot
        self._settings = settings
        self._logger = robot.get_logger()
        self._results: list[dict[str, Any]] = []
        self._running = -1
        self._abort = threading.Event()
        self._chunk_seen = threading.Event()
        self._policy_ready = threading.Event()
        self._instruction_publisher = robot.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
        self._episode_publisher = robot.create_publisher(String, EPISODE_TOPIC, LATCHED_QOS)
        self._stop_client = robot.create_client(Trigger, "qwen_vla/stop")
        self._start_client = robot.create_client(Trigger, "qwen_vla/start")
        robot.create_service(Trigger, "qwen_vla/sim_reset", self._on_reset)
        robot.create_subscription(JointTrajectory, CHUNK_TOPIC, lambda _: self._chunk_seen.set(), COMMAND_QOS)
        robot.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)

    def run(self) -> None:
        """Waits for the other nodes, then runs episodes until told to stop or all are done."""
        try:
            self._wait_for_nodes()
            while not self._robot.stopping() and self._wants_another():
                self._episode(len(self._results))
            self._pause()
        except UserError as error:
            self._logger.error(str(error))
            self.exit_code = 1
        except Exception:
            if not self._robot.stopping():  # publishing may fail once the context is gone
                self._logger.error(traceback.format_exc())
                self.exit_code = 1
        finally:
            self.done.set()

    def status(self) -> dict[str, object]:
        """For the node's diagnostics."""
        outcomes = [result["outcome"] for result in self._results]
        return {
            "episode": self._running,
            "episodes_done": len(outcomes),
            "success": outcomes.count("success"),
            "failure": outcomes.count("failure"),
        }

    def _wants_another(self) -> bool:
        return self._settings.episodes == 0 or len(self._results) < self._settings.episodes

    def _wait_for_nodes(self) -> None:
        limit_s = float(self._settings.startup_timeout_s)
        needs: list[tuple[str, Callable[[], bool]]] = [
            ("controller_node (service qwen_vla/start)", self._start_client.service_is_ready),
            ("policy_node to be active (its status)", self._policy_ready.is_set),
        ]
        if self._settings.wait_for_recorder:
            needs.append(
                ("recorder_node (on qwen_vla/episode)", lambda: self._episode_publisher.get_subscription_count() > 0)
            )
        for what, ready in needs:
            if not self._wait(ready, limit_s):
                if self._robot.stopping():
                    return
                raise UserError(f"no {what} after startup_timeout_s = {limit_s:.0f} s")

    def _episode(self, index: int) -> None:
        settings = self._settings
        seed = settings.seed + index
        self._abort.clear()
        self._pause()
        instruction = self._robot.reset_world(seed, settings.instruction or None)
        if self._robot.stopping():
            return
        self._running = index
        about = {"index": index, "seed": seed, "instruction": instruction}
        earlier = [{key: result[key] for key in EARLIER} for result in self._results[-EARLIER_EPISODES:]]
        self._tell({"event": "started", **about, "earlier": earlier})
        self._chunk_seen.clear()
        self._start_controller()
        self._instruction_publisher.publish(String(data=instruction))
        started_s = self._robot.sim_time_s()
        seen = self._wait(lambda: self._chunk_seen.is_set() or self._abort.is_set(), settings.startup_timeout_s)
        first_s = self._robot.sim_time_s()
        outcome = self._judge(first_s) if seen and not self._abort.is_set() else "aborted"
        seconds = self._robot.sim_time_s() - (first_s if seen else started_s)
        judgement = self._robot.judgement()
        result = {**about, "outcome": outcome, "seconds": round(seconds, 3)}
        self._tell({"event": "finished", **result})
        self._results.append({**result, **judgement})
        self._running = -1
        self._logger.info(f"episode {index} (seed {seed}): {outcome} after {seconds:.1f} s: '{instruction}'")
        if settings.summary_file:
            self._write_summary()
        if not seen and not self._robot.stopping():
            raise UserError(f"no chunk arrived within startup_timeout_s = {settings.startup_timeout_s:.0f} s")

    def _judge(self, first_s: float) -> str:
        """Outcome of the running episode; returns when it is known."""
        while not (self._robot.stopping() or self._abort.is_set()):
            if self._robot.succeeded():
                return "success"
            if self._robot.ended():
                return "failure"
            if self._robot.sim_time_s() - first_s > self._settings.timeout_s:
                return "failure"
            self._abort.wait(POLL_S)
        return "aborted"

    def _pause(self) -> None:
        """Withdraws the instruction and waits until the controller has brought the robot to rest and let go."""
        self._instruction_publisher.publish(String(data=""))
        if self._robot.stopping():
            return
        self._call(self._stop_client)
        self._wait(lambda: self._robot.seconds_since_command() > SILENCE_S, SERVICE_TIMEOUT_S)

    def _start_controller(self) -> None:
        refused = ""
        while not (self._robot.stopping() or self._abort.is_set()):
            answer = self._call(self._start_client)
            if answer is not None and answer.success:
                return
            reason = answer.message if answer is not None else "no answer"
            if reason != refused:  # an emergency stop waits for an operator, however long that takes
                refused = reason
                self._logger.warning(f"controller does not start: {reason}")
            self._abort.wait(0.5)

    def _call(self, client: Any) -> Any:
        """Calls a Trigger service from this thread; None where no answer came in time."""
        answered = threading.Event()
        future = client.call_async(Trigger.Request())
        future.add_done_callback(lambda _: answered.set())
        if not self._wait(answered.is_set, SERVICE_TIMEOUT_S):
            client.remove_pending_request(future)
            return None
        return future.result()

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._robot.stopping() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _tell(self, event: dict[str, Any]) -> None:
        self._episode_publisher.publish(String(data=json.dumps(event)))

    def _write_summary(self) -> None:
        outcomes = [result["outcome"] for result in self._results]
        counts = {outcome: outcomes.count(outcome) for outcome in ("success", "failure", "aborted")}
        atomic_write_json(self._settings.summary_file, {**counts, "episodes": self._results})

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._abort.set()
        response.success, response.message = True, "this episode is aborted, the next one begins"
        return response

    def _on_status(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.name == "policy" and any(pair.key == "ready" and pair.value == "true" for pair in status.values):
                self._policy_ready.set()
