"""From messages that arrive one by one to an ``Observation``, or the reason why there is none. No ROS in here.

A missing or stale camera never becomes a picture: the policy gets a reason instead and holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.spec import CameraSpec, Embodiment, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation

IMAGE_HISTORY = 4  # enough to find the frame nearest to the reference camera's, when drivers run at different phases
STATE_HISTORY = 64  # 1.3 s at 50 Hz: older than any camera that is not stale


@dataclass(frozen=True)
class _Frame:
    stamp_ns: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Reading:
    stamp_ns: int
    values: Mapping[str, float]


class ObservationBuffer:
    """Keeps the last few images of every camera and readings of every state group; safe to use from two threads.

    Images are stored undecoded (``load`` gives the pixels): cameras run several times faster than the policy, and only
    the frames it really uses are worth decoding.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment = embodiment
        self._lock = threading.Lock()
        self._frames: dict[str, deque[_Frame]] = {view: deque(maxlen=IMAGE_HISTORY) for view in embodiment.views}
        self._readings: dict[str, deque[_Reading]] = {g.name: deque(maxlen=STATE_HISTORY) for g in embodiment.state}

    def clear(self) -> None:
        """Forgets everything: what was seen before a reset must not steer what follows it."""
        with self._lock:
            for frames in self._frames.values():
                frames.clear()
            for readings in self._readings.values():
                readings.clear()

    def add_image(self, view: str, stamp_ns: int, load: Callable[[], np.ndarray]) -> None:
        """Adds a camera image; ``load()`` returns (height, width, 3) uint8 RGB when it is needed."""
        with self._lock:
            self._frames[view].append(_Frame(stamp_ns, load))

    def add_state(self, values: Mapping[str, float], stamp_ns: int) -> None:
        """Adds the channels of a state message; groups that are not complete in it are left as they were."""
        with self._lock:
            for group in self.embodiment.state:
                if all(channel in values for channel in group.channels):
                    self._readings[group.name].append(_Reading(stamp_ns, {c: values[c] for c in group.channels}))

    def observe(self, now_ns: int, instruction: str) -> Observation | str:
        """The newest complete observation, or one line that says what is missing, stale or out of step.

        The newest frame of the reference camera sets the time; every other view contributes its frame nearest to it,
        and every state group its reading nearest to it, so that the policy sees one instant as in training.

        Args:
            now_ns: current ROS time in nanoseconds, the clock of the messages' stamps.
            instruction: what the robot is asked to do; empty means nothing, which is a reason to hold.
        """
        if not instruction:
            return "no instruction (publish one on qwen_vla/instruction)"
        with self._lock:
            frames = {view: tuple(history) for view, history in self._frames.items()}
            readings = {name: tuple(history) for name, history in self._readings.items()}
        for camera in self.embodiment.cameras:
            reason = _camera_problem(camera, frames[camera.view], now_ns)
            if reason:
                return reason
        for group in self.embodiment.state:
            reason = _state_problem(group, readings[group.name], now_ns)
            if reason:
                return reason
        stamp_ns = frames[self.embodiment.reference_camera.view][-1].stamp_ns
        chosen = {view: min(history, key=lambda f: abs(f.stamp_ns - stamp_ns)) for view, history in frames.items()}
        max_skew_ms = self.embodiment.safety.max_skew_ms
        for view, frame in chosen.items():
            skew_ms = abs(frame.stamp_ns - stamp_ns) / 1e6
            if skew_ms > max_skew_ms:
                return (
                    f"camera '{view}' is {skew_ms:.0f} ms away from the reference camera "
                    f"'{self.embodiment.reference_camera.view}', limit safety.max_skew_ms = {max_skew_ms:.0f} ms"
                )
        values: dict[str, float] = {}
        for history in readings.values():
            values.update(min(history, key=lambda r: abs(r.stamp_ns - stamp_ns)).values)
        state = np.array([values[channel] for channel in self.embodiment.state_channels], dtype=np.float64)
        if not np.all(np.isfinite(state)):
            bad = [c for c, value in zip(self.embodiment.state_channels, state, strict=True) if not np.isfinite(value)]
            return f"state channel '{bad[0]}' is not finite"
        try:
            images = {view: chosen[view].load() for view in self.embodiment.views}
        except (ValueError, UserError) as error:
            return f"camera image cannot be read: {error}"
        return Observation(images=images, state=state, instruction=instruction, stamp_ns=stamp_ns)


def _camera_problem(camera: CameraSpec, history: tuple[_Frame, ...], now_ns: int) -> str | None:
    if not history:
        return f"camera '{camera.view}': no image received on {camera.topic}"
    return _age_problem(
        f"camera '{camera.view}'", f"image on {camera.topic}", history[-1].stamp_ns, now_ns, camera.max_age_ms
    )


def _state_problem(group: StateGroup, history: tuple[_Reading, ...], now_ns: int) -> str | None:
    if not history:
        return f"state '{group.name}': no message with {', '.join(group.fields)} received on {group.topic}"
    return _age_problem(
        f"state '{group.name}'", f"message on {group.topic}", history[-1].stamp_ns, now_ns, group.max_age_ms
    )


def _age_problem(name: str, what: str, stamp_ns: int, now_ns: int, max_age_ms: float) -> str | None:
    age_ms = (now_ns - stamp_ns) / 1e6
    if age_ms > max_age_ms:
        return f"{name} is stale: last {what} is {age_ms:.0f} ms old, limit max_age_ms = {max_age_ms:.0f}"
    if age_ms < -max_age_ms:
        return f"{name}: last {what} is {-age_ms:.0f} ms in the future: the clocks differ (use_sim_time?)"
    return None
