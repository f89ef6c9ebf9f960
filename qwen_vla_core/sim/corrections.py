"""A policy drives until the expert takes over: demonstrations of how to get out of what that policy gets into.

What the expert would have done is noted at every step, as in DAgger (Ross et al. 2011); after the hand-over the expert
acts itself, so that whole chunks show the way back (HG-DAgger, Kelly et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vla_core.interfaces import Observation

HANDOVER = 0.5  # of the world's time limit: the expert needs the rest


def weights_of(checkpoint: str | Path) -> str:
    """Identity of a checkpoint's weights."""
    from qwen_vla_core.model.checkpoint import read_config, resolve_checkpoint

    return str(read_config(resolve_checkpoint(checkpoint))["weights_id"])


class Pilot:
    """One policy in the worlds of one robot, until its hand-over."""

    def __init__(self, checkpoint: str | Path, robot: str, execute_steps: int = 5) -> None:
        """
        Args:
            checkpoint: shipped name or folder.
            robot: embodiment of the checkpoint.
            execute_steps: actions of each chunk that are executed.
        """
        import torch

        from qwen_vla_core.model.checkpoint import load_checkpoint, resolve_checkpoint

        torch.set_num_threads(1)
        self.policy = load_checkpoint(resolve_checkpoint(checkpoint), "cpu")
        self.robot, self.execute_steps = robot, execute_steps
        self._generator = torch.Generator()
        self._steps, self._until_s = 0, 0.0
        self._chunk_hc = np.zeros((0, 0))

    def begin(self, seed: int, limit_s: float, sooner_than_s: float | None = None) -> None:
        """A new episode.

        Args:
            seed: of its noise and of the hand-over.
            limit_s: of the episode.
            sooner_than_s: the episode was over by then without the expert, so it is to have its turn before.
        """
        rng = np.random.default_rng([seed, 7])
        drawn, earlier = rng.random(2)
        self._until_s = drawn * HANDOVER * limit_s if sooner_than_s is None else earlier * sooner_than_s
        self._generator.manual_seed(seed)
        self._steps = 0

    def drives(self, time_s: float) -> bool:
        """Whether the expert has not taken over yet."""
        return time_s < self._until_s

    def action(self, world: Any, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """(c,) what the policy does for one decision of ``world``; ``images`` is what is to be seen now."""
        from qwen_vla_core.actions.conventions import continue_headings

        due = self._steps % self.execute_steps
        if due == 0:
            seen = Observation(images, world.state(), world.instruction, int(world.time_s * 1e9))
            self._chunk_hc = self.policy.predict(seen, self.robot, generator=self._generator).actions_hc
        self._steps += 1
        setpoint = np.asarray(world.command(), dtype=np.float64)
        return np.asarray(continue_headings(self._chunk_hc[due : due + 1], setpoint, world.headings)[0])
