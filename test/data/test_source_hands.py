"""EgoDex, VITRA, EgoVerse and Xperience: small files in their layouts → 32 channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from action_support import basis, camera_path, colour, hand_path, options, picture, video
from scipy.spatial.transform import Rotation

from qwen_vla_core.cli import main
from qwen_vla_core.data.hands.points import points_of, wrist_frames
from qwen_vla_core.data.lerobot.reader import LeRobotDataset
from qwen_vla_core.data.sources import egodex, egoverse, vitra, xperience
from qwen_vla_core.errors import UserError

SIDES = ("left", "right")
FINGERS = ("Thumb", "IndexFinger", "MiddleFinger", "RingFinger", "LittleFinger")


def tip_error(dataset: LeRobotDataset, points: np.ndarray, camera: np.ndarray, side: str, grasps: Any) -> float:
    """Largest distance between the points and those that the stored wrists say, in metres (palm only)."""
    rows, names = dataset.rows(0), dataset.contract.state_channels
    at = names.index(f"{side}_wrist_x")
    wrist = np.tile(np.eye(4), (len(rows), 1, 1))
    wrist[:, :3, 3] = rows.state[:, at : at + 3]
    wrist[:, :3, :3] = Rotation.from_rotvec(rows.state[:, at + 3 : at + 6]).as_matrix()
    world = camera[0] @ wrist
    frames, _ = wrist_frames(points, side)
    hand = np.einsum("ji,pj->pi", frames[0, :3, :3], points[0] - points[0, 0]) * ([1, -1, 1] if side == "left" else 1)
    rebuilt = points_of(grasps.poses(rows.state[:, at + 6 : at + 16]), world, side, hand)
    return float(np.abs(rebuilt[:, [0, 1, 5, 9, 13, 17]] - points[: len(rows)][:, [0, 1, 5, 9, 13, 17]]).max())


# -- EgoDex -------------------------------------------------------------------------------------------------------


def egodex_episode(path: Path, total: int = 20, seed: int = 0, confidence: bool = True, **words: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["camera/intrinsic"] = np.array([[736.6, 0, 960], [0, 736.6, 540], [0, 0, 1]], np.float32)
        file["transforms/camera"] = camera_path(total).astype(np.float32)
        for side in SIDES:
            wrist, points = hand_path(total, side, seed)
            names = [
                "Hand",
                *(f"{f}{p}" for f in FINGERS for p in ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip")),
            ]
            for i, name in enumerate(names):
                transform = wrist.copy()
                transform[:, :3, 3] = points[:, i]
                file[f"transforms/{side}{name}"] = transform.astype(np.float32)
                if confidence:
                    file[f"confidences/{side}{name}"] = np.ones(total, np.float32)
            file[f"transforms/{side}IndexFingerMetacarpal"] = wrist.astype(np.float32)
        for key, value in (words or {"llm_description": "fold the towel", "llm_type": "simple"}).items():
            file.attrs[key] = value
    video(path.with_suffix(".mp4"), total)


def test_egodex(tmp_path: Path) -> None:
    grasps, src = basis(tmp_path / "g.json"), tmp_path / "part1"
    egodex_episode(src / "fold" / "0.hdf5")
    egodex_episode(
        src / "fold" / "1.hdf5", seed=1, confidence=False, llm_type="reversible", llm_description="fold",
        llm_description2="unfold", which_llm_description="2",
    )  # fmt: skip
    egodex_episode(src / "old" / "0.hdf5", seed=2, description="ordner öffnen")
    egodex_episode(src / "old" / "1.hdf5", seed=3, session_name="nothing said")
    with h5py.File(src / "old" / "0.hdf5", "r+") as file:
        file["confidences/leftThumbTip"][9:11] = 0.1
    report = egodex.convert(src, tmp_path / "out", options(eigengrasps=tmp_path / "g.json"), 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert report["converted"] == len(dataset) == 4 and dataset.family == "human" and dataset.fps == 30
    # 20 tracked steps give 19 rows; two untracked steps cut an episode in two.
    assert dataset.lengths.tolist() == [19, 19, 8, 8]
    assert list(dataset.tasks) == ["fold the towel", "unfold", "ordner öffnen"]
    reasons = {entry["item"]: entry["reason"] for entry in report["dropped"]}
    assert reasons == {
        "old/0.hdf5": "left hand not tracked at 2 of 20 steps",
        "old/1.hdf5": "no instruction at 20 of 20 steps",
    }
    rows = dataset.rows(0)
    assert rows.state.shape == (19, 32)
    np.testing.assert_array_equal(rows.action[:-1], rows.state[1:])
    camera = camera_path(20)
    for side in SIDES:
        assert tip_error(dataset, hand_path(20, side)[1], camera, side, grasps) < 1e-4
    assert report["wrists_in_front"] == 1.0 and 0 < report["residual_rms_rad"] < 1
    later = dataset.frames(3, "ego", [0, 7])
    assert [abs(int(p.mean()) - colour(step, 20)) < 6 for p, step in zip(later, (11, 18), strict=True)] == [True, True]
    sidecar = json.loads((tmp_path / "out" / "meta" / "qwen_vla.json").read_text())
    assert sidecar["source"]["eigengrasps"]["hash"] == grasps.hash
    assert len(sidecar["source"]["eigengrasps"]["explained_variance"]) == 10
    assert sidecar["source"]["licence"].startswith("CC BY-NC-ND")
    assert dataset.infos[3]["first_step"] == 11


def test_egodex_one_hand_and_a_stride(tmp_path: Path) -> None:
    basis(tmp_path / "g.json")
    egodex_episode(tmp_path / "src" / "0.hdf5", total=21)
    with h5py.File(tmp_path / "src" / "0.hdf5", "r+") as file:
        file["confidences/rightHand"][:] = 0.0
    given = {"eigengrasps": tmp_path / "g.json", "no_pictures": True}
    with pytest.raises(UserError, match=r"not one of 1 recordings.*try --hands"):
        egodex.convert(tmp_path / "src", tmp_path / "both", options(**given), 1, False)
    assert not (tmp_path / "both").exists()
    egodex.convert(tmp_path / "src", tmp_path / "left", options(**given, hands="left", stride=3), 1, False)
    dataset = LeRobotDataset(tmp_path / "left")
    assert dataset.fps == 10 and dataset.lengths.tolist() == [6] and dataset.contract.prompt.arms == "single arm"
    assert dataset.rows(0).state.shape == (6, 16)


def test_egodex_damage(tmp_path: Path) -> None:
    basis(tmp_path / "g.json")
    given = options(eigengrasps=tmp_path / "g.json")
    path = tmp_path / "src" / "0.hdf5"
    egodex_episode(path)
    with h5py.File(path, "r+") as file:
        del file["transforms/leftThumbTip"]
        file["transforms/leftThumbTip"] = np.zeros((20, 3, 4))
    with pytest.raises(UserError, match=r"0\.hdf5: dataset 'transforms/leftThumbTip' has shape \(20, 3, 4\)"):
        egodex.convert(tmp_path / "src", tmp_path / "out", given, 1, False)
    egodex_episode(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"0\.hdf5: not a readable HDF5 file"):
        egodex.read(egodex.items(tmp_path / "src")[0], given)
    egodex_episode(path, total=20)
    video(path.with_suffix(".mp4"), 12)
    with pytest.raises(UserError, match=r"0\.mp4: 12 frames for 20 poses"):
        egodex.read(egodex.items(tmp_path / "src")[0], given)
    with pytest.raises(UserError, match="--eigengrasps"):
        egodex.convert(tmp_path / "src", tmp_path / "out", options(), 1, False)
    basis(tmp_path / "m.json", "mano")
    with pytest.raises(UserError, match="'mano' poses, this corpus gives 'points'"):
        egodex.convert(tmp_path / "src", tmp_path / "out", options(eigengrasps=tmp_path / "m.json"), 1, False)
    with pytest.raises(UserError, match="holds no recordings"):
        egodex.convert(tmp_path / "empty", tmp_path / "out", options(eigengrasps=tmp_path / "g.json"), 1, False)


def test_fit_by_command_then_convert_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        egodex_episode(tmp_path / "src" / f"{i}.hdf5", seed=i)
    out = tmp_path / "g.json"
    fit = ["data", "hands", "fit", f"egodex={tmp_path / 'src'}", "--out", str(out), "--workers", "1", "--json"]
    assert main(fit) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hands"] == 120 and report["pose"] == "points" and len(report["explained_variance"]) == 10
    # The corpus bends all fingers together along a curve: a few directions say nearly everything.
    assert report["explained_together"] > 0.999 and report["residual_rms_rad"] < 1e-3
    assert main(["data", "hands", "show", str(out)]) == 0
    assert "10 eigengrasps of 120 hands" in capsys.readouterr().out
    convert = ["data", "convert", str(tmp_path / "src"), str(tmp_path / "out"), "--from", "egodex"]
    assert main([*convert, "--eigengrasps", str(out), "--no-pictures", "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["converted"] == 3 and report["residual_rms_rad"] < 1e-3
    assert main(["data", "hands", "fit", "egodex=/nowhere", "--out", str(out)]) != 0
    assert "no such folder" in capsys.readouterr().err


# -- VITRA --------------------------------------------------------------------------------------------------------


def vitra_episode(path: Path, total: int = 20, left: bool = True, first: int = 5) -> dict[str, Any]:
    camera = camera_path(total)
    value: dict[str, Any] = {
        "video_clip_id_segment": np.zeros(total, np.int64),
        "extrinsics": np.linalg.inv(camera),
        "intrinsics": np.array([[650.0, 0, 720], [0, 650, 540], [0, 0, 1]]),
        "video_decode_frame": np.arange(first, first + total),
        "video_name": "vid-1",
        "avg_speed": np.float64(0.03),
        "anno_type": "right",
        "text": {"right": [("Pick up the bottle.", (0, np.int64(12)))], "left": [("Hold the lid", (8, total))]},
    }
    for side in SIDES:
        _, points = hand_path(total, side)
        frames, _ = wrist_frames(points, side)
        axes = {"right": [[-1, 0, 0], [0, 0, 1], [0, 1, 0]], "left": [[1, 0, 0], [0, 0, -1], [0, 1, 0]]}[side]
        bends = Rotation.from_rotvec(np.full((total * 15, 3), 0.1)).as_matrix().reshape(total, 15, 3, 3)
        value[side] = {
            "beta": np.zeros(10),
            "global_orient_worldspace": frames[:, :3, :3] @ np.array(axes, float),
            "transl_worldspace": points[:, 0],
            "hand_pose": bends,
            "joints_worldspace": points,
            "kept_frames": np.full(total, int(side == "right" or left)),
            "max_translation_movement": None,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, value, allow_pickle=True)  # type: ignore[arg-type]
    return value


def test_vitra(tmp_path: Path) -> None:
    src = tmp_path / "Metadata" / "Ego4D" / "episodic_annotations"
    vitra_episode(src / "Ego4D_vid-1_ep_000000.npy")
    vitra_episode(src / "Ego4D_vid-1_ep_000001.npy", left=False)
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "vid-1.mp4", 25, fps=15)
    grasps = basis(tmp_path / "m.json", "mano")
    given = options(eigengrasps=tmp_path / "m.json", videos=tmp_path / "videos")
    report = vitra.convert(tmp_path / "Metadata", tmp_path / "out", given, 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert dataset.fps == 15 and dataset.lengths.tolist() == [19]
    assert [entry["item"] for entry in report["dropped"]] == ["Ego4D_vid-1_ep_000001"]
    rows = dataset.rows(0)
    told = [dataset.tasks[i] for i in rows.task]
    assert told[0] == "Left hand: None. Right hand: Pick up the bottle."
    assert told[9] == "Left hand: Hold the lid. Right hand: Pick up the bottle."
    assert told[15] == "Left hand: Hold the lid. Right hand: None."
    for side in SIDES:
        at = dataset.contract.state_channels.index(f"{side}_wrist_x")
        frames, _ = wrist_frames(hand_path(20, side)[1], side)
        world = np.tile(np.eye(4), (19, 1, 1))
        world[:, :3, 3] = rows.state[:, at : at + 3]
        world[:, :3, :3] = Rotation.from_rotvec(rows.state[:, at + 3 : at + 6]).as_matrix()
        np.testing.assert_allclose(camera_path(20)[0] @ world, frames[:19], atol=1e-5)
        expected = grasps.coefficients(np.full(45, 0.1))
        np.testing.assert_allclose(rows.state[:, at + 6 : at + 16], np.tile(expected, (19, 1)), atol=1e-6)
    shown = dataset.frames(0, "ego", [0, 18])
    assert [abs(int(p.mean()) - colour(step, 25)) < 6 for p, step in zip(shown, (5, 23), strict=True)] == [True, True]


def test_vitra_by_points_shares_its_poses_with_the_others(tmp_path: Path) -> None:
    src = tmp_path / "src"
    vitra_episode(src / "A_vid-1_ep_000000.npy")
    basis(tmp_path / "g.json")
    given = options(eigengrasps=tmp_path / "g.json", fingers="points", no_pictures=True, hands="right")
    vitra.convert(src, tmp_path / "out", given, 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert dataset.lengths.tolist() == [11] and list(dataset.tasks) == ["Pick up the bottle."]
    egodex_episode(tmp_path / "dex" / "0.hdf5")
    given = options(eigengrasps=tmp_path / "g.json", no_pictures=True, hands="right")
    egodex.convert(tmp_path / "dex", tmp_path / "dex_out", given, 1, False)
    np.testing.assert_allclose(
        LeRobotDataset(tmp_path / "dex_out").rows(0).state[:11], dataset.rows(0).state, atol=1e-4
    )


def test_vitra_damage(tmp_path: Path) -> None:
    path = tmp_path / "A_vid-1_ep_000000.npy"
    value = vitra_episode(path)
    item, given = vitra.items(tmp_path)[0], options(no_pictures=True)
    for key, wrong, message in (
        ("extrinsics", value["extrinsics"][:, :3], r"'extrinsics' has shape \(20, 3, 4\)"),
        ("video_decode_frame", np.zeros(20), "does not increase"),
        ("text", {"left": [("a", 3)]}, r"'text\.left'"),
        ("left", None, "has no 'left'"),
    ):
        np.save(path, {**value, key: wrong}, allow_pickle=True)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            vitra.read(item, given)
    np.save(path, {**value, "right": {**value["right"], "hand_pose": np.zeros((20, 15, 3))}}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"'right\.hand_pose' has shape"):
        vitra.read(item, given)
    vitra_episode(path)
    with pytest.raises(UserError, match="no video 'vid-1'"):
        vitra.read(item, options(videos=tmp_path))


# -- EgoVerse -----------------------------------------------------------------------------------------------------


def egoverse_episode(path: Path, total: int = 20, annotated: bool = True) -> None:
    zarr = pytest.importorskip("zarr")
    from zarr.core.dtype import VariableLengthBytes

    padded = 32  # arrays are longer than the episode
    store = zarr.open(str(path), mode="w", zarr_format=3)
    camera = camera_path(total)
    head = np.concatenate([camera[:, :3, 3], np.roll(Rotation.from_matrix(camera[:, :3, :3]).as_quat(), 1, axis=1)], 1)
    arrays = {"obs_head_pose": head}
    for side in SIDES:
        arrays[f"{side}.obs_keypoints"] = hand_path(total, side)[1].reshape(total, 63)
    arrays["left.obs_keypoints"][15:] = 0  # not tracked
    for name, values in arrays.items():
        full = np.zeros((padded, values.shape[1]), np.float32)
        full[:total] = values
        store.create_array(name, data=full, chunks=(16, values.shape[1]), shards=full.shape)

    def texts(name: str, data: list[bytes]) -> None:
        encoded = np.array(data, object)
        store.create_array(name, shape=(len(data),), chunks=(1,), shards=(len(data),), dtype=VariableLengthBytes())
        store[name][:] = encoded

    texts("images.front_1", [picture(min(step, total - 1), total) for step in range(padded)])
    if annotated:
        words = [
            {"text": "pick the cup", "start_idx": 0, "end_idx": 7},
            {"text": "wipe", "start_idx": 8, "end_idx": 19},
        ]
        texts("annotations", [json.dumps(entry).encode() for entry in words])
    store.attrs.update(
        {
            "embodiment": "scale_bimanual",
            "total_frames": total,
            "fps": 30,
            "task_name": "t",
            "task_description": "tidy up",
        }
    )


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_egoverse(tmp_path: Path) -> None:
    grasps = basis(tmp_path / "g.json")
    egoverse_episode(tmp_path / "src" / "a.zarr")
    egoverse_episode(tmp_path / "src" / "b.zarr", annotated=False)
    report = egoverse.convert(tmp_path / "src", tmp_path / "out", options(eigengrasps=tmp_path / "g.json"), 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    assert dataset.lengths.tolist() == [14, 14] and list(dataset.tasks) == ["pick the cup", "wipe", "tidy up"]
    assert dataset.rows(0).task.tolist() == [0] * 8 + [1] * 6
    assert {entry["reason"] for entry in report["dropped"]} == {"left hand not tracked at 5 of 20 steps"}
    for side in SIDES:
        assert tip_error(dataset, hand_path(20, side)[1], camera_path(20), side, grasps) < 1e-4
    assert abs(int(dataset.frames(0, "ego", [13]).mean()) - colour(13, 20)) < 6
    for file in (tmp_path / "src" / "a.zarr" / "obs_head_pose").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"a\.zarr: 'obs_head_pose' is damaged"):
        egoverse.read(egoverse.items(tmp_path / "src")[0], options())


# -- Xperience ----------------------------------------------------------------------------------------------------


def xperience_episode(folder: Path, total: int = 24) -> None:
    folder.mkdir(parents=True)
    mount = np.eye(4)
    mount[:3, :3], mount[:3, 3] = Rotation.from_rotvec([0.3, -0.2, 0.1]).as_matrix(), [0.1, 0.02, 0]
    camera = camera_path(total)
    body = np.linalg.inv(mount) @ np.linalg.inv(camera)  # world → body
    names = [f"{75294505147569 + 50_000_000 * i}.jpg" for i in range(total)]
    segments = [
        {
            "segment_id": 0,
            "Sub Task": "wash up",
            "start_frame": 1,
            "end_frame": 20,
            "Current Action": [
                {"label": "take the plate", "start_frame_name": names[0], "end_frame_name": names[8]},
                {"label": "rinse the plate", "start_frame": 10, "end_frame": "frame_000020"},
                {"label": "N/A", "start_frame": 21, "end_frame": 22},
            ],
        }
    ]
    with h5py.File(folder / "annotation.hdf5", "w") as file:
        file["slam/quat_wxyz"] = np.roll(Rotation.from_matrix(body[:, :3, :3]).as_quat(), 1, axis=1)
        file["slam/trans_xyz"] = body[:, :3, 3]
        file["slam/frame_names"] = np.array([name.encode() for name in names])
        file["calibration/cam01/T_c0_b"] = mount
        file["calibration/cam01/K"] = np.array([400.0, 400, 256, 256])
        file["video/length_sec"] = total / 20
        for side in SIDES:
            _, points = hand_path(total, side)
            inside = np.einsum("tji,tpj->tpi", camera[:, :3, :3], points - camera[:, None, :3, 3])
            file[f"hand_mocap/{side}_joints_3d"] = inside.astype(np.float32)
        file["caption"] = json.dumps({"config": {"Main Task": "clean the kitchen"}, "segments": segments})
    video(folder / "stereo_left.mp4", total, fps=20)


def test_xperience(tmp_path: Path) -> None:
    grasps = basis(tmp_path / "g.json")
    xperience_episode(tmp_path / "src" / "ep1")
    given = options(eigengrasps=tmp_path / "g.json")
    report = xperience.convert(tmp_path / "src", tmp_path / "out", given, 1, False)
    dataset = LeRobotDataset(tmp_path / "out")
    # Words for steps 0-8 and 9-19; the last four have none.
    assert dataset.fps == 20 and dataset.lengths.tolist() == [19]
    assert dataset.rows(0).task.tolist() == [0] * 9 + [1] * 10
    assert list(dataset.tasks) == ["take the plate", "rinse the plate"]
    assert report["dropped"][0]["reason"] == "no instruction at 4 of 24 steps"
    for side in SIDES:
        assert tip_error(dataset, hand_path(24, side)[1], camera_path(24), side, grasps) < 1e-4
    given.words = "subtask"
    recording = xperience.read(xperience.items(tmp_path / "src")[0], given)
    assert recording.texts[:20] == ["wash up"] * 20 and set(recording.texts[20:]) == {""}
    with h5py.File(tmp_path / "src" / "ep1" / "annotation.hdf5", "r+") as file:
        file["slam/quat_wxyz"][3] = np.nan
        file["hand_mocap/left_joints_3d"][5] = 0
        del file["caption"]
        file["caption"] = "{not json"
    with pytest.raises(UserError, match="'caption' is not the JSON"):
        xperience.read(xperience.items(tmp_path / "src")[0], given)
    with h5py.File(tmp_path / "src" / "ep1" / "annotation.hdf5", "r+") as file:
        del file["caption"]
    recording = xperience.read(xperience.items(tmp_path / "src")[0], given)
    assert np.flatnonzero(~recording.valid("both")).tolist() == [3, 5]
