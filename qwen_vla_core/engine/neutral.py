"""Something to compute before anything has been seen: the first inference of a process is slow."""

from __future__ import annotations

import numpy as np

from qwen_vla_core.embodiment.spec import Embodiment
from qwen_vla_core.interfaces import Observation


def neutral_observation(embodiment: Embodiment) -> Observation:
    """Mid-grey pictures for the warm-up inference, whose chunk is thrown away."""
    images = {c.view: np.full((c.size[1], c.size[0], 3), 128, dtype=np.uint8) for c in embodiment.cameras}
    return Observation(images, np.zeros(len(embodiment.state_channels)), "warm up", 0)
