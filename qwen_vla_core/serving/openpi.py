"""openpi's message layout: one observation map per message in, ``{"actions": (H, c)}`` out, errors as text frames.

A client of that layout gets the server's metadata first, as it expects, and then sends observations whose keys follow
no contract. Which key is which view is found by name (its last part is the view's name) or told by a mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Prediction, Request
from qwen_vla_core.serving.metadata import RobotMetadata, ServerMetadata
from qwen_vla_core.serving.protocol import ProtocolError
from qwen_vla_core.serving.requests import decode_observation

PATH = "/openpi"
KEYS = {"embodiment", "views", "state", "prompt", "default_prompt"}


@dataclass(frozen=True)
class OpenpiMapping:
    """Where an observation's parts are; keys are written with slashes, also for nested maps.

    Attributes:
        embodiment: which robot; empty: the path's, or the checkpoint's only one.
        views: view → key; views that are not named are found by name.
        state: keys whose values follow each other in the state vector; empty: found by the name ``state``.
        prompt: key of the instruction.
        default_prompt: instruction where the observation has none.
    """

    embodiment: str = ""
    views: Mapping[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    prompt: str = "prompt"
    default_prompt: str = ""


def read_mapping(path: str, metadata: ServerMetadata) -> OpenpiMapping:
    """Reads ``--openpi FILE``.

    Raises:
        UserError: not a mapping, or it names an unknown key, robot or view.
    """
    try:
        data = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--openpi {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"--openpi {path}: not a map with the keys {', '.join(sorted(KEYS))}")
    for key in data:
        if key not in KEYS:
            raise UserError(f"--openpi {path}: unknown key {key!r}, known are {', '.join(sorted(KEYS))}")
    views, state = data.get("views", {}), data.get("state", [])
    state = [state] if isinstance(state, str) else state
    if not isinstance(views, dict) or not all(isinstance(text, str) for pair in views.items() for text in pair):
        raise UserError(f"--openpi {path}: 'views' is not a map of view names to keys")
    if not isinstance(state, list) or not all(isinstance(key, str) for key in state):
        raise UserError(f"--openpi {path}: 'state' is not a list of keys")
    for key in ("embodiment", "prompt", "default_prompt"):
        if not isinstance(data.get(key, ""), str):
            raise UserError(f"--openpi {path}: '{key}' is not a text")
    mapping = OpenpiMapping(
        data.get("embodiment", ""), views, tuple(state), data.get("prompt", "prompt"), data.get("default_prompt", "")
    )
    try:
        robot = choose_robot(mapping, metadata, "")
    except ProtocolError as error:
        raise UserError(f"--openpi {path}: {error}") from error
    for view in views:
        if view not in robot.views:
            raise UserError(f"--openpi {path}: embodiment {robot.name} has no view '{view}': {', '.join(robot.views)}")
    return mapping


def choose_robot(mapping: OpenpiMapping, metadata: ServerMetadata, path: str) -> RobotMetadata:
    """The robot of a connection: named by its path ``/openpi/NAME``, by the mapping, or the only one."""
    name = path.removeprefix(PATH).strip("/") if path.startswith(PATH) else ""
    name = name or mapping.embodiment
    if not name and len(metadata.robots) == 1:
        name = next(iter(metadata.robots))
    if name not in metadata.robots:
        known = ", ".join(metadata.robots)
        raise ProtocolError(
            f"embodiment '{name}' is none of {known}"
            if name
            else f"this checkpoint drives {known}: connect to {PATH}/NAME, or name one with --openpi"
        )
    return metadata.robots[name]


def read_observation(message: Mapping[Any, Any], mapping: OpenpiMapping, robot: RobotMetadata) -> Request:
    """An observation in openpi's layout → a request for this robot.

    Pictures may be (3, h, w) or (h, w, 3), uint8 or floats from 0 to 1.

    Raises:
        ProtocolError: a part is missing, ambiguous or has another shape; the message names it and the keys sent.
    """
    values = dict(_flat(message))
    images = {}
    for view in robot.views:
        key = mapping.views.get(view) or _by_name(values, view, "view") or _only_image(values, robot)
        if key is None or key not in values:
            wanted = f"key '{key}' of view '{view}'" if key else f"no key ends in view '{view}'"
            raise ProtocolError(f"observation: {wanted}: {'missing; ' if key else ''}it has {_listed(values)}")
        images[view] = _picture(values[key], key)
    keys = mapping.state or tuple(filter(None, [_by_name(values, "state", "state")]))
    missing = [key for key in keys if key not in values]
    if not keys or missing:
        raise ProtocolError(
            f"observation: {missing[0] if missing else 'state'} is missing; it has {_listed(values)} "
            "(tell the server with --openpi)"
        )
    parts = [np.atleast_1d(np.asarray(values[key])) for key in keys]
    if not all(part.ndim == 1 and part.dtype.kind in "fiu" and np.all(np.isfinite(part)) for part in parts):
        raise ProtocolError(f"observation: {', '.join(keys)} is not a finite vector")
    prompt = values.get(mapping.prompt, mapping.default_prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ProtocolError(f"observation: '{mapping.prompt}' is not a text; it says what the robot shall do")
    state = np.concatenate(parts).astype(np.float64)
    return Request(decode_observation(robot, images, state, prompt.strip()), robot.name)


def answer(prediction: Prediction, inference_s: float, queue_s: float) -> dict[str, Any]:
    """A prediction in openpi's layout: absolute actions in channel units."""
    timing = {"infer_ms": inference_s * 1e3, "queue_ms": queue_s * 1e3}
    return {"actions": np.asarray(prediction.chunk.actions_hc, np.float64), "server_timing": timing}


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        name = prefix + str(key if isinstance(key, str) else repr(key)).replace(".", "/")
        found += _flat(value, name + "/") if isinstance(value, dict) else [(name, value)]
    return found


def _by_name(values: Mapping[str, Any], name: str, what: str) -> str | None:
    keys = [key for key in values if key.rsplit("/", 1)[-1] == name]
    if len(keys) > 1:
        raise ProtocolError(f"observation: {what} '{name}' could be {' or '.join(keys)}; tell the server with --openpi")
    return keys[0] if keys else None


def _only_image(values: Mapping[str, Any], robot: RobotMetadata) -> str | None:
    return _by_name(values, "image", "the picture") if len(robot.views) == 1 else None


def _picture(value: Any, key: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 3 or 3 not in (value.shape[0], value.shape[2]):
        got = f"{value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ProtocolError(f"observation: {key} is {got}, not a picture (h, w, 3) or (3, h, w)")
    image = value if value.shape[2] == 3 else value.transpose(1, 2, 0)
    if image.dtype.kind == "f":
        if not (np.all(np.isfinite(image)) and image.min(initial=0) >= 0 and image.max(initial=0) <= 1):
            raise ProtocolError(f"observation: {key} has floats outside 0 to 1")
        image = (image * 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(list(values)[:20]) or "nothing"
