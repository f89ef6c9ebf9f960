"""Conversations about the frames of simulated demonstrations: what a vision-language stage learns from.

A published backbone arrives pretrained on pictures and words; a tiny random one learns them here first [O].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_vla_core.data.dataset import ActionDataset
from qwen_vla_core.data.mixture_recipe import Ask
from qwen_vla_core.data.samples import TextSample, Turns
from qwen_vla_core.data.stored_scenes import StoredScenes
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.state import EGO

QUESTIONS = 4  # per conversation
POSITION_WEIGHT = 8.0  # of ``all``: positions come most often, they teach a tiny model to see [O]
MOST_MISSES = 1000  # frames without a question that are passed over in one place: then there is none to be found
_SALT = 4391  # keeps these draws apart from others of small seeds


@dataclass(frozen=True)
class Asked:
    """A conversation without its pictures.

    Attributes:
        episode: of the demonstrations.
        t: the frame that is talked about.
        views: pictures that are shown, in model order.
        turns: (question, answer) pairs.
    """

    episode: int
    t: int
    views: tuple[str, ...]
    turns: Turns


class SceneQuestions:
    """One conversation about each frame; implements ``TextDataset``. A pure function of the frame's number.

    Three kinds:
        ``where``: up to ``QUESTIONS`` times where something is, about the reference view alone. Where a frame shows
        nothing to ask about, another frame takes its place.
        ``requests``: the whole policy prompt, with one of the instructions that make sense in this picture (the one
        that was given is among them), all views, and as the answer what it means. It reads as the policy's own input
        does, without a state.
        ``all``: up to ``QUESTIONS`` questions of every kind about all views.
    """

    def __init__(self, demonstrations: ActionDataset, ask: Ask, family: str) -> None:
        """
        Args:
            demonstrations: recorded in simulation.
            ask: the kind of conversation.
            family: of the mixture.

        Raises:
            UserError: they have no scenes, or lack the pictures of a view.
        """
        self.demonstrations, self.ask, self.family = demonstrations, ask, family
        self.name = f"{demonstrations.name}: {ask}"
        self._scenes = StoredScenes(demonstrations)

    @classmethod
    def open(cls, path: str | Path, ask: Ask, family: str, embodiment: str | None = None) -> SceneQuestions:
        """Opens a dataset of demonstrations; ``embodiment`` where it carries no contract.

        Raises:
            UserError: no dataset, or as above.
        """
        from qwen_vla_core.data.lerobot import open_dataset

        return cls(open_dataset(path, embodiment=embodiment), ask, family)

    def __len__(self) -> int:
        return len(self._scenes)

    @property
    def views(self) -> tuple[str, ...]:
        """The pictures that conversations show."""
        every = self.demonstrations.contract.views
        return (reference_view(every),) if self.ask == "where" else every

    def asked(self, index: int) -> Asked:
        """What is said about a frame.

        Raises:
            UserError: damaged data, or nothing to ask about in any of ``MOST_MISSES`` frames.
        """
        rng = np.random.default_rng([_SALT, index])
        for _ in range(MOST_MISSES):
            episode, t = self._scenes.frame(index)
            turns = self._turns(episode, t, rng)
            if turns:
                return Asked(episode, t, self.views, turns)
            index = int(rng.integers(len(self)))
        raise UserError(
            f"{self.demonstrations.name}: nothing to ask about in {', '.join(self.views)}; check the recordings"
        )

    def sample(self, index: int) -> TextSample:
        """The conversation about a frame, with its pictures as stored.

        Raises:
            UserError: as ``asked``; or a video is damaged.
        """
        asked = self.asked(index)
        images = {view: self.demonstrations.frames(asked.episode, view, [asked.t]) for view in asked.views}
        return TextSample(images, asked.turns, self.family, self.name, index)

    def content_hash(self) -> str:
        """Identifies the demonstrations and what is asked about them."""
        return hashlib.sha256(f"{self.ask} {self.demonstrations.content_hash()}".encode()).hexdigest()

    def _turns(self, episode: int, t: int, rng: np.random.Generator) -> Turns:
        scene = self._scenes.scene(episode, t)
        if self.ask == "where":
            return tuple(scene.where_questions(rng, self.views[0])[:QUESTIONS])
        if self.ask == "requests":
            instruction = self._scenes.instruction(episode, t)
            possible = [(instruction, scene.intention()), *scene.requests(instruction, rng)]
            said, meaning = possible[int(rng.integers(len(possible)))]
            return ((self.demonstrations.contract.prompt_for(said), meaning),)
        pairs = scene.questions(rng, self.views)
        if not pairs:
            return ()
        weights = np.array([POSITION_WEIGHT if answer.startswith("row ") else 1.0 for _, answer in pairs])
        chosen = rng.choice(len(pairs), min(QUESTIONS, len(pairs)), replace=False, p=weights / weights.sum())
        return tuple(pairs[i] for i in chosen)


def reference_view(views: Sequence[str]) -> str:
    """The picture that positions are told in: the ego view, else the first."""
    return EGO if EGO in views else views[0]
