"""``qwen-vla serve``: one model for many robots, over websockets."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from typing import Any

from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import DEFAULT_CHECKPOINT
from qwen_vla_core.serving.access import TOKEN_VARIABLE, check_binding, is_loopback, read_token, server_tls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``qwen-vla serve``."""
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="shipped name or checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1; any other needs a token)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: a free one")
    parser.add_argument("--token-file", default="", metavar="FILE", help="file with the token that clients must show")
    parser.add_argument(
        "--token", default="", help=f"the token itself (others on this machine can see it; or {TOKEN_VARIABLE})"
    )
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="certificate chain (PEM): serve wss://")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its private key (PEM)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, CUDA where there is one"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of the model (default: 1)")
    parser.add_argument("--max-clients", type=int, default=16, metavar="N", help="more are refused (default: 16)")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="requests per inference (default: 8)")
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="how long a request waits for others when the model is free (default: 0)",
    )
    parser.add_argument("--max-message-mb", type=float, default=64.0, metavar="MB", help="default: 64")
    parser.add_argument(
        "--drain-timeout", type=float, default=10.0, metavar="S", help="for requests in flight at the end (default: 10)"
    )
    parser.add_argument("--openpi", default="", metavar="FILE", help="YAML: how openpi clients' observations are read")
    parser.add_argument("--json", action="store_true", help="print the address as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; returns 0."""
    _check(args)
    token = read_token(args.token, args.token_file)
    check_binding(args.host, token)
    tls = server_tls(args.tls_cert, args.tls_key)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if tls is None and not is_loopback(args.host):
        logging.warning("pictures and the token travel unencrypted: use --tls-cert and --tls-key, or a tunnel")
    engine, metadata = _load(args)

    from qwen_vla_core.serving.openpi import OpenpiMapping, read_mapping
    from qwen_vla_core.serving.server import PolicyServer, ServerConfig

    config = ServerConfig(
        host=args.host,
        port=args.port,
        token=token,
        tls=tls,
        max_clients=args.max_clients,
        max_message_bytes=int(args.max_message_mb * 2**20),
        max_batch=args.max_batch,
        max_wait_s=args.max_wait_ms / 1e3,
        drain_timeout_s=args.drain_timeout,
        openpi=read_mapping(args.openpi, metadata) if args.openpi else OpenpiMapping(),
    )
    server = PolicyServer(engine, metadata, config)

    def ready() -> None:
        if args.json:
            print(json.dumps({"url": server.url, **metadata.to_message()}), flush=True)
        else:
            print(f"serving {metadata.checkpoint_id} ({', '.join(metadata.robots)}) on {server.url}", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    asyncio.run(server.run(ready))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: from 0 to 65535")
    for name, low, high in (
        ("threads", 1, 256),
        ("max_clients", 1, 1024),
        ("max_batch", 1, 256),
        ("max_wait_ms", 0, 1000),
        ("max_message_mb", 0.01, 1024),
        ("drain_timeout", 0, 3600),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: from {low:g} to {high:g}")


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(engine, metadata), warmed up for every robot of the checkpoint."""
    import torch

    from qwen_vla_core.engine.local import LocalEngine
    from qwen_vla_core.engine.neutral import neutral_observation
    from qwen_vla_core.interfaces import Request
    from qwen_vla_core.model.checkpoint import load_checkpoint, read_config, resolve_checkpoint
    from qwen_vla_core.model.device import choose_device
    from qwen_vla_core.serving.metadata import describe_policy

    torch.set_num_threads(args.threads)
    path = resolve_checkpoint(args.checkpoint)
    device, dtype = choose_device(args.device)
    policy = load_checkpoint(path, device, dtype)
    engine = LocalEngine(policy)
    metadata = describe_policy(policy, path, read_config(path)["weights_id"], tuple(getattr(engine, "strategies", ())))
    began = time.monotonic()
    for name, robot in policy.embodiments.items():
        engine.predict([Request(neutral_observation(robot), name)])
    logging.info("checkpoint %s on %s, warm-up %.2f s", path.name, device, time.monotonic() - began)
    return engine, metadata
