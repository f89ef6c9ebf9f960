"""Demonstrations in memory, and the two kinds of batches drawn from them: action chunks and grounding questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qwen_vla_core.actions.normalize import Quantiles
from qwen_vla_core.data.lerobot import open_dataset
from qwen_vla_core.data.scene_cells import CellBatch
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation
from qwen_vla_core.model.policy import Stats
from qwen_vla_core.model.processor import Sample
from qwen_vla_core.sim.demonstration import Demonstration, read_demonstration
from qwen_vla_core.sim.grounding import Grid, asked_for, intention, questions
from qwen_vla_core.sim.scenes import read_scene
from qwen_vla_core.sim.state import SceneState

Turns = tuple[tuple[str, str], ...]
POSITION_WEIGHT = 8.0
START_SHARE = 0.3
START_STEPS = 6
MOST_MISSES = 10_000  # frames without a question while one batch is drawn: then there is none to be found


@dataclass(frozen=True)
class ChunkBatch:
    """B observations with their targets.

    Attributes:
        observations: what the policy would see.
        actions_bhc: (B, H, c) in channel units.
        step_mask_bh: (B, H) bool, False where the demonstration was pushed off its course and says nothing any more.
        turns: per observation, grounding questions with answers.
    """

    observations: list[Observation]
    actions_bhc: np.ndarray
    step_mask_bh: np.ndarray
    turns: list[Turns]


class Demonstrations:
    """All episodes of some folders, decoded. Sampling is a function of the generator alone."""

    def __init__(self, episodes: Sequence[Demonstration], robot: Embodiment) -> None:
        """
        Args:
            episodes: at least one.
            robot: whose views, channels and horizon the batches follow.

        Raises:
            UserError: no episodes, or an episode lacks one of the robot's views or has other channels.
        """
        if not episodes:
            raise UserError("recipe: `data` holds no episodes; write some with `qwen-vla sim demos`")
        for episode in episodes:
            missing = set(robot.views) - set(episode.images)
            if missing:
                raise UserError(f"episode {episode.seed}: view {sorted(missing)[0]!r} of {robot.name} is missing")
            if episode.rows.action.shape[1] != len(robot.channels):
                raise UserError(
                    f"episode {episode.seed}: {episode.rows.action.shape[1]} action channels, "
                    f"{robot.name} has {len(robot.channels)}"
                )
        self.episodes = list(episodes)
        self.robot = robot
        self._frames = [(e, t) for e, episode in enumerate(self.episodes) for t in range(len(episode))]

    @classmethod
    def load(cls, folders: Sequence[str | Path], robot: Embodiment, progress: bool = True) -> Demonstrations:
        """Reads every episode of every folder into memory (about 1.1 MB per second with three views of 128×96)."""
        episodes: list[Demonstration] = []
        for folder in folders:
            dataset = open_dataset(folder)
            numbers = tqdm(range(len(dataset)), desc=f"reading {folder}", unit="episode", disable=not progress)
            episodes += [read_demonstration(dataset, number) for number in numbers]
        return cls(episodes, robot)

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def frame_count(self) -> int:
        """Observations in all episodes together."""
        return len(self._frames)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the stored pictures."""
        height, width = self.episodes[0].images[self.robot.views[0]].shape[1:3]
        return int(height), int(width)

    def stats(self) -> Stats:
        """Quantiles of actions and states [P]."""
        return Stats(
            action=Quantiles.fit(np.concatenate([e.rows.action for e in self.episodes]), self.robot.channels),
            state=Quantiles.fit(np.concatenate([e.rows.state for e in self.episodes]), self.robot.state_channels),
        )

    def sentences(self, frames: int = 300) -> list[str]:
        """Instructions, questions and answers for the tokenizer."""
        rng = np.random.default_rng(0)
        found = {episode.instruction for episode in self.episodes}
        for index in rng.integers(self.frame_count, size=frames):
            for question, answer in self._turns(int(index), rng, 8):
                found |= {question, answer}
        return sorted(found)

    def chunks(self, rng: np.random.Generator, size: int, question_count: int) -> ChunkBatch:
        """``size`` frames with their next H actions, the meaning of the instruction, and ``question_count`` questions.

        A share of the frames is drawn from the beginnings of episodes, where only the instruction tells what to do.
        """
        horizon = self.robot.control.horizon
        observations, actions, masks, turns = [], [], [], []
        for _ in range(size):
            index = self._draw(rng)
            e, t = self._frames[index]
            episode = self.episodes[e]
            chunk, valid = episode.rows.chunk(t, horizon, hold_at_end=True)  # it ends at rest, and shall stay
            images = {view: _photometric(episode.images[view][t], rng) for view in self.robot.views}
            observations.append(Observation(images, episode.rows.state[t].astype(np.float64), episode.instruction))
            actions.append(chunk)
            masks.append(valid)
            meaning = intention(SceneState.from_dict(episode.scene(t)))
            turns.append((("", meaning), *self._turns(index, rng, question_count)))
        return ChunkBatch(observations, np.stack(actions), np.stack(masks), turns)

    def instructions(
        self, rng: np.random.Generator, size: int, question_count: int
    ) -> tuple[list[Observation], list[Turns]]:
        """``size`` frames, each told to take a random one of its cubes, with what that means there.

        Demonstrations only say what follows the instruction that was given; what another one would have meant in the
        same picture is known as well, and nothing teaches so fast that words decide.
        """
        observations, turns = [], []
        for _ in range(size):
            index = self._draw(rng)
            e, t = self._frames[index]
            episode, scene = self.episodes[e], SceneState.from_dict(self.episodes[e].scene(t))
            colour = scene.cubes[int(rng.integers(len(scene.cubes)))].colour
            instruction = episode.instruction.replace(scene.target, colour)
            images = {view: _photometric(episode.images[view][t], rng) for view in self.robot.views}
            observations.append(Observation(images, episode.rows.state[t].astype(np.float64), instruction))
            meaning = intention(asked_for(scene, colour))
            turns.append((("", meaning), *self._turns(index, rng, question_count)))
        return observations, turns

    def _draw(self, rng: np.random.Generator) -> int:
        """A frame: uniform, but for the share drawn from the beginnings of episodes."""
        index = int(rng.integers(self.frame_count))
        if rng.random() < START_SHARE:
            e, t = self._frames[index]
            index += int(rng.integers(min(START_STEPS, len(self.episodes[e])))) - t
        return index

    def cells(self, rng: np.random.Generator, size: int, grid: Grid) -> CellBatch:
        """Every view of ``size`` frames, and which cells of them hold what."""
        pictures, occupied, inside, applies = [], [], [], []
        for index in rng.integers(self.frame_count, size=size):
            e, t = self._frames[index]
            scene = read_scene(self.episodes[e].scene(t))
            for view in self.robot.views:
                pictures.append(_photometric(self.episodes[e].images[view][t], rng))
                there, where = scene.cells(view, grid)
                occupied.append(there)
                inside.append(where)
                applies.append(scene.applies)
        return CellBatch(np.stack(pictures), np.stack(occupied), np.stack(inside), np.stack(applies))

    def questions(self, rng: np.random.Generator, size: int, question_count: int) -> list[Sample]:
        """``size`` frames of the reference view, each with up to ``question_count`` questions where its cubes are.

        Nothing else is asked in the vision-language stage: finding a named colour is the step that a tiny model takes
        last when many kinds of questions compete.
        """
        reference = self.robot.reference_camera.view
        samples: list[Sample] = []
        misses = 0
        while len(samples) < size:
            e, t = self._frames[int(rng.integers(self.frame_count))]
            asked = questions(SceneState.from_dict(self.episodes[e].scene(t)), rng, views=(reference,))
            where = [(q, a) for q, a in asked if a.startswith("row") and "cube" in q][:question_count]
            if where:
                (question, answer), *rest = where
                images = {reference: _photometric(self.episodes[e].images[reference][t], rng)}
                samples.append(Sample(images, question, (("", answer), *rest)))
            elif (misses := misses + 1) > MOST_MISSES:
                raise UserError(
                    f"recipe: `data` shows nothing to ask about in view {reference!r}; check the recordings"
                )
        return samples

    def _turns(self, index: int, rng: np.random.Generator, count: int) -> Turns:
        """Questions of every kind about all views; positions come most often, they teach a tiny model to see."""
        e, t = self._frames[index]
        asked = questions(SceneState.from_dict(self.episodes[e].scene(t)), rng)
        weights = np.array([POSITION_WEIGHT if answer.startswith("row") else 1.0 for _, answer in asked])
        chosen = rng.choice(len(asked), min(count, len(asked)), replace=False, p=weights / weights.sum())
        return tuple(asked[i] for i in chosen)


def _photometric(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and a colour cast; the geometry stays, because actions depend on it."""
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    lifted = (picture.astype(np.float32) - 128.0) * gain + 128.0 + rng.uniform(-15.0, 15.0)
    return np.clip(lifted, 0, 255).astype(np.uint8)
