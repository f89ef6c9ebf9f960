"""Domain randomisation of the rooms: appearance, camera and dynamics as ranges; off unless asked for.

Layout, landmarks and start pose differ between seeds in any case. Without a ``RoomsDomain`` nothing here runs, and no
random number is drawn.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.sim.domain import pattern
from qwen_vla_core.sim.worlds.rooms_motion import Wear

Range = tuple[float, float]
SURFACES = 8  # patterns of the floor, and as many of the walls
STICKERS = 4  # patterns of landmarks and frames
_TEXELS = 64


@dataclass(frozen=True)
class RoomsDomain:
    """Ranges [O]; every value is drawn evenly between its ends, once per episode. ``--randomize FILE`` changes any."""

    light_turn: float = field(
        default=0.5, metadata=doc("Largest change of the light's direction, per component.", minimum=0.0)
    )
    light_strength: Range = field(default=(0.4, 1.5), metadata=doc("Factor on the lamp's brightness.", minimum=0.0))
    light_tint: float = field(
        default=0.15,
        metadata=doc("Largest relative change of the lamp's red, green, blue.", minimum=0.0, maximum=1.0),
    )
    ambient: Range = field(default=(0.6, 1.3), metadata=doc("Factor on the light from everywhere.", minimum=0.0))
    textures: bool = field(default=True, metadata=doc("Patterns on walls, floor, landmarks; colours vary in any case."))
    wall_rgb: Range = field(default=(0.35, 0.9), metadata=doc("Brightness of the walls.", minimum=0.0, maximum=1.0))
    floor_rgb: Range = field(default=(0.15, 0.75), metadata=doc("Brightness of the floor.", minimum=0.0, maximum=1.0))
    tint: float = field(
        default=0.08, metadata=doc("Largest deviation of walls and floor from grey.", minimum=0.0, maximum=0.3)
    )
    landmark_hue: float = field(
        default=0.025, metadata=doc("Largest change of hue of landmarks and frames, turns.", minimum=0.0, maximum=0.04)
    )
    landmark_size: Range = field(
        default=(0.85, 1.0), metadata=doc("Factor on a landmark's size to the eye.", minimum=0.5, maximum=1.0)
    )
    camera_height: float = field(
        default=0.10, metadata=doc("Largest change of the camera's height, metres.", minimum=0.0, maximum=0.3)
    )
    camera_tilt: float = field(
        default=0.10, metadata=doc("Largest turn of the camera up or down, radians.", minimum=0.0, maximum=0.5)
    )
    camera_pan: float = field(
        default=0.04, metadata=doc("Largest turn of the camera to a side, radians.", minimum=0.0, maximum=0.5)
    )
    camera_fovy: float = field(
        default=0.06, metadata=doc("Largest relative change of the field of view.", minimum=0.0, maximum=0.3)
    )
    speed_gain: Range = field(
        default=(0.85, 1.1), metadata=doc("True speed per commanded speed.", exclusive_minimum=0.0)
    )
    turn_gain: Range = field(
        default=(0.85, 1.1), metadata=doc("True turning rate per commanded one.", exclusive_minimum=0.0)
    )
    pull: float = field(
        default=0.03, metadata=doc("Largest unmeasured turn to a side, radians per metre.", minimum=0.0, maximum=0.3)
    )
    odometry_gain: Range = field(
        default=(0.95, 1.05), metadata=doc("Measured distance per true distance.", exclusive_minimum=0.0)
    )
    delay: tuple[int, int] = field(
        default=(0, 2), metadata=doc("Control steps (1/20 s) until a command takes effect.", minimum=0, maximum=10)
    )

    def to_json(self) -> dict[str, Any]:
        """For the provenance of a dataset."""
        return asdict(self)


def add_materials(spec: mujoco.MjSpec) -> None:
    """Adds the pool of patterns to a scene that is being built. They are grey: a part's own colour shows through."""
    rng = np.random.default_rng(1)
    cube, flat = mujoco.mjtTexture.mjTEXTURE_CUBE, mujoco.mjtTexture.mjTEXTURE_2D
    pools = (
        ("floor", SURFACES, flat, 0.45, 1.0),
        ("wall", SURFACES, cube, 0.35, 1.0),
        ("sticker", STICKERS, cube, 0.2, 3),
    )
    for kind, count, form, depth, repeat in pools:
        for index in range(count):
            sides = 1 if form == flat else 6
            texture = spec.add_texture(name=f"{kind}_{index}", type=form, width=_TEXELS)
            data = np.concatenate([pattern(index, rng, depth) for _ in range(sides)])
            texture.height, texture.nchannel, texture.data = sides * _TEXELS, 3, data.tobytes()
            material = spec.add_material(name=f"{kind}_{index}", specular=0.1, texrepeat=[repeat, repeat])
            material.texuniform = kind != "sticker"
            material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"{kind}_{index}"


def apply(
    model: mujoco.MjModel,
    domain: RoomsDomain,
    rng: np.random.Generator,
    walls: Sequence[int],
    named: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Draws one episode's appearance and writes it into an arranged model built with textures.

    Args:
        model: arranged.
        domain: the ranges.
        rng: the episode's generator for this alone.
        walls: geoms of the walls.
        named: geoms of each landmark and doorway.

    Returns:
        What was drawn, as plain JSON, for the episode's record.
    """
    drawn: dict[str, Any] = {}
    model.light_dir[:] += rng.uniform(-domain.light_turn, domain.light_turn, model.light_dir.shape)
    tint = rng.uniform(1 - domain.light_tint, 1 + domain.light_tint, 3)
    drawn["light"] = float(rng.uniform(*domain.light_strength))
    model.light_diffuse[:] *= drawn["light"] * tint
    drawn["ambient"] = float(rng.uniform(*domain.ambient))
    model.vis.headlight.ambient[:] *= drawn["ambient"]
    model.vis.headlight.diffuse[:] *= drawn["ambient"]
    floor = [model.geom("floor").id]
    for kind, geoms, bounds in (("floor", floor, domain.floor_rgb), ("wall", walls, domain.wall_rgb)):
        rgb = np.clip(rng.uniform(*bounds) + rng.uniform(-domain.tint, domain.tint, 3), 0, 1)
        number = int(rng.integers(SURFACES))
        for geom in geoms:
            model.geom_rgba[geom, :3] = rgb
            if domain.textures:
                model.geom_matid[geom] = model.material(f"{kind}_{number}").id
        drawn[kind] = {"rgb": rgb.tolist(), "pattern": number if domain.textures else None}
    for name, geoms in named.items():
        drawn[name] = _paint(model, domain, rng, name, geoms)
    drawn |= _camera(model, domain, rng)
    return drawn


def _paint(
    model: mujoco.MjModel, domain: RoomsDomain, rng: np.random.Generator, name: str, geoms: Sequence[int]
) -> dict[str, Any]:
    """Shade, pattern and, of a landmark, size."""
    hue, _, _ = colorsys.rgb_to_hsv(*model.geom_rgba[geoms[0], :3])
    hue = (hue + rng.uniform(-domain.landmark_hue, domain.landmark_hue)) % 1.0
    rgb = colorsys.hsv_to_rgb(hue, float(rng.uniform(0.75, 1.0)), float(rng.uniform(0.6, 0.95)))
    number, size = int(rng.integers(-1, STICKERS)), float(rng.uniform(*domain.landmark_size))
    for geom in geoms:
        model.geom_rgba[geom, :3] = rgb
        if domain.textures and number >= 0:  # some stay plain
            model.geom_matid[geom] = model.material(f"sticker_{number}").id
        if not name.endswith("doorway"):
            model.geom_size[geom] *= size
            model.geom_pos[geom, 2] *= size  # it still stands on the floor
            model.geom_rbound[geom] *= size
            model.geom_aabb[geom] *= size
    return {"rgb": list(rgb), "size": size}


def _camera(model: mujoco.MjModel, domain: RoomsDomain, rng: np.random.Generator) -> dict[str, float]:
    camera = model.camera("ego").id
    up = float(rng.uniform(-domain.camera_height, domain.camera_height))
    tilt, pan = (float(rng.uniform(-most, most)) for most in (domain.camera_tilt, domain.camera_pan))
    wider = float(rng.uniform(-domain.camera_fovy, domain.camera_fovy))
    model.cam_pos[camera, 2] += up
    turn, quat = np.zeros(4), model.cam_quat[camera].copy()
    mujoco.mju_euler2Quat(turn, [tilt, pan, 0.0], "xyz")  # in the camera's own axes: right, up, backward
    mujoco.mju_mulQuat(model.cam_quat[camera], quat, turn)
    model.cam_fovy[camera] *= 1 + wider
    return {"camera_height": up, "camera_tilt": tilt, "camera_pan": pan, "camera_fovy": wider}


def draw_wear(domain: RoomsDomain, rng: np.random.Generator) -> Wear:
    """One episode's dynamics."""
    return Wear(
        speed_gain=float(rng.uniform(*domain.speed_gain)),
        turn_gain=float(rng.uniform(*domain.turn_gain)),
        pull=float(rng.uniform(-domain.pull, domain.pull)),
        odometry_gain=float(rng.uniform(*domain.odometry_gain)),
        delay=int(rng.integers(domain.delay[0], domain.delay[1] + 1)),
    )
