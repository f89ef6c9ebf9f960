"""``qwen-vla embodiment``: what it prints is what the project uses, and exit codes can be trusted in scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vla_core import resources
from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import build_prompt, load_embodiment, shipped_embodiments
from qwen_vla_core.embodiment.schema import schema_text
from qwen_vla_core.errors import UserError
from qwen_vla_core.resources import resource_dir


@pytest.mark.parametrize("name", shipped_embodiments(runnable=True))
def test_show_prints_the_exact_prompt_every_channel_and_every_topic(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = load_embodiment(name)
    assert main(["embodiment", "show", name, "--instruction", "open the drawer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert build_prompt(robot, "open the drawer") in [line.strip() for line in lines]
    words = [line.split() for line in lines]
    for column, channel in enumerate(robot.channels):
        assert any(line[:2] == [str(column), channel] for line in words)
    for group in robot.actions:
        assert any(line[:2] == ["out", group.command.topic] for line in words)
    for topic in [camera.topic for camera in robot.cameras] + [group.topic for group in robot.state]:
        assert any(line[:2] == ["in", topic] for line in words)
    assert any(line[:2] == ["watchdog_ms", f"{robot.safety.watchdog_ms:g}"] for line in words)


def test_show_json_carries_limits_maps_and_simulation_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embodiment", "show", "aloha", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    robot = load_embodiment("aloha")
    assert report["sha256"] == robot.hash and report["policy_sha256"] == robot.policy_hash
    assert report["tensor"] == {"H": 16, "K": 64, "c": 14}
    assert [row["upper"] for row in report["channels"]] == [v for g in robot.actions for v in g.limits.upper]
    assert report["groups"][1]["command_map"]["scale"] == pytest.approx(1.6214 - 0.6197)
    assert report["state"][1]["state_map"]["offset"] == pytest.approx(0.044)
    command = next(row for row in report["topics"] if row["topic"] == robot.actions[0].command.topic)
    assert command["message"] == "interbotix_xs_msgs/msg/JointGroupCommand"
    assert command["in_simulation"] == "std_msgs/msg/Float64MultiArray"


def test_check_exits_0_for_good_files_and_2_when_any_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embodiment", "check", *shipped_embodiments()]) == 0
    capsys.readouterr()
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("watchdog_ms: 500", "watchdog_ms: 5").replace("max_skew_ms", "max_skew"))
    assert main(["embodiment", "check", "aloha", str(bad)]) == 2
    out, err = capsys.readouterr()
    assert "aloha: ok, 14 channels, 3 views" in out
    line = next(number for number, row in enumerate(bad.read_text().splitlines(), 1) if "max_skew" in row)
    assert err == f"{bad}:{line}: safety.max_skew: unknown key; fix: did you mean 'max_skew_ms'?\n"


def test_check_json_lists_every_broken_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (resource_dir("embodiments") / "aloha.yaml").read_text()
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("watchdog_ms: 500", "watchdog_ms: 5").replace("unit: fraction", "unit: volt"))
    assert main(["embodiment", "check", str(bad), "--json"]) == 2
    (result,) = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert [error["key"] for error in result["errors"]] == [
        "state[1].unit",
        "state[3].unit",
        "actions[1].unit",
        "actions[3].unit",
        "safety.watchdog_ms",
    ]


def test_a_missing_file_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embodiment", "show", "nothing.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing.yaml: no such embodiment file; fix: check the path" in err


def test_schema_writes_the_file_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "schema.json"
    assert main(["embodiment", "schema", "--output", str(target)]) == 0
    assert main(["embodiment", "schema"]) == 0
    assert target.read_text() == capsys.readouterr().out == schema_text()


def installed_share(prefix: Path) -> Path:
    """A share directory as an installation makes it."""
    share = prefix / "share" / "qwen_vla_ros"
    (share / "embodiments").mkdir(parents=True)
    (share / "embodiments" / "embodiment.schema.json").write_text("{}")
    return share


def test_resources_are_found_in_a_colcon_install_and_beside_site_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pip" / "lib" / "python3.12" / "site-packages" / "qwen_vla_core"
    package.mkdir(parents=True)
    (package.parent / "launch").mkdir()  # ROS 2's own Python package of that name
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    monkeypatch.setattr(resources.sys, "prefix", str(tmp_path / "empty"))
    monkeypatch.setattr(resources.sysconfig, "get_path", lambda _: str(tmp_path / "empty"))
    monkeypatch.setenv("AMENT_PREFIX_PATH", "")
    share = installed_share(tmp_path / "pip")
    assert resource_dir("embodiments") == share / "embodiments"
    colcon = installed_share(tmp_path / "colcon")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path / 'other'}:{tmp_path / 'colcon'}")
    assert resource_dir("embodiments") == colcon / "embodiments"
    with pytest.raises(UserError, match="'launch' files are not installed; fix: reinstall"):
        resource_dir("launch")
