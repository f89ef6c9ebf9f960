"""A world that costs nothing: a point on a plane that has to come near a goal, seen in its state."""

from __future__ import annotations

from typing import Any

import numpy as np

NEAR = 0.15
EMBODIMENT = """\
name: reacher
prompt: {robot_tag: Reacher, arms: single arm}
control: {frequency_hz: 5, horizon: 4, controller_rate_hz: 5, convention: absolute_joint}
cameras:
  - {view: ego, topic: /camera, size: [32, 32], max_age_ms: 300, reference: true}
state:
  - {name: point, kind: joint_position, unit: rad, topic: /a, max_age_ms: 300, fields: [x, y], channels: [x, y]}
  - {name: goal, kind: joint_position, unit: rad, topic: /b, max_age_ms: 300, fields: [u, v], channels: [u, v]}
actions:
  - name: point
    kind: joint_position
    unit: rad
    channels: [x, y]
    start: [0, 0]
    limits: {lower: [-3, -3], upper: [3, 3], velocity: [99, 99], acceleration: [999, 999]}
    command: {kind: forward_command, topic: /c}
    on_timeout: hold_measured
safety: {watchdog_ms: 900, max_jump: 9, soft_start_s: 0.1, max_skew_ms: 100}
"""


class ReachWorld:
    """``JudgedWorld``: the point is where it was told to be; near the goal the episode has succeeded."""

    control_hz = 5.0
    limit_s = 4.0
    channels = ("x", "y")
    views = ("ego",)
    headings: tuple[int, ...] = ()
    held_c = np.zeros(2, bool)

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.instruction = ""

    def reset(self, seed: int, instruction: str | None = None) -> None:
        rng = np.random.default_rng(seed)
        angle, radius = rng.uniform(-np.pi, np.pi), rng.uniform(0.7, 1.0)
        self.point, self.goal = np.zeros(2), radius * np.array([np.cos(angle), np.sin(angle)])
        self.instruction = instruction or "go to the goal"
        self.time_s = 0.0

    def step(self, action_c: np.ndarray) -> None:
        if self.broken:
            raise ArithmeticError("the world broke")
        self.point = np.asarray(action_c, dtype=np.float64)
        self.time_s += 1 / self.control_hz

    def state(self) -> np.ndarray:
        return np.concatenate([self.point, self.goal])

    def command(self) -> np.ndarray:
        return self.point

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        return np.full((8, 8, 3), 90, np.uint8)

    def success(self) -> bool:
        return bool(np.linalg.norm(self.point - self.goal) < NEAR)

    def ended(self) -> bool:
        return self.success()

    def chosen(self) -> str | None:
        return None

    def track(self) -> None:
        return None

    def metrics(self) -> dict[str, float]:
        return {"distance": float(np.linalg.norm(self.point - self.goal))}


def make_reach() -> Any:
    """Importable by name, so that spawned processes and Ray actors can build it."""
    return ReachWorld()


def make_broken() -> Any:
    """A world that raises in its first step."""
    return ReachWorld(broken=True)
