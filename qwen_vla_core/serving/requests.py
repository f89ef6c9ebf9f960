"""Requests and predictions as messages, and back; what comes from the network is checked before the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np

from qwen_vla_core.interfaces import ActionChunk, Committed, Observation, Prediction, Request
from qwen_vla_core.serving.metadata import RobotMetadata, ServerMetadata
from qwen_vla_core.serving.pictures import decode_picture, encode_jpeg, reduce_area
from qwen_vla_core.serving.protocol import BAD_REQUEST, ProtocolError, field, numbers, texts

MAX_INSTRUCTION = 4096


def encode_request(request: Request, metadata: ServerMetadata, mode: str = "auto", quality: int = 90) -> dict[str, Any]:
    """A request as a message; only the views that the policy needs are sent.

    Args:
        request: a view may be missing: the server says so.
        metadata: the server's.
        mode: ``raw``; ``reduced``: exactly what the model would make of it (where the checkpoint reduces by area);
            ``auto``: reduced where possible, else raw; ``jpeg``: reduced where possible, then lossy.
        quality: of JPEG, 1 to 100.
    """
    images: dict[str, Any] = {}
    for view in metadata.robots[request.embodiment].views:
        image = request.observation.images.get(view)
        if image is None:
            continue
        if mode != "raw" and metadata.reduction is not None:
            image = reduce_area(image, *metadata.reduction.target(image.shape[0], image.shape[1]))
        images[view] = encode_jpeg(image, quality) if mode == "jpeg" else image
    committed = request.committed
    return {
        "embodiment": request.embodiment,
        "images": images,
        "state": np.asarray(request.observation.state, dtype=np.float64),
        "instruction": request.observation.instruction,
        "stamp_ns": int(request.observation.stamp_ns),
        "committed": None
        if committed is None
        else {**vars(committed), "actions_hc": np.asarray(committed.actions_hc, np.float64)},
        "noise_hk": None if request.noise_hk is None else np.asarray(request.noise_hk),
    }


def decode_request(message: Any, metadata: ServerMetadata, allowed: tuple[str, ...]) -> Request:
    """A message as a request that fits its robot.

    Raises:
        ProtocolError: with code ``request``; names the key.
    """
    try:
        if not isinstance(message, dict):
            raise ProtocolError("request: not a map")
        name = field(message, "embodiment", str, "request")
        if name not in allowed:
            raise ProtocolError(f"request: embodiment '{name}' was not in this client's hello ({', '.join(allowed)})")
        robot = metadata.robots[name]
        observation = decode_observation(
            robot,
            field(message, "images", dict, "request"),
            numbers(message, "state", (None,), "request", "float64"),
            field(message, "instruction", str, "request"),
            field(message, "stamp_ns", int, "request"),
        )
        noise = None
        if message.get("noise_hk") is not None:
            noise = numbers(message, "noise_hk", (robot.horizon, metadata.noise_channels), "request")
        return Request(observation, name, _committed(message.get("committed"), robot), noise)
    except ProtocolError as error:
        raise ProtocolError(str(error), BAD_REQUEST) from error


def decode_observation(
    robot: RobotMetadata, images: Mapping[Any, Any], state: np.ndarray, instruction: str, stamp_ns: int = 0
) -> Observation:
    """Parts from the network → an observation of this robot; a missing view is an error, never a black picture."""
    decoded = {}
    for view in robot.views:
        if view not in images:
            raise ProtocolError(f"request: view '{view}' of embodiment {robot.name} is missing")
        decoded[view] = decode_picture(images[view], f"request: view '{view}'")
    if state.shape != (len(robot.state_channels),):
        raise ProtocolError(
            f"request: state of embodiment {robot.name} needs {len(robot.state_channels)} channels, got {state.size}"
        )
    if len(instruction) > MAX_INSTRUCTION:
        raise ProtocolError(f"request: instruction has {len(instruction)} characters, limit {MAX_INSTRUCTION}")
    return Observation(decoded, state, instruction, stamp_ns)


def _committed(message: Any, robot: RobotMetadata) -> Committed | None:
    if message is None:
        return None
    if not isinstance(message, dict):
        raise ProtocolError("request: 'committed' is not a map")
    actions = numbers(message, "actions_hc", (None, len(robot.channels)), "committed", "float64")
    frozen = field(message, "frozen", int, "committed")
    if len(actions) > robot.horizon:
        raise ProtocolError(f"committed: {len(actions)} actions, the horizon is {robot.horizon}")
    if not 0 <= frozen <= len(actions):
        raise ProtocolError(f"committed: 'frozen' is {frozen}, there are {len(actions)} actions")
    return Committed(actions, frozen, **_options(message))


def _options(message: Mapping[Any, Any]) -> dict[str, Any]:
    """What else the plan says, such as how to continue it: plain values that this side knows, or an error."""
    hints = get_type_hints(Committed)
    options = {key: value for key, value in message.items() if key not in ("actions_hc", "frozen")}
    for key, value in options.items():
        if key not in hints:
            raise ProtocolError(f"committed: unknown key {key!r:.40}: install the same version on both sides")
        allowed = get_args(hints[key])  # of a Literal
        if not isinstance(value, (str, int, float)) or (allowed and value not in allowed):
            known = f", known are {', '.join(map(str, allowed))}" if allowed else ""
            raise ProtocolError(f"committed: '{key}' is {value!r:.40}{known}")
    return options


def encode_prediction(prediction: Prediction) -> dict[str, Any]:
    """A prediction as a message."""
    chunk = prediction.chunk
    return {
        "actions_hc": np.asarray(chunk.actions_hc, np.float64),
        "channels": chunk.channels,
        "stamp_ns": int(chunk.stamp_ns),
        "period_s": float(chunk.period_s),
        "seconds": {name: float(value) for name, value in prediction.seconds.items()},
    }


def decode_prediction(message: Any, robot: RobotMetadata) -> Prediction:
    """A message as a prediction for this robot.

    Raises:
        ProtocolError: anything that a controller should not be given.
    """
    if not isinstance(message, dict):
        raise ProtocolError("prediction: not a map")
    channels = texts(message, "channels", "prediction")
    if channels != robot.channels:
        raise ProtocolError(f"prediction: channels are not those of {robot.name}")
    actions = numbers(message, "actions_hc", (robot.horizon, len(channels)), "prediction", "float64")
    seconds = field(message, "seconds", dict, "prediction")
    if not all(isinstance(key, str) and isinstance(value, float) for key, value in seconds.items()):
        raise ProtocolError("prediction: 'seconds' is not a map of texts to numbers")
    chunk = ActionChunk(
        actions,
        channels,
        field(message, "stamp_ns", int, "prediction"),
        field(message, "period_s", float, "prediction"),
    )
    return Prediction(chunk, seconds)
