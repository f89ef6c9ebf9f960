"""Where a policy node's chunks come from, by its parameters: the model in this process, or a server elsewhere.

With ``server`` set nothing here imports torch or transformers, and no checkpoint is read: the robot's computer needs
neither a GPU nor the weights.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_vla_core.embodiment import Embodiment, contract_difference, load_robot
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Engine, Prediction, Request
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.serving.batching import MicroBatcher
from qwen_vla_ros.node_utils import declare, declare_robot, in_its_place

FIRST_ANSWER_S = 3.0  # how long configuring waits for the server; it is looked for ever after


@dataclass(frozen=True)
class EngineSetup:
    """An engine and what the node has to know of it.

    Attributes:
        engine: answers requests.
        embodiment: the robot at hand.
        checkpoint_id: name and weights' hash, as they are now: a server may be restarted with others.
        description: for the log.
        warm: whether the first question is as fast as the next ones.
        trained_prefix: how many first actions its training gave at most; None: not known.
        noise_shape: (H, K) of the noise it can be given; None: it draws its own.
    """

    engine: Engine
    embodiment: Embodiment
    checkpoint_id: Callable[[], str]
    description: str
    warm: bool
    trained_prefix: int | None = None
    noise_shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Loaded:
    """A model in memory, and what belongs to its checkpoint."""

    engine: Any
    embodiments: Mapping[str, Embodiment]
    checkpoint_id: str
    description: str
    trained_prefix: int | None
    noise_channels: int
    batcher: MicroBatcher | None


class Seat:
    """One robot's place at a model that several share: requests that wait together are answered in one pass.

    A robot that does not ask is waited for by nobody, and a request that fails is tried again by itself.
    """

    def __init__(self, batcher: MicroBatcher) -> None:
        self.steps: int | None = None
        self._batcher = batcher

    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        """As the engine; waits for its turn, which is measured as ``queue``."""
        answer = self._batcher.submit(requests, self.steps).result()
        return [
            Prediction(prediction.chunk, {**prediction.seconds, "queue": answer.queue_s})
            for prediction in answer.predictions
        ]


class EngineShelf:
    """The models that this process has loaded. Configuring again, with another robot too, finds the weights here.

    Args:
        shared: several robots ask at the same time; each gets a ``Seat``. Otherwise only the newest model is kept.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.loads = 0
        self._lock = threading.Lock()
        self._models: dict[tuple[str, ...], _Loaded] = {}

    def take(self, key: tuple[str, ...], load: Callable[[], _Loaded]) -> _Loaded:
        """The model of ``key``, loaded where it is not there yet; others wait meanwhile, to find it."""
        with self._lock:
            if key not in self._models:
                if not self.shared:
                    self._models.clear()  # before the new one takes its memory
                self._models[key] = load()
                self.loads += 1
            return self._models[key]

    def clear(self) -> None:
        """Forgets everything and gives the memory back."""
        with self._lock:
            for model in self._models.values():
                if model.batcher is not None:
                    model.batcher.close(timeout_s=1.0)
            self._models.clear()

    @property
    def batches(self) -> dict[int, int]:
        """Requests answered together → how often."""
        sizes: dict[int, int] = {}
        for model in self._models.values():
            for size, count in (model.batcher.batches if model.batcher is not None else {}).items():
                sizes[size] = sizes.get(size, 0) + count
        return sizes


def declare_engine(node: Any) -> None:
    """Declares the parameters that ``make_engine`` reads."""
    declare(node, "checkpoint", DEFAULT_CHECKPOINT, "Shipped name or folder of the checkpoint", read_only=True)
    text = "Robot YAML (name or path); empty: the checkpoint's own. May be changed while inactive: the weights stay"
    declare_robot(node, text=text, fixed=False)
    declare(node, "torch_threads", 1, "CPU threads of the model", read_only=True, minimum=1, maximum=256)
    declare(node, "device", "auto", "auto, cpu or cuda; bfloat16 on CUDA, float32 on the CPU", read_only=True)
    declare(node, "compile", False, "torch.compile the model: quicker, but minutes to configure", read_only=True)
    declare(node, "server", "", "ws://host:port or wss://… of a policy server, instead of a checkpoint", read_only=True)
    declare(node, "server_token_file", "", "File with the server's token; empty: QWEN_VLA_TOKEN", read_only=True)
    declare(node, "server_ca_file", "", "Certificate to trust for wss://; empty: the system's", read_only=True)
    declare(
        node, "server_timeout_s", 2.0, "An answer later than this is none", read_only=True, minimum=0.05, maximum=60.0
    )
    declare(node, "server_pictures", "auto", "auto and raw: the same chunks as without a server; jpeg", read_only=True)


def make_engine(node: Any, shelf: EngineShelf) -> EngineSetup:
    """The engine that the node's parameters ask for.

    Args:
        node: with the parameters of ``declare_engine``.
        shelf: where loaded models are kept.

    Raises:
        UserError: a parameter is wrong, or checkpoint or server do not belong to this robot.
    """
    setup = _remote(node) if str(node.get_parameter("server").value) else _local(node, shelf)
    return replace(setup, embodiment=in_its_place(node, setup.embodiment))


def _local(node: Any, shelf: EngineShelf) -> EngineSetup:
    import torch

    from qwen_vla_core.engine.local import LocalEngine
    from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, resolve_checkpoint, trained_prefix
    from qwen_vla_core.model.device import choose_device

    torch.set_num_threads(int(node.get_parameter("torch_threads").value))
    path = resolve_checkpoint(str(node.get_parameter("checkpoint").value))
    device, dtype = choose_device(str(node.get_parameter("device").value))
    compiled = bool(node.get_parameter("compile").value)
    weights = str(read_config(path)["weights_id"])

    def load() -> _Loaded:
        engine = LocalEngine(load_checkpoint(path, device, dtype), compile=compiled)
        batcher = MicroBatcher(engine) if shelf.shared else None
        name, about = f"{path.name} {weights[:12]}", f"checkpoint {path.name} on {device}"
        channels = engine.policy.config.decoder.channels
        return _Loaded(engine, engine.policy.embodiments, name, about, trained_prefix(path), channels, batcher)

    model = shelf.take((str(path), weights, str(device), str(dtype), str(compiled)), load)
    embodiment = _matching_embodiment(node, dict(model.embodiments), path.name)
    engine = model.engine if model.batcher is None else Seat(model.batcher)
    prefix, noise_shape = model.trained_prefix, (embodiment.control.horizon, model.noise_channels)
    return EngineSetup(engine, embodiment, lambda: model.checkpoint_id, model.description, False, prefix, noise_shape)


def _matching_embodiment(node: Any, robots: dict[str, Embodiment], checkpoint: str) -> Embodiment:
    wanted = str(node.get_parameter("embodiment").value)
    if not wanted:
        if len(robots) != 1:
            raise UserError(f"parameter 'embodiment': checkpoint '{checkpoint}' knows {', '.join(robots)}; name one")
        return next(iter(robots.values()))
    given = load_robot(wanted)
    trained = robots.get(given.name)
    if trained is None:
        raise UserError(
            f"parameter 'embodiment': checkpoint '{checkpoint}' knows {', '.join(robots)}, not '{given.name}'"
        )
    difference = contract_difference(given, trained)
    if difference is not None:
        raise UserError(
            f"parameter 'embodiment': checkpoint '{checkpoint}' cannot drive '{wanted}': {difference}; "
            "restore that in the YAML, or use a checkpoint trained with it"
        )
    if given.hash != trained.hash:
        node.get_logger().info(
            f"'{wanted}' ({given.hash[:12]}) is an edit of the checkpoint's '{trained.name}' "
            f"({trained.hash[:12]}); what the policy learned is equal ({given.policy_hash[:12]})"
        )
    return given


def _remote(node: Any) -> EngineSetup:
    from qwen_vla_core.serving.access import read_token
    from qwen_vla_core.serving.client import RemoteEngine
    from qwen_vla_core.serving.trouble import ServerAway, ServerRefused

    wanted = str(node.get_parameter("embodiment").value)
    if not wanted:
        raise UserError("parameter 'embodiment': with a server, name the robot's YAML")
    embodiment = load_robot(wanted)
    url = str(node.get_parameter("server").value)
    engine = RemoteEngine(
        url,
        embodiment,
        token=read_token(token_file=str(node.get_parameter("server_token_file").value)),
        ca_file=str(node.get_parameter("server_ca_file").value),
        name=f"{socket.gethostname()}{node.get_fully_qualified_name()}",
        timeout_s=float(node.get_parameter("server_timeout_s").value),
        pictures=str(node.get_parameter("server_pictures").value),
    )
    description = f"server {url}"
    try:
        description += f": checkpoint {engine.wait_ready(FIRST_ANSWER_S).checkpoint_id}"
    except ServerRefused:
        engine.close()
        raise
    except ServerAway as error:  # a server that starts later than its robots is no mistake
        node.get_logger().warning(f"{error}; the robot holds until it is there")
    return EngineSetup(engine, embodiment, lambda: engine.checkpoint_id, description, True)
