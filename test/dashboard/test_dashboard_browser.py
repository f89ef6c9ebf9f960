"""An operator at the page: a real graph on a mock robot, a real headless Chromium, everything by clicking.

The tests of ``operator`` run in their order, as a shift does: each goes on where the one before left the robot.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 (rclpy) is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")

from graph_support import Graph, Watcher, ros_domain  # noqa: F401
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from server_support import TOKEN, episode, site
from std_msgs.msg import Bool

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.rollouts.index import find_rollouts
from qwen_vla_ros.bringup import build_graph
from qwen_vla_ros.dashboard.browser import PHONE, become_phone, chromium
from qwen_vla_ros.estop import ESTOP_REQUEST_TOPIC
from qwen_vla_ros.node_utils import LATCHED_QOS

ROBOT = load_embodiment("aloha")
EPISODES = (
    ("success", "take the red cube", "clean grasp"),
    ("success", "take the blue cube", "second try"),
    ("partial", "stack the cubes", "one of two"),
    ("failure", "hand over the cube", "dropped it"),
    ("aborted", "take the green cube", "somebody walked in"),
)
TOUCH = 44  # px: what a thumb hits


class Page:
    """The page, as an operator reads it."""

    def __init__(self, window: Any) -> None:
        self.window = window

    def find(self, selector: str) -> Any:
        return self.window.find_element(By.CSS_SELECTOR, selector)

    def wait(self, what: str, condition: Any, timeout_s: float = 60.0) -> Any:
        fleeting = (StaleElementReferenceException,)  # a list is drawn anew while it is read
        waiting = WebDriverWait(self.window, timeout_s, 0.05, fleeting)
        return waiting.until(lambda _: condition(), what)

    def click(self, selector: str) -> None:
        self.wait(f"{selector} to be enabled", lambda: self.find(selector).is_enabled())
        self.window.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def write(self, selector: str, text: str) -> None:
        self.find(selector).clear()
        self.find(selector).send_keys(text)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def says(self, selector: str, word: str, timeout_s: float = 60.0) -> None:
        self.wait(f"{selector} to say '{word}'", lambda: word in self.text(selector), timeout_s)

    def number(self, script: str) -> float:
        return float(self.window.execute_script(f"return {script}"))


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    try:
        with chromium() as opened:
            yield opened
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shift(ros_domain: int, tmp_path_factory: pytest.TempPathFactory, window: Any) -> Iterator[SimpleNamespace]:  # noqa: F811
    """Robot, rollouts and the open page."""
    folder = tmp_path_factory.mktemp("shift")
    yaml = folder / "aloha.yaml"
    yaml.write_text(ROBOT.source_text.replace("size: [640, 480]", "size: [160, 120]"))
    rollouts = folder / "rollouts"
    graph = Graph(
        build_graph(str(yaml), mock=True, run_dir=str(rollouts / "run"), dashboard=True, dashboard_port=0), folder
    )
    watcher = Watcher()
    try:
        page = Page(window)
        log = graph.logs["dashboard_node"]
        found = watcher.wait_for(lambda: re.search(r"dashboard: (\S+)", log.read_text()), 60, "the address")
        watcher.wait_for(lambda: watcher.status.get("policy", {}).get("ready") == "true", 90, "the policy")
        window.get(found[1])
        page.says("#connection", "live")
        yield SimpleNamespace(graph=graph, watcher=watcher, page=page, rollouts=rollouts, address=found[1])
    except BaseException:
        print(graph.log())
        raise
    finally:
        watcher.close()
        graph.close()


def test_the_operator_sees_the_robot(shift: SimpleNamespace) -> None:
    page = shift.page
    assert page.text("#robot-name") == ROBOT.name
    for index in range(len(ROBOT.cameras)):
        canvas = f"document.querySelectorAll('.views canvas')[{index}]"
        page.wait(f"camera {index}", lambda canvas=canvas: page.number(f"+({canvas}.dataset.drawn ?? 0)") > 2)
        pixels = f"new Set({canvas}.getContext('2d').getImageData(0, 0, 160, 120).data).size"
        assert page.number(pixels) > 20, "one colour is no picture"
    page.wait("states", lambda: page.number("document.querySelectorAll('.joint .fill:not([hidden])').length") == 14)
    assert "rad" in page.text(".joint .value")
    levels = {"controller": "warn", "recorder": "ok", "policy": "ok", "mock": "ok", "dashboard": "ok"}
    for name, level in levels.items():  # the controller waits for a first chunk
        page.wait(name, lambda name=name: page.window.find_elements(By.CSS_SELECTOR, f"[data-node={name}]"))
        page.says(f"[data-node={name}] .level", level)
    page.click("[data-node=controller] summary")
    page.says("[data-node=controller] dl", "chunks_accepted")


def test_the_operator_stops_and_starts(shift: SimpleNamespace) -> None:
    page = shift.page
    page.click("#stop")
    page.says("#mode", "idle")
    page.click("#start")
    page.says("#mode", "holding")
    assert not page.find("[data-outcome=success]").is_enabled()  # nothing is being recorded


@pytest.mark.parametrize("number", range(len(EPISODES)))
def test_the_operator_runs_and_labels_an_episode(shift: SimpleNamespace, number: int) -> None:
    page, (outcome, instruction, note) = shift.page, EPISODES[number]
    page.write("#instruction", instruction + Keys.ENTER)
    page.says("#current-instruction", instruction)
    page.says("#recording", "recording")
    page.says("#mode", "running")
    page.wait("consumed actions", lambda: re.search(r" [1-9]\d* of 16 actions consumed", page.text("#plan-words")))
    page.write("#note", note)
    page.click(f"[data-outcome={outcome}]")
    item = f"#rollouts [data-name='run/episode_{number:03d}']"
    page.wait("the rollout", lambda: number + 1 == page.number("document.querySelectorAll('#rollouts li').length"))
    page.wait("its note", lambda: note in page.text(item))
    page.says(f"{item} .outcome", outcome)
    page.says(item, instruction)
    assert page.find("#note").get_attribute("value") == ""
    (found,) = [rollout for rollout in find_rollouts(shift.rollouts) if rollout.number == number]
    assert (found.outcome, found.instruction, found.note, found.judged_by) == (outcome, instruction, note, "operator")


def test_a_film_plays(shift: SimpleNamespace) -> None:
    page = shift.page
    page.click("[data-name='run/episode_000'] .film")
    page.wait("the film", lambda: page.number("document.querySelector('#film').currentTime") > 0.2, 120)
    assert page.number("document.querySelector('#film').videoWidth") > 300
    page.click("#close-film")


def test_a_label_can_be_corrected(shift: SimpleNamespace) -> None:
    page = shift.page
    page.click("[data-name='run/episode_003'] .relabel")
    Select(page.find("#label-outcome")).select_by_value("partial")
    page.write("#label-note", "lifted, then dropped")
    page.click("form.label .primary")
    page.says("[data-name='run/episode_003']", "lifted, then dropped")
    assert [rollout.outcome for rollout in find_rollouts(shift.rollouts)].count("partial") == 2


@pytest.mark.parametrize("way", ["key", "button"])
def test_the_operator_stops_everything(shift: SimpleNamespace, way: str) -> None:
    page, watcher = shift.page, shift.watcher
    if way == "key":
        page.find("#note").send_keys("half a wor", Keys.ESCAPE)  # wherever the focus is
    else:
        page.click("#estop")
    watcher.wait_for(lambda: watcher.status["controller"].get("mode") == "estopped", 20, "the latched stop")
    page.says("#mode", "EMERGENCY STOP")
    page.says("#latched", "latched")
    assert not page.find("#start").is_enabled()
    page.click("#reset")
    watcher.wait_for(lambda: watcher.status["controller"].get("mode") != "estopped", 20, "the reset")
    page.wait("the banner to go", lambda: not page.find("#latched").is_displayed())


def test_the_page_works_on_a_phone(shift: SimpleNamespace) -> None:
    page = shift.page
    become_phone(page.window)
    try:
        page.window.get(shift.address)
        page.says("#connection", "live")
        page.wait("rollouts", lambda: page.number("document.querySelectorAll('#rollouts li').length") == len(EPISODES))
        assert page.number("document.documentElement.scrollWidth") <= PHONE[0]
        small = page.window.execute_script(
            "return [...document.querySelectorAll('button, select, input, summary')].filter((e) => e.offsetParent"
            f" && (e.offsetWidth < {TOUCH} || e.offsetHeight < {TOUCH})).map((e) => e.outerHTML.slice(0, 90))"
        )
        assert small == []
        for place in (0, 99999):
            page.window.execute_script(f"window.scrollTo(0, {place})")
            at = page.window.execute_script("return document.querySelector('#estop').getBoundingClientRect().toJSON()")
            assert at["left"] >= 0 and at["right"] <= PHONE[0] and at["top"] >= 0 and at["bottom"] <= PHONE[1]
        severe = [line["message"] for line in page.window.get_log("browser") if line["level"] == "SEVERE"]
        assert severe == []
    finally:
        page.window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_episodes_are_in_the_report(shift: SimpleNamespace, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "qwen_vla_core.cli", "eval", "report", str(shift.rollouts), "--out", str(report)]
    subprocess.run(command, check=True, timeout=120)
    page = Page(shift.page.window)
    page.window.get(report.as_uri())
    shown = page.text("body")
    for _, instruction, _ in EPISODES:
        assert instruction in shown
    assert "second try" in shown and "lifted, then dropped" in shown
    page.window.get(shift.address)
    page.says("#connection", "live")


def test_what_died_is_seen_at_once(shift: SimpleNamespace) -> None:
    page = shift.page
    page.wait("pictures", lambda: page.number("document.querySelectorAll('figure[data-state=ok]').length") == 3)
    shift.graph.end("mock_node")
    page.wait(
        "stale pictures", lambda: page.number("document.querySelectorAll('figure[data-state=stale]').length") == 3
    )
    page.says("#cameras", "nobody publishes", 30)
    page.says("[data-node=mock]", "silent", 30)
    assert page.text("#connection") == "live"  # the page itself is well
    requests = shift.watcher.listen(Bool, ESTOP_REQUEST_TOPIC, LATCHED_QOS)
    shift.graph.end("controller_node")
    page.says("#mode", "silent", 30)
    page.click("#estop")  # nobody answers: the stop waits on its topic for the next controller
    shift.watcher.wait_for(lambda: [msg.data for _, msg in requests] == [True], 20, "the request")
    page.says("#toasts", ESTOP_REQUEST_TOPIC)
    shift.graph.end("dashboard_node", signal.SIGKILL)
    page.says("#connection", "connection lost", 5)
    page.says("#lost", "Connection lost", 5)
    assert "offline" in str(page.find("body").get_attribute("class"))
    assert shift.graph.processes["recorder_node"].poll() is None  # nothing else minds


def test_a_wrong_token_opens_nothing(window: Any, tmp_path: Path) -> None:
    with site(tmp_path, token=TOKEN) as locked:
        page = Page(window)
        window.get(locked.server.address)
        page.wait("the question", lambda: page.find("#login").is_displayed())
        assert not page.find("#estop").is_displayed() and not page.find("main").is_displayed()
        page.write("#token", "wrong-token-of-some-length" + Keys.ENTER)
        page.says("#login-problem", "not the token")
        page.write("#token", TOKEN + Keys.ENTER)
        page.says("#robot-name", ROBOT.name)
        page.click("#estop")
        page.wait("the press", lambda: locked.robot.told == [("estop", "")])
        window.get(locked.server.address)  # the browser is known now
        page.says("#robot-name", ROBOT.name)


def test_a_read_only_page_has_no_buttons(window: Any, tmp_path: Path) -> None:
    episode(tmp_path / "run" / "episode_000")
    with site(tmp_path, read_only=True) as shown:
        page = Page(window)
        window.get(shown.server.address)
        page.says("#read-only", "read-only")
        page.says("#tally", "1 recorded")
        assert window.find_elements(By.CSS_SELECTOR, "#estop, .writes, .relabel") == []
        window.find_element(By.CSS_SELECTOR, "body").send_keys(Keys.ESCAPE)
        assert page.window.execute_async_script(
            "const done = arguments[0], headers = {'Content-Type': 'application/json'}; fetch('/api/act', "
            "{method: 'POST', headers, body: '{\"action\": \"start\"}'}).then((answer) => done(answer.status))"
        ) == 403  # fmt: skip
        assert shown.robot.told == []
