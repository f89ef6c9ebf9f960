"""Clients that speak openpi's layout: the wire as their client packs it, written down here from its description."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from serving_support import METADATA, ROBOT, TIMEOUT_S, WIDOWX, FakeEngine, get, serving
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from qwen_vla_core.errors import UserError
from qwen_vla_core.serving.metadata import ServerMetadata
from qwen_vla_core.serving.openpi import OpenpiMapping, read_mapping

ONLY_ALOHA = ServerMetadata("fake", "0123456789abcdef", {ROBOT.name: METADATA.robots[ROBOT.name]}, 4, 64)


def to_wire(value: Any) -> Any:
    """Arrays and NumPy scalars as maps with byte keys."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def from_wire(value: dict[Any, Any]) -> Any:
    """The reverse, for msgpack's object hook."""
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    return value


class OpenpiClient:
    """Connects, keeps the metadata that comes first, then one observation per answer."""

    def __init__(self, url: str) -> None:
        self._pack = functools.partial(msgpack.packb, default=to_wire)
        self._unpack = functools.partial(msgpack.unpackb, object_hook=from_wire)
        self._opened = connect(url, compression=None, max_size=None)
        self._websocket = self._opened.__enter__()
        self.metadata = self._unpack(self._websocket.recv(TIMEOUT_S))

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The answer; a text frame is an error."""
        self._websocket.send(self._pack(observation))
        answer = self._websocket.recv(TIMEOUT_S)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return dict(self._unpack(answer))

    def close(self) -> None:
        self._opened.__exit__(None, None, None)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, ONLY_ALOHA) as server:
        yield server.url


def picture(value: int = 0, chw: bool = False) -> np.ndarray:
    image = np.full((6, 8, 3), value, np.uint8)
    return image.transpose(2, 0, 1) if chw else image


def test_an_observation_in_their_layout_gets_actions_in_their_layout(url: str, engine: FakeEngine) -> None:
    client = OpenpiClient(url)
    assert client.metadata["checkpoint"] == "fake" and "aloha" in client.metadata["embodiments"]
    views = {"ego": picture(1, chw=True), "cam_left_wrist": picture(2), "cam_right_wrist": picture(3) / 255.0}
    # Nested as for ALOHA, flat with slashes as for others, dotted as in datasets.
    layouts: list[dict[str, Any]] = [
        {"images": views, "state": np.full(14, 0.5, np.float32)},
        {**{f"observation/{view}": image for view, image in views.items()}, "observation/state": np.full(14, 0.5)},
        {**{f"observation.images.{view}": image for view, image in views.items()}, "observation.state": [0.5] * 14},
    ]
    for layout in layouts:
        answer = client.infer({**layout, "prompt": " pick up the cube "})
        assert answer["actions"].shape == (ROBOT.control.horizon, len(ROBOT.channels)) and np.all(
            answer["actions"] == 0.5
        )
        assert answer["server_timing"]["infer_ms"] >= 0
        (asked,) = engine.calls[-1]
        assert asked.observation.instruction == "pick up the cube"
        assert [int(asked.observation.images[view].mean()) for view in views] == [1, 2, 3]
        assert all(image.shape == (6, 8, 3) for image in asked.observation.images.values())
    (entry,) = get(url + "/metrics")[1]["per_client"]
    assert (entry["layout"], entry["answered"], entry["embodiments"]) == ("openpi", 3, ["aloha"])
    client.close()


def test_a_wrong_observation_is_a_text_that_says_what_is_missing_and_the_next_is_answered(url: str) -> None:
    client = OpenpiClient(url)
    good: dict[str, Any] = {"images": {v: picture() for v in ROBOT.views}, "state": np.zeros(14), "prompt": "go"}
    for changes, told in (
        ({"images": {"ego": picture()}}, "no key ends in view 'cam_left_wrist': it has images/ego, state, prompt"),
        ({"state": np.zeros(3)}, "needs 14 channels, got 3"),
        ({"state": np.full(14, np.nan)}, "not a finite vector"),
        ({"prompt": ""}, "'prompt' is not a text"),
        ({"prompt": 5}, "'prompt' is not a text"),
        ({"ego": picture()}, "view 'ego' could be images/ego or ego"),
        ({"images": {v: np.zeros((4, 4), np.uint8) for v in ROBOT.views}}, "not a picture"),
        ({"images": {v: np.full((4, 4, 3), 7.0) for v in ROBOT.views}}, "floats outside 0 to 1"),
    ):
        with pytest.raises(RuntimeError, match=told):
            client.infer({**good, **changes})
    assert np.all(client.infer(good)["actions"] == 0)
    client.close()


def test_which_robot_is_the_paths_or_the_mappings_or_told_to_be_missing(engine: FakeEngine, tmp_path: Path) -> None:
    seen = {"observation/exterior_image_1_left": picture(), "observation/wrist_image_left": picture()}
    joints = {"observation/joint_position": np.zeros(6), "observation/gripper_position": np.float32(0.25)}
    file = tmp_path / "map.yaml"
    file.write_text(
        "embodiment: widowx\n"
        "views: {ego: observation/exterior_image_1_left, cam_wrist: observation/wrist_image_left}\n"
        "state: [observation/gripper_position, observation/joint_position]\n"
        "default_prompt: put it on the plate\n"
    )
    count = len(WIDOWX.state_channels)
    joints["observation/joint_position"] = np.zeros(count - 1)
    with serving(engine, openpi=read_mapping(str(file), METADATA)) as server:
        client = OpenpiClient(server.url)
        answer = client.infer({**seen, **joints})
        assert (
            answer["actions"].shape == (WIDOWX.control.horizon, len(WIDOWX.channels))
            and answer["actions"][0, 0] == 0.25
        )
        assert engine.calls[-1][0].observation.instruction == "put it on the plate"
        client.close()
    with serving(engine) as server:  # two robots, nobody says which
        lost = OpenpiClient(server.url)
        with pytest.raises((RuntimeError, ConnectionClosed), match="drives aloha, widowx: connect to /openpi/NAME"):
            lost.infer({"state": np.zeros(14)})
        named = OpenpiClient(server.url + "/openpi/widowx")
        good = {"ego": picture(), "cam_wrist": picture(), "state": np.full(count, 2.0), "prompt": "go"}
        assert np.all(named.infer(good)["actions"] == 2.0)
        named.close()
        lost.close()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a", "not a map"),
        ("{", "--openpi"),
        ("pictures: {}", "unknown key 'pictures'"),
        ("{embodiment: aloha, views: {front: image}}", "has no view 'front'"),
        ("embodiment: crane", "'crane' is none of aloha, widowx"),
        ("state: [1]", "'state' is not a list"),
        ("views: [ego]", "'views' is not a map"),
        ("prompt: 3", "'prompt' is not a text"),
        ("state: state", "drives aloha, widowx"),
    ],
)
def test_a_wrong_mapping_names_the_key(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_mapping(str(file), METADATA)
    assert "\n" not in str(caught.value)


def test_a_mapping_for_the_only_robot_needs_no_name(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("state: observation/state")
    assert read_mapping(str(file), ONLY_ALOHA) == OpenpiMapping(state=("observation/state",))
