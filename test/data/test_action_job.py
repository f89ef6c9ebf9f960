"""The common end of all converters of action corpora: order, resuming, pictures, what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from action_support import options, picture, video

from qwen_vla_core.data.action_job import JOURNAL, Episode, Outcome, task_runs, write_dataset
from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.lerobot.writer import LeRobotWriter
from qwen_vla_core.data.source_frames import EncodedFrames, VideoFrames, fit, stored_size
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.errors import UserError

GROUP = (ChannelGroup("arm", "joint_position", "rad", ("a", "b")),)
CONTRACT = DataContract(PromptSpec("Arm", "single arm"), 10.0, 4, "absolute_joint", (), GROUP, GROUP)


@dataclass(frozen=True)
class Item:
    number: int

    @property
    def name(self) -> str:
        return f"item {self.number}"


def work(item: Item) -> Outcome:
    """Item n holds n episodes; item 3 is damaged; odd ones also drop something."""
    if item.number == 3:
        raise UserError("three.bin: record 7: damaged")
    episodes = []
    for part in range(item.number):
        length = 5 + item.number + part
        values = np.full((length, 2), 10 * item.number + part, np.float32)
        rows = EpisodeRows(values, values, np.arange(length) / 10, np.zeros(length, np.int64), np.zeros(length, bool))
        frames = {"ego": EncodedFrames(tuple(picture(i, length) for i in range(length)), (32, 24), "x")}
        episodes.append(Episode(f"{item.name}.{part}", rows, (f"do {item.number}",), frames, {"part": part}))
    dropped = (((f"{item.name}.x", "too dull"),)) if item.number % 2 else ()
    return Outcome(item.name, tuple(episodes), dropped, {"parts": float(item.number)})


def run(out: Path, numbers: list[int], workers: int = 1, **given: Any) -> dict[str, Any]:
    return write_dataset(
        out, CONTRACT, work, [Item(n) for n in numbers], family="manipulation", views={"ego": (32, 24)},
        source={"name": "made up"}, options=options(**given), workers=workers, progress=False,
    )  # fmt: skip


def values(path: Path) -> list[float]:
    dataset = LeRobotDataset(path)
    return [float(dataset.rows(i).action[0, 0]) for i in range(len(dataset))]


def test_order_and_report_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    numbers = [2, 0, 1, 4]
    one, two = run(tmp_path / "one", numbers), run(tmp_path / "two", numbers, workers=2)
    assert one == two and one["converted"] == 7 and one["figures"] == {"parts": 7.0}
    assert one["dropped"] == [{"item": "item 1.x", "reason": "too dull"}]
    assert values(tmp_path / "one") == values(tmp_path / "two") == [20, 21, 10, 40, 41, 42, 43]


def test_goes_on_in_the_middle_of_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", [2, 1, 4])
    add, added = LeRobotWriter.add_staged, []

    def stop(self: LeRobotWriter, staged: Any) -> int:
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(add(self, staged))
        return added[-1]

    monkeypatch.setattr(LeRobotWriter, "add_staged", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", [2, 1, 4])
    monkeypatch.undo()
    with (tmp_path / "out" / JOURNAL).open("a") as file:
        file.write('{"item": "cut sho')
    report = run(tmp_path / "out", [2, 1, 4], resume=True)
    assert report["resumed"] == 2 and report["converted"] == 7
    assert report["dropped"] == [{"item": "item 1.x", "reason": "too dull"}]
    assert values(tmp_path / "out") == values(tmp_path / "whole")
    assert not (tmp_path / "out" / ".staging").exists()


def test_damage_stops_or_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"three\.bin: record 7"):
        run(tmp_path / "out", [2, 3, 1])
    report = run(tmp_path / "all", [2, 3, 1], skip_damaged=True)
    assert {"item": "item 3", "reason": "damaged: three.bin: record 7: damaged"} in report["dropped"]
    assert values(tmp_path / "all") == [20, 21, 10]
    with pytest.raises(UserError, match=r"not one of 2 recordings could be used; the first reason: item 3"):
        run(tmp_path / "none", [0, 3], skip_damaged=True)
    assert not (tmp_path / "none").exists()


def test_another_job_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path / "out", [2])
    with pytest.raises(UserError, match="go on with --resume"):
        run(tmp_path / "out", [2])
    with pytest.raises(UserError, match=r"other options \(ends, items\)"):
        run(tmp_path / "out", [2, 1], resume=True)
    with pytest.raises(UserError, match=r"other options \(options\)"):
        run(tmp_path / "out", [2], resume=True, height=48)


def test_pictures_keep_their_aspect() -> None:
    assert stored_size((1920, 1080), 224) == (398, 224) and stored_size((33, 21), 0) == (32, 20)
    wide = np.full((10, 40, 3), 200, np.uint8)
    fitted = fit(wide, (20, 20))
    assert fitted.shape == (20, 20, 3)
    assert fitted[6].max() == 0 and fitted[7:12].min() == 200 and fitted[12].max() == 0
    with pytest.raises(UserError, match="--height -1"):
        stored_size((10, 10), -1)


@pytest.mark.parametrize("indices", [(0, 1, 2), (3, 30, 44), (350, 352, 399)])
def test_frames_of_a_video_by_number(tmp_path: Path, indices: tuple[int, ...]) -> None:
    total, size = indices[-1] + 1, (72, 16)
    bits = (np.arange(total)[:, None] >> np.arange(9)) & 1  # a bar per bit of the frame's number
    video(tmp_path / "v.mp4", np.repeat(np.repeat(255 * bits, 8, axis=1)[:, None, :, None], 16, axis=1))
    bars = [frame[8, 4::8, 0] > 128 for frame in VideoFrames(str(tmp_path / "v.mp4"), indices, size)]
    assert [int(bar @ (1 << np.arange(9))) for bar in bars] == list(indices)
    with pytest.raises(UserError, match=rf"v\.mp4: ends before frame {total + 4}"):
        list(VideoFrames(str(tmp_path / "v.mp4"), (total - 1, total + 4), size))
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[: len(data) // 3])
    with pytest.raises(UserError, match=r"v\.mp4: damaged video"):
        list(VideoFrames(str(tmp_path / "v.mp4"), indices, size))


def test_task_runs() -> None:
    numbers, tasks = task_runs(["b", "b", "a", "b"])
    assert numbers.tolist() == [0, 0, 1, 0] and tasks == ("b", "a")
