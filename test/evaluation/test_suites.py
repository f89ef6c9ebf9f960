"""Suites as a user meets them: named without a simulator, run, killed, gone on with, spread over workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.evaluation.definitions import METRICS
from qwen_vla_core.evaluation.results import read_result
from qwen_vla_core.evaluation.suites import SUITES, make_suite
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION, Trial

EMBEDDED = ("aloha", "widowx", "navigation", "belt")
RUN = ["eval", "run", "--suite", "navigation", "--expert", "--axis", IN_DISTRIBUTION, "--task", "goto"]


def test_naming_the_suites_imports_no_simulator() -> None:
    code = (
        "import sys; from qwen_vla_core.cli import main; main(['eval', 'suites', '--json'])\n"
        "assert not {'mujoco', 'torch'} & set(sys.modules), 'imported'"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert [suite["name"] for suite in json.loads(out.stdout)] == list(SUITES)


@pytest.mark.parametrize("name", EMBEDDED)
def test_trials_are_the_same_every_time_and_named_apart(name: str) -> None:
    suite = make_suite(name)
    trials = suite.trials(3, 7)
    assert trials == make_suite(name).trials(3, 7) and len({trial.key for trial in trials}) == len(trials)
    assert len(trials) == 3 * len(suite.axes) * len(suite.tasks)
    assert next(iter(suite.axes)) == IN_DISTRIBUTION and {trial.seed for trial in trials} == {7, 8, 9}
    assert [Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) for trial in trials] == trials
    assert set(suite.metrics) <= set(METRICS)
    assert suite.protocol.horizon("anything") > 0 and suite.protocol.deviations


def test_what_is_missing_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qwen_vla_core.evaluation.suites.embedded.NEEDS", ("no_such_simulator",))
    assert main(["eval", "suites", "aloha"]) == 0
    assert "install: pip install 'qwen_vla_ros[sim]'  (lacks no_such_simulator)" in capsys.readouterr().out
    assert main(["eval", "run", "--suite", "aloha", "--expert"]) == 2
    assert "--suite aloha: install pip install" in capsys.readouterr().err


def seconds_apart(rows: Any) -> list[tuple[str, bool, float]]:
    return [(row["key"], row["success"], row["seconds"]) for row in rows]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    path, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-m", "qwen_vla_core.cli", *RUN, "--output", str(path), "--resume", "--episodes"]
    process = subprocess.Popen([*command, "500"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(read_result(path).rows)
    assert 2 <= done < 500
    wanted = str(done + 2)
    assert main([*RUN, "--episodes", wanted, "--output", str(path), "--resume"]) == 0
    assert main([*RUN, "--episodes", wanted, "--output", str(whole)]) == 0
    assert read_result(path).rows == read_result(whole).rows
    before = path.read_bytes()
    capsys.readouterr()
    assert main([*RUN, "--episodes", wanted, "--output", str(path), "--resume", "--json"]) == 0  # complete already
    assert path.read_bytes() == before
    report = json.loads(capsys.readouterr().out)
    assert report["success"]["trials"] == done + 2 and report["axes"][IN_DISTRIBUTION]["goto"]["metrics"]["spl"] > 0.9
    assert main([*RUN, "--episodes", wanted, "--output", str(path)]) == 2
    assert "add --resume" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["processes", "ray"])
def test_workers_change_nothing(where: str, tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    if where == "ray":
        pytest.importorskip("ray")
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert main([*RUN, "--episodes", "4", "--output", str(here)]) == 0
    workers = ["--workers", "2"] if where == "processes" else ["--ray"]
    command = [sys.executable, "-m", "qwen_vla_core.cli", *RUN, "--episodes", "4", "--output", str(there), *workers]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert out.returncode == 0, out.stderr[-2000:]
    assert read_result(here).rows == read_result(there).rows


def test_an_early_stop_reports_the_wider_interval(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    assert main([*RUN, "--episodes", "100", "--until-interval-below", "0.6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    low, high = report["axes"][IN_DISTRIBUTION]["goto"]["success"]["interval_95"]
    assert report["success"]["trials"] < 10 and high - low < 0.6 and high == 1.0
    assert low < report["success"]["interval_95"][0]


def test_a_sheet_shows_every_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    import cv2

    out = tmp_path / "sheet.png"
    assert main(["eval", "sheet", "--suite", "widowx", "--scenes", "1", "--out", str(out)]) == 0
    assert "6 scenes of 6 axes" in capsys.readouterr().out
    picture = cv2.imread(str(out))
    assert picture.shape[0] > 6 * 210 and picture.shape[1] == 280
    assert main(["eval", "sheet", "--suite", "widowx", "--out", "sheet.gif"]) == 2
