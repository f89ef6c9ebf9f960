"""A server's engine, used like the one in this process: ``RemoteEngine`` satisfies ``interfaces.Engine``.

A thread of its own keeps the connection: it connects, checks the server's metadata, and goes on trying while the server
is away. ``predict`` never waits for that: without a connection it fails at once and says why, so that a robot's policy
reports it and the controller holds. Nothing in here imports torch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Prediction, Request
from qwen_vla_core.serving.access import client_tls
from qwen_vla_core.serving.metadata import ServerMetadata, check_hello, hello_message
from qwen_vla_core.serving.pictures import MODES
from qwen_vla_core.serving.protocol import (
    BAD_REQUEST,
    DRAINING,
    FLOODED,
    MAX_MESSAGE_BYTES,
    SUPERSEDED,
    ProtocolError,
    error_message,
    field,
    message_type,
    pack,
    unpack,
)
from qwen_vla_core.serving.requests import decode_prediction, encode_request
from qwen_vla_core.serving.trouble import (
    OPEN_TIMEOUT_S,
    ServerAway,
    ServerRefused,
    Superseded,
    check_url,
    closing,
    failure,
)

FIRST_DELAY_S, LAST_DELAY_S = 0.1, 2.0  # between two attempts; it doubles
PING_INTERVAL_S, PING_TIMEOUT_S = 2.0, 4.0  # a pulled cable says nothing by itself


@dataclasses.dataclass
class LinkStatistics:
    """What has become of this client's requests.

    Attributes:
        connections: how often a server was reached.
        answered: requests with an answer in time.
        timeouts: requests without one.
        superseded: answers dropped because a newer epoch had begun.
        late: answers that came after their request had been given up.
        bytes_sent: of requests.
    """

    connections: int = 0
    answered: int = 0
    timeouts: int = 0
    superseded: int = 0
    late: int = 0
    bytes_sent: int = 0


class RemoteEngine:
    """Asks a policy server; safe to use from several threads."""

    def __init__(
        self,
        url: str,
        robots: Embodiment | Sequence[Embodiment],
        *,
        token: str = "",
        ca_file: str = "",
        name: str = "",
        timeout_s: float = 2.0,
        pictures: str = "auto",
        jpeg_quality: int = 90,
    ) -> None:
        """Starts connecting; see ``wait_ready``.

        Args:
            url: ``ws://host:port`` or ``wss://host:port``.
            robots: that this client will ask for; the server checks that it drives them.
            token: if the server wants one.
            ca_file: certificate to trust instead of the system's.
            name: this client's, in the server's log.
            timeout_s: for an answer.
            pictures: ``auto`` (reduced as the model would, where that changes no bit, else raw), ``raw``, ``reduced``
                (as auto) or ``jpeg`` (reduced where possible, then lossy).
            jpeg_quality: 1 to 100.

        Raises:
            UserError: a value is impossible.
        """
        check_url(url)
        if pictures not in MODES:
            raise UserError(f"server_pictures '{pictures}' is none of {', '.join(MODES)}")
        if not 1 <= jpeg_quality <= 100 or timeout_s <= 0:
            raise UserError("the server's time-out must be positive and the JPEG quality from 1 to 100")
        self.url = url
        self.steps: int | None = None  # Euler steps; None: the checkpoint's. May be changed between calls.
        self.statistics = LinkStatistics()
        self._robots = {r.name: r for r in ([robots] if isinstance(robots, Embodiment) else robots)}
        self._hello = hello_message(self._robots, name or socket.gethostname())
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = client_tls(url, ca_file)
        self._timeout_s, self._pictures, self._quality = timeout_s, pictures, jpeg_quality
        self._changed = threading.Condition()  # guards what follows
        self._epoch = 0
        self._connection: ClientConnection | None = None
        self._metadata: ServerMetadata | None = None
        self._last_metadata: ServerMetadata | None = None
        self._trouble: ServerAway = ServerAway(f"server {url} has not answered yet")
        self._attempts = 0
        self._closed = False
        # Only the loop's thread touches these.
        self._pending: dict[int, tuple[int, asyncio.Future[dict[str, Any]]]] = {}  # id → (epoch, answer)
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="policy server link", daemon=True)
        self._thread.start()

    # --- for the robot ---------------------------------------------------------------------------------------------

    def predict(self, requests: Sequence[Request]) -> list[Prediction]:
        """One prediction per request, in order.

        Raises:
            ServerAway: there is no server, or no answer in time; it is being looked for meanwhile.
            ServerRefused: it is there and does not want this robot.
            Superseded: ``new_epoch`` was called meanwhile.
            UserError: the request does not fit the robot.
            RuntimeError: the server's engine failed.
        """
        with self._changed:
            connection, metadata, epoch = self._connection, self._metadata, self._epoch
            if connection is None or metadata is None:
                raise self._trouble_now()
        answers: list[Prediction] = []
        for first in range(0, len(requests), metadata.max_batch):
            answers += self._ask(requests[first : first + metadata.max_batch], connection, metadata, epoch)
        return answers

    def new_epoch(self) -> int:
        """What was asked before is of no interest any more: ``predict`` calls that wait end with ``Superseded``."""
        with self._changed:
            self._epoch += 1
            epoch = self._epoch
        self._soon(self._end_older, epoch)
        return epoch

    def wait_ready(self, timeout_s: float) -> ServerMetadata:
        """The server's metadata once it is connected.

        Raises:
            ServerRefused: it does not want this robot.
            ServerAway: not reached in time.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._metadata is not None or isinstance(self._trouble, ServerRefused) or self._closed,
                timeout_s,
            )
            if self._metadata is None:
                raise self._trouble_now()
            return self._metadata

    @property
    def checkpoint_id(self) -> str:
        """Of the server reached last; empty before the first."""
        with self._changed:
            return "" if self._last_metadata is None else self._last_metadata.checkpoint_id

    @property
    def trouble(self) -> str:
        """Why there is no connection; empty while there is one."""
        with self._changed:
            return "" if self._connection is not None else str(self._trouble_now())

    def close(self) -> None:
        """Ends the connection; waiting calls fail."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            connection = self._connection
            self._trouble = ServerAway(f"the connection to {self.url} was closed")
            self._connection = self._metadata = None
            self._changed.notify_all()
        self._soon(lambda: self._background(self._end(connection)))
        self._thread.join(timeout=OPEN_TIMEOUT_S)

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _trouble_now(self) -> ServerAway:
        """A fresh exception: one raised in two threads would mix their tracebacks."""
        attempts = f" ({self._attempts} attempts)" if self._attempts > 1 else ""
        return type(self._trouble)(f"{self._trouble}{attempts}")

    def _ask(
        self, requests: Sequence[Request], connection: ClientConnection, metadata: ServerMetadata, epoch: int
    ) -> list[Prediction]:
        began = time.monotonic()
        entries = []
        for request in requests:
            if request.embodiment not in self._robots:
                raise UserError(f"embodiment {request.embodiment!r} is none of {', '.join(self._robots)}")
            entries.append(encode_request(request, metadata, self._pictures, self._quality))
        message = {"type": "predict", "epoch": epoch, "steps": self.steps, "requests": entries}
        try:
            future = asyncio.run_coroutine_threadsafe(self._exchange(message, connection, metadata, epoch), self._loop)
        except RuntimeError as error:
            raise ServerAway(f"the connection to {self.url} was closed") from error
        try:
            reply = future.result(self._timeout_s)
        except concurrent.futures.CancelledError as error:
            raise ServerAway(f"the connection to {self.url} was closed") from error
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            self.statistics.timeouts += 1
            raise ServerAway(f"server {self.url} gave no answer within {self._timeout_s:g} s") from error
        return self._predictions(reply, requests, metadata, time.monotonic() - began)

    def _predictions(
        self, reply: Mapping[str, Any], requests: Sequence[Request], metadata: ServerMetadata, total_s: float
    ) -> list[Prediction]:
        if message_type(reply) == "error":
            text, code = str(reply.get("message")), reply.get("code")
            if code == SUPERSEDED:
                raise Superseded(text)
            if code == BAD_REQUEST:
                raise UserError(f"server {self.url}: {text}")
            if code in (DRAINING, FLOODED):
                raise ServerAway(f"server {self.url}: {text}")
            raise RuntimeError(f"server {self.url}: {text}")
        try:
            entries = field(reply, "predictions", list)
            server = field(reply, "server", dict)
            times = {key: field(server, key, float, "server") for key in ("queue", "total")}
            if len(entries) != len(requests):
                raise ProtocolError(f"{len(entries)} predictions for {len(requests)} requests")
            robots = [metadata.robots[request.embodiment] for request in requests]
            predictions = [decode_prediction(entry, robot) for entry, robot in zip(entries, robots, strict=True)]
        except ProtocolError as error:
            raise RuntimeError(f"server {self.url} sent nonsense: {error}") from error
        self.statistics.answered += 1
        # "transport" is everything that a local engine would not have cost, but for waiting in the server's queue.
        extra = {"queue": times["queue"], "transport": max(0.0, total_s - times["total"])}
        return [dataclasses.replace(p, seconds={**p.seconds, **extra}) for p in predictions]

    def _soon(self, call: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return  # the loop has ended

    # --- the link's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._keep_connected())
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _end(self, connection: ClientConnection | None) -> None:
        """Says good-bye, so that the server does not log a broken client."""
        self._fail_pending(self._trouble)
        if connection is not None:
            await connection.close()
        if self._main is not None:
            self._main.cancel()

    def _background(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_connected(self) -> None:
        delay_s = FIRST_DELAY_S
        while not self._closed:
            try:
                async with connect(
                    self.url,
                    additional_headers=self._headers,
                    ssl=self._tls,
                    compression=None,
                    proxy=None,  # a robot's server is on its own network
                    open_timeout=OPEN_TIMEOUT_S,
                    close_timeout=0.5,
                    ping_interval=PING_INTERVAL_S,
                    ping_timeout=PING_TIMEOUT_S,
                    max_size=MAX_MESSAGE_BYTES,
                ) as connection:
                    metadata = await asyncio.wait_for(self._greet(connection), OPEN_TIMEOUT_S)
                    self._found(connection, metadata)
                    delay_s = FIRST_DELAY_S
                    while True:
                        self._receive(await connection.recv())
            except ConnectionClosed as error:
                trouble = closing(self.url, error)
            except (OSError, asyncio.TimeoutError, WebSocketException, ProtocolError) as error:
                trouble = failure(self.url, error)
            self._lost(trouble)
            if isinstance(trouble, ServerRefused):
                delay_s = LAST_DELAY_S  # nothing changes by asking often
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # many robots must not come back in step
            delay_s = min(2 * delay_s, LAST_DELAY_S)

    async def _greet(self, connection: ClientConnection) -> ServerMetadata:
        """Metadata in, hello out, welcome in; both sides check that they fit."""
        message = unpack(await connection.recv())
        self._raise_error(message)
        if message_type(message) != "metadata":
            raise ProtocolError(f"its first message is of type {message_type(message)!r:.40}: not this kind of server")
        metadata = ServerMetadata.from_message(message)
        check_hello(self._hello, metadata)  # what the server would say, in the same words
        await connection.send(pack(self._hello))
        answer = unpack(await connection.recv())
        self._raise_error(answer)
        if message_type(answer) != "welcome":
            raise ProtocolError(f"expected 'welcome', got {message_type(answer)!r:.40}")
        return metadata

    def _raise_error(self, message: Any) -> None:
        if message_type(message) == "error" and message.get("id") is None:
            raise ProtocolError(str(message.get("message")), str(message.get("code")))

    def _found(self, connection: ClientConnection, metadata: ServerMetadata) -> None:
        with self._changed:
            if self._closed:
                return
            self.statistics.connections += 1
            self._connection, self._metadata, self._last_metadata = connection, metadata, metadata
            self._attempts = 0
            self._changed.notify_all()

    def _lost(self, trouble: ServerAway) -> None:
        with self._changed:
            if not self._closed:
                self._connection = self._metadata = None
                self._trouble = trouble
                self._attempts += 1
                self._changed.notify_all()
        self._fail_pending(trouble)

    def _fail_pending(self, trouble: ServerAway) -> None:
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(type(trouble)(str(trouble)))
        self._pending.clear()

    def _receive(self, data: bytes | str) -> None:
        message = unpack(data)
        self._raise_error(message)
        number = field(message, "id", int)
        epoch, future = self._pending.pop(number, (0, None))
        if future is None or future.done():
            self.statistics.late += 1
        elif epoch < self._epoch:
            self.statistics.superseded += 1
            future.set_result(error_message("a newer epoch has begun", SUPERSEDED, number))
        else:
            future.set_result(message)

    async def _exchange(
        self, message: dict[str, Any], connection: ClientConnection, metadata: ServerMetadata, epoch: int
    ) -> dict[str, Any]:
        """Sends one request and waits for its answer."""
        if connection is not self._connection:
            raise self._trouble_now()
        self._next_id += 1
        number = self._next_id
        data = pack({**message, "id": number})
        if len(data) > metadata.max_message_bytes:
            limit = metadata.max_message_bytes
            raise UserError(
                f"server {self.url}: a request of {len(data)} bytes, its limit is {limit} (--max-message-mb); "
                "send smaller pictures (server_pictures: jpeg)"
            )
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._pending[number] = (epoch, future)
        if epoch < self._epoch:  # it began while this was on its way here
            self._end_older(self._epoch)
        try:
            if not future.done():
                await connection.send(data)
                self.statistics.bytes_sent += len(data)
            return await future
        except ConnectionClosed as error:
            raise closing(self.url, error) from error
        except asyncio.CancelledError:
            self._background(self._withdraw(connection, number))
            raise
        finally:
            self._pending.pop(number, None)

    async def _withdraw(self, connection: ClientConnection, number: int) -> None:
        """The answer came too late: the server need not begin with it."""
        with contextlib.suppress(ConnectionClosed, asyncio.TimeoutError):
            await asyncio.wait_for(connection.send(pack({"type": "cancel", "id": number})), self._timeout_s)

    def _end_older(self, epoch: int) -> None:
        for number, (asked, future) in self._pending.items():
            if asked < epoch and not future.done():
                self.statistics.superseded += 1
                future.set_result(error_message("a newer epoch has begun", SUPERSEDED, number))
