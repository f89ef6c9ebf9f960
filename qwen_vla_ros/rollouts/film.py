"""A film of one episode: its cameras side by side, above them what the robot was told and when it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.files import replacing
from qwen_vla_core.rollouts.index import Rollout
from qwen_vla_ros.node_utils import INSTRUCTION_TOPIC
from qwen_vla_ros.rollouts.episode import Episode

FILM_CRF = 24
BAND = 28  # height of the line of text
BACKGROUND, TEXT = (24, 26, 31), (235, 235, 235)
COLOURS = {"success": (98, 200, 120), "partial": (230, 190, 90), "failure": (235, 100, 90)}
LONGEST_GAP_S = 1.0  # a camera silent for longer shows black, with the word


def film(
    rollout: Rollout,
    path: str | Path,
    *,
    fps: float = 10.0,
    height: int = 240,
    views: Sequence[str] | None = None,
    speed: float = 1.0,
) -> int:
    """Renders an episode as H.264 in an mp4 that browsers play; the file appears when it is complete.

    Args:
        rollout: which; its bag may be unfinished.
        path: of the film, ``.mp4``.
        fps: pictures per second of the film.
        height: of every view in it, pixels.
        views: which, in this order; None: all that the robot has.
        speed: seconds of the episode per second of the film.

    Returns:
        pictures in the film.

    Raises:
        UserError: no camera sent anything, a view is unknown, PyAV or Pillow is missing, or the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: a film's name ends in .mp4")
    for what, value in (("fps", fps), ("height", height), ("speed", speed)):
        if not value > 0:
            raise UserError(f"{what} {value:g}: give more than 0")
    if find_spec("av") is None or find_spec("PIL") is None:
        raise UserError("films need PyAV and Pillow: pip install 'qwen_vla_ros[data]'")
    from qwen_vla_core.data.video import encode_video

    with Episode(rollout) as episode:
        strip = _Strip(episode, height - height % 2, views)
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                count = encode_video(file, strip.frames(fps, speed), strip.size, fps, FILM_CRF)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return count


class _Strip:
    """The cameras' newest pictures beside each other, as time goes on.

    Attributes:
        size: (width, height) of the film, even.
    """

    def __init__(self, episode: Episode, height: int, views: Sequence[str] | None) -> None:
        self._cameras = episode.cameras()
        known = {camera.view: topic for topic, camera in self._cameras.items()}
        wanted = list(views) if views else [view for view in episode.robot.views if view in known]
        for view in wanted:
            if view not in known:
                raise UserError(f"view '{view}': {episode.rollout.name} has pictures of {', '.join(known) or 'none'}")
        if not wanted:
            raise UserError(f"{episode.rollout.name}: no camera sent a picture, so there is nothing to film")
        self._episode, self._height, self._views = episode, height, wanted
        self._topics = {known[view]: view for view in wanted}
        self._widths = self._find_widths()
        self.size = (sum(self._widths.values()), height + BAND)
        self._tiles = {view: _word(width, height, f"no picture of {view} yet") for view, width in self._widths.items()}
        self._seen_ns: dict[str, int] = {}
        self._raw: dict[str, bytes] = {}

    def _find_widths(self) -> dict[str, int]:
        """View → even width of its tile, by its first picture."""
        widths: dict[str, int] = {}
        for topic, _, data in self._episode.bag.messages(list(self._topics)):
            view = self._topics[topic]
            if view not in widths:
                high, wide = self._episode.picture(topic, self._cameras[topic], data).shape[:2]
                widths[view] = max(2, 2 * round(wide * self._height / high / 2))
            if len(widths) == len(self._views):
                break
        return {view: widths[view] for view in self._views}

    def frames(self, fps: float, speed: float) -> Iterator[np.ndarray]:
        """(h, w, 3) RGB pictures of the film, one after another; only what is shown is decoded."""
        instruction_topic = self._episode.topic(INSTRUCTION_TOPIC)
        topics = [*self._topics, *filter(None, [instruction_topic])]
        instruction = self._episode.rollout.instruction
        start_ns = due_ns = self._episode.start_ns
        step_ns = int(1e9 * speed / fps)
        for topic, time_ns, data in self._episode.bag.messages(topics):
            while time_ns >= due_ns and (time_ns > start_ns or self._raw):
                yield self._frame(due_ns, instruction)
                due_ns += step_ns
            if topic == instruction_topic:
                text = str(self._episode.bag.decode(topic, data).data).strip()
                instruction = text or instruction
            else:
                self._raw[topic] = data
                self._seen_ns[self._topics[topic]] = time_ns
        yield self._frame(due_ns, instruction)

    def _frame(self, now_ns: int, instruction: str) -> np.ndarray:
        for topic, data in self._raw.items():
            view = self._topics[topic]
            pixels = self._episode.picture(topic, self._cameras[topic], data)
            self._tiles[view] = cv2.resize(pixels, (self._widths[view], self._height), interpolation=cv2.INTER_AREA)
        self._raw.clear()
        tiles = []
        for view in self._views:
            silent_s = (now_ns - self._seen_ns.get(view, now_ns)) * 1e-9
            width = self._widths[view]
            stale = silent_s > LONGEST_GAP_S
            tiles.append(_word(width, self._height, f"{view}: silent") if stale else self._tiles[view])
        rollout = self._episode.rollout
        seconds = (now_ns - self._episode.start_ns) * 1e-9
        band = _band(self.size[0], f"{seconds:5.1f} s", instruction, rollout.outcome)
        return np.concatenate([band, np.concatenate(tiles, axis=1)], axis=0)


def _band(width: int, clock: str, instruction: str, outcome: str) -> np.ndarray:
    """(BAND, width, 3) the line above the pictures."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, BAND), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    right = draw.textlength(outcome, font=font) + 10
    draw.text((10, 5), clock, fill=TEXT, font=font)
    room = width - 80 - right - 10
    while instruction and draw.textlength(instruction, font=font) > room:
        instruction = f"{instruction[:-2]}…" if len(instruction) > 2 else ""
    draw.text((80, 5), instruction, fill=TEXT, font=font)
    draw.text((width - right, 5), outcome, fill=COLOURS.get(outcome, (160, 165, 175)), font=font)
    return np.asarray(image)


def _word(width: int, height: int, text: str) -> np.ndarray:
    """(height, width, 3) a dark tile that says why there is no picture."""
    tile = np.full((height, width, 3), BACKGROUND, np.uint8)
    cv2.putText(tile, text, (8, height // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, TEXT, 1, cv2.LINE_AA)
    return tile
