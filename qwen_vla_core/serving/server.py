"""The policy server: one port for websockets, ``GET /healthz`` and ``GET /metrics``.

The event loop only moves messages. Decoding runs in a small pool and inference in one thread, so that a slow, silent or
hostile client costs the others nothing but its share of the engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Engine
from qwen_vla_core.serving.access import authorised, check_binding
from qwen_vla_core.serving.batching import MicroBatcher
from qwen_vla_core.serving.connection import ClientConnection, Shared
from qwen_vla_core.serving.metadata import ServerMetadata
from qwen_vla_core.serving.openpi import PATH as OPENPI_PATH
from qwen_vla_core.serving.openpi import OpenpiMapping
from qwen_vla_core.serving.protocol import MALFORMED, MAX_MESSAGE_BYTES, ProtocolError
from qwen_vla_core.serving.statistics import ClientStatistics

INVALID, REFUSED, INTERNAL, TRY_LATER = 1007, 1008, 1011, 1013  # websocket close codes (RFC 6455, IANA)
CLOSE_TIMEOUT_S = 2.0
PING_INTERVAL_S, PING_TIMEOUT_S = 10.0, 20.0
logger = logging.getLogger("qwen_vla.serving")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to serve.

    Attributes:
        host: address to bind to; any but a loopback one needs ``token``.
        port: 0: a free one.
        token: clients must show it; empty: none needed.
        tls: from ``access.server_tls``; None: unencrypted.
        max_clients: more are refused.
        max_message_bytes: a longer message ends its connection.
        max_batch: most requests in one inference.
        max_wait_s: how long a request may wait for others when the engine is free.
        drain_timeout_s: how long requests in flight may take once the server is told to end.
        openpi: how observations in openpi's layout are read.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = dataclasses.field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    max_clients: int = 16
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_batch: int = 8
    max_wait_s: float = 0.0
    drain_timeout_s: float = 10.0
    openpi: OpenpiMapping = dataclasses.field(default_factory=OpenpiMapping)


class PolicyServer:
    """Serves an engine until ``stop`` is called."""

    def __init__(self, engine: Engine, metadata: ServerMetadata, config: ServerConfig) -> None:
        """
        Raises:
            UserError: the address would need a token.
        """
        check_binding(config.host, config.token)
        self.config = config
        self.metadata = dataclasses.replace(
            metadata, max_message_bytes=config.max_message_bytes, max_batch=config.max_batch
        )
        self.port = config.port
        self._engine = engine
        self._clients: dict[ServerConnection, ClientConnection] = {}
        self._past = {"clients": 0, "requests": 0, "answered": 0, "failed": 0, "superseded": 0}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops = 0
        self._stop_asked = asyncio.Event()
        self._started = time.monotonic()

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = self.config.host or "0.0.0.0"
        return f"{'wss' if self.config.tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def stop(self) -> None:
        """Ends the server: the first call drains it, a second one cuts that short. Safe from any thread or signal."""
        self._stops += 1
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop_asked.set)

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves; returns when drained.

        Args:
            ready: called once clients can connect; ``port`` and ``url`` are then the real ones.

        Raises:
            UserError: the address cannot be bound to.
        """
        config = self.config
        self._loop = asyncio.get_running_loop()
        self._batcher = MicroBatcher(self._engine, config.max_batch, config.max_wait_s, lambda: len(self._clients))
        pool = ThreadPoolExecutor(2, "decode")
        self._shared = Shared(self.metadata, self._batcher, pool, config.openpi, lambda: self._stops > 0)
        quiet = logging.getLogger("qwen_vla.serving.websockets")
        quiet.setLevel(logging.CRITICAL)  # every port scan would leave a traceback; what matters is logged here
        try:
            async with serve(
                self._handle,
                config.host or None,
                config.port,
                ssl=config.tls,
                process_request=self._http,
                origins=[None],  # no page in a browser may reach a robot, not even on this machine
                compression=None,
                max_size=config.max_message_bytes,
                max_queue=1,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PING_TIMEOUT_S,
                close_timeout=CLOSE_TIMEOUT_S,
                logger=quiet,
            ) as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                if self._stops:
                    self._stop_asked.set()
                ready()
                await self._stop_asked.wait()
                await self._drain()
        except OSError as error:
            raise UserError(f"cannot serve on --host {config.host} --port {config.port}: {error.strerror}") from error
        finally:
            self._batcher.close(timeout_s=CLOSE_TIMEOUT_S)
            pool.shutdown(wait=False)
        logger.info("closed")

    async def _drain(self) -> None:
        """Waits for what is being answered; new connections and requests are refused meanwhile."""
        deadline = time.monotonic() + self.config.drain_timeout_s
        logger.info("draining: %d clients, %d requests in flight", len(self._clients), len(self._in_flight()))
        while (tasks := self._in_flight()) and (left := deadline - time.monotonic()) > 0 and self._stops < 2:
            self._stop_asked.clear()
            again = asyncio.ensure_future(self._stop_asked.wait())
            await asyncio.wait([*tasks, again], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
        if self._in_flight():
            logger.warning("%d requests were not answered in time", len(self._in_flight()))

    def _in_flight(self) -> list[asyncio.Task[None]]:
        return [task for client in self._clients.values() for task in client.tasks]

    # --- connections -----------------------------------------------------------------------------------------------

    async def _handle(self, websocket: ServerConnection) -> None:
        if self._full() or self._stops:  # several may have passed `_http` at once
            await websocket.close(TRY_LATER, "the server takes no more clients")
            return
        self._past["clients"] += 1
        address = websocket.remote_address
        statistics = ClientStatistics(self._past["clients"], f"{address[0]}:{address[1]}" if address else "?")
        assert websocket.request is not None
        client = ClientConnection(websocket, self._shared, statistics, urlsplit(websocket.request.path).path)
        self._clients[websocket] = client
        try:
            await client.serve()
        except ConnectionClosed:
            pass
        except ProtocolError as error:
            logger.warning("client %d at %s: %s", statistics.number, statistics.address, error)
            await self._end(client, websocket, error)
        except Exception:
            logger.exception("client %d: internal error", statistics.number)
            await websocket.close(INTERNAL, "internal error")
        finally:
            for task in list(client.tasks):
                task.cancel()
            del self._clients[websocket]
            for key in ("requests", "answered", "failed", "superseded"):
                self._past[key] += getattr(statistics, key)
            closed = f"{websocket.close_code} {websocket.close_reason or ''}".strip()
            logger.info("%s; closed: %s", statistics.line(), closed)

    async def _end(self, client: ClientConnection, websocket: ServerConnection, error: ProtocolError) -> None:
        try:
            await client.refuse(error)
        except ConnectionClosed:
            return
        code = INVALID if error.code == MALFORMED else REFUSED
        await websocket.close(code, str(error).encode()[:120].decode(errors="ignore"))

    def _full(self) -> bool:
        return len(self._clients) >= self.config.max_clients

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain requests, and refuses websockets that do not belong here before they are opened."""
        path = urlsplit(request.path).path
        headers = request.headers.get_all("Authorization")
        allowed = authorised(headers[0] if len(headers) == 1 else None, self.config.token)
        if path == "/healthz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._stops else HTTPStatus.OK
            return _json(connection, status, self.health())
        if not allowed:
            reply = _json(connection, HTTPStatus.UNAUTHORIZED, {"error": "wrong or missing token"})
            reply.headers["WWW-Authenticate"] = "Bearer"
            return reply
        if path == "/metrics":
            return _json(connection, HTTPStatus.OK, self.metrics())
        if path != "/" and path != OPENPI_PATH and not path.startswith(OPENPI_PATH + "/"):
            return _json(connection, HTTPStatus.NOT_FOUND, {"error": "paths: /, /openpi[/NAME], /healthz, /metrics"})
        if self._stops:
            return _json(connection, HTTPStatus.SERVICE_UNAVAILABLE, {"error": "draining"})
        if self._full():
            message = f"the server is full: {self.config.max_clients} clients (--max-clients)"
            return _json(connection, HTTPStatus.SERVICE_UNAVAILABLE, {"error": message})
        return None

    def health(self) -> dict[str, Any]:
        """What anybody may know."""
        return {
            "status": "draining" if self._stops else "ok",
            "clients": len(self._clients),
            "waiting": self._batcher.waiting,
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    def metrics(self) -> dict[str, Any]:
        """Everything, for who has the token."""
        totals = dict(self._past)
        connected = [client.statistics for client in self._clients.values()]
        for key in ("requests", "answered", "failed", "superseded"):
            totals[key] += sum(getattr(statistics, key) for statistics in connected)
        return {
            **self.health(),
            "checkpoint": self.metadata.checkpoint_id,
            "totals": totals,
            "batches": {str(size): count for size, count in sorted(self._batcher.batches.items())},
            "per_client": [statistics.report() for statistics in connected],
        }


def _json(connection: ServerConnection, status: HTTPStatus, value: dict[str, Any]) -> Response:
    response = connection.respond(status, json.dumps(value) + "\n")
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = "application/json"
    return response
