"""Foreign simulators as worlds. They speak in named messages; an embodiment YAML says what those mean.

The same file that would describe the robot to the controller (topics, fields, maps, limits) describes it here, so an
adapter holds no joint names, no signs and no scales: a ``Simulator`` says its observation and obeys a command in its
own units, ``ExternalWorld`` does the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np

from qwen_vla_core.actions.rest import stay
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.embodiment.spec import DELTA_KINDS
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.track import Track


@dataclass(frozen=True)
class Seen:
    """What a simulator shows after a reset or a step.

    Attributes:
        images: camera topic → (height, width, 3) uint8 RGB, upright as the benchmark's own evaluation shows them.
        state: state topic → field → value, in message units.
        instruction: the task in words.
        success: by the benchmark's own judgement.
        over: ended for another reason than success.
        metrics: further numbers of the episode so far; the same names in every episode.
    """

    images: Mapping[str, np.ndarray]
    state: Mapping[str, Mapping[str, float]]
    instruction: str
    success: bool = False
    over: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Simulator(Protocol):
    """One task of a benchmark, in the benchmark's own words."""

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """Begins the episode that the benchmark numbers ``seed``; an ``instruction`` replaces its own."""
        ...

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """One control step. ``command``: topic → (n,) values in message units, in the order of the group's fields."""
        ...

    def track(self) -> Track | None:
        """The walk so far; None where nothing walks."""
        ...

    def close(self) -> None:
        """Frees it."""
        ...


class ExternalWorld:
    """A ``SuiteWorld`` made of a simulator and the embodiment YAML that describes its robot.

    Args:
        embodiment: its control frequency is the simulator's.
        simulator: of one task.
        limit_steps: control steps until an episode has failed.
    """

    def __init__(self, embodiment: Embodiment, simulator: Simulator, limit_steps: int) -> None:
        self.embodiment, self.simulator = embodiment, simulator
        self.control_hz = embodiment.control.frequency_hz
        self.limit_s = limit_steps / self.control_hz
        self.channels, self.views = embodiment.channels, embodiment.views
        self.film_views = self.views
        self.render_size = embodiment.reference_camera.size  # what an observation holds: nothing is scaled twice
        self.held_c = np.array([group.kind in DELTA_KINDS for group in embodiment.actions for _ in group.channels])
        self.headings = tuple(_headings(embodiment))
        self.instruction = ""
        self._steps = 0
        self._seen: Seen | None = None
        self._command_c = np.zeros(len(self.channels))

    # ---- an episode ------------------------------------------------------------------------------------------------

    def reset(self, seed: int, instruction: str | None = None) -> None:
        """Begins trial ``seed`` of the benchmark."""
        self._steps = 0
        self._seen = self.simulator.reset(seed, instruction)
        self.instruction = self._seen.instruction
        rest = stay(self.embodiment.actions, self.embodiment.state_channels, self.state())
        if rest is None:  # an embodiment with hold_measured on every target, as the check wants, measures them all
            raise ValueError(f"{self.embodiment.name}: no state channel measures some target of the actions")
        self._command_c = rest.astype(np.float64)

    def step(self, action_c: np.ndarray) -> None:
        """One control step: (c,) in channel units, clipped to the embodiment's limits.

        Raises:
            ValueError: a number is not finite, or the action has another shape.
        """
        action_c = np.asarray(action_c, np.float64)
        if action_c.shape != (len(self.channels),) or not np.isfinite(action_c).all():
            raise ValueError(f"an action has {len(self.channels)} finite numbers, got {action_c}")
        command, first = {}, 0
        self._command_c = action_c.copy()
        for group in self.embodiment.actions:
            columns = slice(first, first + len(group.channels))
            first = columns.stop
            self._command_c[columns] = np.clip(action_c[columns], group.limits.lower, group.limits.upper)
            command[group.command.topic] = np.asarray(group.command.map.to_message(self._command_c[columns]))
        self._steps += 1
        self._seen = self.simulator.step(command)

    def close(self) -> None:
        """Frees the simulator."""
        self.simulator.close()

    # ---- what is seen ----------------------------------------------------------------------------------------------

    @property
    def seen(self) -> Seen:
        """The simulator's last word."""
        if self._seen is None:
            raise ValueError("reset first")
        return self._seen

    def state(self) -> np.ndarray:
        """(n_state,) in channel units.

        Raises:
            ValueError: the simulator does not say what the embodiment reads.
        """
        values: list[float] = []
        for group in self.embodiment.state:
            message = self.seen.state.get(group.topic, {})
            for name in group.fields:
                if name not in message:
                    raise ValueError(f"{group.topic} of the simulator has no '{name}'; it has {sorted(message)}")
                values.append(float(group.map.to_channel(message[name])))
        return np.array(values)

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 of a view, scaled where the simulator's picture has another size.

        Raises:
            ValueError: the simulator's picture is missing or not as the embodiment says.
        """
        camera = next(camera for camera in self.embodiment.cameras if camera.view == view)
        image = self.seen.images.get(camera.topic)
        shape = (camera.size[1], camera.size[0], 3)
        if image is None or image.shape != shape or image.dtype != np.uint8:
            found = "nothing" if image is None else f"{image.dtype} {image.shape}"
            raise ValueError(
                f"{camera.topic} of the simulator gives {found}; {self.embodiment.name} says uint8 {shape}"
            )
        if (width, height) != camera.size:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(image)

    # ---- how it goes -----------------------------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since the reset."""
        return self._steps / self.control_hz

    @property
    def target(self) -> str | None:
        """The benchmarks do not say which object was acted on."""
        return None

    def command(self) -> np.ndarray:
        """(c,) the last action; after a reset what means staying there."""
        return self._command_c.copy()

    def success(self) -> bool:
        """By the benchmark's judgement."""
        return self.seen.success

    def ended(self) -> bool:
        """Success, or the simulator says that it is over."""
        return self.seen.success or self.seen.over

    def chosen(self) -> str | None:
        """Not said by the benchmarks."""
        return None

    def other_instruction(self) -> str | None:
        """Not part of the benchmarks."""
        return None

    def metrics(self) -> dict[str, float]:
        """The simulator's numbers."""
        return dict(self.seen.metrics)

    def track(self) -> Track | None:
        """The walk, where something walks."""
        return self.simulator.track()


def suite_embodiment(name: str) -> Embodiment:
    """The robot of a suite: ``embodiments/suites/<name>.yaml``."""
    return load_embodiment(f"suites/{name}")


def missing_modules(modules: Iterable[str], install: str) -> str | None:
    """What to install, where one of the top-level modules cannot be found."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{install}  (lacks {', '.join(absent)})" if absent else None


def numbered(seed: int, episodes: int, count: int, what: str) -> list[int]:
    """``episodes`` numbers of a benchmark that has ``count`` of them, from ``seed`` on, around the end.

    Raises:
        UserError: there are not so many.
    """
    if episodes > count:
        raise UserError(f"--episodes {episodes}: there are {count} {what}; give at most {count}")
    return [(seed + i) % count for i in range(episodes)]


def _headings(embodiment: Embodiment) -> Iterable[int]:
    """Action columns that are angles modulo a turn: the last of a planar pose."""
    first = 0
    for group in embodiment.actions:
        first += len(group.channels)
        if group.kind == "waypoint" and group.unit == "m,rad":
            yield first - 1
