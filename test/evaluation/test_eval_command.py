"""``qwen-vla eval run``: rates that add up, and mistakes named before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.evaluation.episodes import execute_steps_of
from qwen_vla_core.evaluation.report import print_report, summarise


def row(target: str, chosen: str | None, seconds: float = 2.0, other: dict[str, Any] | None = None) -> dict[str, Any]:
    """One episode; it succeeded when the named object was chosen."""
    success = chosen == target
    result = {"seed": 0, "target": target, "chosen": chosen, "success": success, "seconds": seconds, "metrics": {}}
    return result if other is None else {**result, "other": other}


def fraction(report: dict[str, Any], key: str) -> tuple[int, int]:
    return report[key]["successes"], report[key]["trials"]


def test_success_and_wrong_object_are_counted_apart() -> None:
    rows = [row("red", "red", 2.0), row("red", "green", 12.0), row("blue", None, 12.0), row("blue", "blue", 3.0)]
    report = summarise(rows, {"task": "pick"})
    assert fraction(report, "success") == (2, 4) and report["success"]["rate"] == 0.5
    assert fraction(report, "wrong_object") == (1, 4)
    assert report["mean_seconds_to_success"] == pytest.approx(2.5)
    assert report["settings"] == {"task": "pick"} and report["episodes"] == rows
    low, high = report["success"]["interval_95"]
    assert 0.14 < low < 0.16 and 0.84 < high < 0.86
    assert not {"other_object_success", "named_of_chosen", "both_instructions"} & set(report)


def test_language_counts_both_instructions_of_a_scene() -> None:
    rows = [
        row("red", "red", other=row("green", "green")),  # followed both
        row("red", "red", other=row("green", "red")),  # always takes the red one
        row("blue", None, other=row("red", "red")),
        row("blue", "blue", other=row("red", None)),
    ]
    report = summarise(rows, {})
    assert fraction(report, "success") == (3, 4)
    assert fraction(report, "other_object_success") == (2, 4)
    assert fraction(report, "both_instructions") == (1, 4)
    assert fraction(report, "named_of_chosen") == (5, 6)
    assert fraction(report, "wrong_object") == (0, 4)


def test_nothing_chosen_is_no_success_and_no_division_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    report = summarise([row("red", None, 12.0, other=row("green", None))], {})
    assert report["mean_seconds_to_success"] is None and "named_of_chosen" not in report
    print_report(report)
    out = capsys.readouterr().out
    assert "0/1" in out and "nan" not in out


def test_the_report_names_every_rate_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(summarise([row("red", "red", 2.0, other=row("green", "green"))] * 10, {}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("[" in line and "]" in line for line in lines[:5])
    assert "10/10 = 100% [72%, 100%]" in lines[0] and lines[-1].endswith(" 2.0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--episodes", "0"], "--episodes 0: give at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--execute-steps", "0"], "--execute-steps 0"),
        (["--flow-steps", "0"], "--flow-steps 0"),
        (["--workers", "0"], "--workers 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--gif", "film.mp4"], "--gif film.mp4"),
        (["--embodiment", "no_such_robot"], "no_such_robot"),
        (["--checkpoint", "no-such-checkpoint"], "no-such-checkpoint"),
        (["--checkpoint", "no-such-checkpoint", "--workers", "2"], "no-such-checkpoint"),
        (["--checkpoint", "."], "config.json is missing"),
        (["--suite", "juggling"], "--suite juggling: use one of aloha, widowx"),
        (["--suite", "aloha", "--embodiment", "widowx"], "--suite aloha says which robot it needs"),
        (["--suite", "aloha", "--axis", "weather"], "--axis weather: this suite has in_distribution, colour"),
        (["--suite", "aloha", "--task", "place"], "--task place: use one of pick, transfer"),
        (["--axis", "colour"], "name a --suite"),
        (["--output", "result.json"], "must end in .jsonl"),
        (["--resume"], "--resume: name the --output"),
        (["--until-interval-below", "1.5"], "give a width between 0 and 1"),
        (["--ros", "--workers", "2"], "--ros: runs the graph as it is"),
        (["--rollouts", "here"], "add --ros"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    arguments: list[str],
    named: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run", *arguments]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert named in error and "\n" not in error and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_look_comes_as_often_as_the_robots_yaml_says(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    arguments = ["eval", "run", "--embodiment", "mobile_base", "--expert", "--episodes", "1", "--json"]
    used = []
    for extra in ([], ["--execute-steps", "3"]):
        assert main([*arguments, *extra]) == 0
        used.append(json.loads(capsys.readouterr().out)["settings"]["execute_steps"])
    assert used == [load_embodiment("mobile_base").control.execute_steps, 3]
    assert execute_steps_of("of_a_checkpoint_only") == 5


def test_a_word_that_is_no_task_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "--task", "juggle"]) == 2
    assert "--task juggle: use one of pick, transfer, all" in capsys.readouterr().err


def test_only_metrics_that_every_episode_has_are_averaged() -> None:
    rows = [{**row("red", "red"), "metrics": {"spl": 1.0, "bumps": 2.0}}, {**row("red", None), "metrics": {"spl": 0.0}}]
    assert summarise(rows, {})["metrics"] == {"spl": 0.5}


def test_metrics_of_a_world_are_averaged_over_all_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row("red", "red"), "metrics": {"spl": 1.0}}, {**row("red", None), "metrics": {"spl": 0.0}}]
    report = summarise(rows, {})
    assert report["metrics"] == {"spl": 0.5}
    print_report(report)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["spl,", "mean", "0.500"]
