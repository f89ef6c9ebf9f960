"""What happened in one episode, read from its bag: rates, latencies, interventions, and a timeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import Rollout

INSTRUCTION, STATUS, CHUNK, INFERENCE, LATENCY, EPISODE, NOTE, OUTCOME, HUMAN, ESTOPPED = (
    f"qwen_vla/{name}"
    for name in (
        "instruction", "status", "chunk", "inference", "latency", "episode", "note", "outcome", "human_control",
        "estopped",
    )
)  # fmt: skip
COUNTED = ("limited.", "rejected.", "count.")  # how the controller's counters begin


@dataclass(frozen=True)
class TopicRate:
    """How a topic was heard: messages, their rate, the longest silence between two of them (None: fewer than two)."""

    topic: str
    type: str
    count: int
    hz: float
    longest_gap_ms: float | None


@dataclass(frozen=True)
class Event:
    """Something that happened ``seconds`` after the episode began; ``who`` is a node, the operator or the recorder."""

    seconds: float
    who: str
    text: str


@dataclass(frozen=True)
class Spread:
    """Percentiles of a duration in milliseconds, of ``count`` values."""

    count: int
    p50_ms: float
    p95_ms: float
    max_ms: float


@dataclass(frozen=True)
class Summary:
    """One episode.

    Attributes:
        seconds: from its start to the last message.
        whole: whether the bag was closed.
        topics: every topic, silent ones too.
        chunks: published ones; looks_hz: how often per second of the time between the first and the last.
        latency: part → spread; ``observation_to_chunk`` is the whole way.
        seeds: chunks whose noise can be drawn again.
        interventions: what the controller counted during the episode: limits that acted, chunks refused, holds.
        instructions: (seconds, text) of every change.
        human_seconds: how long a person drove.
        events: the timeline.
    """

    seconds: float
    whole: bool
    topics: tuple[TopicRate, ...]
    chunks: int
    looks_hz: float | None
    latency: Mapping[str, Spread]
    seeds: int
    interventions: Mapping[str, int]
    instructions: tuple[tuple[float, str], ...]
    human_seconds: float
    events: tuple[Event, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def summarise(rollout: Rollout, started_ns: int = 0) -> Summary:
    """Reads a whole bag once.

    Args:
        rollout: which.
        started_ns: when the episode began; 0: with the bag's first message.

    Raises:
        UserError: there is no bag.
    """
    with BagFile(rollout.folder) as bag:
        start_ns = max(started_ns, bag.start_ns)
        arrivals: dict[str, list[int]] = {topic: [] for topic in bag.topics}
        story = _Story(start_ns)
        for topic, time_ns, data in bag.messages():
            arrivals[topic].append(time_ns)
            if (kind := story.wants(topic)) is not None:
                story.hear(kind, time_ns, bag.decode(topic, data))
        rates = tuple(_rate(topic.name, topic.type, arrivals[topic.name]) for topic in bag.topics.values())
        return story.told(bag, rates)


def _rate(topic: str, message_type: str, arrivals_ns: list[int]) -> TopicRate:
    gaps = np.diff(np.array(arrivals_ns, np.int64))
    if not len(gaps) or not gaps.sum():
        return TopicRate(topic, message_type, len(arrivals_ns), 0.0, None)
    return TopicRate(
        topic, message_type, len(arrivals_ns), round(len(gaps) / (gaps.sum() * 1e-9), 2), round(gaps.max() / 1e6, 1)
    )


class _Story:
    """Collects what the topics of this package say."""

    def __init__(self, start_ns: int) -> None:
        self._start_ns = start_ns
        self._kinds = (INSTRUCTION, STATUS, CHUNK, INFERENCE, LATENCY, EPISODE, NOTE, OUTCOME, HUMAN, ESTOPPED)
        self._events: list[Event] = []
        self._states: dict[str, str] = {}
        self._counters: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        self._instructions: list[tuple[float, str]] = []
        self._chunks_ns: list[int] = []
        self._ms: dict[str, list[float]] = {}
        self._latencies_ms: list[float] = []
        self._seeds = 0
        self._human_ns: int | None = None
        self._human_s = 0.0

    def wants(self, topic: str) -> str | None:
        """Which of the package's topics this is; None: none of them."""
        return next((kind for kind in self._kinds if topic.endswith(f"/{kind}")), None)

    def hear(self, kind: str, time_ns: int, message: Any) -> None:
        """Takes a message."""
        seconds = round((time_ns - self._start_ns) * 1e-9, 3)
        if kind == STATUS:
            for status in message.status:
                self._status(seconds, status)
        elif kind == CHUNK:
            self._chunks_ns.append(time_ns)
        elif kind == LATENCY:
            self._latencies_ms.append(float(message.data) * 1e3)
        elif kind == INFERENCE:
            self._inference(str(message.data))
        elif kind in (HUMAN, ESTOPPED):
            self._switch(kind, seconds, time_ns, bool(message.data))
        else:
            self._text(kind, seconds, str(message.data).strip())

    def _status(self, seconds: float, status: Any) -> None:
        values = {pair.key: pair.value for pair in status.values}
        state = values.get("mode") or values.get("state") or ""
        reason = values.get("reason", "")
        # A reason that only counts on (ages, rates) is no news.
        known = f"{state}: {reason.split(':')[0]}" if reason and state in ("holding", "fault", "estopped") else state
        if status.name in ("controller", "policy", "recorder") and known != self._states.get(status.name):
            before = self._states.get(status.name)
            self._states[status.name] = known
            if before is not None or state in ("holding", "fault", "estopped"):
                self._events.append(Event(max(seconds, 0.0), status.name, f"{state}: {reason}" if reason else state))
        if status.name == "controller":
            counts = {k: int(v) for k, v in values.items() if k.startswith(COUNTED) and _is_total(k) and v.isdigit()}
            first, _ = self._counters.get(status.name, (counts, counts))
            self._counters[status.name] = (first, counts)

    def _inference(self, text: str) -> None:
        try:
            record = json.loads(text)
            for part, ms in record["ms"].items():
                self._ms.setdefault(part, []).append(float(ms))
            self._seeds += record.get("seed") is not None
        except (ValueError, KeyError, TypeError, AttributeError):  # another version's
            return

    def _switch(self, kind: str, seconds: float, time_ns: int, on: bool) -> None:
        if kind == ESTOPPED:
            if on or any(event.text.startswith("emergency stop") for event in self._events):
                self._events.append(
                    Event(max(seconds, 0.0), "controller", f"emergency stop {'latched' if on else 'released'}")
                )
            return
        if on and self._human_ns is None:
            self._human_ns = max(time_ns, self._start_ns)
            self._events.append(Event(max(seconds, 0.0), "operator", "takes over"))
        elif not on and self._human_ns is not None:
            self._human_s += (time_ns - self._human_ns) * 1e-9
            self._human_ns = None
            self._events.append(Event(seconds, "operator", "hands back"))

    def _text(self, kind: str, seconds: float, text: str) -> None:
        if kind == INSTRUCTION:
            before = self._instructions[-1][1] if self._instructions else ""
            if text == before or (not self._instructions and seconds < 0):
                return
            self._instructions.append((seconds, text))
            self._events.append(Event(seconds, "operator", f"instruction: {text}" if text else "instruction withdrawn"))
        elif kind == EPISODE:
            try:
                event = dict(json.loads(text))
            except (ValueError, TypeError):
                return
            said = ", ".join(f"{k} {event[k]}" for k in ("outcome", "seed", "seconds") if event.get(k) is not None)
            self._events.append(Event(max(seconds, 0.0), "simulator", f"{event.get('event', '')}: {said}"))
        else:
            said = f"note: {text}" if kind == NOTE else f"verdict: {_verdict(text)}"
            self._events.append(Event(seconds, "operator", said))

    def told(self, bag: BagFile, topics: tuple[TopicRate, ...]) -> Summary:
        """What came together."""
        latency = {part: _spread(values) for part, values in self._ms.items()}
        if "observation_to_chunk" not in latency and self._latencies_ms:
            latency["observation_to_chunk"] = _spread(self._latencies_ms)
        span_s = (self._chunks_ns[-1] - self._chunks_ns[0]) * 1e-9 if len(self._chunks_ns) > 1 else 0.0
        human_s = self._human_s + (0.0 if self._human_ns is None else (bag.end_ns - self._human_ns) * 1e-9)
        return Summary(
            seconds=round((bag.end_ns - self._start_ns) * 1e-9, 3),
            whole=bag.whole,
            topics=topics,
            chunks=len(self._chunks_ns),
            looks_hz=round((len(self._chunks_ns) - 1) / span_s, 2) if span_s else None,
            latency=latency,
            seeds=self._seeds,
            interventions=dict(self._grown()),
            instructions=tuple(self._instructions),
            human_seconds=round(human_s, 3),
            events=tuple(sorted(self._events, key=lambda event: event.seconds)),
        )

    def _grown(self) -> Iterator[tuple[str, int]]:
        for first, last in self._counters.values():
            for key, count in last.items():
                if count > first.get(key, 0):
                    yield key, count - first.get(key, 0)


def _verdict(text: str) -> str:
    """As people read it: the outcome, with reason and note behind it."""
    try:
        said = dict(json.loads(text))
    except (ValueError, TypeError):
        return text
    more = ", ".join(str(said[key]) for key in ("reason", "note") if said.get(key))
    return f"{said.get('outcome', '')} ({more})" if more else str(said.get("outcome", ""))


def _is_total(key: str) -> bool:
    """``limited.velocity``, but not ``limited.velocity.left_arm``, which is a part of it."""
    return key.count(".") == 1


def _spread(values_ms: list[float]) -> Spread:
    p50, p95 = np.percentile(values_ms, [50, 95])
    return Spread(len(values_ms), round(float(p50), 2), round(float(p95), 2), round(max(values_ms), 2))
