"""What a walk leaves behind: the facts that ``evaluation/navigation.py`` makes its measures from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Track:
    """One episode of a mobile base; lengths in metres.

    Attributes:
        path_n2: (n, 2) where the base was, from the start on, evenly spaced in time.
        to_goal_n: (n,) length of the shortest free way from there to the goal.
        reference_m2: (m, 2) the shortest free way that does the task, start to stop.
        reach: how near to the goal a stop counts.
        stopped: whether the base has stopped by itself.
        passed: whether it has passed what it was to pass; True where nothing was named.
        bumps: how often it ran into something.
    """

    path_n2: np.ndarray
    to_goal_n: np.ndarray
    reference_m2: np.ndarray
    reach: float
    stopped: bool
    passed: bool
    bumps: int
