"""From messages that arrive one by one to an ``Observation``, or the reason why there is none. No ROS in here.

A missing or stale camera never becomes a picture: the policy gets a reason instead and holds. The same goes for a
camera that still sends, but sends nothing worth seeing: black, frozen, or of another shape than the robot's YAML says.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qwen_vla_core.embodiment.spec import CameraSpec, Embodiment, StateGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Observation

IMAGE_HISTORY = 4  # enough to find the frame nearest to the reference camera's, when drivers run at different phases
STATE_HISTORY = 64  # 1.3 s at 50 Hz: older than any camera that is not stale
BLACK_LEVEL = (
    16  # of 255: "black" of video with limited range; a capped lens stays below it, an unlit room does not [O]
)
BLACK_SHARE = 0.01  # so much of a black picture may be brighter: hot pixels, a light-emitting diode's reflection [O]
SHAPE_TOLERANCE = 0.02  # of the aspect ratio: drivers round and crop a few pixels [O]
SAMPLES = 64  # at least so many rows and columns of a picture are looked at, evenly spaced


@dataclass(frozen=True)
class _Frame:
    stamp_ns: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Look:
    """When a camera's present picture was first seen, and a checksum to know it again."""

    checksum: int
    since_ns: int


@dataclass(frozen=True)
class _Reading:
    stamp_ns: int
    values: Mapping[str, float]


class ObservationBuffer:
    """Keeps the last few images of every camera and readings of every state group; safe to use from two threads.

    Images are stored undecoded (``load`` gives the pixels): cameras run several times faster than the policy, and only
    the frames it really uses are worth decoding.

    Args:
        embodiment: the robot.
        frozen_after_s: a camera whose used frames are bit-identical for longer than this is taken for frozen: a real
            sensor has noise. 0 switches the check off, for simulated cameras, which see a still scene without noise.

    Attributes:
        cameras_ns: view → stamps of the pictures that the last observation was chosen from, oldest first.
        states_ns: state group → the same of its readings.
    """

    def __init__(self, embodiment: Embodiment, frozen_after_s: float = 0.0) -> None:
        self.embodiment = embodiment
        self._frozen_after_s = frozen_after_s
        self._looks: dict[str, _Look] = {}
        self._refused: tuple[tuple[int, ...], str] = ((), "")  # stamps of the last refused set of frames, and why
        self._lock = threading.Lock()
        self.cameras_ns: dict[str, tuple[int, ...]] = {}
        self.states_ns: dict[str, tuple[int, ...]] = {}
        self._frames: dict[str, deque[_Frame]] = {view: deque(maxlen=IMAGE_HISTORY) for view in embodiment.views}
        self._readings: dict[str, deque[_Reading]] = {g.name: deque(maxlen=STATE_HISTORY) for g in embodiment.state}

    def clear(self) -> None:
        """Forgets everything: what was seen before a reset must not steer what follows it."""
        with self._lock:
            for frames in self._frames.values():
                frames.clear()
            for readings in self._readings.values():
                readings.clear()
            self._looks.clear()

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

    def stamps(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """View → stamps of the pictures that are held now, oldest first, and state group → those of its readings."""
        with self._lock:
            return (
                {view: tuple(frame.stamp_ns for frame in history) for view, history in self._frames.items()},
                {name: tuple(reading.stamp_ns for reading in kept) for name, kept in self._readings.items()},
            )

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
        stamps_ns = tuple(chosen[view].stamp_ns for view in self.embodiment.views)
        if stamps_ns == self._refused[0]:  # asked many times a second: the same pictures need no second look
            return self._refused[1]
        try:
            images = {view: chosen[view].load() for view in self.embodiment.views}
        except (ValueError, UserError) as error:
            return f"camera image cannot be read: {error}"
        for camera in self.embodiment.cameras:
            reason = self._picture_problem(camera, images[camera.view], chosen[camera.view].stamp_ns)
            if reason:
                self._refused = (stamps_ns, reason)
                return reason
        self.cameras_ns = {view: tuple(frame.stamp_ns for frame in history) for view, history in frames.items()}
        self.states_ns = {name: tuple(reading.stamp_ns for reading in kept) for name, kept in readings.items()}
        return Observation(images=images, state=state, instruction=instruction, stamp_ns=stamp_ns)

    def _picture_problem(self, camera: CameraSpec, pixels: np.ndarray, stamp_ns: int) -> str | None:
        """Why a picture (h, w, 3) that did arrive in time shows nothing the policy may act on."""
        (height, width), (wide, high) = pixels.shape[:2], camera.size
        if abs(width * high - height * wide) > SHAPE_TOLERANCE * height * wide:
            return (
                f"camera '{camera.view}' sends {width} × {height} pixels on {camera.topic}, another shape than "
                f"cameras[].size = {wide} × {high}"
            )
        step = max(1, min(height, width) // SAMPLES)
        sample = pixels[::step, ::step]
        if np.count_nonzero(sample > BLACK_LEVEL) <= BLACK_SHARE * sample.size:
            return f"camera '{camera.view}' is black: lens covered, no light, or no picture on {camera.topic}"
        if self._frozen_after_s <= 0:
            return None
        checksum = zlib.crc32(pixels[::step].tobytes())
        with self._lock:
            look = self._looks.get(camera.view)
            if look is None or look.checksum != checksum or stamp_ns < look.since_ns:
                look = self._looks[camera.view] = _Look(checksum, stamp_ns)
        still_s = (stamp_ns - look.since_ns) * 1e-9
        if still_s > self._frozen_after_s:
            return (
                f"camera '{camera.view}' is frozen: bit-identical pictures on {camera.topic} for {still_s:.1f} s, "
                f"limit frozen_after_s = {self._frozen_after_s:g}"
            )
        return None


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
