"""A Foxglove layout for a robot: ``python -m qwen_vla_ros.foxglove aloha --out config/foxglove.json``.

Foxglove opens it (Layouts → Import from file) beside a live graph through foxglove_bridge, or on a recorded MCAP. Joint
states are read by their place in the message, in the order of the YAML; a driver with another order needs an edit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.embodiment.spec import ActionGroup
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_text
from qwen_vla_core.rollouts.index import OUTCOMES
from qwen_vla_ros.estop import ESTOPPED_TOPIC
from qwen_vla_ros.node_utils import (
    CHUNK_TOPIC,
    EPISODE_TOPIC,
    INSTRUCTION_TOPIC,
    LATENCY_TOPIC,
    PLAN_TOPIC,
    STATUS_TOPIC,
)

COLOURS = ("#4e98e2", "#f5774d", "#f7df71", "#5cd6a9", "#be6bff", "#61cbff", "#ff8fb1")
ODOMETRY_PATHS = {
    "x": "pose.pose.position.x",
    "y": "pose.pose.position.y",
    "z": "pose.pose.position.z",
    "vx": "twist.twist.linear.x",
    "vy": "twist.twist.linear.y",
    "wz": "twist.twist.angular.z",
}
POSE_PATHS = {"x": "pose.position.x", "y": "pose.position.y", "z": "pose.position.z"} | {
    f"q{axis}": f"pose.orientation.{axis}" for axis in "xyzw"
}
BUTTONS = {
    "estop": ("qwen_vla/estop", "EMERGENCY STOP", "#c4112d"),
    "start": ("qwen_vla/start", "Start", "#0b6b45"),
    "stop": ("qwen_vla/stop", "Stop", "#5a6478"),
    "reset": ("qwen_vla/reset", "Reset stop", "#5a6478"),
    **{outcome: (f"qwen_vla/episode_{outcome}", f"Episode: {outcome}", "#2457d6") for outcome in OUTCOMES},
}


def layout(robot: Embodiment, namespace: str = "") -> dict[str, Any]:
    """The layout as Foxglove's JSON: cameras, a plot per group, latency, what changed when, diagnostics, buttons."""

    def name(topic: str) -> str:
        return topic if topic.startswith("/") else "/".join(["", *filter(None, [namespace.strip("/")]), topic])

    images = {
        f"Image!{camera.view}": {
            "foxglovePanelTitle": camera.view,
            "imageMode": {"imageTopic": name(camera.topic)},
        }
        for camera in robot.cameras
    }
    plots = {f"Plot!{group.name}": _plot(group.name, _group_lines(robot, group, name)) for group in robot.actions}
    latency = {"Plot!latency": _plot("observation to chunk, s", [_line(f"{name(LATENCY_TOPIC)}.data", "latency", 0)])}
    changes = {
        "StateTransitions!changes": {
            "foxglovePanelTitle": "what changed when",
            "isSynced": True,
            "paths": [
                {"value": f"{name(topic)}.data", "label": label, "timestampMethod": "receiveTime"}
                for topic, label in (
                    (INSTRUCTION_TOPIC, "instruction"),
                    (EPISODE_TOPIC, "episode"),
                    (ESTOPPED_TOPIC, "e-stop"),
                )
            ],
        }
    }
    health = {
        "DiagnosticSummary!status": {
            "topicToRender": name(STATUS_TOPIC),
            "minLevel": 0,
            "pinnedIds": [],
            "sortByLevel": True,
        },
        "DiagnosticStatusPanel!policy": {
            "topicToRender": name(STATUS_TOPIC),
            "selectedName": "policy",
            "selectedHardwareId": f"/{namespace.strip('/')}",
        },
        "RawMessages!chunk": {"topicPath": name(CHUNK_TOPIC), "foxglovePanelTitle": "newest chunk"},
    }
    send = {
        "Publish!instruction": {
            "topicName": name(INSTRUCTION_TOPIC),
            "datatype": "std_msgs/msg/String",
            "value": json.dumps({"data": "pick up the red cube"}, indent=2),
            "buttonText": "Send instruction",
            "advancedView": True,
        }
    }
    buttons = {
        f"CallService!{key}": {
            "serviceName": name(service),
            "requestPayload": "{}",
            "buttonText": text,
            "buttonColor": colour,
            "editingMode": False,
        }
        for key, (service, text, colour) in BUTTONS.items()
    }
    watching = _split("column", [_split("column", list(images)), "StateTransitions!changes"], (75,))
    signals = _split("column", [*plots, *latency])
    acting = _split("column", [*health, *send, _grid(list(buttons))], (34, 34, 34, 34))
    return {
        "configById": {**images, **plots, **latency, **changes, **health, **send, **buttons},
        "globalVariables": {},
        "userNodes": {},
        "playbackConfig": {"speed": 1},
        "layout": _split("row", [watching, signals, acting], (36, 55)),
    }


def _group_lines(robot: Embodiment, group: ActionGroup, name: Any) -> list[dict[str, Any]]:
    """Of every channel: what is measured (in the driver's units) and what is commanded now (in channel units)."""
    measured = _measured_paths(robot, name)
    lines = []
    for index, channel in enumerate(group.channels):
        column = robot.channels.index(channel)
        if channel in measured:
            lines.append(_line(measured[channel], f"{channel} measured", index))
        lines.append(
            _line(f"{name(PLAN_TOPIC)}.points[0].positions[{column}]", f"{channel} planned", index, dashed=True)
        )
    return lines


def _measured_paths(robot: Embodiment, name: Any) -> dict[str, str]:
    """State channel → message path."""
    paths: dict[str, str] = {}
    joints: dict[str, int] = {}  # topic → joints so far
    for group in robot.state:
        for channel, field in zip(group.channels, group.fields, strict=True):
            if group.source == "joint_state":
                index = joints.setdefault(group.topic, 0)
                joints[group.topic] += 1
                paths[channel] = f"{name(group.topic)}.position[{index}]"
            else:
                known = ODOMETRY_PATHS if group.source == "odometry" else POSE_PATHS
                if field in known:  # a yaw is no field of the message
                    paths[channel] = f"{name(group.topic)}.{known[field]}"
    return paths


def _line(path: str, label: str, colour: int, dashed: bool = False) -> dict[str, Any]:
    style = {"lineStyle": "dashed"} if dashed else {}
    return {
        "value": path,
        "label": label,
        "enabled": True,
        "timestampMethod": "receiveTime",
        "color": COLOURS[colour % len(COLOURS)],
        "showLine": True,
        **style,
    }


def _plot(title: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "foxglovePanelTitle": title,
        "paths": lines,
        "showXAxisLabels": True,
        "showYAxisLabels": True,
        "showLegend": True,
        "legendDisplay": "floating",
        "showPlotValuesInLegend": False,
        "isSynced": True,
        "xAxisVal": "timestamp",
        "followingViewWidth": 20,
        "sidebarDimension": 240,
    }


def _split(direction: str, parts: Sequence[Any], shares: Sequence[int] = ()) -> Any:
    """Panels beside each other; ``shares`` are percentages of what is left, by default all get the same."""
    if len(parts) == 1:
        return parts[0]
    share = shares[0] if shares else round(100 / len(parts))
    rest = _split(direction, parts[1:], shares[1:])
    return {"direction": direction, "first": parts[0], "second": rest, "splitPercentage": share}


def _grid(panels: Sequence[str]) -> Any:
    """Two panels in a row."""
    return _split("column", [_split("row", panels[i : i + 2]) for i in range(0, len(panels), 2)])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the layout, or prints it; exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Foxglove layout of a robot's topics")
    parser.add_argument("embodiment", nargs="?", default="aloha", help="shipped name or path of the robot's YAML")
    parser.add_argument("--namespace", default="", help="of the graph")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".json; default: standard output")
    args = parser.parse_args(argv)
    try:
        text = json.dumps(layout(load_embodiment(args.embodiment), args.namespace), indent=2) + "\n"
    except UserError as error:
        print(f"foxglove: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text, end="")
    else:
        atomic_write_text(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
