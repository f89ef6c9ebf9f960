"""What the loader hands out: one action window or one conversation, as plain NumPy; and how the policy takes them.

Every family of the mixture ends in one of two forms, so that a batch may hold both [P: every minibatch mixes families].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen_vla_core.interfaces import Observation

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ActionSample:
    """One observation and the actions that followed it; c channels, H steps.

    Attributes:
        images: view → (n, height, width, 3) uint8 RGB, oldest frame first and the current one last, views in model
            order; empty for data without pictures.
        state: (c_s,) float32 in channel units at the current frame.
        instruction: what was asked at the current frame.
        actions_hc: (H, c) float32 in channel units and in the convention that the prompt names: relative conventions
            are relative to the chunk's first frame. Only for T2A does H differ from the contract's: it is the whole
            sequence [P].
        step_mask_h: (H,) bool; False where the episode, the instruction or an unperturbed course has ended.
        embodiment: name of the robot whose contract (prompt, views, channels, horizon) this is.
        family: of the mixture.
        dataset: name of the dataset.
        episode: its number in the dataset.
        t: the current frame's number in the episode.
        seed: of everything random about this sample (jitter here, noise later): the same wherever it is drawn.
        turns: (question, answer) pairs after the prompt; an empty question is none: what the instruction means in this
            picture, which the policy itself says first.
        told: the robot that the prompt speaks of, where it is another one; None: the same.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str
    actions_hc: np.ndarray
    step_mask_h: np.ndarray
    embodiment: str
    family: str
    dataset: str
    episode: int
    t: int
    seed: int
    turns: Turns = ()
    told: str | None = None


@dataclass(frozen=True)
class TextSample:
    """One conversation about pictures.

    Attributes:
        images: view → (n, height, width, 3) uint8 RGB, n frames of that view in time order, views in the order of the
            conversation; empty for text alone.
        turns: (question, answer) pairs, at least one, without picture markers.
        family: of the mixture.
        dataset: name of the dataset.
        index: its number in the dataset.
    """

    images: Mapping[str, np.ndarray]
    turns: Turns
    family: str
    dataset: str
    index: int


Sample = ActionSample | TextSample


class TextDataset(Protocol):
    """Conversations of one corpus. Opened cheaply; pictures are read when asked for; safe to open in every worker."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> TextSample:
        """The conversation of one line.

        Raises:
            UserError: the line or a picture is missing or damaged; names file and row.
        """
        ...

    def content_hash(self) -> str:
        """Identifies the dataset's content (files, sizes, times or sums)."""
        ...


@dataclass(frozen=True)
class SampleBatch:
    """One minibatch, in the order in which it was drawn.

    Attributes:
        step: number of the batch since the beginning of training; with recipe and seed it decides all the rest.
        samples: of all families.
    """

    step: int
    samples: Sequence[Sample]


@dataclass(frozen=True)
class RobotInputs:
    """The action samples of one embodiment in a batch, as ``QwenVLA.collate`` takes them; B of them.

    Attributes:
        embodiment: their robot.
        rows: their B positions in the batch.
        observations: B observations.
        actions_bhc: (B, H, c) float32; H is the longest of them.
        step_mask_bh: (B, H) bool, False on what a shorter one lacks.
        turns: of each observation; () where nothing is said.
    """

    embodiment: str
    rows: tuple[int, ...]
    observations: tuple[Observation, ...]
    actions_bhc: np.ndarray
    step_mask_bh: np.ndarray
    turns: tuple[Turns, ...]


@dataclass(frozen=True)
class PolicyInputs:
    """A batch as the model takes it.

    Attributes:
        robots: one entry per embodiment, in the order of appearance.
        text_rows: positions of the conversations in the batch.
        conversations: what ``Processor.collate`` takes: images, prompt, turns.
    """

    robots: tuple[RobotInputs, ...]
    text_rows: tuple[int, ...]
    conversations: tuple[tuple[Mapping[str, np.ndarray], str, Turns], ...]


def policy_inputs(samples: Sequence[Sample]) -> PolicyInputs:
    """Sorts a mixed batch by what the model does with it.

    A single frame per view becomes a plain picture, as at run time.
    """
    by_robot: dict[str, list[tuple[int, ActionSample]]] = {}
    texts: list[tuple[int, TextSample]] = []
    for row, sample in enumerate(samples):
        if isinstance(sample, ActionSample):
            by_robot.setdefault(sample.embodiment, []).append((row, sample))
        else:
            texts.append((row, sample))
    return PolicyInputs(
        robots=tuple(_robot_inputs(name, members) for name, members in by_robot.items()),
        text_rows=tuple(row for row, _ in texts),
        conversations=tuple(_conversation(sample) for _, sample in texts),
    )


def _robot_inputs(name: str, members: Sequence[tuple[int, ActionSample]]) -> RobotInputs:
    horizon = max(len(sample.actions_hc) for _, sample in members)
    actions = np.zeros((len(members), horizon, members[0][1].actions_hc.shape[1]), np.float32)
    mask = np.zeros(actions.shape[:2], bool)
    for i, (_, sample) in enumerate(members):
        actions[i, : len(sample.actions_hc)] = sample.actions_hc
        mask[i, : len(sample.actions_hc)] = sample.step_mask_h
    return RobotInputs(
        embodiment=name,
        rows=tuple(row for row, _ in members),
        observations=tuple(
            Observation(plain_pictures(sample.images), sample.state.astype(np.float64), sample.instruction)
            for _, sample in members
        ),
        actions_bhc=actions,
        step_mask_bh=mask,
        turns=tuple(sample.turns for _, sample in members),
    )


def _conversation(sample: TextSample) -> tuple[Mapping[str, np.ndarray], str, Turns]:
    (question, answer), *rest = sample.turns
    return plain_pictures(sample.images), question, (("", answer), *rest)


def plain_pictures(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A single frame per view becomes a plain picture (height, width, 3), as at run time."""
    return {view: frames[0] if len(frames) == 1 else frames for view, frames in images.items()}
