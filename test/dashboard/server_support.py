"""A dashboard server without ROS behind it: a robot that writes down what it was told, and raw requests."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_ros.dashboard.board import Board
from qwen_vla_ros.dashboard.library import Library
from qwen_vla_ros.dashboard.robot import Answer, describe
from qwen_vla_ros.dashboard.server import Dashboard, ServerThread, Settings
from qwen_vla_ros.dashboard.sessions import Hub
from qwen_vla_ros.dashboard.timeline import Timeline

ROBOT = load_embodiment("aloha")
TOKEN = "a-token-of-enough-characters"


class FakeRobot:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def act(self, action: str, text: str) -> Answer:
        self.told.append((action, text))
        return Answer(action != "stop", f"{action} done")


@dataclass
class Reply:
    """An HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """A running server and its parts."""

    def __init__(self, server: ServerThread, robot: FakeRobot, board: Board, hub: Hub) -> None:
        self.server, self.robot, self.board, self.hub = server, robot, board, hub
        self.host = f"127.0.0.1:{server.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A request as it is given: nothing normalises the path. ``_`` in header names stands for ``-``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()})
        finally:
            connection.close()

    def act(self, action: str, text: str = "", **headers: str) -> Reply:
        return self.ask("POST", "/api/act", {"action": action, "text": text}, **headers)

    def socket(self, **headers: str) -> ClientConnection:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return connect(f"ws://{self.host}/api/socket", additional_headers=given, open_timeout=20, proxy=None)


@contextmanager
def site(rollouts: Path, limit: int = 16, **settings: Any) -> Iterator[Site]:
    """A server on any free port of the loopback."""
    board, timeline, robot = Board(), Timeline(ROBOT.channels), FakeRobot()
    hub = Hub(ROBOT.views, board, timeline, limit)
    chosen = Settings(port=0, **settings)
    dashboard = Dashboard(chosen, robot, hub, Library(rollouts), describe(ROBOT, True))
    server = ServerThread(dashboard, chosen)
    try:
        yield Site(server, robot, board, hub)
    finally:
        server.close()


def episode(folder: Path, **about: Any) -> Path:
    """A folder that looks like a recorded episode, with an empty bag."""
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.mcap").write_bytes(b"not a bag")
    known = {"instruction": "take the cube", "outcome": "aborted", "started": "2025-01-31T10:00:00+00:00"}
    (folder / "episode.json").write_text(json.dumps({**known, **about}))
    return folder
