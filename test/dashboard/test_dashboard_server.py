"""Who may use the dashboard, what it takes from strangers, and that a slow browser slows nobody."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_support import ROBOT, TOKEN, Site, episode, site
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import OUTCOMES
from qwen_vla_ros.dashboard.robot import ACTIONS
from qwen_vla_ros.dashboard.server import Settings, open_socket
from qwen_vla_ros.dashboard.sessions import MAX_MESSAGE, STATES_IN_FLIGHT

FOREIGN = "http://evil.example"


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab") / "rollouts"
    episode(root / "20250131_000" / "episode_000")
    (root.parent / "secret.mp4").write_bytes(b"secret")
    return root


@pytest.fixture(scope="module")
def own(rollouts: Path) -> Iterator[Site]:
    """On loopback, without a token."""
    with site(rollouts) as running:
        yield running


@pytest.fixture(scope="module")
def locked(rollouts: Path) -> Iterator[Site]:
    """With a token."""
    with site(rollouts, token=TOKEN) as running:
        yield running


def wait_until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def close_code(browser: ClientConnection) -> int:
    """With which code the server hangs up; what it says before does not matter."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            browser.recv(timeout=20)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


def hears(browser: ClientConnection, section: str) -> bool:
    """Whether a state with this section comes."""
    while section not in json.loads(browser.recv(timeout=20)):
        browser.send('{"taken": true}')
    return True


@pytest.fixture(autouse=True)
def nothing_told(own: Site, locked: Site) -> None:
    own.robot.told.clear()
    locked.robot.told.clear()


def test_a_page_of_this_computer_may_press_buttons(own: Site) -> None:
    page = own.ask("GET", "/")
    assert page.status == 200 and b"Emergency stop" in page.body
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert own.act("instruction", " take\n the  cube ", Origin=f"http://{own.host}").json == {
        "ok": True,
        "message": "instruction done",
    }
    assert own.robot.told == [("instruction", "take the cube")]
    refused = own.act("stop")
    assert refused.status == 409 and refused.json["ok"] is False  # the robot's own refusal is passed on


def test_everything_the_page_loads_is_in_the_package(own: Site) -> None:
    wanted = ["/static/app.js", "/static/style.css", "/static/icon.svg"]
    for path in wanted:
        reply = own.ask("GET", path)
        assert reply.status == 200, path
        text = reply.body.decode()
        assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
        wanted.extend(f"/static/{part.split(chr(34))[0]}" for part in text.split('from "/static/')[1:])
    assert len(set(wanted)) > 8


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": FOREIGN},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "[::1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8080"},
    ],
    ids=str,
)
def test_a_foreign_page_in_the_operators_browser_can_do_nothing(own: Site, headers: dict[str, str]) -> None:
    assert own.act("start", **headers).status == 403
    assert own.ask("POST", "/api/label", {"name": "x", "outcome": "success"}, **headers).status == 403
    assert own.ask("GET", "/api/rollouts", **headers).status == 403
    assert own.ask("GET", "/api/hello", **headers).status == 403
    if "Host" not in headers:
        with pytest.raises(InvalidStatus) as caught:
            own.socket(**headers)
        assert caught.value.response.status_code == 403
    assert own.robot.told == []


def test_a_form_cannot_press_buttons(own: Site) -> None:
    """A form of another site needs no permission to send, but cannot choose this content type."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = own.ask("POST", "/api/act", b'{"action": "start"}', Content_Type=kind)
        assert reply.status == 415
    assert own.robot.told == []


def test_a_tunnel_may_change_the_port(own: Site) -> None:
    for host in ("localhost:9000", "127.0.0.1:9000", "[::1]:9000"):
        assert own.act("start", Host=host, Origin=f"http://{host}").status == 200


def test_without_the_token_nothing_is_shown_and_nothing_done(locked: Site) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Cookie": "x=y"}):
        assert locked.act("start", **headers).status == 401
        assert locked.ask("GET", "/api/rollouts", **headers).status == 401
        assert locked.ask("GET", "/api/rollouts/20250131_000/episode_000/film", **headers).status == 401
        with pytest.raises(InvalidStatus) as caught:
            locked.socket(**headers)
        assert caught.value.response.status_code == 401
    assert locked.robot.told == []
    assert locked.act("start", Authorization=f"Bearer {TOKEN}").status == 200
    assert locked.act("start", Authorization=f"Bearer {TOKEN}", Origin=FOREIGN).status == 403


def test_a_browser_shows_the_token_once(locked: Site) -> None:
    wrong = locked.ask("POST", "/login", {"token": TOKEN[:-1]})
    assert wrong.status == 401 and "set-cookie" not in wrong.headers
    assert locked.ask("POST", "/login", {"token": ["x"]}).status == 401
    assert locked.ask("POST", "/login", {"token": TOKEN}, Origin=FOREIGN).status == 403
    given = locked.ask("POST", "/login", {"token": TOKEN})
    cookie = given.headers["set-cookie"]
    assert given.status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    session = cookie.split(";")[0]
    assert locked.act("start", Cookie=session).status == 200
    assert locked.act("start", Cookie=session, Origin=FOREIGN).status == 403
    with locked.socket(Cookie=session) as browser:
        assert browser.state.name == "OPEN"
    name = session.split("=")[0]
    assert locked.act("start", Cookie=f"{name}=guessed").status == 401
    assert locked.act("start", Host="127.0.0.1:port", Cookie=session).status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_the_network_needs_a_token(host: str) -> None:
    with pytest.raises(UserError, match="token"):
        Settings(host=host).check()
    with pytest.raises(UserError, match="16"):
        Settings(host=host, token="short").check()
    Settings(host=host, token=TOKEN).check()
    Settings(host="127.0.0.1").check()


def test_read_only_refuses_every_button(rollouts: Path) -> None:
    with site(rollouts, read_only=True) as shown:
        assert shown.ask("GET", "/api/hello").json["read_only"] is True
        for action in ACTIONS:
            assert shown.act(action, "text").status == 403, action
        label = {"name": "20250131_000/episode_000", "outcome": "success", "note": ""}
        assert shown.ask("POST", "/api/label", label).status == 403
        assert shown.robot.told == []
        assert shown.ask("GET", "/api/rollouts").json[0]["outcome"] == "aborted"
        with shown.socket() as browser:
            browser.send('{"action": "start"}')
            assert close_code(browser) == 1008


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 5000, 400),
        (b'{"action": "format"}', 400),
        (b'{"action": ["start"]}', 400),
        (b'{"action": "instruction", "text": 7}', 400),
        (json.dumps({"action": "instruction", "text": "x" * 501}).encode(), 400),
        (json.dumps({"action": "instruction", "text": "a\u0007b\u202e"}).encode(), 400),
        (b'{"text": "' + b"x" * 100_000 + b'"}', 413),
    ],
)
def test_garbage_is_refused(own: Site, body: bytes, status: int) -> None:
    assert own.ask("POST", "/api/act", body).status == status
    assert own.robot.told == []
    assert own.ask("GET", "/api/hello").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../node.py",
        "/static/..%2fnode.py",
        "/static/%2e%2e/node.py",
        "/static//etc/passwd",
        "/api/rollouts/../secret/film",
        "/api/rollouts/..%2f../secret.mp4/film",
        "/api/rollouts/%2e%2e/secret.mp4/film",
        "/api/rollouts/20250131_000/..%2fepisode_000/film",
        "/api/rollouts/20250131_000/episode_000%00/film",
        "/api/rollouts/.films/episode_000/film",
    ],
)
def test_no_name_leads_out_of_the_folder(own: Site, path: str) -> None:
    reply = own.ask("GET", path)
    assert reply.status == 404 and b"secret" not in reply.body


def test_labels_are_kept_with_the_episode(own: Site, rollouts: Path) -> None:
    folder = episode(rollouts / "20250131_001" / "episode_002")
    name = "20250131_001/episode_002"
    reply = own.ask("POST", "/api/label", {"name": name, "outcome": "partial", "note": "half way"})
    assert reply.status == 200 and reply.json["rollout"]["outcome"] == "partial"
    about = json.loads((folder / "episode.json").read_text())
    assert (about["outcome"], about["note"], about["judged_by"]) == ("partial", "half way", "operator")
    assert {row["name"]: row["note"] for row in own.ask("GET", "/api/rollouts").json}[name] == "half way"
    assert own.ask("POST", "/api/label", {"name": "../x", "outcome": "success", "note": ""}).status == 404
    assert own.ask("POST", "/api/label", {"name": name, "outcome": "great", "note": ""}).status == 400
    assert tuple(own.ask("GET", "/api/hello").json["outcomes"]) == OUTCOMES


def test_a_film_that_cannot_be_made_says_why(own: Site) -> None:
    path = "/api/rollouts/20250131_000/episode_000/film"
    wait_until(lambda: own.ask("GET", path).status != 202)
    reply = own.ask("GET", path)
    assert reply.status == 409 and reply.json["message"]


def test_no_rollouts_is_an_empty_list(tmp_path: Path) -> None:
    with site(tmp_path / "none") as fresh:
        assert fresh.ask("GET", "/api/rollouts").json == []


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "7", '{"views": ["/etc/passwd"]}', '{"drawn": 99}', '{"drawn": -1}', '{"drawn": true}', '{"x": 1}'],
)
def test_a_browser_that_talks_nonsense_is_shown_out(own: Site, text: str) -> None:
    with own.socket() as odd, own.socket() as other:
        odd.send(text)
        assert close_code(odd) == 1008
        own.board.put("test", text)
        own.hub.ring()
        assert hears(other, "test")


def test_a_message_that_is_too_long_ends_that_browser_only(own: Site) -> None:
    with own.socket() as odd, own.socket() as other:
        odd.send("x" * (MAX_MESSAGE + 1))
        assert close_code(odd) == 1009
        own.board.put("test", time.monotonic())
        own.hub.ring()
        assert hears(other, "test")


def test_a_slow_browser_is_sent_little_and_slows_nobody(own: Site) -> None:
    """It takes nothing for a while: two states and one picture per view are on their way to it, then nothing more."""
    view, enough = ROBOT.views[0], 20
    done, ticks = threading.Event(), itertools.count()

    def sample() -> None:
        while not done.wait(0.005):
            own.board.put("test", next(ticks))
            own.hub.tick({view: b"picture"})

    with own.socket() as slow, own.socket() as quick:
        wait_until(lambda: own.hub.count == 2)
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            seen = {str: 0, bytes: 0}
            while min(seen.values()) < enough:
                message = quick.recv(timeout=20)
                quick.send('{"taken": true}' if isinstance(message, str) else '{"drawn": 0}')
                seen[type(message)] += 1
        finally:
            done.set()
            sampler.join()
        late: list[str | bytes] = []
        with pytest.raises(TimeoutError):
            while True:
                late.append(slow.recv(timeout=0.3))
        assert sum(isinstance(message, str) for message in late) == STATES_IN_FLIGHT
        assert sum(isinstance(message, bytes) for message in late) == 1
        slow.send('{"taken": true, "drawn": 0}')
        (text,) = [slow.recv(timeout=20)]
        assert json.loads(text)["test"] == next(ticks) - 1 > enough / 2  # what lies between was never sent
        wait_until(lambda: view in own.hub.wanted())
        own.hub.tick({view: b"newest"})
        assert slow.recv(timeout=20)[8:] == b"newest"


def test_a_page_that_is_not_visible_gets_no_pictures(own: Site) -> None:
    with own.socket() as browser:
        wait_until(own.hub.looking)
        browser.send('{"looking": false}')
        wait_until(lambda: not own.hub.looking())
        assert own.hub.wanted() == frozenset()


def test_only_so_many_browsers(tmp_path: Path) -> None:
    with site(tmp_path, limit=1) as small, small.socket():
        with pytest.raises(InvalidStatus) as caught:
            small.socket()
        assert caught.value.response.status_code == 503


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        opened = open_socket("127.0.0.1", port)
        assert port < opened.getsockname()[1] < port + 50
        opened.close()
    with pytest.raises(UserError, match="cannot listen"):
        open_socket("192.0.2.1", 8080)
