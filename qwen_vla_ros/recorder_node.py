"""Records episodes as MCAP bags, from raw messages: nothing is deserialised, converted or resampled.

One bag per episode. In simulation the episode topic begins and ends it. On a robot it begins with an instruction and
ends with a verdict: a service ``episode_success``, ``…partial``, ``…failure``, ``…aborted``, or ``qwen_vla/outcome``.
A bag is written below ``.partial`` and moved when it is closed, so a folder with its final name is always complete.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from std_msgs.msg import Bool, Float64, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES, PARTIAL
from qwen_vla_ros.bag import EpisodeBag, learn
from qwen_vla_ros.bringup import next_run_dir
from qwen_vla_ros.commands import adapter_for, command_kind
from qwen_vla_ros.estop import ANY_QOS, ESTOPPED_TOPIC
from qwen_vla_ros.losses import LossCounter
from qwen_vla_ros.messages import groups_by_topic, image_message_type, state_message_type
from qwen_vla_ros.node_utils import (
    CHUNK_TOPIC,
    CONSUMED_TOPIC,
    EPISODE_TOPIC,
    HUMAN_TOPIC,
    INFERENCE_TOPIC,
    INSTRUCTION_TOPIC,
    LATCHED_QOS,
    LATENCY_TOPIC,
    NOTE_TOPIC,
    OUTCOME_TOPIC,
    PLAN_TOPIC,
    PLAYING_TOPIC,
    STATUS_QOS,
    STATUS_TOPIC,
    declare,
    declare_robot,
    heartbeat,
    load_robot,
    run_node,
    status_message,
)
from qwen_vla_ros.verdicts import Verdict, attach, verdict_of

IMAGE_QOS = QoSProfile(
    depth=30, reliability=ReliabilityPolicy.BEST_EFFORT
)  # a second: closing a bag waits for the disk
STREAM_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
# Who joins late hears the last one; who waits for the disk misses none of episodes shorter than that.
EVENT_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# What arrived shortly before an instruction goes into its bag, as much as a policy remembers: it may choose from that.
KEPT_IMAGES, KEPT_OTHERS = 4, 250
BEFORE_S = 4.0


class RecorderNode(Node):
    """See the module's text. Parameters are described where they are declared."""

    def __init__(self) -> None:
        super().__init__("recorder_node")
        name = declare_robot(self, "aloha")
        self._simulated = declare(
            self,
            "simulated",
            False,
            "The simulator says when episodes begin, and command types are its own",
            read_only=True,
        )
        run_dir = declare(
            self, "run_dir", "", "Folder of this run; empty: the next free below rollouts", read_only=True
        )
        rollouts = declare(self, "rollouts", "rollouts", "Parent of run folders", read_only=True)
        operated = declare(
            self,
            "operated",
            False,
            "Instructions begin episodes and verdicts end them, also where 'simulated' is set (mock)",
            read_only=True,
        )
        self._by_events = self._simulated and not operated
        self._splits = declare(
            self,
            "instruction_splits",
            True,
            "Another instruction begins another episode; false: it belongs to the one that is open",
            read_only=True,
        )
        self._checkpoint = declare(self, "checkpoint", "", "Checkpoint, for the metadata", read_only=True)
        instruction = declare(
            self, "instruction", "", "The one the policy starts with: an episode begins at once", read_only=True
        )
        self._min_free_mb = declare(
            self, "min_free_mb", 1000, "Stop recording before less than this is free on the disk", minimum=0
        )
        self.embodiment = load_robot(self, name)
        self.run_dir = Path(run_dir).expanduser() if run_dir else next_run_dir(rollouts)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"parameter 'run_dir': cannot write to {self.run_dir}: {error.strerror}") from error
        self._bag: EpisodeBag | None = None
        self._instruction = ""
        self._checkpoint_id = ""  # as the policy reports it
        self._latched: dict[tuple[str, bytes], tuple[str, bytes]] = {}
        self._recent: dict[str, deque[tuple[int, bytes]]] = {}  # what arrived before an instruction
        self._note = ""
        self._index: object = None  # of the open episode, as the simulator counts
        self._told: list[tuple[int, str]] = []  # instructions of the open episode, with their arrival
        self._human: bool | None = None
        self._began_ns = 0
        self._last: tuple[Path, str] | None = None  # the episode closed last, and its outcome
        self._counts = {"bags": 0, "messages": 0, "bytes": 0}
        self._window = (time.monotonic(), 0)
        self._losses = LossCounter()  # since the last bag was opened
        self._lost_before = 0  # in bags that are closed
        self._problem = ""
        self._failure = ""  # of the last bag, until the next one is open
        self._closed = False
        self.topics = recorded_topics(self.embodiment, self._simulated)
        if not self._by_events:
            kept = {camera.topic: KEPT_IMAGES for camera in self.embodiment.cameras}
            kept |= dict.fromkeys([*groups_by_topic(self.embodiment.state), PLAN_TOPIC], KEPT_OTHERS)
            self._recent = {self.resolve_topic_name(topic): deque(maxlen=most) for topic, most in kept.items()}
        learn(message_type for message_type, _ in self.topics.values())
        for topic, (message_type, qos) in self.topics.items():
            self.create_subscription(message_type, topic, self._raw_callback(topic), qos, raw=True)
        self.create_subscription(Bool, HUMAN_TOPIC, self._raw_callback(HUMAN_TOPIC), LATCHED_QOS, raw=True)
        for outcome in OUTCOMES:
            self.create_service(Trigger, f"qwen_vla/episode_{outcome}", self._outcome_callback(outcome))
        self._status_publisher = self.create_publisher(DiagnosticArray, STATUS_TOPIC, STATUS_QOS)
        heartbeat(self, 1.0, self._on_timer)
        self.get_logger().info(f"recording to {self.run_dir}")
        self._on_instruction(str(instruction).strip())

    # --- messages --------------------------------------------------------------------------------------------------

    def _raw_callback(self, topic: str) -> Callable[[bytes, dict[str, Any]], None]:
        name = self.resolve_topic_name(topic)

        def alone() -> bool:
            return self.count_publishers(name) == 1

        def on_message(data: bytes, info: dict[str, Any]) -> None:
            event: dict[str, Any] = {}
            stream, single = name, alone
            verdict: Verdict | None = None
            if topic == EPISODE_TOPIC:
                event = self._episode_event(deserialize_message(data, String).data)
            elif topic == INSTRUCTION_TOPIC:
                self._latched.pop((name, b""), None)  # a bag that begins with an instruction holds no earlier one
                self._on_instruction(deserialize_message(data, String).data.strip())
                self._latched[name, b""] = (name, data)
            elif topic == PLAYING_TOPIC:
                self._latched[name, b""] = (name, data)
            elif topic == STATUS_TOPIC:
                for status in deserialize_message(data, DiagnosticArray).status:
                    self._latched[name, status.name.encode()] = (name, data)
                    stream, single = f"{name} {status.name}", lambda: True  # every node numbers its own
                    if status.name == "policy":
                        self._checkpoint_id = next((v.value for v in status.values if v.key == "checkpoint"), "")
            elif topic == HUMAN_TOPIC:  # heard twice, from publishers of either durability (see estop.py)
                human = bool(deserialize_message(data, Bool).data)
                if human == self._human:
                    return
                self._human, self._latched[name, b""], single = human, (name, data), lambda: False
            elif topic == ESTOPPED_TOPIC:
                self._latched[name, b""] = (name, data)
            elif topic == OUTCOME_TOPIC:
                verdict = self._verdict(deserialize_message(data, String).data)
            if event.get("event") == "started" and self._by_events:
                self._end_unheard(event.get("earlier"))
                self._begin({key: event.get(key) for key in ("index", "seed", "instruction")})
            self._losses.heard(name, stream, info.get("publication_sequence_number"), single)
            self._write(name, data)
            if event.get("event") == "finished" and self._by_events:  # after its own message went into the bag
                self._end_as_told(event)
            elif topic == NOTE_TOPIC:
                self._judge(Verdict(note=deserialize_message(data, String).data.strip()))
            elif verdict is not None:
                self._judge(verdict)

        return on_message

    def _write(self, name: str, data: bytes, arrived_ns: int | None = None) -> None:
        now_ns = int(self.get_clock().now().nanoseconds) if arrived_ns is None else arrived_ns
        if arrived_ns is None and (kept := self._recent.get(name)) is not None:
            kept.append((now_ns, data))
        if self._bag is None:
            return
        try:
            self._bag.write(name, now_ns, data)
        except OSError as error:
            self._fail(self._bag, error)
            return
        self._counts["messages"] += 1
        self._counts["bytes"] += len(data)

    def _fail(self, bag: EpisodeBag, error: OSError) -> None:
        """Gives the bag up and says so in the status until the next one is open; the node goes on."""
        if self._bag is not None:
            self._lost_before += self._losses.lost.total()
        self._bag = None
        self._failure = f"recording of {bag.path} failed: {error}; what was written stays in {PARTIAL}"
        self.get_logger().error(self._failure)
        bag.abandon({"outcome": "aborted", "reason": str(error), "judged_by": "recorder", "note": self._note})

    def _episode_event(self, text: str) -> dict[str, Any]:
        """The simulator's event; anybody may publish on its topic, so nonsense is logged and means nothing."""
        try:
            event = json.loads(text)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.get_logger().warning(f"{EPISODE_TOPIC}: no episode event: {text[:80]!r}", throttle_duration_sec=5.0)
            return {}
        return event

    def _on_instruction(self, instruction: str) -> None:
        changed = instruction != self._instruction
        self._instruction = instruction
        if changed and instruction and not self._by_events and (self._splits or self._bag is None):
            self._begin({"instruction": instruction})
        elif changed:
            self._told.append((int(self.get_clock().now().nanoseconds), instruction))

    # --- episodes --------------------------------------------------------------------------------------------------

    def _begin(self, about: dict[str, Any]) -> None:
        self._end("aborted", {"reason": "the next episode began", "judged_by": "recorder"})
        if not self._space_left():
            return
        self._began_ns, self._index = int(self.get_clock().now().nanoseconds), about.get("index")
        metadata = {
            **about,
            "embodiment": self.embodiment.name,
            "embodiment_hash": self.embodiment.hash,
            "embodiment_policy_hash": self.embodiment.policy_hash,
            "embodiment_yaml": self.embodiment.source_text,
            "namespace": self.get_namespace(),
            "namespaced_topics": bool(self.get_parameter("namespaced_topics").value),
            "checkpoint": self._checkpoint,
            "simulated": self._simulated,
            "started_ns": self._began_ns,
        }
        types = {self.resolve_topic_name(topic): message_type for topic, (message_type, _) in self.topics.items()}
        path = self.run_dir / f"episode_{self._next_index():03d}"
        try:
            self._bag = EpisodeBag(path, types, metadata)
        except OSError as error:
            self._failure = f"recording of {path} failed: {error}"
            self.get_logger().error(self._failure)
            return
        self._failure = self._note = ""
        self._told = [(self._began_ns, str(about.get("instruction") or ""))]
        self._losses.lost.clear()  # what was lost between episodes; the numbers heard last still count
        earlier = [(t, name, data) for name, kept in self._recent.items() for t, data in kept]
        for arrived_ns, name, data in sorted(earlier, key=lambda message: message[0]):
            if self._began_ns - arrived_ns < BEFORE_S * 1e9:
                self._write(name, data, arrived_ns)
        for name, data in self._latched.values():  # published before the episode, true during it
            self._write(name, data, int(self.get_clock().now().nanoseconds))

    def _next_index(self) -> int:
        folders = [*self.run_dir.glob("episode_[0-9]*"), *self.run_dir.glob(f"{PARTIAL}/episode_[0-9]*")]
        taken = [int(path.name.removeprefix("episode_")) for path in folders]
        return max(taken, default=-1) + 1

    def _end(self, outcome: str, about: dict[str, Any]) -> None:
        bag, self._bag = self._bag, None
        if bag is None:
            return
        self._lost_before += self._losses.lost.total()
        seconds = round((int(self.get_clock().now().nanoseconds) - self._began_ns) * 1e-9, 3)
        told = [[round((at_ns - self._began_ns) * 1e-9, 3), text] for at_ns, text in self._told]
        known = {"seconds": seconds, "reason": "", "note": self._note, "instructions": told}
        try:
            lost = dict(self._losses.lost)
            ended = {**known, **about, "outcome": outcome, "checkpoint_id": self._checkpoint_id, "lost": lost}
            path = bag.close(ended)
        except OSError as error:
            self._fail(bag, error)
            return
        self._counts["bags"] += 1
        self._last = (path, outcome)
        line = f"{path}: {outcome}, {bag.messages} messages, {bag.size_bytes / 1e6:.1f} MB"
        self.get_logger().info(f"{line}, lost: {lost}" if lost else line)

    def _end_as_told(self, result: dict[str, Any]) -> None:
        about = {"seconds": result.get("seconds"), "reason": result.get("reason"), "judged_by": "simulator"}
        self._end(str(result.get("outcome")), {key: value for key, value in about.items() if value is not None})

    def _end_unheard(self, earlier: object) -> None:
        """Ends the open episode as a later one's event says, where its own was lost: this process stood still."""
        for result in earlier if isinstance(earlier, list) else []:
            if isinstance(result, dict) and result.get("index") == self._index and result.get("outcome") in OUTCOMES:
                self._end_as_told(result)

    def _outcome_callback(self, outcome: str) -> Callable[[Trigger.Request, Trigger.Response], Trigger.Response]:
        def on_request(_request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            response.success = self._bag is not None
            response.message = f"episode closed: {outcome}" if self._bag is not None else "no episode is being recorded"
            if self._bag is not None:
                self._judge(Verdict(outcome))
            return response

        return on_request

    def _verdict(self, text: str) -> Verdict | None:
        try:
            return verdict_of(text)
        except UserError as error:
            self.get_logger().warning(f"{OUTCOME_TOPIC}: {error}", throttle_duration_sec=5.0)
            return None

    def _judge(self, verdict: Verdict) -> None:
        """Of the open episode, which an outcome ends; else of the one closed last, whose label is changed."""
        if self._bag is None:
            try:
                self._last = attach(self._last, verdict)
            except UserError as error:
                self.get_logger().warning(str(error))
            return
        self._note = "\n".join(filter(None, [self._note, verdict.note]))
        if verdict.outcome:
            self._end(verdict.outcome, {"judged_by": "operator", "reason": verdict.reason})
            self._instruction = ""  # the same instruction given again begins the next episode

    # --- health ----------------------------------------------------------------------------------------------------

    def _space_left(self) -> bool:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
            free_mb = shutil.disk_usage(self.run_dir).free // 1_000_000
        except OSError as error:
            self._problem = f"cannot write to {self.run_dir}: {error.strerror}"
            self.get_logger().error(f"not recording: {self._problem}", throttle_duration_sec=10.0)
            return False
        limit_mb = int(self.get_parameter("min_free_mb").value)
        full = free_mb < limit_mb
        self._problem = f"disk: {free_mb} MB free below {self.run_dir}, limit min_free_mb = {limit_mb}" if full else ""
        if full:
            self.get_logger().error(f"not recording: {self._problem}", throttle_duration_sec=10.0)
        return not full

    def _on_timer(self) -> None:
        if not self._space_left():
            self._end("aborted", {"reason": self._problem, "judged_by": "recorder"})
        if self._bag is not None:
            try:
                self._bag.flush()
            except OSError as error:
                self._fail(self._bag, error)
        then, size = self._window
        now = time.monotonic()
        self._window = (now, self._counts["bytes"])
        state = "recording" if self._bag is not None else "waiting"
        values = {"state": state, **self._counts, "mb_per_s": (self._counts["bytes"] - size) / 1e6 / (now - then)}
        values["lost"] = self._lost_before + (self._losses.lost.total() if self._bag is not None else 0)
        values["run_dir"] = self.run_dir
        values["episode"] = self._bag.path.name if self._bag is not None else ""
        values["last_episode"], values["last_outcome"] = (
            (self._last[0].name, self._last[1]) if self._last is not None else ("", "")
        )
        problem = self._problem or self._failure
        message = f"not recording: {problem}" if problem else state
        level = "error" if problem else "ok"
        self._status_publisher.publish(status_message(self, "recorder", level, message, values))

    def close(self) -> None:
        """Finishes the bag that is open."""
        if not self._closed:
            self._closed = True
            self._end("aborted", {"reason": "the recorder was stopped", "judged_by": "recorder"})


def recorded_topics(embodiment: Embodiment, simulated: bool) -> dict[str, tuple[type, QoSProfile]]:
    """Everything of the robot and of this package: topic → (message type, QoS), in the names the YAML uses.

    Raises:
        UserError: A command's message package is not installed.
    """
    topics: dict[str, tuple[type, QoSProfile]] = {}
    for camera in embodiment.cameras:
        topics[camera.topic] = (image_message_type(camera), IMAGE_QOS)
    for topic, groups in groups_by_topic(embodiment.state).items():
        topics[topic] = (state_message_type(groups), STREAM_QOS)
    for group in embodiment.actions:
        message_type = adapter_for(command_kind(group, simulated)).message_type
        topics[group.command.topic] = (message_type, RELIABLE_QOS)
    topics[CHUNK_TOPIC] = topics[CONSUMED_TOPIC] = topics[PLAN_TOPIC] = (JointTrajectory, RELIABLE_QOS)
    topics[LATENCY_TOPIC] = (Float64, RELIABLE_QOS)
    topics[PLAYING_TOPIC] = (String, EVENT_QOS)
    topics[INSTRUCTION_TOPIC] = (String, EVENT_QOS)
    topics[STATUS_TOPIC] = (DiagnosticArray, STATUS_QOS)
    topics[EPISODE_TOPIC] = (String, EVENT_QOS)
    topics[INFERENCE_TOPIC] = topics[NOTE_TOPIC] = topics[OUTCOME_TOPIC] = (String, RELIABLE_QOS)
    topics[HUMAN_TOPIC] = (Bool, ANY_QOS)
    topics[ESTOPPED_TOPIC] = (Bool, EVENT_QOS)
    return topics


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    return run_node(RecorderNode, argv)


if __name__ == "__main__":
    sys.exit(main())
