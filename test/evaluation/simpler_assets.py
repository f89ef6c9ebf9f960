"""Stand-ins for the assets of SimplerEnv's Bridge tasks: boxes in the folders, with the names, that mani-skill reads.

The real ones are a download from the Hugging Face hub and GitHub. With these the real task code, controllers and
renderer run; the pictures show boxes in front of a grey background.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

# link, parent, joint, its axis, offset from the parent joint (m), limits: a WidowX 250 in outline
JOINTS = (
    ("shoulder_link", "base_link", "waist", "0 0 1", (0, 0, 0.072), (-3.14, 3.14)),
    ("upper_arm_link", "shoulder_link", "shoulder", "0 1 0", (0, 0, 0.039), (-1.88, 1.99)),
    ("upper_forearm_link", "upper_arm_link", "elbow", "0 1 0", (0.05, 0, 0.25), (-2.15, 1.61)),
    ("lower_forearm_link", "upper_forearm_link", "forearm_roll", "1 0 0", (0.175, 0, 0), (-3.14, 3.14)),
    ("wrist_link", "lower_forearm_link", "wrist_angle", "0 1 0", (0.075, 0, 0), (-1.75, 2.15)),
    ("gripper_link", "wrist_link", "wrist_rotate", "1 0 0", (0.065, 0, 0), (-3.14, 3.14)),
)
MODELS = {  # name → size in metres
    "bridge_carrot_generated_modified": (0.09, 0.02, 0.02),
    "bridge_plate_objaverse_larger": (0.13, 0.13, 0.01),
    "bridge_spoon_generated_modified": (0.1, 0.02, 0.01),
    "table_cloth_generated_shorter": (0.1, 0.1, 0.004),
}


def write_assets(folder: Path) -> None:
    """Fills ``folder``, which MS_ASSET_DIR is to name; knows the carrot and the spoon."""
    data = folder / "data"
    robot, dataset = data / "robots" / "widowx", data / "tasks" / "bridge_v2_real2sim_dataset"
    for place in (robot, dataset / "real_inpainting", dataset / "stages", dataset / "custom" / "models"):
        place.mkdir(parents=True)
    (robot / "wx250s.urdf").write_text(_urdf())
    grey = np.full((480, 640, 3), 120, np.uint8)
    for name in ("bridge_real_eval_1", "bridge_sink"):
        cv2.imwrite(str(dataset / "real_inpainting" / f"{name}.png"), grey)
    for name in ("bridge_table_1_v1", "bridge_table_1_v2"):
        # A slab under the objects, its top 0.86 m high: the task turns the stage upright and moves it.
        (dataset / "stages" / f"{name}.glb").write_bytes(
            _glb(np.array([2.5, 0.05, 2.5]), np.array([-2.06, 0.835, 2.83]))
        )
    known = {}
    for name, size in MODELS.items():
        model = dataset / "custom" / "models" / name
        model.mkdir()
        for file in ("collision.obj", "textured.obj"):
            (model / file).write_text(box_obj(np.array(size)))
        half = [value / 2 for value in size]
        known[name] = {"bbox": {"min": [-v for v in half], "max": half}, "scales": [1.0], "density": 600}
    (dataset / "custom" / "info_bridge_custom_v0.json").write_text(json.dumps(known))


def _corners(size: np.ndarray, middle: np.ndarray | None = None) -> np.ndarray:
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return signs * size / 2 + (0.0 if middle is None else middle)


_FACES = np.array(
    [
        [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
        [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
    ]
)  # fmt: skip


def box_obj(size: np.ndarray) -> str:
    """A box as Wavefront OBJ."""
    lines = [f"v {x:.5f} {y:.5f} {z:.5f}" for x, y, z in _corners(size)]
    return "\n".join([*lines, *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in _FACES)]) + "\n"


def _glb(size: np.ndarray, middle: np.ndarray) -> bytes:
    """A box as binary glTF."""
    points = _corners(size, middle).astype("<f4")
    binary = points.tobytes() + _FACES.astype("<u2").tobytes()
    binary += b"\0" * (-len(binary) % 4)
    views = [
        {"buffer": 0, "byteOffset": 0, "byteLength": points.nbytes},
        {"buffer": 0, "byteOffset": points.nbytes, "byteLength": _FACES.size * 2},
    ]
    low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    accessors = [
        {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3", "min": low, "max": high},
        {"bufferView": 1, "componentType": 5123, "count": _FACES.size, "type": "SCALAR"},
    ]
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = len(text).to_bytes(4, "little") + b"JSON" + text + len(binary).to_bytes(4, "little") + b"BIN\0" + binary
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little") + chunks


def _link(name: str, size: tuple[float, float, float]) -> str:
    box = f'<geometry><box size="{size[0]} {size[1]} {size[2]}"/></geometry>'
    inertia = '<inertia ixx="1e-3" ixy="0" ixz="0" iyy="1e-3" iyz="0" izz="1e-3"/>'
    return (
        f'<link name="{name}"><inertial><mass value="0.2"/>{inertia}</inertial>'
        f"<visual>{box}</visual><collision>{box}</collision></link>"
    )


def _joint(kind: str, name: str, parent: str, child: str, offset: tuple[float, ...], rest: str = "") -> str:
    place = " ".join(str(value) for value in offset)
    return (
        f'<joint name="{name}" type="{kind}"><origin xyz="{place}" rpy="0 0 0"/><parent link="{parent}"/>'
        f'<child link="{child}"/>{rest}</joint>'
    )


def _urdf() -> str:
    parts = [_link("base_link", (0.1, 0.1, 0.06))]
    for link, parent, joint, axis, offset, (lower, upper) in JOINTS:
        limit = f'<axis xyz="{axis}"/><limit lower="{lower}" upper="{upper}" effort="50" velocity="3"/>'
        parts += [_link(link, (0.04, 0.04, 0.04)), _joint("revolute", joint, parent, link, offset, limit)]
    for side, sign in (("left", 1), ("right", -1)):
        limit = f'<axis xyz="0 {sign} 0"/><limit lower="0.015" upper="0.037" effort="10" velocity="1"/>'
        parts += [
            _link(f"{side}_finger_link", (0.05, 0.008, 0.02)),
            _joint("prismatic", f"{side}_finger", "gripper_link", f"{side}_finger_link", (0.07, 0, 0), limit),
        ]
    parts += [
        _link("ee_gripper_link", (0.005, 0.005, 0.005)),
        _joint("fixed", "ee_gripper", "gripper_link", "ee_gripper_link", (0.093, 0, 0)),
    ]
    return '<?xml version="1.0"?>\n<robot name="wx250s">' + "".join(parts) + "</robot>\n"
