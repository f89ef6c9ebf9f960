"""``dashboard_node``: the operator's page as a node. What it shows comes from topics, its buttons call services.

Three threads: this node's executor hears the statuses and the services' answers, the sampler looks at the fast topics
while a browser does, and the server has an event loop of its own. None of them waits for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.rollouts.index import OUTCOMES
from qwen_vla_core.serving.access import read_token, server_tls
from qwen_vla_ros.bringup import DASHBOARD_TOKEN, DEFAULT_HOST, DEFAULT_PORT
from qwen_vla_ros.dashboard.board import Board
from qwen_vla_ros.dashboard.library import Library
from qwen_vla_ros.dashboard.robot import Answer, describe
from qwen_vla_ros.dashboard.sampler import Sampler
from qwen_vla_ros.dashboard.server import Dashboard, ServerThread, Settings
from qwen_vla_ros.dashboard.sessions import Hub
from qwen_vla_ros.dashboard.timeline import Timeline
from qwen_vla_ros.estop import ESTOP_REQUEST_TOPIC, ESTOPPED_TOPIC
from qwen_vla_ros.node_utils import (
    COMMAND_QOS,
    EPISODE_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    LEVELS,
    NOTE_TOPIC,
    STATUS_QOS,
    STATUS_TOPIC,
    declare,
    heartbeat,
    run_node,
    status_message,
)

ANSWER_S = 5.0  # how long a service may take
ESTOP_ANSWER_S = 1.0  # after which an emergency stop goes the other way, by topic, too
WITHDRAWN_S = 0.2  # until the controller has heard that the request is withdrawn: before, it refuses a reset
SERVICES = {
    "start": "qwen_vla/start",
    "stop": "qwen_vla/stop",
    "estop": "qwen_vla/estop",
    "reset": "qwen_vla/reset",
    **{outcome: f"qwen_vla/episode_{outcome}" for outcome in OUTCOMES},
}
ROBOT_RESETS = ("qwen_vla/sim_reset", "qwen_vla/mock_reset")  # of whatever stands in for the robot
KEPT_INSTRUCTIONS = 20
LEVEL_NAMES = {value: name for name, value in LEVELS.items()}


class DashboardNode(Node):
    """See the module's text. Parameters are described where they are declared."""

    def __init__(self) -> None:
        super().__init__("dashboard_node")
        name = declare(self, "embodiment", "aloha", "Robot YAML (name or path)", read_only=True)
        text = "Read each command's simulation_kind, where set, as simulator and mock do"
        simulated = declare(self, "simulated", False, text, read_only=True)
        self._rollouts = declare(self, "rollouts", "rollouts", "Folder of recorded runs to list", read_only=True)
        text = "Pictures and states per second, at most; a slow browser gets fewer"
        rate_hz = declare(self, "rate_hz", 10.0, text, read_only=True, minimum=0.5, maximum=30.0)
        width = declare(self, "picture_width", 480, "Widest picture sent", read_only=True, minimum=64, maximum=4096)
        limit = declare(self, "max_browsers", 16, "Browsers at once", read_only=True, minimum=1, maximum=256)
        settings = self._declare_settings()
        settings.check()
        self.embodiment = load_embodiment(name)
        self._status: dict[str, dict[str, Any]] = {}
        self._status_at: dict[str, float] = {}
        self._status_shown: dict[str, float] = {}
        self._lock = threading.Lock()
        self.exit_code = 0
        self._instruction = ""
        self._instructions: list[str] = []
        self._estop_sent = False
        self._board = Board()
        timeline = Timeline(self.embodiment.channels)
        self._hub = Hub(self.embodiment.views, self._board, timeline, limit)
        self._subscribe()
        dashboard = Dashboard(
            settings, self, self._hub, Library(self._rollouts), describe(self.embodiment, bool(simulated))
        )
        self.server = ServerThread(dashboard, settings)
        self._sampler = Sampler(
            self, self.embodiment, simulated, self._board, timeline, self._hub, rate_hz, width, self._put_statuses
        )
        self._read_only = settings.read_only
        self._tell_address()

    def _declare_settings(self) -> Settings:
        text = "Address to serve; any but a loopback one needs a token"
        host = declare(self, "host", DEFAULT_HOST, text, read_only=True)
        text = "Port; where it is taken, the next free one. 0: any"
        port = declare(self, "port", DEFAULT_PORT, text, read_only=True, minimum=0, maximum=65535)
        text = f"File with the token that browsers must show; empty: the variable {DASHBOARD_TOKEN}"
        token_file = declare(self, "token_file", "", text, read_only=True)
        read_only = declare(self, "read_only", False, "Show everything, press nothing", read_only=True)
        cert = declare(self, "tls_cert", "", "Certificate file: serve https", read_only=True)
        key = declare(self, "tls_key", "", "Its key file", read_only=True)
        token = read_token(token_file=token_file, variable=DASHBOARD_TOKEN)
        return Settings(host, port, token, read_only, server_tls(cert, key))

    def _subscribe(self) -> None:
        self._instruction_publisher = self.create_publisher(String, INSTRUCTION_TOPIC, LATCHED_QOS)
        self._note_publisher = self.create_publisher(String, NOTE_TOPIC, COMMAND_QOS)
        self._estop_publisher = self.create_publisher(Bool, ESTOP_REQUEST_TOPIC, LATCHED_QOS)
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        self._triggers = {action: self.create_client(Trigger, service) for action, service in SERVICES.items()}
        self._robot_resets = [self.create_client(Trigger, service) for service in ROBOT_RESETS]
        self.create_subscription(DiagnosticArray, STATUS_TOPIC, self._on_status, STATUS_QOS)
        self.create_subscription(String, INSTRUCTION_TOPIC, self._on_instruction, LATCHED_QOS)
        self.create_subscription(String, EPISODE_TOPIC, self._on_episode, LATCHED_QOS)
        self.create_subscription(Bool, ESTOPPED_TOPIC, self._on_estopped, LATCHED_QOS)
        self._put_instruction()
        heartbeat(self, 1.0, self._on_timer)

    def _tell_address(self) -> None:
        what = "read-only dashboard" if self._read_only else "dashboard"
        reach = "a token opens it" if self.server.shared else "from this computer only"
        print(f"{what}: {self.server.address} ({reach})", flush=True)

    # --- what is shown (executor thread) ---------------------------------------------------------------------------

    def _on_status(self, msg: DiagnosticArray) -> None:
        with self._lock:
            for status in msg.status:
                level = status.level if isinstance(status.level, bytes) else bytes([status.level])
                self._status[status.name] = {
                    "level": LEVEL_NAMES.get(level, "stale"),
                    "message": status.message,
                    "values": {pair.key: pair.value for pair in status.values},
                }
                self._status_at[status.name] = time.monotonic()

    def _put_statuses(self) -> dict[str, float]:
        """Called by the sampler, so that nothing is made of them while nobody looks; returns their ages in seconds."""
        now = time.monotonic()
        with self._lock:
            if self._status_shown != self._status_at:
                self._status_shown = dict(self._status_at)
                self._board.put("status", self._status)
            return {name: round(now - at, 2) for name, at in self._status_at.items()}

    def _on_instruction(self, msg: String) -> None:
        text = " ".join(msg.data.split())
        self._instruction = text
        if text:
            self._instructions = [text, *(known for known in self._instructions if known != text)][:KEPT_INSTRUCTIONS]
        self._put_instruction()

    def _put_instruction(self) -> None:
        self._board.put("instruction", {"now": self._instruction, "earlier": self._instructions})
        self._hub.ring()

    def _on_episode(self, msg: String) -> None:
        try:
            event = json.loads(msg.data)
        except ValueError:
            return  # anybody may publish on this topic
        if isinstance(event, dict):
            self._board.put("episode", event)
            self._hub.ring()

    def _on_estopped(self, msg: Bool) -> None:
        self._board.put("estopped", bool(msg.data))
        self._hub.ring()

    def _on_timer(self) -> None:
        ready = {action: client.service_is_ready() for action, client in self._triggers.items()}
        ready["robot_reset"] = any(client.service_is_ready() for client in self._robot_resets)
        if self._board.put("services", ready):
            self._hub.ring()
        values = {"state": "serving", "address": self.server.address, "browsers": self._hub.count}
        self._status_publisher.publish(status_message(self, "dashboard", "ok", "serving", values))

    # --- buttons (the server's event loop) -------------------------------------------------------------------------

    def act(self, action: str, text: str) -> Awaitable[Answer]:
        """Does one of ``robot.ACTIONS``; see there."""
        self.get_logger().info(f"operator: {action}" + (f" '{text}'" if text else ""))
        if action == "instruction":
            return self._instruct(text)
        if action == "estop":
            return self._stop_everything()
        if action == "reset":
            return self._reset()
        if action == "robot_reset":
            ready = [client for client in self._robot_resets if client.service_is_ready()]
            return self._call(ready[0] if ready else self._robot_resets[0], ANSWER_S)
        if action in OUTCOMES:
            return self._judge(action, text)
        return self._call(self._triggers[action], ANSWER_S)

    async def _judge(self, outcome: str, note: str) -> Answer:
        """Ends the episode; its note follows, and the recorder adds it to the episode that was closed last."""
        answer = await self._call(self._triggers[outcome], ANSWER_S)
        if answer.ok and note:
            self._note_publisher.publish(String(data=note))
        return answer

    async def _instruct(self, text: str) -> Answer:
        self._instruction_publisher.publish(String(data=text))
        return Answer(True, f"instruction: {text}" if text else "the instruction is withdrawn: the robot pauses")

    async def _stop_everything(self) -> Answer:
        """Asks the controller; one that does not answer at once is told by topic, where also a later one hears it."""
        answer = await self._call(self._triggers["estop"], ESTOP_ANSWER_S)
        if answer.ok:
            return answer
        self._estop_publisher.publish(Bool(data=True))
        self._estop_sent = True
        return Answer(False, f"{answer.message}; the stop was also published on {ESTOP_REQUEST_TOPIC}")

    async def _reset(self) -> Answer:
        if self._estop_sent:  # only this page's own request is withdrawn, never that of a button on the wall
            self._estop_publisher.publish(Bool(data=False))
            self._estop_sent = False
            await asyncio.sleep(WITHDRAWN_S)
        return await self._call(self._triggers["reset"], ANSWER_S)

    async def _call(self, client: Any, timeout_s: float) -> Answer:
        if not client.service_is_ready():
            return Answer(False, f"nobody offers {client.srv_name}: is the node running?")
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        future = client.call_async(Trigger.Request())

        def on_answer(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(answered.set)

        future.add_done_callback(on_answer)
        try:
            await asyncio.wait_for(answered.wait(), timeout_s)
        except asyncio.TimeoutError:
            client.remove_pending_request(future)
            return Answer(False, f"{client.srv_name} did not answer within {timeout_s:g} s")
        response = future.result()
        return Answer(bool(response.success), str(response.message))

    # --- life ------------------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Whether the server has died."""
        return not self.server.alive

    def close(self) -> None:
        """Ends sampler and server; a server that had died by itself makes exit code 1."""
        self.exit_code = 0 if self.server.alive else 1
        self._sampler.close()
        self.server.close()


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    return run_node(DashboardNode, argv)
