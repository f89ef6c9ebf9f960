"""Simulated robots: worlds, their scripted experts, demonstrations and questions about what is to be seen."""

from __future__ import annotations

import os

# MuJoCo reads this when it is first imported; without it a machine without a display cannot render.
os.environ.setdefault("MUJOCO_GL", "egl")
