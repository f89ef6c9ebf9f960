"""``qwen-vla up``: the graph as data, and a supervisor that reports a dead node and stops the rest in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from graph_support import Watcher

from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import resource_dir
from qwen_vla_ros import up
from qwen_vla_ros.bringup import (
    CONTROLLER_PROFILE,
    NodeSpec,
    build_graph,
    command_line,
    next_run_dir,
    node_environment,
)

ROOT = Path(__file__).parents[2]
SLEEPER = """
import signal, sys, time
def on_int(*_):
    print("{name} stopped", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, on_int)
print("{name} started", flush=True)
while True:
    time.sleep(0.05)
"""


def names(specs: list[NodeSpec]) -> set[str]:
    return {spec.name for spec in specs}


def test_the_graph_follows_its_arguments() -> None:
    assert names(build_graph()) == {"controller_node", "recorder_node", "policy_node", "sim_node"}
    assert names(build_graph(sim=False, record=False)) == {"controller_node", "policy_node"}
    by_name = {
        spec.name: spec for spec in build_graph(use_sim_time=True, episodes=3, instruction="pick up the red cube")
    }
    assert "use_sim_time" not in by_name["sim_node"].parameters and by_name["sim_node"].parameters["publish_clock"]
    assert by_name["policy_node"].parameters["use_sim_time"] is True
    assert by_name["sim_node"].ends_graph and not by_name["policy_node"].ends_graph
    assert max(by_name.values(), key=lambda spec: spec.stop_order).name == "controller_node"
    # In simulation the simulator gives the instruction, after it has reset the world.
    assert "instruction" not in by_name["policy_node"].parameters
    assert by_name["sim_node"].parameters["instruction"] == "pick up the red cube"
    robot = {spec.name: spec for spec in build_graph(sim=False, instruction="go")}
    assert robot["policy_node"].parameters["instruction"] == "go"
    assert (
        robot["recorder_node"].parameters["instruction"] == "go"
    )  # no topic tells it: its first episode begins with it
    assert robot["controller_node"].parameters["start_on_activate"] is True
    assert "dashboard_node" not in robot
    page = build_graph(mock=True, dashboard=True, dashboard_read_only=True, run_dir="/lab/rollouts/today")[-1]
    assert page.name == "dashboard_node" and page.optional and page.parameters["rollouts"] == "/lab/rollouts"
    assert page.parameters["read_only"] is True and page.parameters["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embodiment": "alhoa"}, "alhoa"),
        ({"sim": False, "episodes": 2}, "episodes need the simulator"),
        ({"log_level": "loud"}, "log_level 'loud'"),
        ({"strategy": "teleport"}, "strategy 'teleport'"),
        ({"params_file": "/nowhere.yaml"}, "params_file '/nowhere.yaml'"),
        ({"dashboard": True, "dashboard_host": "0.0.0.0"}, "dashboard_host 0.0.0.0 is not a loopback address"),
        ({"dashboard": True, "dashboard_token_file": "/nowhere"}, "token file /nowhere"),
    ],
)
def test_mistakes_are_one_line_that_names_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_graph(**arguments)
    assert "\n" not in str(caught.value)


def test_parameters_reach_the_command_line_as_what_they_are() -> None:
    spec = NodeSpec("n", "sim_node", namespace="/lab", parameters={"a": 'say "1.0"', "b": True, "c": 2, "d": 0.5})
    command = command_line(spec)
    assert 'a:="say \\"1.0\\""' in command and "b:=true" in command and "c:=2" in command and "d:=0.5" in command
    assert "__ns:=/lab" in command


@pytest.mark.usefixtures("no_profile_chosen")
def test_environment_has_the_shipped_transport_profile_unless_the_user_chose_one() -> None:
    wanted = node_environment({})
    profile = str(resource_dir("config") / "fastdds.xml")
    assert wanted["FASTRTPS_DEFAULT_PROFILES_FILE"] == wanted["FASTDDS_DEFAULT_PROFILES_FILE"] == profile
    assert wanted["MUJOCO_GL"] == "egl"
    graph = {spec.name: spec.environment["FASTDDS_DEFAULT_PROFILES_FILE"] for spec in build_graph("aloha")}
    assert graph.pop("controller_node") == str(resource_dir("config") / CONTROLLER_PROFILE)
    assert set(graph.values()) == {profile}
    chosen = node_environment({"FASTDDS_DEFAULT_PROFILES_FILE": "mine.xml", "MUJOCO_GL": "osmesa"})
    assert not any("PROFILES" in key for key in chosen) and "MUJOCO_GL" not in chosen


def test_run_folders_never_collide(tmp_path: Path) -> None:
    assert len({next_run_dir(tmp_path) for _ in range(3)}) == 3


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, str], NodeSpec]:
    """Nodes whose process is a short script: supervision needs no ROS."""
    scripts: dict[str, str] = {}
    monkeypatch.setattr(up, "command_line", lambda spec: [sys.executable, "-c", scripts[spec.name]])

    def make(name: str, stop_order: int, script: str = SLEEPER) -> NodeSpec:
        scripts[name] = script.replace("{name}", name)
        return NodeSpec(name, name, stop_order=stop_order, ends_graph=name == "sim")

    return make


def test_a_dead_node_is_reported_and_the_rest_stops_with_the_controller_last(scripted: Callable) -> None:
    lines: list[str] = []
    nodes = [scripted("controller", 3), scripted("policy", 0), scripted("recorder", 2)]
    die = "import os, time\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.01)\nos._exit(7)"
    nodes.append(scripted("sim", 1, die))
    go = Path(f"/tmp/qwen_vla_go_{os.getpid()}")
    os.environ["GO"] = str(go)

    def echo(line: str) -> None:
        lines.append(line)
        if sum("started" in text for text in lines) == 3:
            go.touch()

    try:
        outcome = up.supervise(nodes, echo)
    finally:
        go.unlink(missing_ok=True)
        del os.environ["GO"]
    assert outcome == up.Outcome("sim died", {"sim": 7})
    assert "[up] sim died (exit code 7): stopping the rest" in lines
    stopped = [line.split()[1] for line in lines if line.endswith("stopped")]
    assert stopped == ["policy", "recorder", "controller"]


def test_a_dead_dashboard_stops_nothing_and_comes_back(scripted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "RESTART_AFTER_S", 0.05)
    monkeypatch.setattr(up, "RESTARTS", 2)
    stop, lines = threading.Event(), []

    def echo(line: str) -> None:
        lines.append(line)
        if "go on without it" in line:
            stop.set()

    die = "print('serving', flush=True); raise SystemExit(1)"
    page = replace(scripted("dashboard", 0, die), optional=True)
    outcome = up.supervise([scripted("controller", 3), page], echo, stop)
    assert outcome == up.Outcome("stopped", {})  # nothing has failed that the robot needs
    assert lines.count("[dashboard] serving") == 3
    assert lines.count("[up] dashboard ended (exit code 1): the others go on, it is started again") == 2
    assert "[controller] controller stopped" in lines


def test_a_users_mistake_in_the_dashboard_is_told_once(scripted: Callable) -> None:
    stop, lines = threading.Event(), []

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith("[up]"):
            stop.set()

    page = replace(scripted("dashboard", 0, "raise SystemExit(2)"), optional=True)
    assert up.supervise([scripted("controller", 3), page], echo, stop).failed == {}
    assert "[up] dashboard ended (exit code 2): the others go on without it" in lines


def test_a_finished_job_ends_the_graph_without_failure(scripted: Callable) -> None:
    outcome = up.supervise([scripted("controller", 3), scripted("sim", 1, "print('done')")], lambda _: None)
    assert outcome == up.Outcome("finished", {})


def test_a_node_that_ignores_ctrl_c_is_stopped_all_the_same(
    scripted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "GRACE_S", {signal.SIGINT: 0.3, signal.SIGTERM: 0.3, signal.SIGKILL: 2.0})
    deaf = "import signal, time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\nprint('started', flush=True)\n"
    stop, lines = threading.Event(), []

    def echo(line: str) -> None:
        lines.append(line)
        if "started" in line:
            stop.set()

    outcome = up.supervise([scripted("deaf", 0, deaf + "while True: time.sleep(1)")], echo, stop)
    assert outcome == up.Outcome("stopped", {})
    assert any("SIGTERM" in line for line in lines) and any("SIGKILL" in line for line in lines)


def test_summary_counts_episodes_and_names_the_folder(tmp_path: Path) -> None:
    episodes = [{"outcome": "success"}, {"outcome": "success"}]
    (tmp_path / "summary.json").write_text(json.dumps({"success": 2, "failure": 0, "aborted": 0, "episodes": episodes}))
    result = up.summarise(up.Outcome("finished", {}), tmp_path)
    assert up.summary_line(result) == f"2 episodes: 2 success, 0 failure; rollouts in {tmp_path}"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert up.summarise(up.Outcome("policy_node died", {"policy_node": 2}), empty)["rollouts"] is None
    assert not empty.exists()


def test_one_ctrl_c_ends_the_real_graph_cleanly(watcher: Watcher, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    params = tmp_path / "params.yaml"
    params.write_text("sim_node:\n  ros__parameters:\n    episode_timeout_s: 599.0\n")
    command = [sys.executable, "-m", "qwen_vla_core.cli", "up", "aloha", "--checkpoint", str(checkpoint), "--json"]
    command += ["--rollouts", str(tmp_path / "rollouts"), "--params-file", str(params), "--use-sim-time"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            watcher.wait_for(lambda: watcher.status.get("controller", {}).get("mode") == "running", 90, "motion")
        finally:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=60)
    logged = (tmp_path / "log").read_text()
    assert process.returncode == 0, logged
    result = json.loads(output)
    assert result["ended"] == "stopped" and result["failed_nodes"] == {}
    assert "SIGTERM" not in logged and "Traceback" not in logged, logged
    assert re.search(r"^\[dashboard_node\] dashboard: http://127\.0\.0\.1:\d+/ ", logged, re.MULTILINE), logged
    assert (Path(result["rollouts"]) / "episode_000" / "episode.json").is_file()


def test_a_policy_that_cannot_start_ends_the_graph_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen_vla_core.cli", "up", "aloha", "--checkpoint", str(tmp_path / "none")]
    command += ["--rollouts", str(tmp_path / "rollouts"), "--no-record"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert "policy_node cannot start" in ended.stdout and "policy_node died (exit code 2)" in ended.stdout
