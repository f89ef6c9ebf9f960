"""The report page: complete by itself, honest about what it shows, and safe whatever a file says."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.evaluation.metrics import Rate
from qwen_vla_core.evaluation.pages.films import worst
from qwen_vla_core.evaluation.results import ResultFile, read_result

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Tags, what they point to, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words += data


def write(path: Path, outcomes: list[bool], instruction: str = "lift the red cube", **header: Any) -> Path:
    about = {"suite": "aloha", "settings": {"checkpoint": path.stem}, "seed": 0, "axes": {"colour": "unseen"}, **header}
    with ResultFile(path, about, resume=False) as file:
        for seed, success in enumerate(outcomes):
            file.append(
                {
                    "key": f"colour/pick/{seed}",
                    "axis": "colour",
                    "task": "pick",
                    "seed": seed,
                    "instruction": instruction,
                    "success": success,
                    "seconds": 2.0 if success else 12.0,
                    "chosen": "red" if success else None,
                    "target": "red",
                    "variant": instruction,
                    "metrics": {"progress": 1.0 if success else 0.25 * (seed % 3)},
                }
            )
    return path


def report(tmp_path: Path, *arguments: object) -> tuple[str, Page]:
    out = tmp_path / "report.html"
    assert main(["eval", "report", *map(str, arguments), "--out", str(out)]) == 0
    text = out.read_text()
    return text, Page(text)


def test_two_results_are_shown_and_compared_with_nothing_from_outside(tmp_path: Path) -> None:
    a = write(tmp_path / "first.jsonl", [True] * 6 + [False] * 14)
    b = write(tmp_path / "second.jsonl", [True] * 16 + [False] * 4)
    text, page = report(tmp_path, a, b, "--films", 0)
    low, high = Rate(6, 20).interval
    assert "6/20 = 30%" in page.words and f"{low:.0%} – {high:.0%}" in page.words and "16/20 = 80%" in page.words
    assert "second against first" in page.words and "+50 points" in page.words and "0.002" in page.words
    assert all(source.startswith("#") for source in page.sources)
    assert not {"script", "link", "iframe", "img"} & set(page.tags) and "@import" not in text and "url(" not in text
    assert page.tags.count("svg") == 2 * 3  # success, stages and times of two results
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_what_files_say_is_never_code(tmp_path: Path) -> None:
    path = write(tmp_path / "evil.jsonl", [True, False], EVIL, axes={"colour": EVIL}, title=EVIL)
    run = tmp_path / f"rollouts{'/'}20250101_000" / "episode_000"
    run.mkdir(parents=True)
    (run / "episode.json").write_text(json.dumps({"outcome": "failure", "instruction": EVIL, "note": EVIL}))
    text, page = report(tmp_path, path, tmp_path / "rollouts", "--films", 0, "--title", EVIL)
    assert not {"script", "img"} & set(page.tags)
    assert page.words.count(EVIL) >= 8 and EVIL not in text


def test_recorded_rollouts_are_counted_by_instruction_with_their_notes(tmp_path: Path) -> None:
    outcomes = ["success", "success", "partial", "failure", "aborted"]
    for number, outcome in enumerate(outcomes):
        folder = tmp_path / "rollouts/20250101_000" / f"episode_{number:03d}"
        folder.mkdir(parents=True)
        told = {"outcome": outcome, "instruction": "fold the towel" if number < 4 else "wait", "note": f"note {number}"}
        (folder / "episode.json").write_text(json.dumps({**told, "seconds": 10.0 + number, "judged_by": "operator"}))
    broken = tmp_path / "rollouts/20250101_000/episode_005"
    broken.mkdir()
    (broken / "episode.json").write_text("{")
    _, page = report(tmp_path, tmp_path / "rollouts")
    assert "fold the towel" in page.words and "2/4 = 50%" in page.words and "not judged" in page.words
    assert all(f"note {number}" in page.words for number in range(5))
    assert "10.5" in page.words  # mean seconds of the two successes
    assert "cannot be read" in page.words and "unfinished" in page.words


def test_what_is_no_result_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([tmp_path / "gone"], "there is no such file or folder"),
        ([tmp_path / "empty"], "holds neither results"),
        ([tmp_path / "empty", "--films", "-1"], "--films -1"),
        ([tmp_path / "empty", "--weights", "here"], "write NAME=FOLDER"),
    ):
        assert main(["eval", "report", *map(str, arguments), "--out", str(tmp_path / "r.html")]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "report", str(tmp_path), "--out", "page.pdf"]) == 2


def test_the_worst_are_those_that_came_least_far_of_every_axis(tmp_path: Path) -> None:
    result = read_result(write(tmp_path / "r.jsonl", [False] * 7 + [True]))
    assert [row["seed"] for row in worst(result, 3)] == [0, 3, 6]
    assert len(worst(result, 50)) == 7 and worst(result, 0) == []


def test_films_are_of_the_episodes_that_failed(tmp_path: Path) -> None:
    """The expert, cut off after a second: the second run ends as the first, and the page holds a playable film."""
    pytest.importorskip("mujoco")
    av = pytest.importorskip("av")
    path = tmp_path / "cut.jsonl"
    run = ["eval", "run", "--suite", "navigation", "--expert", "--timeout", "1", "--axis", "colour", "--task", "goto"]
    assert main([*run, "--episodes", "2", "--output", str(path)]) == 0
    text, page = report(tmp_path, path, "--films", 1)
    (source,) = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", text)
    with av.open(BytesIO(base64.b64decode(source))) as film:
        frames = sum(1 for _ in film.decode(video=0))
        stream = film.streams.video[0]
        assert stream.codec_context.name == "h264" and (stream.width, stream.height) == (640, 240) and frames == 15
    assert "ended otherwise" not in page.words and read_result(path).rows[0]["instruction"] in page.words


def test_a_result_whose_checkpoint_is_gone_has_no_films_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    path = write(
        tmp_path / "lost.jsonl", [False] * 3, settings={"embodiment": "", "suite": "aloha", "checkpoint": "gone"}
    )
    _, page = report(tmp_path, path, "--films", 1)
    assert "no films:" in page.words and "gone" in page.words and "video" not in page.tags
