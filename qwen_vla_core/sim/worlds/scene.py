"""The ALOHA scene, composed at run time from the ViperX model of the installed ``gym-aloha`` package.

Nothing of that package is copied: its MJCF is parsed where it lies, then cameras, cubes, floor and quality settings are
replaced. Its Python code is never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mujoco

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.domain import add_materials
from qwen_vla_core.sim.worlds.objects import CUBE_HALF, PARKING_Z, add_cubes, aim

ARMS: tuple[str, str] = ("left", "right")
PINCH_OFFSET = 0.14  # metres from the gripper link to the point between the finger pads, along the gripper
CAMERAS: dict[str, str] = {  # view name → camera of the model
    "ego": "ego",
    "cam_left_wrist": "left_wrist",
    "cam_right_wrist": "right_wrist",
}
EGO_POSITION = (0.0, 0.12, 0.78)
EGO_TARGET = (0.0, 0.555, 0.05)
EGO_FOVY = 44.0  # degrees
WRIST_POSITION = (0.035, 0.0, 0.105)  # metres in the gripper link's frame
WRIST_TARGET = (0.18, 0.0, 0.0)
WRIST_FOVY = 75.0
TABLE_CENTRE, TABLE_HALF = (0.0, 0.6), (0.6096, 0.381)  # metres

__all__ = ["ARMS", "CAMERAS", "CUBE_HALF", "PARKING_Z", "build_model"]


def asset_folder() -> Path:
    """Folder of the ViperX model inside the installed ``gym-aloha``.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("gym_aloha")
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0]) / "assets" if places else None
    if folder is None or not (folder / "bimanual_viperx_transfer_cube.xml").is_file():
        raise UserError("the ALOHA world needs the ViperX model of gym-aloha: pip install 'qwen_vla_ros[sim]'")
    return folder


def build_model(*, materials: bool = False) -> mujoco.MjModel:
    """Compiles the scene: two arms, a table, three cubes (one colour each), three cameras, no shadows.

    Args:
        materials: also the patterns that domain randomisation chooses from.
    """
    spec = mujoco.MjSpec.from_file(str(asset_folder() / "bimanual_viperx_transfer_cube.xml"))
    spec.visual.quality.shadowsize = 0  # shadows cost nine tenths of the rendering time
    spec.visual.quality.offsamples = 0
    spec.visual.map.znear = 0.01
    spec.option.timestep = 0.002
    for key in list(spec.keys):
        spec.delete(key)
    spec.delete(spec.body("box"))
    for camera in list(spec.cameras):
        spec.delete(camera)

    world = spec.worldbody
    world.add_camera(name="ego", pos=EGO_POSITION, fovy=EGO_FOVY, xyaxes=aim(EGO_POSITION, EGO_TARGET, (0.0, 0.0, 1.0)))
    for arm in ARMS:
        gripper = spec.body(f"vx300s_{arm}/gripper_link")
        gripper.add_site(name=f"{arm}_pinch", pos=[PINCH_OFFSET, 0, 0], size=[0.002] * 3, rgba=[0, 0, 0, 0], group=5)
        gripper.add_camera(
            name=f"{arm}_wrist",
            pos=WRIST_POSITION,
            fovy=WRIST_FOVY,
            xyaxes=aim(WRIST_POSITION, WRIST_TARGET, (0.0, 0.0, 1.0)),
        )
    world.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[3, 3, 1], pos=[0, 0, -0.7], contype=0, conaffinity=0
    )
    add_cubes(spec)
    if materials:
        add_materials(spec, TABLE_CENTRE, TABLE_HALF)
    return spec.compile()
