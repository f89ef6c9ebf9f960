"""docs/results.md: what is ours and what is theirs never mix, and the committed page is what the command makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.results import FORMAT
from qwen_vla_core.evaluation.results_page import compare, page, parameters, read_published, stored_results
from qwen_vla_core.evaluation.suites import make_suite
from qwen_vla_core.resources import resource_dir

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, suite: str, cells: dict[str, list[bool]], metrics: Any = None, **settings: Any) -> None:
    """A result file: axis → successes."""
    header = {"format": FORMAT, "suite": suite, "settings": settings, "axes": dict.fromkeys(cells, "")}
    rows = [
        {
            "axis": axis, "task": "t", "key": f"{axis}/t/{i}", "success": success, "seconds": 1.0, "chosen": None,
            "target": None, "metrics": metrics(success) if metrics else {},
        }
        for axis, successes in cells.items()
        for i, success in enumerate(successes)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))


def test_the_committed_page_is_what_the_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "docs" / "results.md"
    assert main(["eval", "results", "--check", "--out", str(committed)]) == 0, capsys.readouterr().out
    assert (committed.parent / "images" / "results.png").stat().st_size > 10_000


def test_ours_stand_beside_theirs_by_axis_and_metric(tmp_path: Path) -> None:
    cells = {"in_distribution": [True] * 9 + [False], "colour": [True, False], "position": [False] * 3}
    write(tmp_path / "small.results" / "aloha.jsonl", "aloha", cells)
    write(
        tmp_path / "small.results" / "belt.jsonl", "belt", {"in_distribution": [True, False]},
        lambda success: {"manipulation_score": 1.0 if success else 0.3},
    )  # fmt: skip
    write(tmp_path / "small.results" / "late.jsonl", "aloha", {"colour": [True]}, latency_ms=100.0)
    write(tmp_path / "small.results" / "other" / "often.jsonl", "aloha", {"colour": [True]}, execute_steps=2)
    write(tmp_path / "small.results" / "rarely.jsonl", "aloha", {"colour": [True]}, execute_steps=5)
    write(tmp_path / "small.results" / "other" / "aloha.jsonl", "aloha", {"colour": [True]})
    row = {"success": True, "seconds": 1.0, "chosen": None, "target": None, "metrics": {}}
    older = {"settings": {"embodiment": "aloha", "task": "pick"}, "episodes": [{"seed": 1, **row}]}
    (tmp_path / "small.results" / "suites").mkdir()
    (tmp_path / "small.results" / "suites" / "pick.json").write_text(json.dumps(older))
    (tmp_path / "small.results" / "broken.json").write_text("{}")
    stored = stored_results(tmp_path)
    assert [(item.checkpoint, item.suite, item.unusual) for item in stored] == [
        ("small", "aloha", ()),
        ("small", "belt", ()),
        ("small", "aloha", ("latency_ms 100.0",)),
        ("small (other)", "aloha", ()),
        ("small (other)", "aloha", ()),  # as often as its YAML says
        ("small", "aloha", ("execute_steps 5",)),
        ("small", "aloha", ()),  # of a time before suites: not beside the suite's own
    ]
    lines = {(line.benchmark, line.axis, line.metric): line for line in compare(read_published(), stored)}
    real = "ALOHA, real robot"
    assert lines[real, "in_distribution", "success"].ours == (("small", "t", Rate(9, 10)),)
    assert lines[real, "colour", "success"].ours == (("small", "t", Rate(1, 2)),)  # neither the late nor the other's
    assert lines[real, "all OOD axes", "success"].ours == (("small", None, Rate(1, 5)),)
    assert lines[real, "background", "success"].ours == ()
    assert lines["DOMINO", "in_distribution", "manipulation_score"].ours == (("small", "t", pytest.approx(65.0)),)
    text = page(tmp_path, tmp_path, "p.png")
    row = next(line for line in text.splitlines() if line.startswith("| colour | success | 88.5 %"))
    assert row.endswith("| small, t: 1/2 = 50% [9%, 91%] | no |")
    assert "| background | success | 80.8 % | not measured | no |" in text
    assert "| LIBERO | all suites | success | 97.9 % | not measured | `--suite libero` |" in text
    assert "latency_ms 100.0 | small.results/late.jsonl" in text


def test_what_is_published_names_suites_axes_and_metrics_that_exist(tmp_path: Path) -> None:
    for benchmark in read_published()["benchmarks"]:
        twin = benchmark["twin"]
        assert benchmark["source"].startswith("readme")
        if twin is not None:
            suite = make_suite(twin)
            assert benchmark["why_not"], benchmark["name"]
            for entry in benchmark["results"]:
                assert entry["axis"] in {*suite.axes, "all OOD axes"}, (benchmark["name"], entry)
                assert entry["metric"] in {"success", *suite.metrics}, (benchmark["name"], entry)
    broken = tmp_path / "published.yaml"
    broken.write_text("benchmarks: [{name: X, twin: nowhere, results: []}]")
    with pytest.raises(UserError, match="benchmark 'X': twin nowhere is no suite"):
        read_published(broken)
    broken.write_text("benchmarks: [{name: X, twin: null, results: [{axis: a, value: 101}]}]")
    with pytest.raises(UserError, match="X, a: value is no percentage"):
        read_published(broken)


def test_the_command_writes_page_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "c" / "small.results" / "aloha.jsonl", "aloha", {"colour": [True, False]})
    out = tmp_path / "docs" / "results.md"
    flags = ["eval", "results", "--results", str(tmp_path / "c"), "--benchmarks", str(tmp_path), "--out", str(out)]
    assert main(flags) == 0
    assert (out.parent / "images" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert main([*flags, "--check"]) == 0
    out.write_text(out.read_text() + "edited\n")
    assert main([*flags, "--check"]) == 1
    assert "is not what `qwen-vla eval results" in capsys.readouterr().out
    assert main(["eval", "results", "--check"]) == 2 and main([*flags[:2], "--results", str(tmp_path / "no")]) == 2


def test_parameters_are_counted_without_loading_weights() -> None:
    assert 1e6 < parameters(resource_dir("checkpoints") / "generalist") < 1e7
