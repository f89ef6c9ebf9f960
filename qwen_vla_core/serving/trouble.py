"""Why a policy server does not answer, in words."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidStatus

from qwen_vla_core.errors import UserError
from qwen_vla_core.serving.protocol import CONTRACT, VERSION, ProtocolError

OPEN_TIMEOUT_S = 3.0  # for a connection and for the server's first words


class ServerAway(ConnectionError):
    """There is no answer: the server is gone, restarting, too slow or refuses. Passes by itself, or names the cause."""


class ServerRefused(ServerAway, UserError):
    """The server is there, but this robot, this version or this token does not belong to it."""


class Superseded(ServerAway):
    """A newer epoch has begun while this was computed: the answer was dropped."""


def check_url(url: str) -> None:
    """Raises a UserError unless it is a websocket's address."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("ws", "wss") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"server '{url}' is no address like ws://host:8000 or wss://host:8000")


def closing(url: str, error: ConnectionClosed) -> ServerAway:
    """In words, how a connection ended."""
    code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (None, "")
    if code is None or code == 1006:
        return ServerAway(f"server {url} is away: the connection broke")
    if code == 1001:
        return ServerAway(f"server {url} is away: it was shut down")
    return ServerAway(f"server {url} closed the connection: {reason or 'no reason given'} ({code})")


def failure(url: str, error: Exception) -> ServerAway:
    """In words, why there is no connection."""
    if isinstance(error, ProtocolError):
        if error.code in (CONTRACT, VERSION):
            return ServerRefused(f"server {url} refused: {error}")
        return ServerAway(f"server {url}: {error}")
    if isinstance(error, InvalidStatus):
        status, body = error.response.status_code, bytes(error.response.body or b"")[:200].decode(errors="replace")
        if status == 401:
            return ServerRefused(f"server {url} refused the token (server_token_file, QWEN_VLA_TOKEN)")
        if status == 404:
            return ServerRefused(f"server {url}: wrong path: {body.strip()}")
        return ServerAway(f"server {url} is not taking clients: HTTP {status} {body.strip()}")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return ServerAway(f"server {url} is away: no answer within {OPEN_TIMEOUT_S:g} s")
    return ServerAway(f"server {url} is away: {_cause(error)}")


def _cause(error: BaseException) -> str:
    """One line: asyncio's own text for a refused connection lists every address."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
