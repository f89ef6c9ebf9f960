"""Hand geometry, eigengrasps and the reader of stored dictionaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from action_support import basis, camera_path, hand_path, hand_points
from scipy.spatial.transform import Rotation

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.data.hands.eigengrasps import Eigengrasps, Moments, load, save
from qwen_vla_core.data.hands.object_npy import read_dict
from qwen_vla_core.data.hands.points import (
    FINGERS,
    finger_pose,
    mano_fingers,
    mano_wrist,
    points_of,
    wrist_frames,
)
from qwen_vla_core.data.hands.track import HandRecording, channels, contract_of, stretches, track_points
from qwen_vla_core.errors import UserError


@pytest.mark.parametrize("side", ["left", "right"])
def test_points_give_back_the_wrist_and_the_bends(side: str) -> None:
    wrist, points = hand_path(20, side)
    found, valid = wrist_frames(points, side)
    assert valid.all()
    np.testing.assert_allclose(found[:, :3, 3], points[:, 0], atol=1e-12)
    np.testing.assert_allclose(found, wrist, atol=1e-9)  # made with x along the hand and z out of its back
    pose, bent = finger_pose(points, found, side)
    assert bent.all()
    hand = np.einsum("ji,pj->pi", found[0, :3, :3], points[0] - points[0, 0]) * ([1, -1, 1] if side == "left" else 1)
    np.testing.assert_allclose(points_of(pose, found, side, hand), points, atol=1e-9)


def test_both_hands_share_one_pose_and_bending_is_about_one_axis() -> None:
    bend = np.linspace(0.05, 0.4, 8)
    poses = {}
    for side in ("left", "right"):
        points = hand_points(bend, side)
        frames, _ = wrist_frames(points, side)
        poses[side], valid = finger_pose(points, frames, side)
        assert valid.all()
    np.testing.assert_allclose(poses["left"], poses["right"], atol=1e-12)
    index = poses["right"].reshape(8, 15, 3)[:, 3 * FINGERS.index("index") + 1]
    np.testing.assert_allclose(index[:, 1], bend, atol=1e-9)  # the middle joint, relative to its parent
    np.testing.assert_allclose(index[:, [0, 2]], 0, atol=1e-9)


def test_what_is_no_hand_is_marked_and_never_filled_in() -> None:
    _, points = hand_path(6, "right")
    points[1, 4] = np.nan
    points[2] *= 1000  # millimetres
    points[3] = 0
    points[4, 9] = points[4, 0]
    track = track_points(points, "right", np.array([True, True, True, True, True, False]))
    assert track.valid.tolist() == [True, False, False, False, False, False]
    assert np.isfinite(track.wrist).all() and np.isfinite(track.fingers).all()
    with pytest.raises(ValueError, match=r"expected \(T, 21, 3\)"):
        track_points(points[:, :20], "right", np.ones(6, bool))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mano_wrists_are_the_same_frame(side: str) -> None:
    # MANO's right hand lies along −x with the thumb at +z; a left hand is its mirror image in x.
    bend = np.full(3, 0.2)
    ours = hand_points(bend, "right")
    mano = np.stack([-ours[..., 0], ours[..., 2], ours[..., 1]], axis=-1) * ([-1, 1, 1] if side == "left" else 1)
    turn = Rotation.from_rotvec([[0.1, 2.0, -1.0], [0.5, 0.2, 0.1], [0, 0, 3.0]]).as_matrix()
    points = np.einsum("tij,tpj->tpi", turn, mano) + 0.3
    expected, valid = wrist_frames(points, side)
    assert valid.all()
    found = mano_wrist(turn, points[:, 0], side)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    bends = np.tile(Rotation.from_rotvec([0.1, 0.2, 0.3]).as_matrix(), (2, 15, 1, 1))
    np.testing.assert_allclose(mano_fingers(bends), np.tile([0.1, 0.2, 0.3], (2, 15)), atol=1e-12)


def test_eigengrasps_find_the_directions_and_report_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(45, 10)))[0].T
    sizes = np.linspace(1.0, 0.2, 10)
    noise = 0.01
    poses = 0.3 + rng.normal(size=(4000, 10)) * sizes @ axes + rng.normal(0, noise, (4000, 45))
    parts = [Moments.of(part) for part in np.array_split(poses, 7)]
    total = Moments.of(np.zeros((0, 45)))
    for part in parts:
        total = total.merge(part)
    one = Moments.of(poses)
    np.testing.assert_allclose(total.scatter, one.scatter, rtol=1e-9)
    grasps = Eigengrasps.fit(total, "points", 10, ({"name": "egodex"},))
    assert np.abs(axes @ grasps.components.T).max(axis=1).min() > 0.95
    assert grasps.explained.sum() > 0.99 and (np.diff(grasps.explained) <= 0).all()
    coefficients = grasps.coefficients(poses)
    np.testing.assert_allclose(grasps.coefficients(grasps.poses(coefficients)), coefficients, atol=1e-12)
    left_out = np.sqrt(np.mean(np.square(poses - grasps.poses(coefficients))))
    assert left_out == pytest.approx(grasps.residual_rms, rel=0.01) == pytest.approx(noise * np.sqrt(35 / 45), rel=0.05)
    assert grasps.squared_residual(poses) == pytest.approx(left_out**2 * poses.size)
    save(grasps, tmp_path / "g.json")
    again = load(tmp_path / "g.json")
    assert again.hash == grasps.hash and again.sources == ({"name": "egodex"},)
    np.testing.assert_array_equal(again.components, grasps.components)


def test_damaged_or_too_few_eigengrasps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 tracked hands are too few"):
        Eigengrasps.fit(Moments.of(np.zeros((3, 45))), "points", 10)
    grasps = basis(tmp_path / "g.json")
    value = grasps.to_json()
    for key, wrong in {
        "mean": value["mean"][:44],
        "components": (np.array(value["components"]) * 1.1).tolist(),
        "variance": [float("nan")] * 45,
        "pose": "fists",
    }.items():
        (tmp_path / "bad.json").write_text(json.dumps({**value, key: wrong}))
        with pytest.raises(UserError, match=r"bad\.json: no eigengrasps"):
            load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="qwen-vla data hands fit"):
        load(tmp_path / "missing.json")


def test_channels_are_in_the_first_camera_and_invertible(tmp_path: Path) -> None:
    grasps, camera = basis(tmp_path / "g.json"), camera_path(12)
    tracks = {side: track_points(hand_path(12, side)[1], side, np.ones(12, bool)) for side in ("left", "right")}
    recording = HandRecording("a", "a", 30, camera, np.ones(12, bool), tracks, ["x"] * 12, None)
    values = channels(recording, "both", grasps, 3, 12)
    contract = contract_of("both", 30, ())
    assert values.shape == (9, 32) == (9, len(contract.action_channels))
    assert contract.convention == "relative_eef" and contract.horizon == 16
    assert len(contract_of("left", 30, ()).action_channels) == 16
    right = contract.action_channels.index("right_wrist_x")
    world = np.tile(np.eye(4), (9, 1, 1))
    world[:, :3, :3] = Rotation.from_rotvec(values[:, right + 3 : right + 6]).as_matrix()
    world[:, :3, 3] = values[:, right : right + 3]
    np.testing.assert_allclose(camera[3] @ world, tracks["right"].wrist[3:], atol=1e-6)
    # A chunk is learned relative to the wrist at its first frame: there, the pose that is held is the identity.
    parts = relative_parts(contract.convention, contract.action, contract.state)
    chunk = to_relative(parts, values, values[0])
    np.testing.assert_allclose(chunk[0, right : right + 6], 0, atol=1e-6)
    expected = np.linalg.inv(tracks["right"].wrist[3]) @ tracks["right"].wrist[8]
    np.testing.assert_allclose(chunk[5, right : right + 3], expected[:3, 3], atol=1e-6)
    first = contract.action_channels.index("left_grasp_0")
    np.testing.assert_allclose(
        values[:, first : first + 10], grasps.coefficients(tracks["left"].fingers[3:]), atol=1e-6
    )


def test_stretches() -> None:
    assert stretches(np.array([True, True, False, True, False, False, True])) == [(0, 2), (3, 4), (6, 7)]
    assert stretches(np.zeros(3, bool)) == [] and stretches(np.ones(2, bool)) == [(0, 2)]


# -- stored dictionaries ------------------------------------------------------------------------------------------


class _Runs:
    """What a hostile file holds: a call that leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_dictionaries_come_back_as_numpy_wrote_them(tmp_path: Path) -> None:
    value = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "b": np.array([True, False]),
        "big": np.array([1, 2], ">i4"),
        "n": {"text": [("wörter", (0, np.int64(25)))], "none": None, "number": np.float32(0.5), "long": 2**70},
        "empty": [],
    }
    np.save(tmp_path / "v.npy", value, allow_pickle=True)  # type: ignore[arg-type]
    found = read_dict(tmp_path / "v.npy")
    for key in ("a", "f", "b", "big"):
        np.testing.assert_array_equal(found[key], value[key])
    assert found["n"] == {"text": [["wörter", [0, 25]]], "none": None, "number": 0.5, "long": 2**70}
    assert found["empty"] == []


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    np.save(tmp_path / "v.npy", {"a": _Runs(trace)}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"v\.npy: not a dictionary of plain arrays"):
        read_dict(tmp_path / "v.npy")
    assert not trace.exists()


def test_other_and_cut_files(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", {"a": np.arange(100)}, allow_pickle=True)  # type: ignore[arg-type]
    data = (tmp_path / "v.npy").read_bytes()
    for cut in (4, 60, len(data) // 2, len(data) - 1):
        (tmp_path / "v.npy").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"v\.npy: not a dictionary"):
            read_dict(tmp_path / "v.npy")
    np.save(tmp_path / "n.npy", np.arange(3))
    with pytest.raises(UserError, match="not one stored object"):
        read_dict(tmp_path / "n.npy")
    np.save(tmp_path / "o.npy", np.array([1, "a"], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"o\.npy"):
        read_dict(tmp_path / "o.npy")
