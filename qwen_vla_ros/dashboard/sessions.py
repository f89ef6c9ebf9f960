"""One browser's websocket: it is sent what is newest, and nothing more until it has dealt with that. No ROS in here.

A browser says when it has taken a state message and when it has drawn a picture. At most ``STATES_IN_FLIGHT`` states
and one picture per camera are on their way to it at any time. So a slow phone sees fewer pictures, never old ones, and
neither the server's memory nor any other browser, let alone the graph, is touched by it.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Callable
from typing import Any

from aiohttp import WSMsgType, web

from qwen_vla_ros.dashboard.board import Board
from qwen_vla_ros.dashboard.timeline import Timeline

STATES_IN_FLIGHT = 2
SILENT_S = 20.0  # a browser that has not taken a state for this long is gone
ASLEEP_S = 1.0  # between two states for a page that is not visible
MAX_MESSAGE = 4096  # bytes from a browser
PICTURE_HEADER = struct.Struct("<II")  # camera, number


class Session:
    """See the module's text. Everything runs in the server's event loop.

    Attributes:
        looking: whether the page is visible.
        ready: views of which it waits for a picture.
    """

    def __init__(self, views: tuple[str, ...], board: Board, timeline: Timeline, changed: Callable[[], None]) -> None:
        self.looking = True
        self.ready: set[str] = set(views)
        self._views = views
        self._shown = set(views)
        self._board, self._timeline = board, timeline
        self._changed = changed
        self._known: dict[str, int] = {}
        self._timeline_known = (-1, -1)
        self._channel = 0
        self._in_flight = 0
        self._state_at = 0.0
        self._taken_at = time.monotonic()
        self._pictures: dict[str, tuple[int, bytes]] = {}
        self._bell = asyncio.Event()

    def offer(self, pictures: dict[str, tuple[int, bytes]]) -> None:
        """New pictures (view → number, JPEG), and perhaps a new state."""
        for view, picture in pictures.items():
            if view in self.ready:
                self._pictures[view] = picture  # an older one that could not be sent yet is dropped here
        self._bell.set()

    async def run(self, socket: web.WebSocketResponse) -> None:
        """Until the browser goes."""
        sender = asyncio.create_task(self._send(socket))
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT or not self._take(message.data):
                    await socket.close(code=1008, message=b"not understood")
                    break
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _take(self, text: str) -> bool:
        """A browser's message; False: it is nonsense, and this no page of ours."""
        try:
            message = json.loads(text)
        except ValueError:
            return False
        if not isinstance(message, dict):
            return False
        for key, value in message.items():
            known = self._take_one(key, value)
            if not known:
                return False
        self._bell.set()
        return True

    def _take_one(self, key: str, value: Any) -> bool:
        if key == "taken" and value is True:
            self._in_flight = max(0, self._in_flight - 1)
            self._taken_at = time.monotonic()
        elif key == "drawn" and type(value) is int and 0 <= value < len(self._views):
            if self._views[value] in self._shown:
                self.ready.add(self._views[value])
                self._changed()
        elif key == "looking" and isinstance(value, bool):
            self.looking = value
            self._changed()
        elif key == "channel" and type(value) is int:
            self._channel = value
        elif key == "views" and isinstance(value, list) and set(map(str, value)) <= set(self._views):
            self._shown = set(value)
            self.ready = set(value)
            self._changed()
        else:
            return False
        return True

    async def _send(self, socket: web.WebSocketResponse) -> None:
        while not socket.closed:
            await self._bell.wait()
            self._bell.clear()
            if time.monotonic() - self._taken_at > SILENT_S and self._in_flight >= STATES_IN_FLIGHT:
                await socket.close(code=1001, message=b"no answer")
                return
            try:
                await self._send_newest(socket)
            except (ConnectionError, RuntimeError):
                return

    async def _send_newest(self, socket: web.WebSocketResponse) -> None:
        now = time.monotonic()
        asleep = not self.looking and now - self._state_at < ASLEEP_S
        if self._in_flight < STATES_IN_FLIGHT and not asleep:
            text = self._state()
            if text:
                self._in_flight += 1
                self._state_at = now
                await socket.send_str(text)
        while self._pictures:
            view, (number, data) = self._pictures.popitem()
            if view not in self.ready or not self.looking:
                continue
            self.ready.discard(view)
            self._changed()
            await socket.send_bytes(PICTURE_HEADER.pack(self._views.index(view), number) + data)

    def _state(self) -> str:
        """What is new since the last one, as one JSON object; empty: nothing."""
        parts = []
        for name, (version, text) in self._board.newer(self._known).items():
            self._known[name] = version
            parts.append(f'"{name}":{text}')
        version, text = self._timeline.text(self._channel)
        if self.looking and (version, self._channel) != self._timeline_known:
            self._timeline_known = (version, self._channel)
            parts.append(f'"timeline":{text}')
        return "{" + ",".join(parts) + "}" if parts else ""


class Hub:
    """All browsers; the only part that two threads use.

    Args:
        views: of the robot, in the page's order.
        limit: how many browsers at once.
    """

    def __init__(self, views: tuple[str, ...], board: Board, timeline: Timeline, limit: int) -> None:
        self._views, self._board, self._timeline = views, board, timeline
        self._limit = limit
        self._sessions: set[Session] = set()
        self._sockets: set[web.WebSocketResponse] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted: frozenset[str] = frozenset()
        self._looking = False
        self._number = 0

    @property
    def count(self) -> int:
        """Browsers connected."""
        return len(self._sessions)

    # --- for the sampler's thread ----------------------------------------------------------------------------------

    def looking(self) -> bool:
        """Whether anybody looks."""
        return self._looking

    def wanted(self) -> frozenset[str]:
        """Views of which somebody waits for a picture."""
        return self._wanted

    def tick(self, pictures: dict[str, bytes]) -> None:
        """The board is up to date; never waits for a browser."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._offer, pictures)

    # --- in the event loop -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """The event loop runs; called in it."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Says goodbye to every browser."""
        self._loop = None
        for socket in list(self._sockets):
            await socket.close(code=1001, message=b"the dashboard ends")

    def ring(self) -> None:
        """Something on the board changed; from any thread."""
        self.tick({})

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """One browser, until it goes."""
        if len(self._sessions) >= self._limit:
            raise web.HTTPServiceUnavailable(text=f"{self._limit} browsers are connected already (max_browsers)")
        socket = web.WebSocketResponse(heartbeat=5.0, max_msg_size=MAX_MESSAGE, compress=False)
        session = Session(self._views, self._board, self._timeline, self._recount)
        self._sessions.add(session)
        try:
            await socket.prepare(request)
            self._sockets.add(socket)
            self._recount()
            session.offer({})
            await session.run(socket)
        finally:
            self._sessions.discard(session)
            self._sockets.discard(socket)
            self._recount()
        return socket

    def _offer(self, pictures: dict[str, bytes]) -> None:
        self._number += 1
        numbered = {view: (self._number, data) for view, data in pictures.items()}
        for session in self._sessions:
            session.offer(numbered)

    def _recount(self) -> None:
        awake = [session for session in self._sessions if session.looking]
        self._looking = bool(awake)
        self._wanted = frozenset().union(*(session.ready for session in awake)) if awake else frozenset()
