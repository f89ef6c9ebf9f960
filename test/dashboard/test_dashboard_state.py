"""What the page is told: sections by version, JSON that every browser reads, and the chunk timeline."""

from __future__ import annotations

import json

import numpy as np

from qwen_vla_core.embodiment import load_embodiment, shipped_embodiments
from qwen_vla_core.interfaces import ActionChunk
from qwen_vla_core.runtime.commitment import PlanRest
from qwen_vla_ros.dashboard.board import Board, to_json
from qwen_vla_ros.dashboard.pictures import encode
from qwen_vla_ros.dashboard.robot import describe
from qwen_vla_ros.dashboard.timeline import KEPT_CHUNKS, Timeline


def test_only_what_changed_is_newer() -> None:
    board = Board()
    assert board.put("a", [1]) and not board.put("a", [1]) and board.put("b", {"x": 1})
    assert {name: version for name, (version, _) in board.newer({}).items()} == {"a": 1, "b": 1}
    assert board.put("a", [2])
    assert board.newer({"a": 1, "b": 1}) == {"a": (2, "[2]")}
    assert board.text("c") == "null"


def test_what_is_not_finite_is_no_json_and_becomes_null() -> None:
    text = to_json({"x": [1.0, float("nan"), (float("inf"),)], "y": "ü"})
    assert json.loads(text) == {"x": [1.0, None, [None]], "y": "ü"}


def test_the_timeline_tells_old_new_and_consumed() -> None:
    timeline = Timeline(("a", "b"))
    rows = np.arange(8.0).reshape(4, 2)
    for second in range(KEPT_CHUNKS + 2):
        timeline.add_chunk(ActionChunk(rows + second, ("a", "b"), second * 10**9, 0.1), second * 10**9 + 2 * 10**8)
    timeline.add_chunk(ActionChunk(rows, ("other", "b"), 0, 0.1), 0)  # another robot's
    timeline.add_consumed(ActionChunk(rows[:3], ("a", "b"), 9 * 10**9, 0.1))
    timeline.add_plan(PlanRest(9 * 10**9, rows[2:]))
    timeline.add_measured(9 * 10**9, (None, 5.0))
    version, text = timeline.text(1)
    shown = json.loads(text)
    assert len(shown["chunks"]) == KEPT_CHUNKS and shown["channel"] == 1
    newest = shown["chunks"][-1]
    assert newest == {"stamp": 9.0, "received": 9.2, "period": 0.1, "consumed": 3, "values": [10.0, 12.0, 14.0, 16.0]}
    assert shown["chunks"][0]["consumed"] == 0
    assert shown["plan"] == {"t": 9.0, "values": [5.0, 7.0]}
    assert shown["measured"] == {"t": [9.0], "values": [5.0]}
    assert json.loads(timeline.text(0)[1])["measured"]["values"] == []
    assert timeline.text(1) == (version, text)  # made once, however many look
    timeline.add_plan(PlanRest(10**10, rows[:1]))  # one point: nothing is left
    assert json.loads(timeline.text(99)[1])["plan"] is None  # a channel that does not exist is the first


def test_every_shipped_robot_is_described() -> None:
    for name in shipped_embodiments():
        robot = load_embodiment(name)
        about = json.loads(to_json(describe(robot, False)))
        assert [channel["name"] for channel in about["channels"]] == list(robot.channels)
        assert all(channel["lower"] < channel["upper"] for channel in about["channels"])
        assert [camera["view"] for camera in about["cameras"]] == list(robot.views)
    units = {
        name: [channel["unit"] for channel in describe(load_embodiment(name), False)["channels"]]
        for name in ("mobile_base", "widowx")
    }
    assert units == {"mobile_base": ["m", "m", "rad"], "widowx": ["m"] * 3 + ["rad"] * 3 + ["fraction"]}


def test_pictures_are_made_small() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    data = encode(pixels, 320)
    import cv2

    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (240, 320, 3)
