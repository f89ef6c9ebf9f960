"""Where a policy node's chunks come from, by its parameters: the model in this process, or a server elsewhere.

With ``server`` set nothing here imports torch or transformers, and no checkpoint is read: the robot's computer needs
neither a GPU nor the weights.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_vla_core.embodiment import Embodiment, contract_difference, load_robot
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Engine
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_ros.node_utils import declare

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
    """

    engine: Engine
    embodiment: Embodiment
    checkpoint_id: Callable[[], str]
    description: str
    warm: bool
    trained_prefix: int | None = None


def declare_engine(node: Any) -> None:
    """Declares the parameters that ``make_engine`` reads."""
    declare(node, "checkpoint", DEFAULT_CHECKPOINT, "Shipped name or folder of the checkpoint", read_only=True)
    declare(node, "embodiment", "", "Robot YAML (name or path); empty: the checkpoint's own", read_only=True)
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


def make_engine(node: Any) -> EngineSetup:
    """The engine that the node's parameters ask for.

    Raises:
        UserError: a parameter is wrong, or checkpoint or server do not belong to this robot.
    """
    if str(node.get_parameter("server").value):
        return _remote(node)
    return _local(node)


def _local(node: Any) -> EngineSetup:
    import torch

    from qwen_vla_core.engine.local import LocalEngine
    from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, resolve_checkpoint, trained_prefix
    from qwen_vla_core.model.device import choose_device

    torch.set_num_threads(int(node.get_parameter("torch_threads").value))
    path = resolve_checkpoint(str(node.get_parameter("checkpoint").value))
    device, dtype = choose_device(str(node.get_parameter("device").value))
    engine = LocalEngine(load_checkpoint(path, device, dtype), compile=bool(node.get_parameter("compile").value))
    checkpoint_id = f"{path.name} {read_config(path)['weights_id'][:12]}"
    embodiment = _matching_embodiment(node, engine.policy.embodiments, path.name)
    description = f"checkpoint {path.name} on {device}"
    return EngineSetup(engine, embodiment, lambda: checkpoint_id, description, False, trained_prefix(path))


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
