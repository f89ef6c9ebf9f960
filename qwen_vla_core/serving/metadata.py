"""Who serves what: the server's first message, and whether a robot fits to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vla_core.embodiment import Embodiment, contract_difference
from qwen_vla_core.model.picture_size import target_size
from qwen_vla_core.serving.protocol import (
    CONTRACT,
    MALFORMED,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    VERSION,
    ProtocolError,
    field,
    texts,
)

if TYPE_CHECKING:
    from qwen_vla_core.model.policy import QwenVLA

# What is done with the rest of a robot's plan: an engine that continues it names its strategies itself.
DEFAULT_STRATEGIES = ("blend",)


@dataclass(frozen=True)
class Reduction:
    """How the model makes pictures smaller by area means: a robot may do it first, with the same result.

    Attributes:
        side: pixels per token, in height and width.
        min_pixels: smaller pictures are enlarged.
        max_pixels: larger ones are reduced to at most this area.
    """

    side: int
    min_pixels: int
    max_pixels: int

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to send: smaller where that changes nothing, else as it is."""
        limits = (self.side, self.min_pixels, self.max_pixels)
        new = target_size(height, width, *limits)
        shrinks = new[0] <= height and new[1] <= width
        # The model reduces what it gets: that must leave a picture that is reduced already as it is.
        return new if shrinks and target_size(*new, *limits) == new else (height, width)


@dataclass(frozen=True)
class RobotMetadata:
    """One robot that the checkpoint drives.

    Attributes:
        name: of the embodiment.
        hash: of its YAML's text in the checkpoint.
        policy_hash: of ``contract``.
        contract: its ``Embodiment.policy_contract``.
        horizon: H.
        frequency_hz: of the actions.
        channels: the c action channels, in column order.
        state_channels: of the state vector.
        views: view → (width, height) that its YAML expects, pixels; others are taken too.
        stats_hash: of the quantiles that its data are normalised with.
    """

    name: str
    hash: str
    policy_hash: str
    contract: Mapping[str, Any]
    horizon: int
    frequency_hz: float
    channels: tuple[str, ...]
    state_channels: tuple[str, ...]
    views: Mapping[str, tuple[int, int]]
    stats_hash: str = ""

    @classmethod
    def of(cls, robot: Embodiment, stats_hash: str = "") -> RobotMetadata:
        """A robot as a policy knows it."""
        return cls(
            name=robot.name,
            hash=robot.hash,
            policy_hash=robot.policy_hash,
            contract=robot.policy_contract,
            horizon=robot.control.horizon,
            frequency_hz=float(robot.control.frequency_hz),
            channels=robot.channels,
            state_channels=robot.state_channels,
            views={camera.view: camera.size for camera in robot.cameras},
            stats_hash=stats_hash,
        )

    @classmethod
    def from_message(cls, name: str, message: Mapping[Any, Any]) -> RobotMetadata:
        """The other side's description, checked."""
        what = f"embodiment '{name}'"
        views = field(message, "views", dict, what)
        if not all(isinstance(view, str) for view in views):
            raise ProtocolError(f"{what}: 'views' is not a map of texts to sizes")
        return cls(
            name=name,
            hash=field(message, "hash", str, what),
            policy_hash=field(message, "policy_hash", str, what),
            contract=field(message, "contract", dict, what),
            horizon=field(message, "horizon", int, what),
            frequency_hz=field(message, "frequency_hz", float, what),
            channels=texts(message, "channels", what),
            state_channels=texts(message, "state_channels", what),
            views={view: _size(size) for view, size in views.items()},
            stats_hash=field(message, "stats_hash", str, what),
        )


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise ProtocolError(f"metadata: {value!r:.40} is not a size [width, height]")
    return value[0], value[1]


@dataclass(frozen=True)
class ServerMetadata:
    """What is served.

    Attributes:
        checkpoint: its name.
        weights_id: hash of its weights.
        robots: by name.
        flow_steps: Euler steps when a request asks for none.
        noise_channels: K of a request's starting noise.
        reduction: how pictures may be made smaller before they are sent; None: not at all, or bits would change.
        strategies: what the engine does with the rest of a robot's plan (``Request.committed``).
        max_message_bytes: longer messages end the connection.
        max_batch: most requests in one message.
    """

    checkpoint: str
    weights_id: str
    robots: Mapping[str, RobotMetadata]
    flow_steps: int = 0
    noise_channels: int = 64
    reduction: Reduction | None = None
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_batch: int = 8

    @property
    def checkpoint_id(self) -> str:
        """Name and the beginning of the weights' hash, as in the metadata of recordings."""
        return f"{self.checkpoint} {self.weights_id[:12]}"

    def to_message(self) -> dict[str, Any]:
        """The first message on every connection; openpi's clients take any map for metadata."""
        values = asdict(self)
        robots = {name: {k: v for k, v in robot.items() if k != "name"} for name, robot in values.pop("robots").items()}
        return {"type": "metadata", "protocol": PROTOCOL_VERSION, **values, "embodiments": robots}

    @classmethod
    def from_message(cls, message: Mapping[Any, Any]) -> ServerMetadata:
        """The server's first message, checked.

        Raises:
            ProtocolError: another protocol version, or something is missing.
        """
        check_version(message, "server")
        robots = field(message, "embodiments", dict, "metadata")
        if not all(isinstance(name, str) and isinstance(entry, dict) for name, entry in robots.items()):
            raise ProtocolError("metadata: 'embodiments' is not a map of texts to maps")
        reduction = None
        if message.get("reduction") is not None:
            rule = field(message, "reduction", dict, "metadata")
            limits = [field(rule, key, int, "reduction") for key in ("side", "min_pixels", "max_pixels")]
            if min(limits) < 1:
                raise ProtocolError("reduction: side and pixels are positive")
            reduction = Reduction(*limits)
        return cls(
            checkpoint=field(message, "checkpoint", str, "metadata"),
            weights_id=field(message, "weights_id", str, "metadata"),
            robots={name: RobotMetadata.from_message(name, entry) for name, entry in robots.items()},
            flow_steps=field(message, "flow_steps", int, "metadata"),
            noise_channels=field(message, "noise_channels", int, "metadata"),
            reduction=reduction,
            strategies=texts(message, "strategies", "metadata"),
            max_message_bytes=field(message, "max_message_bytes", int, "metadata"),
            max_batch=max(1, field(message, "max_batch", int, "metadata")),
        )


def check_version(message: Mapping[Any, Any], side: str) -> None:
    """Raises a ProtocolError unless the other side speaks this version."""
    version = message.get("protocol")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the {side} speaks protocol version {version!r:.20}, this side {PROTOCOL_VERSION}: "
            "install the same version of qwen_vla_ros on both",
            VERSION,
        )


def describe_policy(policy: QwenVLA, path: Path, weights_id: str, strategies: tuple[str, ...] = ()) -> ServerMetadata:
    """What a loaded checkpoint serves.

    Args:
        policy: from ``load_checkpoint``.
        path: its folder.
        weights_id: from its configuration.
        strategies: of the engine that runs it.
    """
    from qwen_vla_core.model.processor import AREA

    image = policy.processor.image
    rule = Reduction(image.patch_size * image.merge_size, image.min_pixels, image.max_pixels)
    robots = {}
    for name, robot in policy.embodiments.items():
        stats = policy.embodiment_stats(name)
        text = json.dumps({"action": stats.action.to_dict(), "state": stats.state.to_dict()}, sort_keys=True)
        robots[name] = RobotMetadata.of(robot, hashlib.sha256(text.encode()).hexdigest())
    return ServerMetadata(
        checkpoint=path.resolve().name,
        weights_id=weights_id,
        robots=robots,
        flow_steps=policy.config.flow.steps,
        noise_channels=policy.config.decoder.channels,
        reduction=rule if image.resample == AREA else None,
        strategies=strategies or DEFAULT_STRATEGIES,
    )


def hello_message(robots: Mapping[str, Embodiment], name: str) -> dict[str, Any]:
    """What a client says first: who it is and which robots it speaks for."""
    stated = {key: {"policy_hash": r.policy_hash, "contract": r.policy_contract} for key, r in robots.items()}
    return {"type": "hello", "protocol": PROTOCOL_VERSION, "name": name, "embodiments": stated}


def check_hello(message: Mapping[Any, Any], metadata: ServerMetadata) -> tuple[str, tuple[str, ...]]:
    """(client's name, its robots) of a hello that fits.

    Raises:
        ProtocolError: other version, unknown robot, or one that differs in what the policy has learned; the first
            differing field is named.
    """
    check_version(message, "client")
    stated = field(message, "embodiments", dict, "hello")
    if not stated:
        raise ProtocolError("hello: 'embodiments' names no robot")
    for name, entry in stated.items():
        trained = metadata.robots.get(name) if isinstance(name, str) else None
        if trained is None:
            known = ", ".join(metadata.robots)
            raise ProtocolError(f"checkpoint '{metadata.checkpoint}' knows {known}, not {name!r:.60}", CONTRACT)
        if not isinstance(entry, dict):
            raise ProtocolError(f"hello: embodiment '{name}' is not a map", MALFORMED)
        if field(entry, "policy_hash", str, "hello") == trained.policy_hash:
            continue
        difference = contract_difference(field(entry, "contract", dict, "hello"), trained.contract)
        raise ProtocolError(
            f"checkpoint '{metadata.checkpoint}' cannot drive this '{name}': "
            + (difference or "policy_hash differs, though every field is equal: the versions of qwen_vla_ros differ"),
            CONTRACT,
        )
    return field(message, "name", str, "hello")[:80], tuple(stated)
