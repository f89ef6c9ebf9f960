"""The WidowX scene: our own MJCF (``widowx.xml``) with the WX250s meshes of the installed ``rtb-data`` package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mujoco

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.domain import add_materials
from qwen_vla_core.sim.worlds.objects import add_clutter, add_cubes, aim
from qwen_vla_core.sim.worlds.widowx_belt import add_belt

CAMERAS: dict[str, str] = {"ego": "ego", "cam_wrist": "wrist"}  # view name → camera of the model
EGO_POSITION = (0.56, 0.0, 0.60)
EGO_TARGET = (0.24, 0.0, 0.0)
EGO_FOVY = 45.0  # degrees
WRIST_POSITION = (0.01, 0.0, 0.085)  # metres in the gripper link's frame
WRIST_TARGET = (0.13, 0.0, 0.0)
WRIST_FOVY = 75.0
TABLE_CENTRE, TABLE_HALF = (0.25, 0.0), (0.45, 0.5)  # metres, as in the MJCF


def mesh_folder() -> Path:
    """Folder of the WX250s meshes inside the installed ``rtb-data``. Its Python code is never imported.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("rtbdata")
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0]) / "xacro/trossen_descriptions/meshes/meshes_wx250s" if places else None
    if folder is None or not (folder / "WXSA-250-M-1-Base.stl").is_file():
        raise UserError("the WidowX world needs the WX250s meshes of rtb-data: pip install 'qwen_vla_ros[sim]'")
    return folder


def build_model(*, materials: bool = False) -> mujoco.MjModel:
    """Compiles the scene: the arm on its table, a plate, a belt, three cubes (one colour each), two cameras.

    Args:
        materials: also the patterns and the clutter that domain randomisation chooses from.
    """
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("widowx.xml")))
    spec.meshdir = str(mesh_folder())
    up = (0.0, 0.0, 1.0)
    spec.worldbody.add_camera(name="ego", pos=EGO_POSITION, fovy=EGO_FOVY, xyaxes=aim(EGO_POSITION, EGO_TARGET, up))
    spec.body("gripper_link").add_camera(
        name="wrist", pos=WRIST_POSITION, fovy=WRIST_FOVY, xyaxes=aim(WRIST_POSITION, WRIST_TARGET, up)
    )
    add_belt(spec)
    add_cubes(spec, contact=3)
    if materials:
        add_materials(spec, TABLE_CENTRE, TABLE_HALF)
        add_clutter(spec, contact=3)
    return spec.compile()
