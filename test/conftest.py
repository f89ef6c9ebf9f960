"""Before any test imports MuJoCo: without a display only EGL renders, and MuJoCo reads this once."""

from __future__ import annotations

import os

os.environ.setdefault("MUJOCO_GL", "egl")
