from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vla_core import cli
from qwen_vla_core.model.checkpoint import save_checkpoint
from qwen_vla_core.model.policy import QwenVLA


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["model", "show", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_paper_parts_are_within_two_percent_of_the_published(capsys: pytest.CaptureFixture[str]) -> None:
    report = show(capsys, "--preset", "paper")
    published = {name: part for name, part in report["parts"].items() if "published" in part}
    expected = {"decoder", "dit_block", "vlm_to_dit", "action_mlps", "timestep_mlp", "output_adaln"}
    assert set(published) == expected
    for name, part in published.items():
        assert abs(part["parameters"] / part["published"] - 1) < 0.02, name
    assert 4.4e9 < report["parts"]["backbone"]["parameters"] < 4.7e9
    assert report["parts"]["state_token"]["parameters"] == 0


def test_small_fits_one_consumer_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    parts = show(capsys, "--preset", "small")["parts"]
    assert 0.8e9 < parts["backbone"]["parameters"] < 0.9e9
    assert 130e6 < parts["decoder"]["parameters"] < 170e6


def test_tiny_is_a_few_million(capsys: pytest.CaptureFixture[str], policy: QwenVLA) -> None:
    parts = show(capsys, "--preset", "tiny")["parts"]
    assert 1e6 < parts["total"]["parameters"] < 4e6
    built = sum(parameter.numel() for parameter in policy.parameters())
    assert abs(built - parts["total"]["parameters"]) < 0.02 * built


def test_a_checkpoint_is_described_with_its_robots(
    capsys: pytest.CaptureFixture[str], policy: QwenVLA, tmp_path: Path
) -> None:
    save_checkpoint(policy, tmp_path / "c", provenance={"steps": 3})
    report = show(capsys, "--checkpoint", str(tmp_path / "c"))
    assert report["embodiments"] == ["aloha"]
    assert report["provenance"] == {"steps": 3}
    assert cli.main(["model", "show", "--checkpoint", str(tmp_path / "c")]) == 0
    assert "steps: 3" in capsys.readouterr().out


def test_an_unknown_preset_or_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["model", "show", "--preset", "huge"]) == 2
    assert "--preset" in capsys.readouterr().err
    assert cli.main(["model", "show", "--checkpoint", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
