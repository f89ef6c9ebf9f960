"""The dry run: shipped robots pass, wrong limits show, and whatever is played stays inside the limits."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import load_embodiment, parse_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.findings import failed
from qwen_vla_core.runtime.rehearsal import rehearse, report


@pytest.mark.parametrize("name", shipped_embodiments(runnable=True))
def test_a_shipped_robot_stands_still_and_follows_a_small_sine(name: str) -> None:
    run = rehearse(load_embodiment(name))
    assert [finding.level for finding in report(run)] == ["ok"] * 4
    assert run.mode == "running"
    if name == "mobile_base":  # a base that cannot go sideways is not asked to
        assert run.amplitude_c[1] == 0.0
    else:
        assert (run.amplitude_c > 0).all()
    moved_c = np.ptp(run.command_tc, axis=0)
    assert (moved_c >= 0.9 * run.amplitude_c).all()
    measured = np.isfinite(run.measured_tc[-1])
    assert (np.ptp(run.measured_tc[:, measured], axis=0) >= 0.9 * run.amplitude_c[measured]).all()


@pytest.mark.parametrize("name", shipped_embodiments(runnable=True))
def test_a_sine_beyond_the_limits_is_changed_and_never_leaves_them(name: str) -> None:
    run = rehearse(load_embodiment(name), scale=60.0)
    robot = run.robot
    findings = report(run)
    assert any(f.subject == "small sine" and f.level == "warn" for f in findings)
    assert run.changes["sine"] and not failed(findings)
    lower_c = np.array([x for group in robot.actions for x in group.limits.lower])
    upper_c = np.array([x for group in robot.actions for x in group.limits.upper])
    velocity_c = np.array([x for group in robot.actions for x in group.limits.velocity])
    assert (run.command_tc >= lower_c).all() and (run.command_tc <= upper_c).all()
    assert (np.abs(run.rates_tc) <= velocity_c * (1 + 1e-9)).all()


def test_a_jump_limit_below_what_a_tick_needs_is_seen() -> None:
    robot = parse_embodiment(load_embodiment("aloha").source_text.replace("max_jump: 1.0", "max_jump: 0.0001"))
    findings = report(rehearse(robot))
    (sine,) = (finding for finding in findings if finding.subject == "small sine")
    assert sine.level == "warn" and "max_jump" in sine.message
    assert any("away from the plan" in finding.message for finding in findings)


def test_the_command_draws_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "run.png"
    assert main(["embodiment", "dry-run", "widowx", "--out", str(picture), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and set(told["amplitudes"]) == set(load_embodiment("widowx").channels)
    pixels = cv2.imread(str(picture))
    assert pixels is not None and pixels.shape[0] > 500 and pixels.std() > 5
    assert main(["embodiment", "dry-run", "widowx", "--out", str(tmp_path / "run.jpg")]) == 2
    assert main(["embodiment", "dry-run", "widowx", "--scale", "0"]) == 2
    said = capsys.readouterr().err
    assert "must end in .png" in said and "--scale" in said
