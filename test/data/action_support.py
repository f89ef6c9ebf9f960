"""Small corpora in their real layouts, built without the code under test."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from qwen_vla_core.data.hands.eigengrasps import Eigengrasps, save

SIZE = (32, 24)
FINGERS = ("Thumb", "Index", "Middle", "Ring", "Little")


def options(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"height": 24, "min_steps": 4, **given})


def colour(step: int, total: int) -> int:
    """Grey level that says which step a picture shows, far enough apart to survive JPEG and h264."""
    return 20 + (200 * step) // max(total - 1, 1)


def picture(step: int, total: int, kind: str = "JPEG", size: tuple[int, int] = SIZE) -> bytes:
    image, data = Image.new("RGB", size, (colour(step, total),) * 3), io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def video(path: Path, frames: int | np.ndarray, fps: int = 30) -> None:
    """Grey frames that say their number, or given ones (T, h, w, 1)."""
    import av

    if isinstance(frames, int):
        greys = np.array([colour(step, frames) for step in range(frames)])
        frames = np.broadcast_to(greys[:, None, None, None], (frames, SIZE[1], SIZE[0], 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for grey in frames:
            frame = np.repeat(grey, 3, axis=2).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# -- TFRecord, byte by byte ---------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while True:
        out.append(number & 0x7F | (0x80 if number > 0x7F else 0))
        number >>= 7
        if not number:
            return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def example(columns: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """A ``tf.train.Example``."""
    entries = b""
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            feature = _field(2, _field(1, values.astype("<f4").tobytes()))
        elif isinstance(values, np.ndarray):
            feature = _field(3, _field(1, b"".join(_varint(int(value)) for value in values)))
        else:
            feature = _field(1, b"".join(_field(1, value) for value in values))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def framed(data: bytes) -> bytes:
    def masked(part: bytes) -> int:
        crc = google_crc32c.value(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def rlds(
    folder: Path,
    name: str,
    shapes: Mapping[str, tuple[int, ...] | str],
    shards: Sequence[Sequence[Mapping[str, Any]]],
) -> Path:
    """A TFDS folder. Shapes: feature below steps → its dimensions, ``text`` or ``image``."""
    version = folder / name / "1.0.0"
    version.mkdir(parents=True)
    tree: dict[str, Any] = {}
    for key, shape in {"is_first": (), **shapes}.items():
        node = tree
        *above, leaf = key.split("/")
        for part in above:
            node = node.setdefault(part, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        if shape == "text":
            node[leaf] = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
        elif shape == "image":
            dimensions = [str(SIZE[1]), str(SIZE[0]), "3"]
            node[leaf] = {"image": {"shape": {"dimensions": dimensions}, "dtype": "uint8", "encodingFormat": "jpeg"}}
        else:
            inside = {"dimensions": [str(size) for size in shape]} if shape else {}
            node[leaf] = {"tensor": {"shape": inside, "dtype": "float32", "encoding": "none"}}
    steps = {
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": {"featuresDict": {"features": tree}}},
    }
    (version / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "shardLengths": [str(len(shard)) for shard in shards],
    }
    info = {"fileFormat": "tfrecord", "name": name, "splits": [split], "version": "1.0.0"}
    (version / "dataset_info.json").write_text(json.dumps(info))
    for number, shard in enumerate(shards):
        path = version / f"{name}-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        path.write_bytes(b"".join(framed(example(columns)) for columns in shard))
    return version


# -- hands --------------------------------------------------------------------------------------------------------


def hand_points(bend: np.ndarray, side: str = "right") -> np.ndarray:
    """(T, 21, 3) of a hand in a frame with x along it, z out of its back: every joint bent by ``bend`` (T,) radians."""
    points = np.zeros((len(bend), 21, 3))
    for finger in range(5):
        base = np.array([0.03, 0.03, 0.0]) if finger == 0 else np.array([0.09, 0.02 * (2 - finger), 0.0])
        straight = np.array([1.0, 1.0, 0.0]) / np.sqrt(2) if finger == 0 else np.array([1.0, 0.0, 0.0])
        points[:, 1 + 4 * finger] = base
        for joint in range(3):
            # A finger closes towards the palm: about +y.
            turn = Rotation.from_rotvec(np.outer(bend * (joint + 1), [0.0, 1.0, 0.0]))
            points[:, 2 + 4 * finger + joint] = points[:, 1 + 4 * finger + joint] + 0.03 * turn.apply(straight)
    return points * ([1, -1, 1] if side == "left" else [1, 1, 1])


def hand_path(total: int, side: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(T, 4, 4) wrist → world before a camera at the origin, and the (T, 21, 3) points in the world."""
    rng = np.random.default_rng(seed + (side == "left"))
    time = np.linspace(0, 1, total)
    wrist = np.tile(np.eye(4), (total, 1, 1))
    wrist[:, :3, :3] = Rotation.from_rotvec(np.outer(time, rng.normal(size=3)) + rng.normal(size=3)).as_matrix()
    start = np.array([0.1 if side == "right" else -0.1, 0.1, 0.5])
    wrist[:, :3, 3] = start + np.outer(time, rng.normal(0, 0.1, 3))
    bend = 0.2 + 0.25 * np.sin(4 * time + seed)
    points = np.einsum("tij,tpj->tpi", wrist[:, :3, :3], hand_points(bend, side)) + wrist[:, None, :3, 3]
    return wrist, points


def camera_path(total: int) -> np.ndarray:
    """(T, 4, 4) camera → world, moving a little from the identity."""
    camera = np.tile(np.eye(4), (total, 1, 1))
    time = np.linspace(0, 1, total)
    camera[:, :3, :3] = Rotation.from_rotvec(np.outer(time, [0.05, 0.1, 0.0])).as_matrix()
    camera[:, :3, 3] = np.outer(time, [0.02, 0.0, 0.05])
    return camera


def basis(path: Path, pose: str = "points") -> Eigengrasps:
    """A file of ten eigengrasps."""
    rng = np.random.default_rng(3)
    components = np.linalg.qr(rng.normal(size=(45, 10)))[0].T
    grasps = Eigengrasps(pose, np.zeros(45), components, np.linspace(1, 0, 45), 100)
    save(grasps, path)
    return grasps
