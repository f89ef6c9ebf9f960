"""No observation without every camera and every joint, fresh and of one instant; always a reason instead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.interfaces import Observation
from qwen_vla_ros.observation import ObservationBuffer

ROBOT = load_embodiment("aloha")
NOW = 1_000_000_000_000
MS = 1_000_000


def image(value: int) -> np.ndarray:
    return np.full((6, 8, 3), 100 + value, np.uint8)


def filled(ages_ms: dict[str, float] | None = None, state_age_ms: float = 0) -> ObservationBuffer:
    """A buffer with one image per view and one state; a view with age None gets no image."""
    buffer = ObservationBuffer(ROBOT)
    for i, view in enumerate(ROBOT.views):
        age = (ages_ms or {}).get(view, 0)
        if age is not None:
            buffer.add_image(view, NOW - int(age * MS), lambda i=i: image(i + 1))
    buffer.add_state({c: float(i) for i, c in enumerate(ROBOT.state_channels)}, NOW - int(state_age_ms * MS))
    return buffer


def test_a_complete_fresh_set_is_an_observation() -> None:
    observation = filled().observe(NOW, "pick up the red cube")
    assert isinstance(observation, Observation)
    assert tuple(observation.images) == ROBOT.views
    np.testing.assert_array_equal(observation.images["cam_right_wrist"], image(3))
    np.testing.assert_array_equal(observation.state, np.arange(14.0))
    assert observation.stamp_ns == NOW and observation.instruction == "pick up the red cube"


@pytest.mark.parametrize("view", ROBOT.views)
def test_a_missing_camera_is_a_reason_never_a_picture(view: str) -> None:
    reason = filled({view: None}).observe(NOW, "go")  # type: ignore[dict-item]
    assert isinstance(reason, str) and f"camera '{view}': no image received" in reason


@pytest.mark.parametrize("view", ROBOT.views)
def test_a_stale_camera_is_named_with_its_age_and_limit(view: str) -> None:
    reason = filled({view: 301}).observe(NOW, "go")
    assert isinstance(reason, str) and f"camera '{view}' is stale" in reason and "301 ms" in reason and "300" in reason


def test_views_too_far_apart_are_refused_and_the_nearest_frame_is_used() -> None:
    reason = filled({"cam_left_wrist": 151}).observe(NOW, "go")
    assert isinstance(reason, str) and "'cam_left_wrist' is 151 ms away" in reason and "max_skew_ms" in reason
    buffer = filled({"cam_left_wrist": 100})
    buffer.add_image("cam_left_wrist", NOW - 10 * MS, lambda: image(77))
    buffer.add_image("cam_left_wrist", NOW + 40 * MS, lambda: image(88))
    observation = buffer.observe(NOW + 50 * MS, "go")
    assert isinstance(observation, Observation)
    assert observation.images["cam_left_wrist"][0, 0, 0] == 177  # 10 ms from the reference; the newest is 40 ms away


def test_state_is_that_of_the_pictures_instant() -> None:
    buffer = filled(state_age_ms=1)
    for age in (30, 60):
        buffer.add_state(dict.fromkeys(ROBOT.state_channels, 100.0 + age), NOW + age * MS)
    observation = buffer.observe(NOW + 60 * MS, "go")
    assert isinstance(observation, Observation)
    np.testing.assert_array_equal(observation.state, np.arange(14.0))


def test_missing_stale_partial_or_non_finite_state_is_a_reason() -> None:
    limit_ms = min(group.max_age_ms for group in ROBOT.state)
    assert isinstance(filled(state_age_ms=limit_ms).observe(NOW, "go"), Observation)
    assert "is stale" in str(filled(state_age_ms=limit_ms + 1).observe(NOW, "go"))
    buffer = ObservationBuffer(ROBOT)
    for view in ROBOT.views:
        buffer.add_image(view, NOW, lambda: image(1))
    buffer.add_state({"left_waist": 1.0}, NOW)
    assert "state 'left_arm': no message with waist" in str(buffer.observe(NOW, "go"))
    buffer.add_state(dict.fromkeys(ROBOT.state_channels, np.nan), NOW)
    assert "'left_waist' is not finite" in str(buffer.observe(NOW, "go"))


def test_no_instruction_an_unreadable_picture_and_clocks_that_differ_are_reasons() -> None:
    assert "no instruction" in str(filled().observe(NOW, ""))
    assert "in the future" in str(filled(dict.fromkeys(ROBOT.views, -400)).observe(NOW, "go"))
    buffer = filled()

    def broken() -> np.ndarray:
        raise ValueError("image data has 3 bytes")

    buffer.add_image("ego", NOW + MS, broken)
    assert "cannot be read: image data has 3 bytes" in str(buffer.observe(NOW, "go"))


def test_clear_forgets_what_was_seen() -> None:
    buffer = filled()
    buffer.clear()
    assert "no image received" in str(buffer.observe(NOW, "go"))


def test_only_the_frames_that_are_used_are_decoded() -> None:
    buffer = ObservationBuffer(replace(ROBOT))
    decoded: list[int] = []
    for i in range(4):
        for view in ROBOT.views:
            buffer.add_image(view, NOW + i * MS, lambda i=i: (decoded.append(i), image(i))[1])
    buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), NOW)
    buffer.observe(NOW + 4 * MS, "go")
    assert decoded == [3, 3, 3]


def pictures(buffer: ObservationBuffer, stamp_ns: int, **shown: np.ndarray) -> None:
    """A new frame of every view, and a state."""
    for view in ROBOT.views:
        pixels = shown.get(view, image(stamp_ns // MS % 50))
        buffer.add_image(view, stamp_ns, lambda pixels=pixels: pixels)
    buffer.add_state(dict.fromkeys(ROBOT.state_channels, 0.0), stamp_ns)


def test_a_black_picture_is_a_reason_also_with_hot_pixels_and_a_dark_room_is_not_black() -> None:
    black = np.random.default_rng(0).integers(0, 9, (480, 640, 3), dtype=np.uint8)
    black[::97, ::89] = 255
    dark = black.copy()
    dark[200:280, 300:400] = 40
    buffer = ObservationBuffer(ROBOT)
    pictures(buffer, NOW, cam_left_wrist=black)
    assert "camera 'cam_left_wrist' is black" in str(buffer.observe(NOW, "go"))
    assert "camera 'cam_left_wrist' is black" in str(buffer.observe(NOW, "go"))
    pictures(buffer, NOW + MS, cam_left_wrist=dark)
    assert isinstance(buffer.observe(NOW + MS, "go"), Observation)


def test_a_picture_of_another_shape_is_a_reason_and_a_smaller_one_of_the_same_shape_is_not() -> None:
    buffer = ObservationBuffer(ROBOT)
    pictures(buffer, NOW, ego=np.full((640, 480, 3), 100, np.uint8))
    reason = str(buffer.observe(NOW, "go"))
    assert "camera 'ego' sends 480 × 640" in reason and "640 × 480" in reason
    pictures(buffer, NOW + MS, ego=np.full((288, 384, 3), 100, np.uint8))
    assert isinstance(buffer.observe(NOW + MS, "go"), Observation)


def test_bit_identical_pictures_with_new_stamps_are_a_frozen_camera_until_they_change() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 480, 640, 3), dtype=np.uint8)

    def seen(buffer: ObservationBuffer, i: int, ego: int) -> Observation | str:
        shown = dict.fromkeys(ROBOT.views, noise[i]) | {"ego": noise[ego]}
        pictures(buffer, NOW + i * 100 * MS, **shown)
        return buffer.observe(NOW + i * 100 * MS, "go")

    buffer = ObservationBuffer(ROBOT, frozen_after_s=1.0)
    assert all(isinstance(seen(buffer, i, ego=0), Observation) for i in range(11))
    reason = str(seen(buffer, 11, ego=0))
    assert "camera 'ego' is frozen" in reason and "1.1 s" in reason and "frozen_after_s = 1" in reason
    assert isinstance(seen(buffer, 12, ego=1), Observation)
    assert isinstance(seen(buffer, 13, ego=1), Observation)
    buffer.clear()
    simulated = ObservationBuffer(ROBOT)
    assert all(isinstance(seen(simulated, i, ego=0), Observation) for i in range(20))
