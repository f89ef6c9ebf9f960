"""What ``qwen-vla embodiment show`` tells: one plain dictionary, and the same as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from qwen_vla_core.embodiment.commanded import commanded_robot
from qwen_vla_core.embodiment.layout import ActionLayout
from qwen_vla_core.embodiment.prompt import build_prompt, view_tokens
from qwen_vla_core.embodiment.spec import (
    COMMAND_MESSAGES,
    IMAGE_MESSAGES,
    STATE_MESSAGES,
    ActionGroup,
    Embodiment,
    GripSpec,
    LinearMap,
)


def describe_embodiment(embodiment: Embodiment, instruction: str) -> dict[str, Any]:
    """Everything a person checks before running a robot, as JSON-ready values."""
    layout = ActionLayout(embodiment)
    control = dataclasses.asdict(embodiment.control)
    return {
        "name": embodiment.name,
        "description": embodiment.description,
        "path": embodiment.source_path,
        "sha256": embodiment.hash,
        "policy_sha256": embodiment.policy_hash,
        "prompt": build_prompt(embodiment, instruction),
        "control": {
            **control,
            "execute_steps": embodiment.execute_steps,
            "chunk_s": embodiment.control.horizon * embodiment.period_s,
        },
        "tensor": {"H": layout.H, "K": layout.K, "c": layout.c},
        "training_only": embodiment.training_only,
        "channels": _channels(embodiment.actions, embodiment.training_only),
        "commanded": _commanded(embodiment),
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "unit": group.unit,
                "message": None if embodiment.training_only else COMMAND_MESSAGES[group.command.kind],
                "command_map": dataclasses.asdict(group.command.map),
                "on_timeout": group.on_timeout,
                "watchdog_ms": group.watchdog_ms,
                "tracker": dataclasses.asdict(group.command.tracker) if group.command.tracker else None,
                "grip": dataclasses.asdict(group.grip or GripSpec()) if group.kind == "gripper" else None,
            }
            for group in embodiment.actions
        ],
        "state": [
            {
                "name": group.name,
                "kind": group.kind,
                "unit": group.unit,
                "topic": group.topic,
                "channels": dict(zip(group.channels, group.fields or [""] * len(group.channels), strict=True)),
                "state_map": dataclasses.asdict(group.map),
                "max_age_ms": group.max_age_ms,
            }
            for group in embodiment.state
        ],
        "cameras": [
            {**dataclasses.asdict(camera), "size": list(camera.size), "tokens": list(view_tokens(camera.view))}
            for camera in embodiment.cameras
        ],
        "topics": _topics(embodiment),
        "safety": {
            **dataclasses.asdict(embodiment.safety),
            "max_observation_age_ms": embodiment.max_observation_age_ms,
        },
        "simulation": dataclasses.asdict(embodiment.simulation) if embodiment.simulation else None,
    }


def _commanded(embodiment: Embodiment) -> list[dict[str, Any]]:
    """Positions that are published instead of what the policy says, with the limits that hold on them."""
    if embodiment.training_only:
        return []
    told = commanded_robot(embodiment).actions
    pairs = zip(embodiment.actions, told, strict=True)
    return _channels(tuple(other for ours, other in pairs if ours is not other))


def _channels(groups: Iterable[ActionGroup], training_only: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group in groups:
        for index, channel in enumerate(group.channels):
            if training_only:
                rows.append({"column": len(rows), "channel": channel, "group": group.name, "unit": group.unit})
                continue
            rows.append(
                {
                    "column": len(rows),
                    "channel": channel,
                    "group": group.name,
                    "unit": group.unit,
                    "lower": group.limits.lower[index],
                    "upper": group.limits.upper[index],
                    "velocity": group.limits.velocity[index],
                    "acceleration": group.limits.acceleration[index],
                    "jerk": group.limits.jerk[index] if group.limits.jerk else None,
                    "start": group.start[index] if group.start else None,
                    "on_timeout": group.on_timeout,
                }
            )
    return rows


def _topics(embodiment: Embodiment) -> list[dict[str, str]]:
    if embodiment.training_only:
        return []
    rows = {
        camera.topic: {"topic": camera.topic, "direction": "in", "message": IMAGE_MESSAGES[camera.transport]}
        for camera in embodiment.cameras
    }
    for state in embodiment.state:
        rows[state.topic] = {"topic": state.topic, "direction": "in", "message": STATE_MESSAGES[state.source]}
    for group in embodiment.actions:
        command = group.command
        row = {"topic": command.topic, "direction": "out", "message": COMMAND_MESSAGES[command.kind]}
        if command.simulation_kind and command.simulation_kind != command.kind:
            row["in_simulation"] = COMMAND_MESSAGES[command.simulation_kind]
        rows[command.topic] = row
    stop = embodiment.safety.obstacle_stop
    if stop is not None:
        rows[stop.topic] = {"topic": stop.topic, "direction": "in", "message": "sensor_msgs/msg/LaserScan"}
    return list(rows.values())


def embodiment_text(report: dict[str, Any]) -> str:
    """``describe_embodiment`` as text for a terminal."""
    control, tensor = report["control"], report["tensor"]
    runs = not report["training_only"]
    rate = f"controller {control['controller_rate_hz']:g} Hz" if runs else "for training only: nothing runs it"
    sections = [
        f"{report['name']}: {report['description']}" if report["description"] else report["name"],
        f"{report['path']}\nsha256 {report['sha256']}\nsha256 of what a policy learns {report['policy_sha256']}",
        f"Prompt\n  {report['prompt']}",
        f"Control\n  {control['frequency_hz']:g} Hz × H={tensor['H']} actions = {control['chunk_s']:g} s per chunk, "
        f"a look every {control['execute_steps']}, {rate}, {control['convention']}",
        f"Action tensor: H×K = {tensor['H']}×{tensor['K']}, columns 0 … {tensor['c'] - 1} real, the rest masked\n"
        + _table(report["channels"], tuple(report["channels"][0])),
        *_told(report),
        "State (message → channel)\n" + _state_table(report["state"]),
        "Cameras\n"
        + _table(
            [
                {**camera, "size": "×".join(map(str, camera["size"])), "tokens": " … ".join(camera["tokens"])}
                for camera in report["cameras"]
            ],
            ("view", "topic", "transport", "size", "max_age_ms", "reference", "tokens"),
        ),
    ]
    if runs:
        sections.append("Topics\n" + _table(report["topics"], ("direction", "topic", "message", "in_simulation")))
        sections.append("Safety\n" + _table(_safety_rows(report), ("key", "value")))
    if report["simulation"]:
        values = {**report["simulation"]}
        values["camera_size"] = "×".join(map(str, values["camera_size"] or ())) or "as the cameras"
        sections.append("Simulation\n" + _table([{"key": k, "value": v} for k, v in values.items()], ("key", "value")))
    return "\n\n".join(sections) + "\n"


def _told(report: dict[str, Any]) -> list[str]:
    """Sections on what is published."""
    if report["training_only"]:
        return []
    groups = [{**group, "map": map_text(LinearMap(**group["command_map"]))} for group in report["groups"]]
    sections = ["Command maps (channel → message)\n" + _table(groups, ("name", "kind", "unit", "map", "message"))]
    rows = report["commanded"]
    if rows:
        columns = tuple(column for column in rows[0] if column != "column")
        sections.insert(0, "Commanded instead of the policy's channels, under these limits\n" + _table(rows, columns))
    return sections


def map_text(map_: LinearMap) -> str:
    """A linear map as a formula."""
    if map_ == LinearMap():
        return "message = channel"
    text = f"message = {map_.scale:.6g}·channel"
    return text + (f" {'+' if map_.offset > 0 else '−'} {abs(map_.offset):.6g}" if map_.offset else "")


def _safety_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is on: the global keys, then what single groups and boxes add."""
    told = ("workspace", "obstacle_stop")
    rows = [{"key": key, "value": value} for key, value in report["safety"].items() if key not in told]
    rows.append({"key": "obstacle_stop", "value": _obstacle_stop(report["safety"]["obstacle_stop"])})
    for group in report["groups"]:
        if group["watchdog_ms"] is not None:
            rows.append({"key": f"watchdog_ms of {group['name']}", "value": group["watchdog_ms"]})
        if group["tracker"] is not None:
            rows.append({"key": f"tracker of {group['name']}", "value": _tracker(group["tracker"])})
        if group["grip"] is not None:
            grip = group["grip"]
            text = f"closes at up to {grip['closing_velocity']:g}/s, presses up to {grip['max_lead']:g} of its range"
            rows.append({"key": f"grip of {group['name']}", "value": text})
    boxes = report["safety"]["workspace"]
    rows += [{"key": f"workspace of {box['group']}", "value": _workspace(box)} for box in boxes]
    return rows if boxes else [*rows, {"key": "workspace", "value": "none"}]


def _obstacle_stop(stop: dict[str, Any] | None) -> str:
    if stop is None:
        return "none: nothing looks where a base drives"
    return (
        f"stops {stop['stop_distance']:g} m before what {stop['topic']} sees in its way, slower from "
        f"{stop['slow_distance']:g} m on; no scan for {stop['max_age_ms']:g} ms: stands"
    )


def _tracker(tracker: dict[str, Any]) -> str:
    back = f"{tracker['max_reverse']:g} m/s back" if tracker["max_reverse"] else "never back"
    return (
        f"{tracker['law']}, up to {tracker['max_speed']:g} m/s, {back}, {tracker['max_turn']:g} rad/s; "
        f"{tracker['acceleration']:g} m/s², {tracker['turn_acceleration']:g} rad/s²"
    )


def _workspace(box: dict[str, Any]) -> str:
    lower, upper = ([f"{value:g}" for value in box[side]] for side in ("lower", "upper"))
    text = f"({', '.join(lower)}) … ({', '.join(upper)}) m in {box['frame_id']}"
    if box["kinematics"]:
        text += f", {box['kinematics']['tip']} by {box['kinematics']['model']}"
    return text + (f", measured by {', '.join(box['position'])}" if box["position"] else "")


def _state_table(state: Iterable[dict[str, Any]]) -> str:
    rows = [
        {
            "group": group["name"],
            "channel": channel,
            "unit": group["unit"],
            "topic": group["topic"],
            "field": field,
            "map": map_text(LinearMap(**group["state_map"])) if group["topic"] else None,
            "max_age_ms": group["max_age_ms"] if group["topic"] else None,
        }
        for group in state
        for channel, field in group["channels"].items()
    ]
    return _table(rows, ("group", "channel", "unit", "topic", "field", "map", "max_age_ms"))


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text, numbers to the right; columns that are empty everywhere are left out."""
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    if not columns:
        return "  none"
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    lines = [
        "  ".join(
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, numeric, strict=True)
        )
        for line in [list(columns), ["─" * width for width in widths], *cells]
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
