"""The MuJoCo scene of the rooms: one model with spare parts, arranged anew for each layout without compiling again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mujoco
import numpy as np

from qwen_vla_core.sim.worlds.rooms_domain import add_materials
from qwen_vla_core.sim.worlds.rooms_layout import ROBOT_RADIUS, Doorway, Landmark, Layout

CAMERAS: dict[str, str] = {"ego": "ego"}
OVERHEAD = "overhead"  # for films; no policy sees it
CAMERA_AT = (0.10, 0.0, 0.60)  # metres in the frame of the base
CAMERA_TILT = math.radians(10)  # downwards
CAMERA_FOVY = 84.0  # degrees; 100 in width
WALL_HEIGHT = 1.5
DOOR_HEIGHT = 1.3
MOST_WALLS, MOST_DOORS, MOST_LANDMARKS = 8, 2, 6
HEIGHT: dict[str, float] = {"pillar": 1.3, "ball": 0.5, "box": 0.4}
RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.08, 0.62, 0.14),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.80, 0.08),
}
WALL_RGB, FLOOR_RGB = (0.72, 0.71, 0.68), (0.42, 0.40, 0.38)
_FRAME = ("left", "right", "top")
_GEOM = mujoco.mjtGeom
_TYPE = {"pillar": _GEOM.mjGEOM_CYLINDER, "ball": _GEOM.mjGEOM_SPHERE, "box": _GEOM.mjGEOM_BOX}
# Fields that a layout or an appearance writes; restored before every episode.
FIELDS: tuple[str, ...] = (
    "geom_pos", "geom_quat", "geom_size", "geom_type", "geom_rgba", "geom_matid", "geom_rbound", "geom_aabb",
    "cam_pos", "cam_quat", "cam_fovy", "light_dir", "light_pos", "light_diffuse", "light_specular",
)  # fmt: skip


def build_model(*, textures: bool = False) -> mujoco.MjModel:
    """Compiles the spare parts: floor, walls, door frames, landmarks, and a base with its camera.

    Args:
        textures: also the patterns that domain randomisation chooses from.
    """
    spec = mujoco.MjSpec()
    spec.visual.quality.shadowsize = 0  # shadows cost nine tenths of the rendering time
    spec.visual.quality.offsamples = 0
    spec.visual.map.znear = 0.01
    spec.visual.headlight.ambient = [0.45, 0.45, 0.45]
    spec.visual.headlight.diffuse = [0.25, 0.25, 0.25]
    spec.visual.headlight.specular = [0, 0, 0]
    sky = spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT
    )
    sky.width, sky.height, sky.rgb1, sky.rgb2 = 32, 192, [0.80, 0.84, 0.88], [0.80, 0.84, 0.88]
    world = spec.worldbody
    world.add_light(
        name="lamp",
        pos=[0, 0, 6],
        dir=[0.3, 0.2, -1.0],
        diffuse=[0.5] * 3,
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
    )
    world.add_camera(name=OVERHEAD, pos=[0, 0, 11.0], fovy=44)
    box = _GEOM.mjGEOM_BOX
    parts = [("floor", [6, 5, 0.05], [0.0, 0.0, -0.05])]
    parts += [(f"wall_{i}", [0.1, 0.1, 0.1], [0.01 * i, 0.0, -3.0]) for i in range(MOST_WALLS)]
    parts += [(f"frame_{i}_{at}", [0.1, 0.1, 0.1], [0.0, 0.0, -4.0 - i]) for i in range(MOST_DOORS) for at in _FRAME]
    parts += [(f"landmark_{i}", [0.2, 0.2, 0.2], [0.0, 0.0, -6.0 - i]) for i in range(MOST_LANDMARKS)]
    for name, size, pos in parts:
        world.add_geom(name=name, type=box, size=size, pos=pos, contype=0, conaffinity=0, rgba=[0.5, 0.5, 0.5, 1])
    base = world.add_body(name="base")
    for name, axis in (("x", [1, 0, 0]), ("y", [0, 1, 0])):
        base.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis)
    base.add_joint(name="heading", type=mujoco.mjtJoint.mjJNT_HINGE, axis=[0, 0, 1])
    for name, size, pos, rgba in (
        ("chassis", [ROBOT_RADIUS, 0.10], [0, 0, 0.14], [0.15, 0.16, 0.18, 1]),
        ("mast", [0.03, 0.18], [0, 0, 0.40], [0.15, 0.16, 0.18, 1]),
        ("nose", [0.05, 0.02], [0.13, 0, 0.25], [0.95, 0.45, 0.10, 1]),
    ):
        base.add_geom(
            name=name, type=_GEOM.mjGEOM_CYLINDER, size=[*size, 0], pos=pos, contype=0, conaffinity=0, rgba=rgba
        )
    s, c = math.sin(CAMERA_TILT), math.cos(CAMERA_TILT)
    # Looking along +x and down: the picture's right is −y, its up (s, 0, c).
    base.add_camera(name="ego", pos=CAMERA_AT, fovy=CAMERA_FOVY, xyaxes=[0, -1, 0, s, 0, c])
    if textures:
        add_materials(spec)
    model = spec.compile()
    model.geom_sameframe[:] = 0  # parts are moved later: nothing may be taken over from where they were built
    return model


class Parts:
    """Arranges the spare parts of a model to a layout."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self._built = {name: getattr(model, name).copy() for name in FIELDS}
        self._headlight = model.vis.headlight.ambient.copy(), model.vis.headlight.diffuse.copy()
        self.walls = tuple(model.geom(f"wall_{i}").id for i in range(MOST_WALLS))
        self.frames = tuple(tuple(model.geom(f"frame_{i}_{at}").id for at in _FRAME) for i in range(MOST_DOORS))
        self.landmarks = tuple(model.geom(f"landmark_{i}").id for i in range(MOST_LANDMARKS))
        self.floor = model.geom("floor").id

    def arrange(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Puts everything back as built, then every wall, frame and landmark in its place.

        Returns:
            the geoms of each landmark and doorway, by name.
        """
        m = self.model
        for name, value in self._built.items():
            getattr(m, name)[:] = value
        m.vis.headlight.ambient[:], m.vis.headlight.diffuse[:] = self._headlight
        m.geom_rgba[self.floor, :3] = FLOOR_RGB
        half = 0.5 * WALL_HEIGHT
        for geom, wall in zip(self.walls, layout.walls, strict=False):
            size = (0.5 * (wall.x1 - wall.x0), 0.5 * (wall.y1 - wall.y0), half)
            self._box(geom, (0.5 * (wall.x0 + wall.x1), 0.5 * (wall.y0 + wall.y1), half), size, WALL_RGB)
        named: dict[str, tuple[int, ...]] = {}
        for geoms, door in zip(self.frames, layout.doorways, strict=False):
            self._frame(geoms, door)
            named[door.name] = geoms
        for geom, landmark in zip(self.landmarks, layout.landmarks, strict=False):
            self._landmark(geom, landmark)
            named[landmark.name] = (geom,)
        return named

    def _box(
        self,
        geom: int,
        at: tuple[float, float, float],
        size: tuple[float, float, float],
        rgb: tuple[float, float, float],
    ) -> None:
        m = self.model
        m.geom_type[geom], m.geom_pos[geom], m.geom_size[geom] = _GEOM.mjGEOM_BOX, at, size
        m.geom_rgba[geom, :3] = rgb
        self.bound(geom)

    def bound(self, geom: int) -> None:
        """Brings the bounding sphere and box of a part in line with its type and size."""
        m = self.model
        size, kind = m.geom_size[geom], m.geom_type[geom]
        if kind == _GEOM.mjGEOM_SPHERE:
            half = np.full(3, size[0])
            m.geom_rbound[geom] = size[0]
        else:
            half = np.array([size[0], size[0], size[1]]) if kind == _GEOM.mjGEOM_CYLINDER else size.copy()
            # A cylinder's rim is nearer than the corner of its box; the sphere only has to be large enough.
            m.geom_rbound[geom] = np.linalg.norm(half)
        m.geom_aabb[geom] = [0, 0, 0, *half]

    def _frame(self, geoms: tuple[int, ...], door: Doorway) -> None:
        """Two posts in the ends of the wall, outside the gap, and a lintel across it."""
        along = (-door.normal[1], door.normal[0])
        thick, post = 0.10, 0.08
        across = (abs(door.normal[0]) * thick, abs(door.normal[1]) * thick)
        rgb = RGB[door.colour]
        for geom, side in zip(geoms[:2], (-1.0, 1.0), strict=True):
            off = side * (0.5 * door.width + post - 0.01)  # a little before the wall's end, or both flicker
            at = (door.centre[0] + off * along[0], door.centre[1] + off * along[1], 0.5 * WALL_HEIGHT + 0.01)
            size = (across[0] + abs(along[0]) * post, across[1] + abs(along[1]) * post, 0.5 * WALL_HEIGHT + 0.01)
            self._box(geom, at, size, rgb)
        span, height = 0.5 * door.width, 0.5 * (WALL_HEIGHT - DOOR_HEIGHT)
        size = (across[0] + abs(along[0]) * span, across[1] + abs(along[1]) * span, height + 0.01)
        self._box(geoms[2], (*door.centre, DOOR_HEIGHT + height), size, rgb)

    def _landmark(self, geom: int, landmark: Landmark) -> None:
        m, height = self.model, HEIGHT[landmark.shape]
        m.geom_type[geom] = _TYPE[landmark.shape]
        m.geom_pos[geom] = (*landmark.centre, 0.5 * height)
        m.geom_quat[geom] = (math.cos(0.5 * landmark.yaw), 0.0, 0.0, math.sin(0.5 * landmark.yaw))
        if landmark.shape == "pillar":
            m.geom_size[geom] = (landmark.radius, 0.5 * height, 0.0)
        else:
            m.geom_size[geom] = 0.5 * height
        m.geom_rgba[geom, :3] = RGB[landmark.colour]
        self.bound(geom)
