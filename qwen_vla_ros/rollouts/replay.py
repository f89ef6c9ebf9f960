"""Feeds a recording through the real policy node and compares, chunk by chunk, what its engine is asked with.

What a live node had when it looked is a matter of when messages reached *it*, which no recorder can know to the
millisecond. So the node itself lists the stamps of all it held (``inference_log``). Here the recorded messages with
these stamps go through the node's own subscriptions, in the order of their arrival, the clock is set to that of the
look, and the node looks: choosing, decoding, mapping and the plan to continue are its own code. The digests of what it
then asks must be those it told when it was live. The answer is compared too, where the noise is known by its seed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import ActionChunk, Prediction
from qwen_vla_core.rollouts.index import Rollout
from qwen_vla_ros.engines import EngineSetup
from qwen_vla_ros.inference_log import InferenceRecord
from qwen_vla_ros.messages import chunk_from_message
from qwen_vla_ros.node_utils import CHUNK_TOPIC, INFERENCE_TOPIC
from qwen_vla_ros.policy_node import PolicyNode
from qwen_vla_ros.rollouts.episode import Episode
from qwen_vla_ros.rollouts.feed import Feed


@dataclass(frozen=True)
class Compared:
    """One chunk.

    Attributes:
        seconds: since the episode's start, of its observation.
        different: parts of the inputs that are not bit-identical; empty: all are.
        missing: messages that the live node had and the bag has not.
        held: why the replayed node saw nothing to infer from; empty: it did.
        output: largest difference of an action to the recorded chunk's; None: not comparable.
    """

    seconds: float
    different: tuple[str, ...]
    missing: int
    held: str
    output: float | None

    @property
    def identical(self) -> bool:
        """Whether the inputs are."""
        return not self.different and not self.held


@dataclass(frozen=True)
class Replayed:
    """How a replay went.

    Attributes:
        chunks: of every recorded inference.
        unexplained: recorded chunks that no inference record speaks of.
        why_no_outputs: why answers are not compared; empty: they are.
    """

    chunks: tuple[Compared, ...]
    unexplained: int
    why_no_outputs: str

    def to_json(self) -> dict[str, Any]:
        """Counts, and the chunks that differ."""
        outputs = [chunk.output for chunk in self.chunks if chunk.output is not None]
        return {
            "chunks": len(self.chunks),
            "inputs_identical": sum(chunk.identical for chunk in self.chunks),
            "outputs_compared": len(outputs),
            "outputs_identical": sum(value == 0.0 for value in outputs),
            "output_max_difference": max(outputs, default=None),
            "outputs_not_compared_because": self.why_no_outputs,
            "messages_missing": sum(chunk.missing for chunk in self.chunks),
            "chunks_without_record": self.unexplained,
            "different": [
                {"seconds": c.seconds, "parts": list(c.different), "missing": c.missing, "held": c.held}
                for c in self.chunks
                if not c.identical
            ],
        }


class ReplayedPolicy(PolicyNode):
    """The policy node with the recording's clock, seeds and measured latency in place of its own; the rest is its own.

    Attributes:
        clock_ns: what it takes for the time.
        seed: of the next inference's noise; None: it draws one.
        latency_s: what it expects an inference to take.
        told: the record of the last inference.
        problem: why it holds.
    """

    def __init__(self, setup: EngineSetup | None) -> None:
        super().__init__()
        self.clock_ns = 0
        self.seed: int | None = None
        self.latency_s = 0.0
        self.told: InferenceRecord | None = None
        self.chunk: ActionChunk | None = None
        self._given = setup
        self._inference_publisher = _Tap(self._on_told)

    def _on_told(self, msg: Any) -> None:
        self.told = InferenceRecord.from_text(msg.data)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Without the worker: here the recording says when the node looks."""
        return LifecycleNode.on_activate(self, state)

    def infer(self, look_ns: int, chunk_ns: int) -> InferenceRecord | str:
        """Looks and infers as the worker does; the record, or why there is nothing to infer from."""
        self.told = None
        self.clock_ns = look_ns
        look = self._look()
        self.clock_ns = chunk_ns
        if look is None or not self._infer(look) or self.told is None:
            return self._problem or "nothing newer than the instruction"
        return self.told

    def resume(self, continuing: bool) -> None:
        """What happened before the bag began: whether a chunk for this instruction was being played."""
        self._continuing = continuing

    def remembers(self, cameras: Mapping[str, tuple[int, ...]], states: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the node holds exactly these pictures and readings."""
        assert self._buffer is not None
        return self._buffer.stamps() == (dict(cameras), dict(states))

    def _make_engine(self) -> EngineSetup:
        return super()._make_engine() if self._given is None else self._given

    def _predict(self, *arguments: Any) -> ActionChunk:
        self.chunk = super()._predict(*arguments)
        return self.chunk

    def _now_ns(self) -> int:
        return self.clock_ns

    def _draw_seed(self) -> int:
        return super()._draw_seed() if self.seed is None else self.seed

    def _expected_latency_s(self) -> float:
        return self.latency_s


@dataclass(frozen=True)
class _Tap:
    """In a publisher's place."""

    publish: Callable[[Any], None]


@dataclass
class Still:
    """An engine that answers with zeros: inputs are compared without a model."""

    robot: Embodiment
    steps: int | None = field(default=None)

    def predict(self, requests: Any) -> list[Prediction]:
        """As ``interfaces.Engine``."""
        shape = (self.robot.control.horizon, len(self.robot.channels))
        return [
            Prediction(
                ActionChunk(np.zeros(shape), self.robot.channels, r.observation.stamp_ns, self.robot.period_s), {}
            )
            for r in requests
        ]


def replay(
    rollout: Rollout,
    *,
    checkpoint: str = "",
    inputs_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replayed:
    """Replays one episode; see the module's text.

    Args:
        rollout: which; its bag may be unfinished.
        checkpoint: name or folder; empty: the recorded name.
        inputs_only: no model is loaded and no answer compared.
        progress: told how many chunks of how many are done.

    Raises:
        UserError: the bag has no inference records, or the node cannot be configured.
    """
    with Episode(rollout) as episode:
        records = _records(episode)
        chunks = {c.stamp_ns: c for c in (chunk_from_message(msg) for _, msg in episode.told(CHUNK_TOPIC))}
        if not records:
            more = f" (it has {len(chunks)} chunks)" if chunks else ""
            raise UserError(
                f"{rollout.name}: has no message on {INFERENCE_TOPIC}{more}; the policy that was recorded does not say "
                "what it saw, so there is nothing to compare"
            )
        checkpoint = checkpoint or rollout.checkpoint
        server = checkpoint.startswith(("ws://", "wss://"))
        if server and not inputs_only:
            raise UserError(f"{rollout.name}: was driven by {checkpoint}; use --inputs-only, or name its --checkpoint")
        setup = None
        if inputs_only:
            setup = EngineSetup(Still(episode.robot), episode.robot, str, "no model", True)
        done: list[Compared] = []
        why = "inputs only" if inputs_only else ""
        with _node(episode, records[0][1], checkpoint, setup) as node:
            if not why and (mine := node._checkpoint_id()) != records[0][1].checkpoint:
                why = f"recorded with checkpoint '{records[0][1].checkpoint}', here it is '{mine}'"
            feed = Feed(episode, node)
            for arrived_ns, record in records:
                missing = feed.up_to(record, arrived_ns, first=not done)
                done.append(_compare(node, record, chunks.get(record.stamp_ns), missing, episode.start_ns, bool(why)))
                progress(len(done), len(records))
    known = {record.stamp_ns for _, record in records}
    if not why and all(record.seed is None for _, record in records):
        why = "the noise was not drawn by the node, so its seed is not known"
    return Replayed(tuple(done), sum(stamp not in known for stamp in chunks), why)


def _records(episode: Episode) -> list[tuple[int, InferenceRecord]]:
    """(arrival, record) in the order of their looks."""
    records = []
    for arrived_ns, msg in episode.told(INFERENCE_TOPIC):
        try:
            records.append((arrived_ns, InferenceRecord.from_text(msg.data)))
        except ValueError as error:
            raise UserError(
                f"{episode.rollout.name}: a message on {INFERENCE_TOPIC} cannot be read ({error})"
            ) from None
    return sorted(records, key=lambda entry: entry[1].look_ns)


def _compare(
    node: ReplayedPolicy, record: InferenceRecord, chunk: ActionChunk | None, missing: int, start_ns: int, blind: bool
) -> Compared:
    node.seed = record.seed
    if record.held is not None:
        node.latency_s = record.held.latency_s
    steps = Parameter("flow_steps", value=record.flow_steps)
    if node.get_parameter("flow_steps").value != record.flow_steps:
        node.set_parameters([steps])
    told = node.infer(record.look_ns, record.chunk_ns)
    seconds = round((record.stamp_ns - start_ns) * 1e-9, 3)
    if isinstance(told, str):
        return Compared(seconds, (), missing, told, None)
    parts = {*record.inputs, *told.inputs}
    different = tuple(sorted(part for part in parts if record.inputs.get(part) != told.inputs.get(part)))
    output = None
    if not blind and record.seed is not None:
        if told.chunk == record.chunk:
            output = 0.0
        elif chunk is not None and node.chunk is not None:
            # A chunk message that equals ours bit for bit although its digest does not would be a damaged record.
            output = max(float(np.abs(chunk.actions_hc - node.chunk.actions_hc).max()), np.finfo(float).tiny)
    return Compared(seconds, different, missing, "", output)


@contextlib.contextmanager
def _node(
    episode: Episode, record: InferenceRecord, checkpoint: str, setup: EngineSetup | None
) -> Iterator[ReplayedPolicy]:
    """A configured and active node that no robot can hear: discovery is off."""
    before = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "OFF"
    node: ReplayedPolicy | None = None
    with tempfile.TemporaryDirectory() as folder:
        yaml = Path(folder) / f"{episode.robot.name}.yaml"
        yaml.write_text(episode.robot.source_text, encoding="utf-8")
        arguments = ["--ros-args", "-p", f"embodiment:={yaml}", "-p", f"strategy:={record.strategy}"]
        arguments += ["-p", "frozen_after_s:=0.0", "--log-level", "policy_node:=warn"]
        if checkpoint and setup is None:
            arguments += ["-p", f"checkpoint:={checkpoint}"]
        if episode.about.get("namespaced_topics"):
            arguments += ["-p", "namespaced_topics:=true"]
        namespace = str(episode.about.get("namespace") or "").strip("/")
        if namespace:
            arguments += ["-r", f"__ns:=/{namespace}"]
        try:
            rclpy.init(args=arguments)
            node = ReplayedPolicy(setup)
            node.start()
            yield node
        finally:
            if node is not None:
                node.close()
                node.destroy_node()
            rclpy.try_shutdown()
            if before is None:
                os.environ.pop("ROS_AUTOMATIC_DISCOVERY_RANGE", None)
            else:
                os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = before
