"""One client's side of the server: greets it, finds out which layout it speaks, answers it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from qwen_vla_core.errors import UserError
from qwen_vla_core.interfaces import Request
from qwen_vla_core.serving import openpi
from qwen_vla_core.serving.batching import Answer, MicroBatcher
from qwen_vla_core.serving.metadata import RobotMetadata, ServerMetadata, check_hello
from qwen_vla_core.serving.protocol import (
    BAD_REQUEST,
    DRAINING,
    FAILED,
    FLOODED,
    SUPERSEDED,
    ProtocolError,
    error_message,
    field,
    message_type,
    pack,
    unpack,
)
from qwen_vla_core.serving.requests import decode_request, encode_prediction
from qwen_vla_core.serving.statistics import ClientStatistics

MAX_IN_FLIGHT = 4  # of one client: a sane one waits for its answer, or has given up on a few
MAX_STEPS = 100
SEND_TIMEOUT_S = 10.0  # a client that reads nothing for so long is gone

T = TypeVar("T")
logger = logging.getLogger("qwen_vla.serving")


@dataclass(frozen=True)
class Shared:
    """What all connections of a server share.

    Attributes:
        metadata: what is served.
        batcher: runs the engine.
        pool: for decoding, so that a large message never stops the loop.
        mapping: how observations in openpi's layout are read.
        draining: whether the server is about to end.
    """

    metadata: ServerMetadata
    batcher: MicroBatcher
    pool: Executor
    mapping: openpi.OpenpiMapping
    draining: Callable[[], bool]


@dataclass(eq=False)
class _Job:
    number: int
    epoch: int
    future: Future[Answer] | None = None
    superseded: bool = False


class ClientConnection:
    """Serves one websocket until it closes."""

    def __init__(self, websocket: ServerConnection, shared: Shared, statistics: ClientStatistics, path: str) -> None:
        self.statistics = statistics
        self.tasks: set[asyncio.Task[None]] = set()  # requests being answered
        self._websocket, self._shared, self._path = websocket, shared, path
        self._jobs: set[_Job] = set()
        self._robot: RobotMetadata | None = None  # of a client with openpi's layout

    async def serve(self) -> None:
        """Metadata, then messages one by one.

        Raises:
            ProtocolError: the client does not belong here, or sends nonsense.
            ConnectionClosed: it is gone.
        """
        if self._path.startswith(openpi.PATH):
            self._speak_openpi()
        await self._send(pack(self._shared.metadata.to_message()))
        async for data in self._websocket:
            arrived = time.monotonic()
            self.statistics.bytes_in += len(data)
            message = await self._in_pool(unpack, data)
            kind = message_type(message)
            if not self.statistics.layout and kind == "":
                self._speak_openpi()
            if self.statistics.layout == "openpi":
                await self._tracked(self._openpi(message, arrived))
            elif kind == "hello" and not self.statistics.layout:
                name, robots = check_hello(message, self._shared.metadata)
                self.statistics.name, self.statistics.embodiments = name, robots
                self.statistics.layout = "qwen_vla"
                await self._send(pack({"type": "welcome", "client": self.statistics.number}))
                logger.info("client %d: %s for %s", self.statistics.number, name, ", ".join(robots))
            elif kind == "predict" and self.statistics.layout:
                await self._predict(message, arrived)
            elif kind == "cancel" and self.statistics.layout:
                number = field(message, "id", int, "cancel")
                self._withdraw([job for job in self._jobs if job.number == number])
            else:
                raise ProtocolError(f"unexpected message of type {kind!r:.40}" + self._expected())

    def _expected(self) -> str:
        return ", expected 'predict'" if self.statistics.layout else ", expected 'hello'"

    def _speak_openpi(self) -> None:
        if not self.statistics.layout:
            self.statistics.layout = "openpi"
            self._robot = openpi.choose_robot(self._shared.mapping, self._shared.metadata, self._path)
            self.statistics.embodiments = (self._robot.name,)

    async def refuse(self, error: ProtocolError) -> None:
        """Says why, in the client's layout, before the connection is closed."""
        if self.statistics.layout == "openpi":
            await self._send(str(error))
        else:
            await self._send(pack(error_message(str(error), error.code)))

    # --- this project's layout -------------------------------------------------------------------------------------

    async def _predict(self, message: dict[str, Any], arrived: float) -> None:
        number, epoch = field(message, "id", int, "predict"), field(message, "epoch", int, "predict")
        steps = None if message.get("steps") is None else field(message, "steps", int, "predict")
        entries = field(message, "requests", list, "predict")
        statistics = self.statistics
        statistics.requests += 1
        if epoch > statistics.epoch:
            statistics.epoch = epoch
            self._withdraw([job for job in self._jobs if job.epoch < epoch])
        refusal = None
        if self._shared.draining():
            refusal = error_message("the server is draining: it ends and takes no new requests", DRAINING, number)
        elif epoch < statistics.epoch:
            statistics.superseded += 1
            refusal = error_message(f"epoch {epoch} is over, {statistics.epoch} has begun", SUPERSEDED, number)
        elif self._flooded():
            refusal = error_message(f"{MAX_IN_FLIGHT} requests of this client are waiting already", FLOODED, number)
        elif not 1 <= len(entries) <= self._shared.metadata.max_batch:
            limit = self._shared.metadata.max_batch
            refusal = error_message(f"{len(entries)} requests in a message, from 1 to {limit}", BAD_REQUEST, number)
        elif steps is not None and not 1 <= steps <= MAX_STEPS:
            refusal = error_message(f"{steps} Euler steps, from 1 to {MAX_STEPS} are taken", BAD_REQUEST, number)
        if refusal is not None:
            statistics.failed += refusal["code"] != SUPERSEDED
            await self._send(pack(refusal))
            return
        job = _Job(number, epoch)
        self._jobs.add(job)
        self._start(self._answer(job, steps, entries, arrived))

    def _flooded(self) -> bool:
        """Whether this client waits for too much; what it has withdrawn counts little, but not nothing."""
        waiting = sum(not job.superseded for job in self._jobs)
        return waiting >= MAX_IN_FLIGHT or len(self.tasks) >= 4 * MAX_IN_FLIGHT

    def _withdraw(self, jobs: list[_Job]) -> None:
        """Nobody waits for these any more: what still queues is not computed."""
        for job in jobs:
            job.superseded = True
            if job.future is not None:
                job.future.cancel()

    async def _answer(self, job: _Job, steps: int | None, entries: list[Any], arrived: float) -> None:
        """Decodes, waits for the engine and sends the answer or the reason why there is none."""
        metadata, allowed = self._shared.metadata, self.statistics.embodiments

        def decode() -> list[Request]:
            return [decode_request(entry, metadata, allowed) for entry in entries]

        number = job.number
        try:
            requests = await self._in_pool(decode)
            answer = await self._ask(requests, steps, job)
            reply: dict[str, Any] = {
                "type": "chunks",
                "id": number,
                "epoch": job.epoch,
                "predictions": [encode_prediction(prediction) for prediction in answer.predictions],
            }
            total_s = time.monotonic() - arrived
            reply["server"] = {"queue": answer.queue_s, "inference": answer.inference_s, "total": total_s}
            self.statistics.add(answer.queue_s, answer.inference_s, total_s, answer.batch)
        except asyncio.CancelledError:
            if not job.superseded:
                raise  # the client is gone
            self.statistics.superseded += 1
            reply = error_message("withdrawn by the client, or its epoch is over", SUPERSEDED, number)
        except Exception as error:
            reply = error_message(*self._blame(error), number)
        finally:
            self._jobs.discard(job)
        await self._send(pack(reply))

    async def _ask(self, requests: list[Request], steps: int | None, job: _Job) -> Answer:
        if job.superseded:
            raise asyncio.CancelledError
        job.future = self._shared.batcher.submit(requests, steps)
        return await asyncio.wrap_future(job.future)

    def _blame(self, error: Exception) -> tuple[str, str]:
        """(message, code) of a request that failed; a bug keeps its traceback in the server's log."""
        self.statistics.failed += 1
        if isinstance(error, (ProtocolError, UserError)):
            return str(error), BAD_REQUEST
        logger.error("client %d: inference failed", self.statistics.number, exc_info=error)
        return f"inference failed: {error}", FAILED

    # --- openpi's layout -------------------------------------------------------------------------------------------

    async def _openpi(self, message: dict[Any, Any], arrived: float) -> None:
        robot, mapping = self._robot, self._shared.mapping
        assert robot is not None
        self.statistics.requests += 1
        try:
            if self._shared.draining():
                raise ProtocolError("the server is draining: it ends and takes no new requests", DRAINING)
            request = await self._in_pool(openpi.read_observation, message, mapping, robot)
            answer = await self._ask([request], None, _Job(0, 0))
            reply: bytes | str = pack(openpi.answer(answer.predictions[0], answer.inference_s, answer.queue_s))
            self.statistics.add(answer.queue_s, answer.inference_s, time.monotonic() - arrived, answer.batch)
        except Exception as error:
            reply = self._blame(error)[0]
        await self._send(reply)

    # --- plumbing --------------------------------------------------------------------------------------------------

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._guarded(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _guarded(self, work: Any) -> None:
        with contextlib.suppress(ConnectionClosed):  # the reading side notices too and ends
            await work

    async def _tracked(self, work: Any) -> None:
        """Awaits work that a draining server has to wait for."""
        await self._start(work)

    async def _in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._shared.pool, call, *arguments)

    async def _send(self, data: bytes | str) -> None:
        try:
            await asyncio.wait_for(self._websocket.send(data), SEND_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.warning("client %d reads nothing: closing", self.statistics.number)
            self._websocket.transport.abort()
            return
        self.statistics.bytes_out += len(data)
