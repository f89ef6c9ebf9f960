from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vl_support import convert, picture, read_lines, write_json

from qwen_vla_core.data.llava import LlavaDataset
from qwen_vla_core.data.pictures import load_picture
from qwen_vla_core.data.sources.driving_vqa import CAMERAS
from qwen_vla_core.errors import UserError

SCENE = "f0f120e4d4b0441da90ec53b16ee169d"
T0 = 1535657108104844  # microseconds
LISTED = (
    "There are two traffic elements in the front view. The information of these traffic elements is "
    "[(traffic light, green, 40.0, 0.0, 80.0, 45.0), (traffic light, red, 0, 45, 160, 90)]."
)


def key_frame(nuscenes: Path, number: int, pairs: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """A DriveLM key frame; its six pictures of 160 × 90 are written, half a second apart."""
    paths = {}
    for at, camera in enumerate(CAMERAS):
        name = f"samples/{camera}/n008-2018-08-30__{camera}__{T0 + 500000 * number + at}.jpg"
        picture(nuscenes / name, 160, 90, seed=10 * number + at)
        paths[camera] = f"../nuscenes/{name}"
    empty = dict.fromkeys(("C", "con_up", "con_down", "cluster", "layer"))
    return {
        "key_object_infos": {
            "<c1,CAM_BACK,108.8,49.7>": {
                "Category": "Vehicle",
                "Status": "Moving",
                "2d_bbox": [96.6, 40.3, 122.4, 59.1],
            }
        },
        "QA": {kind: [{"Q": q, "A": a, **empty, "tag": [2]} for q, a in asked] for kind, asked in pairs.items()},
        "image_paths": paths,
    }


def drivelm(folder: Path) -> Path:
    frames = {
        "4a0798f849ca477ab18009c3a20b7df2": key_frame(
            folder / "nuscenes",
            1,
            {
                "perception": [
                    ("What is the status of <c1,CAM_BACK,108.8,49.7>?", "Moving."),
                    ("Identify all the traffic elements in the front view.", LISTED),
                    ("What are objects to the front left of the ego car?", ""),
                ],
                "planning": [("In this scenario, what are safe actions?", "Brake gently, <c1,CAM_BACK,160.0,90.0>.")],
            },
        ),
        "ffffffffffffffffffffffffffffffff": key_frame(
            folder / "nuscenes", 0, {"behavior": [("Predict the behavior of the ego vehicle.", "It goes straight.")]}
        ),
    }
    corpus = {SCENE: {"scene_description": "The ego vehicle proceeds.", "key_frames": frames}}
    return write_json(folder / "QA_dataset_nus/v1_1_train_nus.json", corpus, 4)


def test_drivelm_shows_six_tagged_views_and_keeps_its_categories(tmp_path: Path) -> None:
    src = drivelm(tmp_path)
    summary = convert("driving_vqa", src, tmp_path / "out", "--images", str(tmp_path / "nuscenes"))
    assert (summary["family"], summary["converted"], len(summary["dropped"])) == ("driving_vqa", 4, 1)
    assert summary["tasks"] == {"perception": 2, "planning": 1, "behavior": 1}
    (dropped,) = read_lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"] == "has no answer" and dropped["item"].endswith(".QA.perception[2]")
    data = LlavaDataset.open(tmp_path / "out")
    assert data.views == tuple(camera.lower() for camera in CAMERAS)
    value = data.raw(0)["conversations"][0]["value"]
    assert value.startswith("<|cam_front_start|><image><|cam_front_end|>\n<|cam_front_right_start|><image>")
    sample = data.sample(0)
    assert list(sample.images) == [camera.lower() for camera in CAMERAS]
    assert all(frames.shape == (1, 90, 160, 3) for frames in sample.images.values())
    # Places are in thousandths of their own camera's picture; the rest of the text is untouched.
    assert sample.turns == (("What is the status of <c1,CAM_BACK,680,552>?", "Moving."),)
    assert data.sample(1).turns[0][1] == LISTED.replace("40.0, 0.0, 80.0, 45.0", "250, 0, 500, 500").replace(
        "0, 45, 160, 90", "0, 500, 1000, 1000"
    )
    assert data.sample(2).turns[0][1] == "Brake gently, <c1,CAM_BACK,1000,1000>."


def test_several_frames_come_oldest_first_with_their_times(tmp_path: Path) -> None:
    src = drivelm(tmp_path)
    convert("driving_vqa", src, tmp_path / "out", "--images", str(tmp_path / "nuscenes"), "--frames", "3")
    data = LlavaDataset.open(tmp_path / "out")
    record, sample = data.record(0), data.sample(0)
    assert data.raw(0)["conversations"][0]["value"].startswith(
        "<|cam_front_start|><image><image><|cam_front_end|>\n<|cam_front_right_start|><image><image>"
    )
    assert record.times == (-0.5, 0.0) * 6 and record.views[:2] == ("cam_front", "cam_front")
    assert sample.turns[0][0].startswith("Each camera shows 2 frames: 0.5 s ago and now.\n")
    front = sorted((tmp_path / "nuscenes/samples/CAM_FRONT").iterdir())
    for frame, file in zip(sample.images["cam_front"], front, strict=True):
        assert (frame == load_picture(file)).all()
    alone = data.sample(3)  # the scene's first moment has no past
    assert alone.images["cam_front"].shape[0] == 1 and alone.turns[0][0].startswith("Predict the behavior")


def test_a_moment_without_all_its_pictures_is_dropped(tmp_path: Path) -> None:
    src = drivelm(tmp_path)
    gone = sorted((tmp_path / "nuscenes/samples/CAM_BACK").iterdir())[0]
    gone.unlink()
    convert("driving_vqa", src, tmp_path / "out", "--images", str(tmp_path / "nuscenes"))
    reasons = [drop["reason"] for drop in read_lines(tmp_path / "out/dropped.jsonl")]
    assert reasons == ["has no answer", f"picture {gone} is missing"]


def test_a_wrong_category_is_an_error_with_its_line(tmp_path: Path) -> None:
    src = drivelm(tmp_path)
    src.write_text(src.read_text().replace('"planning"', '"plans"'))
    with pytest.raises(UserError, match=rf"v1_1_train_nus\.json:2: {SCENE}\.key_frames\..*plans: expected a list"):
        convert("driving_vqa", src, tmp_path / "out", "--images", str(tmp_path / "nuscenes"))
    src.write_text("[]")
    with pytest.raises(UserError, match="expected scenes by their token"):
        convert("driving_vqa", src, tmp_path / "out", "--images", str(tmp_path / "nuscenes"))


def nuscenes_qa(folder: Path, tables: str = "v1.0-trainval") -> Path:
    """Three samples half a second apart, each with six key frames, a sweep and a lidar scan."""
    samples, data = [], []
    for number in range(3):
        token = f"sample-{number}"
        samples.append(
            {
                "token": token,
                "timestamp": T0 + 500000 * number,
                "prev": f"sample-{number - 1}" if number else "",
                "next": f"sample-{number + 1}" if number < 2 else "",
                "scene_token": "scene",
            }
        )
        for camera in (*CAMERAS, "LIDAR_TOP"):
            kind = "jpg" if camera in CAMERAS else "pcd.bin"
            name = f"samples/{camera}/n015__{camera}__{T0 + 500000 * number}.{kind}"
            if camera in CAMERAS:
                picture(folder / name, 32, 18, seed=number)
            row = {
                "token": f"data-{number}-{camera}",
                "sample_token": token,
                "timestamp": T0 + 500000 * number,
                "fileformat": kind,
                "is_key_frame": True,
                "height": 900,
                "width": 1600,
                "filename": name,
                "prev": "",
                "next": "",
            }
            sweep = {**row, "is_key_frame": False, "filename": name.replace("samples", "sweeps")}
            data += [row, sweep]
    write_json(folder / tables / "sample.json", samples)
    write_json(folder / tables / "sample_data.json", data)
    asked = [
        ("sample-2", "Are there any moving bicycles?", "no", "exist"),
        ("sample-0", "How many cars are there?", "2", "count"),
        ("sample-9", "What is the status of the truck?", "parked", "status"),
    ]
    questions = [
        {"split": "train", "sample_token": t, "question": q, "answer": a, "num_hop": 0, "template_type": kind}
        for t, q, a, kind in asked
    ]
    return write_json(folder / "NuScenes_train_questions.json", {"info": {}, "questions": questions})


def test_nuscenes_qa_finds_its_pictures_in_the_tables(tmp_path: Path) -> None:
    src = nuscenes_qa(tmp_path)
    summary = convert("driving_vqa", src, tmp_path / "out", "--frames", "2")
    assert (summary["converted"], summary["tasks"]) == (2, {"exist": 1, "count": 1})
    (dropped,) = read_lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"].startswith("sample sample-9 has no key frame of CAM_FRONT, ")
    data = LlavaDataset.open(tmp_path / "out")
    assert data.record(0).times == (-0.5, 0.0) * 6
    assert data.sample(0).images["cam_back_left"].shape == (2, 18, 32, 3)
    assert data.sample(0).turns[0] == (
        "Each camera shows 2 frames: 0.5 s ago and now.\nAre there any moving bicycles?",
        "no",
    )
    assert data.sample(1).images["cam_back_left"].shape == (1, 18, 32, 3)
    assert list(data.validate("decode")) == []


def test_nuscenes_tables_are_found_or_named(tmp_path: Path) -> None:
    src = nuscenes_qa(tmp_path)
    write_json(tmp_path / "v1.0-mini/sample_data.json", [])
    with pytest.raises(UserError, match="holds 2 sets of nuScenes tables; name the folder of one with --tables"):
        convert("driving_vqa", src, tmp_path / "out")
    assert convert("driving_vqa", src, tmp_path / "out", "--tables", str(tmp_path / "v1.0-trainval"))["converted"] == 2
    with pytest.raises(UserError, match=r"sample\.json: cannot be read"):
        convert("driving_vqa", src, tmp_path / "out2", "--tables", str(tmp_path))
    table = tmp_path / "v1.0-trainval/sample_data.json"
    table.write_text(table.read_text()[:-900])
    with pytest.raises(UserError, match=r"sample_data\.json:\d+: not JSON"):
        convert("driving_vqa", src, tmp_path / "out2", "--tables", str(tmp_path / "v1.0-trainval"))
    assert not (tmp_path / "out2").exists()
