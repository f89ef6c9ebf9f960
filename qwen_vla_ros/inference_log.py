"""What each chunk was computed from, told in JSON beside it, so that a recording can prove what the policy saw.

A look is a choice: of all that had arrived, the newest complete set. So the record lists the stamps of everything the
node held at that moment, and when that was. Whoever has the messages can put the node back into that state and must get
the same inputs, bit for bit: ``inputs`` is a digest of all that the engine is asked with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwen_vla_core.interfaces import ActionChunk, Committed, Observation

# age of the pictures when inference starts, decoding them, the model's three parts, a server's two, from look to
# chunk, and from the observation's stamp to its chunk
PARTS = ("preprocess", "backbone", "denoise", "queue", "transport")
LATENCIES = ("image_age", "decode", *PARTS, "inference", "observation_to_chunk")

VERSION = 1
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Look:
    """One look at what has arrived.

    Attributes:
        observation: to infer from.
        generation: counts instructions.
        instructed_ns, look_ns: see ``InferenceRecord``.
        started_s: monotonic time.
        cameras_ns, states_ns: stamps of what it was chosen from, by view and by state group.
    """

    observation: Observation
    generation: int
    instructed_ns: int
    look_ns: int
    started_s: float
    cameras_ns: Mapping[str, tuple[int, ...]]
    states_ns: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Held:
    """The part of the plan that an inference continued.

    Attributes:
        latency_s: how long the chunk was expected to take from its observation.
        plans_ns: stamps of the plans the node remembered.
        continuing: whether the plan being played is one for this instruction.
    """

    latency_s: float
    plans_ns: tuple[int, ...]
    continuing: bool


@dataclass(frozen=True)
class Asked:
    """What an engine was asked with besides the observation; see ``InferenceRecord``."""

    embodiment: str
    committed: Committed | None
    flow_steps: int
    held: Held | None
    seed: int | None


@dataclass(frozen=True)
class InferenceRecord:
    """One inference.

    Attributes:
        stamp_ns: of the observation, and so of the chunk.
        look_ns: when the node looked; chunk_ns: when it had published the chunk.
        instructed_ns: when the instruction came; older pictures were not looked at.
        instruction: what was asked.
        embodiment: the robot's name.
        checkpoint: name and weights.
        strategy: how chunks follow each other.
        cameras: view → stamps of the pictures the node held, oldest first.
        states: state group → stamps of the readings it held.
        held: what it knew of the plan; None: the strategy does not ask.
        seed: of the sampler's noise; None: the engine drew it itself.
        flow_steps: Euler steps asked for; 0: the checkpoint's.
        inputs: part → digest of what the engine was asked with: every view, ``state``, ``question`` (instruction,
            stamp, robot, steps) and ``committed``; the noise is its seed.
        chunk: digest of the actions.
        ms: where the time went.
    """

    stamp_ns: int
    look_ns: int
    chunk_ns: int
    instructed_ns: int
    instruction: str
    embodiment: str
    checkpoint: str
    strategy: str
    cameras: Mapping[str, tuple[int, ...]]
    states: Mapping[str, tuple[int, ...]]
    held: Held | None
    seed: int | None
    flow_steps: int
    inputs: Mapping[str, str]
    chunk: str
    ms: Mapping[str, float] = field(default_factory=dict)

    def to_text(self) -> str:
        """One line of JSON; stamps as the first and the distances to it, which halves their length."""
        value = asdict(self)
        for kind in ("cameras", "states"):
            value[kind] = {name: _apart(stamps) for name, stamps in value[kind].items()}
        if self.held is not None:
            value["held"]["plans_ns"] = _apart(self.held.plans_ns)
        value["ms"] = {name: round(ms, 3) for name, ms in self.ms.items()}
        return json.dumps({"version": VERSION, **value}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> InferenceRecord:
        """Reads what ``to_text`` wrote.

        Raises:
            ValueError: it did not.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            if value.pop("version") != VERSION:
                raise ValueError("another version")
            for kind in ("cameras", "states"):
                value[kind] = {name: _joined(stamps) for name, stamps in value[kind].items()}
            if value["held"] is not None:
                value["held"] = Held(**{**value["held"], "plans_ns": _joined(value["held"]["plans_ns"])})
            return cls(**value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no inference record: {error}") from None


def record_of(
    look: Look, asked: Asked, chunk: ActionChunk, spent_s: Mapping[str, float], **about: Any
) -> InferenceRecord:
    """The record of an inference; ``about`` gives ``checkpoint``, ``strategy`` and ``chunk_ns``."""
    observation = look.observation
    return InferenceRecord(
        stamp_ns=observation.stamp_ns,
        look_ns=look.look_ns,
        instructed_ns=look.instructed_ns,
        instruction=observation.instruction,
        embodiment=asked.embodiment,
        cameras=look.cameras_ns,
        states=look.states_ns,
        held=asked.held,
        seed=asked.seed,
        flow_steps=asked.flow_steps,
        inputs=input_digests(observation, asked.embodiment, asked.committed, asked.flow_steps),
        chunk=chunk_digest(chunk.actions_hc),
        ms={name: seconds * 1e3 for name, seconds in spent_s.items()},
        **about,
    )


def input_digests(
    observation: Observation, embodiment: str, committed: Committed | None, flow_steps: int
) -> dict[str, str]:
    """Digests of all that an engine is asked with, but for the noise; see ``InferenceRecord.inputs``."""
    parts = {view: _digest(picture) for view, picture in observation.images.items()}
    parts["state"] = _digest(np.asarray(observation.state, np.float64))
    question = f"{embodiment}|{observation.stamp_ns}|{flow_steps}|{observation.instruction}"
    parts["question"] = hashlib.blake2b(question.encode(), digest_size=DIGEST_BYTES).hexdigest()
    if committed is not None:
        told = f"{committed.use}|{committed.frozen}"
        parts["committed"] = _digest(np.asarray(committed.actions_hc, np.float64), told)
    return parts


def _digest(values: np.ndarray, told: str = "") -> str:
    """Of shape, type and bytes."""
    digest = hashlib.blake2b(f"{values.shape}|{values.dtype}|{told}|".encode(), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def chunk_digest(actions_hc: np.ndarray) -> str:
    """Digest of a chunk's (H, c) actions."""
    return _digest(np.asarray(actions_hc, np.float64))


def noise_of(seed: int | None, shape: tuple[int, int] | None) -> np.ndarray | None:
    """(H, K) float32 starting noise of a seed; None without one."""
    if seed is None or shape is None:
        return None
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def _apart(stamps: Sequence[int]) -> list[int]:
    return [stamp - stamps[0] if index else stamp for index, stamp in enumerate(stamps)]


def _joined(values: Iterable[int]) -> tuple[int, ...]:
    listed = [int(value) for value in values]
    return tuple(listed[0] + value if index else value for index, value in enumerate(listed))
