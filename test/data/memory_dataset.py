"""An ActionDataset in memory, healthy as made here; tests put exactly one fault in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.embodiment import Embodiment, parse_embodiment
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

FPS = 10.0
ARMS = ("left", "right")
CHANNELS = tuple(f"{arm}_{joint}" for arm in ARMS for joint in ("shoulder", "elbow", "gripper"))
TASKS = ("pick up the red cube with the left arm and hand it to the right arm", "bring both grippers together")
# A two-armed robot of two joints and a gripper each, tag and topics made up.
ROBOT_YAML = (
    """
name: pair
prompt: {robot_tag: Pair, arms: dual arms}
control: {frequency_hz: 10, horizon: 8, controller_rate_hz: 50, convention: absolute_joint}
cameras: [{view: ego, topic: /ego, reference: true}]
state:
"""
    + "".join(
        f"""
  - name: {arm}_arm
    kind: joint_position
    unit: rad
    topic: /{arm}
    fields: [a, b]
    channels: [{arm}_shoulder, {arm}_elbow]
  - {{name: {arm}_gripper, kind: gripper, unit: fraction, topic: /{arm}, fields: [g], channels: [{arm}_gripper]}}
"""
        for arm in ARMS
    )
    + "actions:\n"
    + "".join(
        f"""
  - name: {arm}_arm
    kind: joint_position
    unit: rad
    channels: [{arm}_shoulder, {arm}_elbow]
    limits: {{lower: [-2, -1.5], upper: [2, 1.5], velocity: [3, 3], acceleration: [30, 30]}}
    command: {{kind: forward_command, topic: /{arm}/commands}}
    on_timeout: hold_measured
  - name: {arm}_gripper
    kind: gripper
    unit: fraction
    channels: [{arm}_gripper]
    limits: {{lower: [0], upper: [1], velocity: [5], acceleration: [60]}}
    command: {{kind: forward_command, topic: /{arm}/gripper}}
    on_timeout: hold_measured
"""
        for arm in ARMS
    )
)


def robot() -> Embodiment:
    return parse_embodiment(ROBOT_YAML, "pair.yaml")


def contract(**changes: Any) -> DataContract:
    values = {name: getattr(DataContract.of(robot()), name) for name in DataContract.__dataclass_fields__}
    return DataContract(**(values | changes))


@dataclass
class MemoryDataset:
    """Episodes and pictures in lists; ``broken`` maps an episode (or (episode, view)) to the reader's complaint."""

    episodes: list[EpisodeRows]
    pictures: list[dict[str, np.ndarray]]
    tasks: Sequence[str] = TASKS
    contract: DataContract = field(default_factory=contract)
    name: str = "memory"
    family: str = "manipulation"
    fps: float = FPS
    broken: dict[Any, str] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(rows) for rows in self.episodes], np.int64)

    @property
    def views(self) -> Sequence[str]:
        return sorted({view for pictures in self.pictures for view in pictures})

    def rows(self, episode: int) -> EpisodeRows:
        if episode in self.broken:
            raise UserError(self.broken[episode])
        return self.episodes[episode]

    def frames(self, episode: int, view: str, steps: Sequence[int]) -> np.ndarray:
        if (episode, view) in self.broken:
            raise UserError(self.broken[episode, view])
        return self.pictures[episode][view][list(steps)]

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for rows in self.episodes:
            digest.update(rows.state.tobytes() + rows.action.tobytes())
        return digest.hexdigest()


def motion(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(steps, 6) smooth motion of all channels inside the limits; grippers close and open."""
    time = np.linspace(0, 1, steps)[:, None]
    phase, size = rng.uniform(0, 6, (1, 6)), rng.uniform(0.5, 0.9, (1, 6))
    values = size * np.sin(2 * np.pi * time * rng.uniform(0.9, 1.3, (1, 6)) + phase)
    values[:, [2, 5]] = 0.5 + 0.45 * values[:, [2, 5]]
    return values


def paint(values: np.ndarray, rng: np.random.Generator, size: int = 48) -> np.ndarray:
    """(T, size, size, 3) pictures in which a bright square per arm follows the joints, before a fixed texture."""
    frames = np.repeat(rng.integers(60, 120, (1, size, size, 3), np.uint8), len(values), axis=0)
    for frame, row in zip(frames, values, strict=True):
        for colour, (a, b) in enumerate(((row[0], row[1]), (row[3], row[4]))):
            x, y = (int((np.clip(v, -1, 1) * 0.4 + 0.5) * (size - 10)) for v in (a, b))
            frame[y : y + 10, x : x + 10, colour] = 255
    return frames


def episode(rng: np.random.Generator, steps: int = 50, task: int = 0) -> tuple[EpisodeRows, dict[str, np.ndarray]]:
    """A healthy episode: measured state lags the command and has noise."""
    path = motion(rng, steps + 1)
    state = path[:-1] + rng.normal(0, 0.002, (steps, 6))
    state[:, [2, 5]] = np.clip(state[:, [2, 5]], 0.01, 0.99)
    rows = EpisodeRows(
        state=state.astype(np.float32),
        action=path[1:].astype(np.float32),
        timestamp=np.arange(steps) / FPS,
        task=np.full(steps, task, np.int64),
        perturbed=np.zeros(steps, bool),
    )
    return rows, {"ego": paint(path[:-1], rng)}


def healthy(count: int = 6, seed: int = 0, steps: int = 50) -> MemoryDataset:
    """A dataset without any fault; lengths and tasks differ a little."""
    rng = np.random.default_rng(seed)
    made = [episode(rng, steps + 2 * i, i % 2) for i in range(count)]
    return MemoryDataset([rows for rows, _ in made], [pictures for _, pictures in made])


def single_arm_contract(convention: str, kind: str, unit: str, channels: Sequence[str]) -> DataContract:
    """A contract of one action group whose channels are measured under the same names as ``eef_pose``/joints."""
    measured = {"joint_delta": "joint_position", "eef_delta": "eef_pose"}.get(kind, kind)
    return DataContract(
        prompt=PromptSpec("Arm", "single arm"),
        frequency_hz=FPS,
        horizon=4,
        convention=convention,
        views=(),
        state=(ChannelGroup("arm", measured, unit, tuple(channels)),),
        action=(ChannelGroup("arm", kind, unit, tuple(channels)),),
    )
