"""A recorded episode with its robot: the bag's topics by what they mean, their messages as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.embodiment.load import parse_embodiment
from qwen_vla_core.embodiment.namespaced import namespaced
from qwen_vla_core.embodiment.spec import CameraSpec
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.bag import BagFile
from qwen_vla_core.rollouts.index import SIDECAR, Rollout, read_about
from qwen_vla_ros.messages import compressed_to_rgb, image_to_rgb


class Episode:
    """An open bag and the robot that was recorded; a context manager.

    Attributes:
        rollout: its row.
        about: the whole ``episode.json``.
        robot: as it was when it was recorded.
        bag: open.
        start_ns, end_ns: of the episode: what a bag holds from before it began does not count.
    """

    def __init__(self, rollout: Rollout) -> None:
        """
        Raises:
            UserError: there is no bag, or nothing says what robot it is.
        """
        self.rollout = rollout
        self.about: Mapping[str, Any] = read_about(rollout.folder)
        text = str(self.about.get("embodiment_yaml") or "")
        if text:
            self.robot: Embodiment = parse_embodiment(text, f"{rollout.folder / SIDECAR}: embodiment_yaml")
        elif self.about.get("embodiment"):
            self.robot = load_embodiment(str(self.about["embodiment"]))
        else:
            raise UserError(f"{rollout.folder / SIDECAR}: says nothing of the robot (embodiment_yaml)")
        if self.about.get("namespaced_topics"):
            self.robot = namespaced(self.robot)
        self.bag = BagFile(rollout.folder)
        self.start_ns = int(self.about.get("started_ns") or 0) or self.bag.start_ns
        self.end_ns = self.bag.end_ns

    def topic(self, name: str) -> str | None:
        """The bag's name of a topic of the YAML or of this package, which may lie in a namespace; None: not in it."""
        if name.startswith("/"):
            return name if name in self.bag.topics else None
        namespace = str(self.about.get("namespace") or "").strip("/")
        full = f"/{namespace}/{name}" if namespace else f"/{name}"
        if full in self.bag.topics:
            return full
        found = [topic for topic in self.bag.topics if topic.endswith(f"/{name}")]
        return found[0] if len(found) == 1 else None

    def cameras(self) -> dict[str, CameraSpec]:
        """Topic → camera, of those that sent anything."""
        found = {self.topic(camera.topic): camera for camera in self.robot.cameras}
        return {topic: camera for topic, camera in found.items() if topic and self.bag.topics[topic].count}

    def picture(self, topic: str, camera: CameraSpec, data: bytes) -> np.ndarray:
        """(h, w, 3) uint8 RGB, as the policy node makes it of the same message.

        Raises:
            UserError: it cannot be read.
        """
        message = self.bag.decode(topic, data)
        try:
            return compressed_to_rgb(message) if camera.transport == "compressed" else image_to_rgb(message)
        except ValueError as error:
            raise UserError(f"{self.rollout.name}: a picture on {topic} cannot be read ({error})") from None

    def told(self, name: str) -> Iterator[tuple[int, Any]]:
        """(arrival in ns, message) of one topic; nothing where the bag has none."""
        topic = self.topic(name)
        if topic is None or not self.bag.topics[topic].count:
            return
        for _, time_ns, data in self.bag.messages([topic]):
            yield time_ns, self.bag.decode(topic, data)

    def close(self) -> None:
        """Closes the bag."""
        self.bag.close()

    def __enter__(self) -> Episode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
