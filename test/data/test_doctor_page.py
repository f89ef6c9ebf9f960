"""The doctor's page: one file that needs nothing else, with a plot or thumbnails for what can be shown."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from memory_dataset import MemoryDataset, healthy, robot

from qwen_vla_core.data.doctor.case import examine_all
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.doctor.diagnose import diagnose
from qwen_vla_core.data.doctor.page import render, write_page
from qwen_vla_core.data.sketch import QuantileSketch


class Page(HTMLParser):
    """Checks that tags are balanced; collects articles' pictures and outside references."""

    VOID = frozenset({"meta", "img", "rect", "br", "!doctype"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.articles: dict[str, list[str]] = {}
        self.outside: list[str] = []
        self.rows = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "article":
            self.articles[str(given["id"])] = []
        for name in ("src", "href"):
            source = given.get(name)
            if source and not source.startswith("data:"):
                self.outside.append(source)
        if tag == "img":
            assert given["alt"]
            list(self.articles.values())[-1].append(str(given["src"]))
        self.rows += tag == "svg"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(dataset: MemoryDataset, pictures: int | None = 0) -> tuple[Page, str]:
    case = examine_all(dataset, robot(), Thresholds(), pictures, workers=1, progress=False)
    text = render(diagnose(case))
    return Page(text), text


def picture(source: str) -> np.ndarray:
    found = cv2.imdecode(np.frombuffer(base64.b64decode(source.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    return found


def faulty() -> MemoryDataset:
    dataset = healthy(10)
    dataset.tasks = ("close the left gripper <b>now</b> 🤖 & wait", *dataset.tasks[1:])
    action = dataset.episodes[0].action
    action[:, 2] = 0.5
    dataset.episodes[1].action[5, 1] = np.nan
    dataset.episodes[1].action[25, 0] = 2.6
    time = dataset.episodes[3].timestamp.copy()
    time[20:] += 0.8
    dataset.episodes[3] = dataclasses.replace(dataset.episodes[3], timestamp=time)
    dataset.pictures[4]["ego"][10:14] = 0
    dataset.pictures[5]["ego"][20:45] = dataset.pictures[5]["ego"][20]
    dataset.episodes[8], dataset.pictures[8] = dataset.episodes[2], dataset.pictures[2]
    dataset.broken[7, "ego"] = "videos/ego/file-000.mp4: cut short"
    dataset.broken[9] = "data/file-000.parquet: cut short"
    return dataset


def test_every_finding_that_can_be_shown_is() -> None:
    page, text = page_of(faulty())
    assert {code: len(sources) > 0 for code, sources in page.articles.items()} == {
        "unreadable_rows": False,
        "not_finite": True,
        "missing_frames": False,
        "blank_frames": True,
        "out_of_limits": True,
        "time_gaps": True,
        "frozen_frames": True,
        "duplicate_rows": True,
        "instruction_motion": True,
        "velocity": True,
    }
    assert page.outside == [] and "<script" not in text and page.rows == 12
    for sources in page.articles.values():
        assert all(picture(source).std() > 0 for source in sources if source.startswith("data:image/png"))
    assert "gripper &lt;b&gt;now&lt;/b&gt; 🤖 &amp; wait" in text and "<b>now" not in text
    blank = [picture(source) for source in page.articles["blank_frames"] if "jpeg" in source]
    assert [frame.max() < 8 for frame in blank] == [False, False, True, True, False, False]


def test_duplicate_pictures_show_both_episodes() -> None:
    dataset = healthy(4)
    columns = ("state", "action", "timestamp", "task", "perturbed")
    rows = dataset.episodes[3]
    dataset.episodes[3] = dataclasses.replace(rows, **{name: getattr(rows, name)[:50] for name in columns})
    dataset.pictures[3] = dataset.pictures[0]
    page, text = page_of(dataset)
    assert list(page.articles) == ["duplicate_frames"] and len(page.articles["duplicate_frames"]) == 12
    assert "episode 0, row 0, ego" in text and "episode 3, row 0, ego" in text


def test_a_healthy_dataset_says_so(tmp_path: Path) -> None:
    dataset = healthy(2)
    page, text = page_of(dataset, pictures=None)
    assert page.articles == {} and "Nothing was found" in text
    case = examine_all(dataset, robot(), Thresholds(), None, workers=1, progress=False)
    write_page(diagnose(case), tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == text


@pytest.mark.parametrize("values", [[0.25] * 9, [0.0, 1.0], [-1e9, 0.1, 0.2, 1e9]])
def test_sparklines_of_odd_channels(values: list[float]) -> None:
    from qwen_vla_core.data.doctor.plots import sparkline

    sketch = QuantileSketch()
    sketch.add(np.array(values))
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"/>', sparkline(sketch))]
    assert max(heights) == 22 and len(heights) == min(len(set(values)), 3)
