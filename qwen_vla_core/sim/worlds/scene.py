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
from qwen_vla_core.sim.randomize import COLOURS, PLAIN_RGB

ARMS: tuple[str, str] = ("left", "right")
CUBE_HALF = 0.02  # metres
PINCH_OFFSET = 0.14  # metres from the gripper link to the point between the finger pads, along the gripper
PARKING_Z = -2.0  # cubes that are not in the episode rest on a shelf under the floor, out of every camera's sight
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


def _aim(position: tuple[float, ...], target: tuple[float, ...], up: tuple[float, ...]) -> list[float]:
    """``xyaxes`` of a camera at ``position`` that looks at ``target``."""
    forward = [t - p for p, t in zip(position, target, strict=True)]
    right = _cross(forward, up)
    return [*right, *_cross(right, forward)]


def _cross(a: list[float] | tuple[float, ...], b: list[float] | tuple[float, ...]) -> list[float]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


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
    world.add_camera(
        name="ego", pos=EGO_POSITION, fovy=EGO_FOVY, xyaxes=_aim(EGO_POSITION, EGO_TARGET, (0.0, 0.0, 1.0))
    )
    for arm in ARMS:
        gripper = spec.body(f"vx300s_{arm}/gripper_link")
        gripper.add_site(name=f"{arm}_pinch", pos=[PINCH_OFFSET, 0, 0], size=[0.002] * 3, rgba=[0, 0, 0, 0], group=5)
        gripper.add_camera(
            name=f"{arm}_wrist",
            pos=WRIST_POSITION,
            fovy=WRIST_FOVY,
            xyaxes=_aim(WRIST_POSITION, WRIST_TARGET, (0.0, 0.0, 1.0)),
        )
    plane, box = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
    world.add_geom(name="floor", type=plane, size=[3, 3, 1], pos=[0, 0, -0.7], contype=0, conaffinity=0)
    world.add_geom(name="shelf", type=box, size=[0.3, 0.3, 0.05], pos=[0, 0, PARKING_Z - 0.05])
    for colour in COLOURS:
        body = world.add_body(name=f"cube_{colour}")
        body.add_freejoint(name=f"cube_{colour}")
        body.mass = 0.05
        body.inertia = [1.4e-5] * 3  # 50 g solid cube of 4 cm
        body.explicitinertial = True
        body.add_geom(
            name=f"cube_{colour}",
            type=box,
            size=[CUBE_HALF] * 3,
            rgba=[*PLAIN_RGB[colour], 1.0],
            condim=4,
            friction=[1, 0.005, 0.0001],  # as in gym-aloha
            solimp=[2, 1, 0.01, 0.5, 2],
            solref=[0.01, 1],
        )
    if materials:
        add_materials(spec)
    return spec.compile()
