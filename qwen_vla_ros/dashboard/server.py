"""The web server: pages, buttons, websocket, rollouts. An event loop in a thread of its own; no ROS in here."""

from __future__ import annotations

import asyncio
import errno
import json
import mimetypes
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from aiohttp import web

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES
from qwen_vla_core.serving.access import check_binding, is_loopback
from qwen_vla_ros.bringup import DASHBOARD_TOKEN, DEFAULT_HOST, DEFAULT_PORT
from qwen_vla_ros.dashboard.guard import HEADERS, Guard
from qwen_vla_ros.dashboard.library import Library
from qwen_vla_ros.dashboard.robot import ACTIONS, MAX_TEXT, TEXT_ACTIONS, Robot
from qwen_vla_ros.dashboard.sessions import Hub

TRIED_PORTS = 50  # the wanted one and those after it
MAX_BODY = 8192  # bytes of a request
START_TIMEOUT_S = 10.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Settings:
    """Where and for whom to serve.

    Attributes:
        host: address to bind; any but a loopback one needs a token.
        port: the wanted one; where it is taken, the next free one. 0: any.
        token: what browsers must show; empty: nothing.
        read_only: no button does anything.
        tls: encryption; None: plain HTTP.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    token: str = ""
    read_only: bool = False
    tls: ssl.SSLContext | None = None

    def check(self) -> None:
        """Refuses the network without a token.

        Raises:
            UserError: the address is open to others and the token missing or short.
        """
        check_binding(self.host, self.token, "dashboard host", f"token_file or {DASHBOARD_TOKEN}")


class Dashboard:
    """The pages' handlers around a robot, its board and its rollouts.

    Args:
        about: what the page needs to know once (``robot.describe``).
    """

    def __init__(self, settings: Settings, robot: Robot, hub: Hub, library: Library, about: dict[str, Any]) -> None:
        settings.check()
        self._settings = settings
        self._robot, self._hub, self._library = robot, hub, library
        self._about = about
        self._guard = Guard(settings.token, settings.tls is not None)
        self._files = _static_files()

    def app(self) -> web.Application:
        """The application; one event loop's."""
        app = web.Application(middlewares=[self._headers], client_max_size=MAX_BODY)
        app.router.add_get("/", self._page)
        app.router.add_get("/static/{name}", self._static)
        app.router.add_post("/login", self._login)
        app.router.add_get("/api/hello", self._guarded(self._hello))
        app.router.add_get("/api/socket", self._guarded(self._hub.serve))
        app.router.add_post("/api/act", self._guarded(self._act))
        app.router.add_get("/api/rollouts", self._guarded(self._rollouts))
        app.router.add_post("/api/label", self._guarded(self._label))
        app.router.add_get("/api/rollouts/{run}/{episode}/film", self._guarded(self._film))
        app.on_startup.append(self._on_startup)
        app.on_shutdown.append(self._on_shutdown)
        return app

    async def _on_startup(self, _app: web.Application) -> None:
        self._hub.open()

    async def _on_shutdown(self, _app: web.Application) -> None:
        await self._hub.close()
        await self._library.close()

    @web.middleware
    async def _headers(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every answer, errors included, carries the headers that keep other sites away from it."""
        try:
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(HEADERS)
            raise
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            self._guard.check_site(request)
            self._guard.check_token(request)
            return await handler(request)

        return guarded

    # --- pages -----------------------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return self._file("index.html", request)

    async def _static(self, request: web.Request) -> web.StreamResponse:
        return self._file(request.match_info["name"], request)

    def _file(self, name: str, _request: web.Request) -> web.StreamResponse:
        """A page's file: only those found at start exist, so that no path leads anywhere else."""
        found = self._files.get(name)
        if found is None:
            raise web.HTTPNotFound(text="no such file")
        kind, data = found
        return web.Response(body=data, content_type=kind, charset="utf-8", headers={"Cache-Control": "no-cache"})

    async def _login(self, request: web.Request) -> web.StreamResponse:
        self._guard.check_site(request)
        return await self._guard.login(request, (await _body(request)).get("token"))

    async def _hello(self, _request: web.Request) -> web.StreamResponse:
        return _json({**self._about, "read_only": self._settings.read_only, "outcomes": OUTCOMES})

    # --- buttons ---------------------------------------------------------------------------------------------------

    async def _act(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        self._check_writable()
        action = body.get("action")
        if action not in ACTIONS:
            raise web.HTTPBadRequest(text=f"action: one of {', '.join(ACTIONS)}")
        text = _text(body.get("text", "")) if action in TEXT_ACTIONS else ""
        answer = await self._robot.act(str(action), text)
        return _json({"ok": answer.ok, "message": answer.message}, status=200 if answer.ok else 409)

    def _check_writable(self) -> None:
        if self._settings.read_only:
            raise web.HTTPForbidden(text="this dashboard is read-only")

    # --- rollouts --------------------------------------------------------------------------------------------------

    async def _rollouts(self, _request: web.Request) -> web.StreamResponse:
        return _json(await self._library.rows())

    async def _label(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        self._check_writable()
        outcome = body.get("outcome")
        if outcome not in OUTCOMES:
            raise web.HTTPBadRequest(text=f"outcome: one of {', '.join(OUTCOMES)}")
        try:
            row = await self._library.label(str(body.get("name", "")), str(outcome), _text(body.get("note", "")))
        except KeyError:
            raise web.HTTPNotFound(text="no such rollout") from None
        except UserError as error:
            return _json({"ok": False, "message": str(error)}, status=409)
        return _json({"ok": True, "message": f"{row['name']}: {outcome}", "rollout": row})

    async def _film(self, request: web.Request) -> web.StreamResponse:
        """The film, or 202 while it is being made: ask again."""
        name = f"{request.match_info['run']}/{request.match_info['episode']}"
        try:
            film = await self._library.film(name)
        except KeyError:
            raise web.HTTPNotFound(text="no such rollout") from None
        except UserError as error:
            return _json({"state": "failed", "message": str(error)}, status=409)
        if film is None:
            return _json({"state": "making"}, status=202)
        return web.FileResponse(film, headers={**HEADERS, "Content-Type": "video/mp4", "Cache-Control": "no-cache"})


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request. Its content type is one that no other site's form can send."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        body = json.loads(await request.text())
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest(text="no JSON") from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="a JSON object is needed")
    return body


def _text(value: object) -> str:
    """One line of an operator's text."""
    if not isinstance(value, str):
        raise web.HTTPBadRequest(text="text: a string is needed")
    line = " ".join(value.split())
    if len(line) > MAX_TEXT:
        raise web.HTTPBadRequest(text=f"text: {len(line)} characters, at most {MAX_TEXT}")
    if not line.isprintable():
        raise web.HTTPBadRequest(text="text: has characters that cannot be printed")
    return line


def _json(value: object, status: int = 200) -> web.Response:
    return web.json_response(value, status=status, headers={"Cache-Control": "no-store"})


def _static_files() -> dict[str, tuple[str, bytes]]:
    """Name → (content type, content) of every file of the page."""
    found = {}
    for file in resources.files("qwen_vla_ros.dashboard").joinpath("static").iterdir():
        if file.is_file():
            kind = "text/javascript" if file.name.endswith(".js") else mimetypes.guess_type(file.name)[0]
            found[file.name] = (kind or "application/octet-stream", file.read_bytes())
    if "index.html" not in found:
        raise UserError("the dashboard's pages are not installed; fix: reinstall qwen_vla_ros")
    return found


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket on the port, or on the next free one.

    Raises:
        UserError: none of them can be bound.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    problem: OSError | None = None
    for tried in range(port, min(port + TRIED_PORTS, 65536)) if port else (0,):
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((address[0], tried, *address[2:]))
            opened.listen(64)
            return opened
        except OSError as error:
            opened.close()
            problem = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    raise UserError(f"dashboard: cannot listen on {host}:{port}: {problem}")


class ServerThread:
    """Runs a dashboard in a thread of its own.

    Attributes:
        address: what to open in a browser.
        shared: whether other computers can reach it.
    """

    def __init__(self, dashboard: Dashboard, settings: Settings) -> None:
        """Returns when it listens.

        Raises:
            UserError: it cannot.
        """
        self._socket = open_socket(settings.host, settings.port)
        self.shared = not is_loopback(settings.host)
        self.port = int(self._socket.getsockname()[1])
        host = socket.gethostname() if settings.host in ("", "0.0.0.0", "::") else settings.host
        host = f"[{host}]" if ":" in host else host
        self.address = f"{'https' if settings.tls else 'http'}://{host}:{self.port}/"
        self._dashboard, self._tls = dashboard, settings.tls
        self._started = threading.Event()
        self._problem: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._thread.start()
        self._started.wait(START_TIMEOUT_S)
        if self._problem is not None:
            raise UserError(f"dashboard: the server did not start: {self._problem}")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._problem = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        runner = web.AppRunner(self._dashboard.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket, ssl_context=self._tls).start()
            self._started.set()
            await self._ending.wait()
        finally:
            await runner.cleanup()

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the server and waits for its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(timeout=5.0)
