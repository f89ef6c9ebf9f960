"""Trials as Ray actors, on this machine or on the cluster that ``RAY_ADDRESS`` names."""

from __future__ import annotations

import traceback
from itertools import cycle
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.episodes import Evaluator, Row, Settings
from qwen_vla_core.evaluation.suites.protocol import Trial


class RayRunner:
    """A ``Runner``: one actor per worker, given trials by turns."""

    def __init__(self, settings: Settings, workers: int) -> None:
        """
        Args:
            settings: of every trial; the checkpoint's path must mean the same on every node.
            workers: actors.

        Raises:
            UserError: Ray is not installed.
        """
        from qwen_vla_core.training.world_pool import start_ray

        self.ray, self._started = start_ray(workers, "--ray", "leave it out")
        kind = self.ray.remote(num_cpus=1)(_Actor)
        self._actors = [kind.remote(settings) for _ in range(workers)]
        self._next = cycle(self._actors)
        self.ahead = 2 * workers

    def begin(self, trial: Trial) -> Any:
        """See ``Runner``."""
        return next(self._next).run.remote(trial)

    def finish(self, handle: Any) -> Row:
        """See ``Runner``.

        Raises:
            UserError: an actor died, or what a user can mend went wrong in one.
        """
        try:
            text, fixable, row = self.ray.get(handle)
        except self.ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--ray: an actor died: {reason}") from None
        if row is not None:
            return dict(row)
        raise UserError(text) if fixable else RuntimeError(f"in a Ray actor:\n{text}")

    def close(self) -> None:
        """Ends the actors, and Ray where it was started here."""
        for actor in self._actors:
            self.ray.kill(actor)
        if self._started:
            self.ray.shutdown()


class _Actor:
    """An evaluator that is built with its first trial, so that what is wrong is told like any other mistake."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.evaluator: Evaluator | None = None

    def run(self, trial: Trial) -> tuple[str, bool, Row | None]:
        """(text, whether the user can mend it, row): exceptions with their own arguments do not survive the way."""
        try:
            if self.evaluator is None:
                import qwen_vla_core.sim  # noqa: F401 - before MuJoCo: it chooses the GL back-end

                self.evaluator = Evaluator(self.settings)
            return "", True, self.evaluator(trial)
        except UserError as error:
            return str(error), True, None
        except Exception:
            return traceback.format_exc(), False, None
