"""The Foxglove layout: every panel is placed, and every topic, field and service in it exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from qwen_vla_core.embodiment import Embodiment, load_embodiment, shipped_embodiments
from qwen_vla_core.resources import resource_dir
from qwen_vla_ros import foxglove
from qwen_vla_ros.dashboard.node import SERVICES
from qwen_vla_ros.recorder_node import recorded_topics

VIEWS = {"Image", "Plot", "StateTransitions", "DiagnosticSummary", "DiagnosticStatusPanel", "RawMessages"}
PANELS = VIEWS | {"Publish", "CallService"}


def placed(node: Any) -> Iterator[str]:
    """Panels in the tree of the layout."""
    if isinstance(node, str):
        yield node
        return
    assert set(node) == {"direction", "first", "second", "splitPercentage"}
    assert node["direction"] in ("row", "column") and 5 <= node["splitPercentage"] <= 95
    yield from placed(node["first"])
    yield from placed(node["second"])


def paths(layout: dict[str, Any]) -> Iterator[str]:
    """Everything in the layout that names a topic."""
    for config in layout["configById"].values():
        yield from (path["value"] for path in config.get("paths", ()))
        for key in ("topicToRender", "topicPath", "topicName"):
            if key in config:
                yield config[key]
        if "imageMode" in config:
            yield config["imageMode"]["imageTopic"]


def check_path(path: str, topics: dict[str, type]) -> None:
    """The topic is recorded, and the fields are those of its message."""
    topic = next(
        (name for name in sorted(topics, key=len, reverse=True) if path == name or path.startswith(f"{name}.")), None
    )
    assert topic is not None, f"{path}: no such topic"
    fields = path[len(topic) :].lstrip(".")
    kind: Any = topics[topic]
    for part in filter(None, fields.split(".")):
        name, array = re.fullmatch(r"(\w+)(\[\d+\])?", part).groups()
        types = kind.get_fields_and_field_types()
        assert name in types, f"{path}: {kind.__name__} has no field {name}"
        assert bool(array) == ("sequence" in types[name] or "[" in types[name]), path
        element = re.sub(r"sequence<(.*)>", r"\1", types[name]).split("[")[0]
        if "/" in element:
            package, message = element.split("/")
            kind = getattr(__import__(f"{package}.msg", fromlist=[message]), message)


def topic_types(robot: Embodiment) -> dict[str, type]:
    return {
        topic if topic.startswith("/") else f"/{topic}": kind
        for topic, (kind, _) in recorded_topics(robot, True).items()
    }


@pytest.mark.parametrize("name", shipped_embodiments())
def test_everything_in_it_exists(name: str) -> None:
    robot = load_embodiment(name)
    made = json.loads(json.dumps(foxglove.layout(robot)))
    assert set(made) == {"configById", "globalVariables", "userNodes", "playbackConfig", "layout"}
    panels = list(placed(made["layout"]))
    assert sorted(panels) == sorted(made["configById"])
    assert {panel.split("!")[0] for panel in panels} == PANELS
    found = list(paths(made))
    assert len(found) > 10
    for path in found:
        check_path(path, topic_types(robot))
    called = {config["serviceName"] for config in made["configById"].values() if "serviceName" in config}
    assert called == {f"/{service}" for service in SERVICES.values()}


def test_the_shipped_one_is_the_one_that_is_made() -> None:
    shipped = (resource_dir("config") / "foxglove.json").read_text()
    command = "python -m qwen_vla_ros.foxglove aloha --out config/foxglove.json"
    assert json.loads(shipped) == foxglove.layout(load_embodiment("aloha")), f"make it anew: {command}"


def test_a_namespace_moves_relative_topics_only() -> None:
    made = foxglove.layout(load_embodiment("aloha"), "/lab/")
    topics = set(paths(made))
    assert "/lab/qwen_vla/status" in topics and "/cam_high/camera/color/image_rect_raw" in topics
    assert made["configById"]["CallService!estop"]["serviceName"] == "/lab/qwen_vla/estop"


def test_a_path_that_is_wrong_is_found() -> None:
    types = topic_types(load_embodiment("aloha"))
    check_path("/qwen_vla/plan.points[0].positions[3]", types)
    for wrong in ("/qwen_vla/plans", "/qwen_vla/plan.points[0].position[3]", "/qwen_vla/plan.points.positions[0]"):
        with pytest.raises(AssertionError):
            check_path(wrong, types)


def test_the_command_tells_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert foxglove.main(["alhoa"]) == 2
    assert "alhoa" in capsys.readouterr().err
