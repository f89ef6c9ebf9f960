"""``python -m qwen_vla_ros.dashboard.filming EPISODE FILM.mp4``: makes one film, out of everybody's way."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import read_rollout

NICENESS = 5  # a robot may be running on this computer; more would never end beside a busy one
FPS, HEIGHT = 10.0, 240


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 with one line on stderr where there is nothing to film."""
    episode, film_file = sys.argv[1:] if argv is None else argv
    os.nice(NICENESS)
    from qwen_vla_ros.rollouts.film import film

    try:
        film(read_rollout(episode), film_file, fps=FPS, height=HEIGHT)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
