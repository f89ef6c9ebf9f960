"""R2R-CE and RxR-CE: gzipped episodes and recorded walks in their layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from action_support import colour, options, picture

from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.sources import r2r_ce, rxr_ce
from qwen_vla_core.data.waypoints import FORWARD, LEFT, LOOK_DOWN, RIGHT, STOP
from qwen_vla_core.errors import UserError

SCENE = "mp3d/7y3sRwLe3Va/7y3sRwLe3Va.glb"


def walk(actions: list[int], turn_deg: float) -> tuple[list[list[float]], list[list[float]]]:
    """Habitat positions before every action but the stop and at the end; and only where they change."""
    yaw, places = 0.0, [[3.0, 0.17, -1.0]]
    for action in actions:
        if action == STOP:
            break
        yaw += np.deg2rad(turn_deg) * {LEFT: 1, RIGHT: -1}.get(action, 0)
        step = 0.25 if action == FORWARD else 0.0
        x, y, z = places[-1]
        places.append([x - step * np.sin(yaw), y, z - step * np.cos(yaw)])
    changed = [place for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
    return places, changed


def episode(number: Any, text: str, **instruction: Any) -> dict[str, Any]:
    return {
        "episode_id": number,
        "trajectory_id": 11,
        "scene_id": SCENE,
        "start_position": [3.0, 0.17, -1.0],
        "start_rotation": [0.0, 0.0, 0.0, 1.0],
        "info": {"geodesic_distance": 6.4, "role": "guide"},
        "goals": [{"position": [3.0, 0.17, -5.0], "radius": 3.0}],
        "instruction": {"instruction_text": text, **instruction},
        "reference_path": [[3.0, 0.17, -1.0], [3.0, 0.17, -3.0], [1.0, 0.17, -3.0]],
    }


def store(path: Path, episodes: list[dict[str, Any]], recorded: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"episodes": episodes, "instruction_vocab": {}}).encode()))
    if recorded is not None:
        name = path.name.replace(".json", "_gt.json")
        path.with_name(name).write_bytes(gzip.compress(json.dumps(recorded).encode()))
    return path


ACTIONS = [FORWARD, FORWARD, LEFT, FORWARD, FORWARD, RIGHT, FORWARD, FORWARD, FORWARD, STOP]


def r2r(tmp_path: Path) -> Path:
    places, changed = walk(ACTIONS, 15)
    recorded = {
        "1": {"actions": ACTIONS, "locations": changed, "forward_steps": 7},
        "2": {"actions": ACTIONS, "locations": places, "forward_steps": 7},
        "3": {"actions": ACTIONS, "locations": changed[:-2], "forward_steps": 7},
        "4": {"actions": [FORWARD, STOP], "locations": walk([FORWARD], 15)[0], "forward_steps": 1},
        "6": {"actions": ACTIONS, "locations": places, "forward_steps": 7},
    }
    texts = {1: "Walk past the table.\n", 2: "Go  left.", 3: "Go.", 4: "Stop here.", 5: "Nobody walked.", 6: " "}
    return store(tmp_path / "train" / "train.json.gz", [episode(i, text) for i, text in texts.items()], recorded)


def test_r2r(tmp_path: Path) -> None:
    report = r2r_ce.convert(r2r(tmp_path), tmp_path / "out", options(), 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert report["converted"] == 2 and dataset.family == "navigation" and dataset.fps == 2 and not dataset.views
    assert list(dataset.tasks) == ["Walk past the table.", "Go left."]
    reasons = {entry["item"]: entry["reason"] for entry in report["dropped"]}
    assert set(reasons) == {"3", "4", "5", "6"}
    assert "6 locations fit neither 9 moves nor 7 steps" in reasons["3"]
    assert "1 samples, fewer than 4" in reasons["4"]
    assert "not among the recorded walks" in reasons["5"] and reasons["6"] == "has no instruction"
    first, second = dataset.rows(0), dataset.rows(1)
    np.testing.assert_allclose(first.state, second.state, atol=1e-6)  # the two ways of recording say the same
    # x forward is −z, y left is −x; at the default pace one action is one row, then the stop.
    np.testing.assert_allclose(first.state[:3], [[1, -3, 0], [1.25, -3, 0], [1.5, -3, 0]], atol=1e-6)
    assert first.state[3, 2] == pytest.approx(np.deg2rad(15))
    assert len(first) == 9 + 8 and np.ptp(first.state[9:], axis=0).max() == 0
    np.testing.assert_array_equal(first.action[:-1], first.state[1:])
    assert set(first.extra["scene"]) == {"7y3sRwLe3Va"}
    sidecar = json.loads((tmp_path / "out" / "meta" / "qwen_vla.json").read_text())
    assert sidecar["source"]["speed_m_s"] == 0.5 and "zero waypoints" in sidecar["source"]["stop"]
    assert dataset.infos[0]["trajectory"] == 11


def test_r2r_reference_paths_need_no_recordings(tmp_path: Path) -> None:
    src = store(tmp_path / "val.json", [episode(1, "Go.")])
    with pytest.raises(UserError, match=r"val_gt\.json: no such file; use --path reference"):
        r2r_ce.convert(src, tmp_path / "out", options(), 1, False)
    r2r_ce.convert(src, tmp_path / "out", options(path="reference", speed=1.0, turn_rate=90.0), 1, False)
    rows = LeRobotDataset(tmp_path / "out").rows(0)
    # 2 m, a quarter turn to the left, 2 m: 2 s + 1 s + 2 s.
    corners = [[1, -3, 0], [3, -3, 0], [3, -3, np.pi / 2], [3, -1, np.pi / 2]]
    np.testing.assert_allclose(rows.state[[0, 4, 6, 10]], corners, atol=1e-6)
    assert len(rows) == 10 + 8


def test_pictures_follow_the_walk_and_stay_at_the_stop(tmp_path: Path) -> None:
    src = r2r(tmp_path)
    for number, count in ((1, 10), (2, 9)):
        folder = tmp_path / "images" / f"7y3sRwLe3Va_r2r_{number:06d}" / "rgb"
        folder.mkdir(parents=True)
        for step in range(count):
            (folder / f"{step:03d}.jpg").write_bytes(picture(step, 10))
    pattern = str(tmp_path / "images" / "{scene}_r2r_{episode:0>6}" / "rgb")
    report = r2r_ce.convert(src, tmp_path / "out", options(frames=pattern, limit=2), 1, False)
    assert report["dropped"] == [{"item": "2", "reason": "9 pictures for 10 poses"}]
    dataset = LeRobotDataset(tmp_path / "out")
    frames = dataset.frames(0, "ego", [0, 5, 9, 16])
    shown = [abs(int(p.mean()) - colour(step, 10)) < 6 for p, step in zip(frames, (0, 5, 9, 9), strict=True)]
    assert shown == [True] * 4
    with pytest.raises(UserError, match=r"--frames .*'room'; its fields are scene, episode, trajectory"):
        r2r_ce.convert(src, tmp_path / "other", options(frames="{room}"), 1, False)


def test_rxr_languages(tmp_path: Path) -> None:
    actions = [FORWARD, LEFT, LOOK_DOWN, *[FORWARD] * 5, STOP]
    told = {
        "1": ("en-IN", "You are facing a door."),
        "2": ("hi-IN", "दरवाज़े से आगे बढ़ें और रुकें।"),
        "3": ("te-IN", "తలుపు వైపు నడవండి."),
    }
    episodes = [
        episode(n, text, language=language, instruction_id=f"9{n}", annotator_id="7", timed_instruction=[])
        for n, (language, text) in told.items()
    ]
    recorded = {n: {"actions": actions, "locations": walk(actions, 30)[1], "forward_steps": 6} for n in told}
    src = store(tmp_path / "train_guide.json.gz", episodes, recorded)
    rxr_ce.convert(src, tmp_path / "out", options(languages=["hi-IN", "te-IN"]), 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert list(dataset.tasks) == [told["2"][1], told["3"][1]]
    rows = dataset.rows(0)
    assert len(rows) == 7 + 8  # looking down takes no time
    assert rows.state[2, 2] == pytest.approx(np.deg2rad(30))
    assert dataset.infos[0]["language"] == "hi-IN" and dataset.infos[0]["role"] == "guide"
    assert dataset.infos[0]["instruction_id"] == "92"
    with pytest.raises(UserError, match="--languages fr-FR: use some of en-US"):
        rxr_ce.convert(src, tmp_path / "other", options(languages=["fr-FR"]), 1, False)


def test_damage_names_file_and_record(tmp_path: Path) -> None:
    src = r2r(tmp_path)
    data = src.read_bytes()
    src.write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"train\.json\.gz: damaged or cut short"):
        r2r_ce.convert(src, tmp_path / "out", options(), 1, False)
    src.write_bytes(gzip.compress(b'{"episodes": [\n{]}'))
    with pytest.raises(UserError, match=r"train\.json\.gz:2: not JSON at column 2"):
        r2r_ce.convert(src, tmp_path / "out", options(), 1, False)
    for key, value, message in (
        ("start_position", [1, 2], r"episodes\[0\] \(episode_id 1\): 'start_position' is no list"),
        ("start_position", [1, 2, float("nan")], "'start_position' is not finite"),
        ("start_rotation", [0, 0, 1], r"'start_rotation' is no \[x, y, z, w\]"),
        ("scene_id", None, "'scene_id' is missing"),
        ("instruction", "go", "'instruction' is missing or no dict"),
    ):
        broken = {**episode(1, "Go."), key: value}
        src.write_bytes(gzip.compress(json.dumps({"episodes": [broken]}).encode()))
        with pytest.raises(UserError, match=message):
            r2r_ce.convert(src, tmp_path / "out", options(resume=True), 1, False)
    assert not list((tmp_path / "out").glob("data/**/*.parquet"))
