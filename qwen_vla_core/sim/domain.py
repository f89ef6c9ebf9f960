"""Domain randomisation of a tabletop world: what is varied, how far, and how it is put into a MuJoCo model.

Evaluation and demonstrations use ``RandomizationConfig`` alone. With a ``DomainConfig`` the ranges of the synthetic
family [P: light, texture, camera, poses, dynamics] come on top; the ranges themselves are our choice [O]. Without one
nothing here runs, and no random number is drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import mujoco
import numpy as np

from qwen_vla_core.embodiment.parse import NodeParser
from qwen_vla_core.embodiment.spec import doc
from qwen_vla_core.embodiment.yamlpos import compose, read_text
from qwen_vla_core.errors import UserError

Range = tuple[float, float]
TABLE_TOP = "table_top"  # a sheet over the table that can carry a texture (the table's own mesh has no coordinates)
SURFACES, STICKERS = 12, 4  # textures of table and floor, and of cubes
_TEXELS = 64


@dataclass(frozen=True)
class DomainConfig:
    """Ranges; every value is drawn evenly between its two ends, once per episode. ``--randomize FILE`` changes any."""

    light_position: float = field(
        default=0.5, metadata=doc("Largest displacement of each light per axis, metres.", minimum=0.0)
    )
    light_strength: Range = field(default=(0.4, 1.6), metadata=doc("Factor on each light's brightness.", minimum=0.0))
    light_tint: float = field(
        default=0.2, metadata=doc("Largest relative change of a light's red, green and blue.", minimum=0.0, maximum=1.0)
    )
    ambient: Range = field(
        default=(0.5, 1.5), metadata=doc("Factor on the light that comes from everywhere.", minimum=0.0)
    )
    textures: bool = field(default=True, metadata=doc("Patterns on table, floor and cubes; colours vary in any case."))
    table_rgb: Range = field(
        default=(0.1, 0.9), metadata=doc("Red, green and blue of the table, each.", minimum=0.0, maximum=1.0)
    )
    floor_rgb: Range = field(
        default=(0.05, 0.8), metadata=doc("Red, green and blue of the floor, each.", minimum=0.0, maximum=1.0)
    )
    camera_shift: float = field(
        default=0.03, metadata=doc("Largest displacement of each camera per axis, metres.", minimum=0.0)
    )
    camera_turn: float = field(
        default=0.04, metadata=doc("Largest turn of each camera per axis, radians.", minimum=0.0)
    )
    camera_fovy: float = field(
        default=0.06, metadata=doc("Largest relative change of each field of view.", minimum=0.0, maximum=0.5)
    )
    cube_size: Range = field(default=(0.9, 1.1), metadata=doc("Factor on each cube's edge.", minimum=0.5, maximum=1.3))
    cube_mass: Range = field(default=(0.5, 2.0), metadata=doc("Factor on each cube's mass.", exclusive_minimum=0.0))
    cube_friction: Range = field(
        default=(0.7, 1.5), metadata=doc("Factor on each cube's friction.", exclusive_minimum=0.0)
    )
    joint_damping: Range = field(
        default=(0.0, 2.0), metadata=doc("Damping added to each arm joint, N m s/rad.", minimum=0.0)
    )
    joint_friction: Range = field(
        default=(0.8, 1.1), metadata=doc("Factor on each arm joint's dry friction.", minimum=0.0)
    )
    joint_gain: Range = field(
        default=(0.9, 1.1), metadata=doc("Factor on each arm joint's position gain.", exclusive_minimum=0.0)
    )
    distractors: tuple[int, int] = field(
        default=(0, 3),
        metadata=doc("Least and most pieces of clutter on the table, where the world has them.", minimum=0),
    )
    start_pose: float = field(
        default=0.08, metadata=doc("Largest deviation of each arm joint from the start pose, radians.", minimum=0.0)
    )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for the provenance of a dataset."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# Model fields that `apply` changes; the world restores them before every episode.
FIELDS: tuple[str, ...] = (
    "light_pos", "light_specular", "geom_size", "geom_matid", "geom_friction", "geom_rbound", "geom_aabb",
    "body_mass", "body_inertia", "dof_damping", "dof_frictionloss", "actuator_gainprm", "actuator_biasprm",
)  # fmt: skip


Ranges = TypeVar("Ranges")


def load_domain(path: str | Path, kind: type[Ranges] = DomainConfig) -> Ranges:  # type: ignore[assignment]
    """Reads ranges from YAML; keys that are left out keep their default.

    Args:
        path: the file.
        kind: the frozen dataclass of ranges of the world at hand.

    Raises:
        UserError: unreadable, an unknown key, a wrong type, or a range whose first end is the larger one.
    """
    source = str(path)
    parser = NodeParser(source)
    config = parser.dataclass(kind, compose(read_text(Path(path), source), source), "")
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if isinstance(value, tuple) and value[0] > value[1]:
            parser.fail(item.name, f"{value[0]:g} is larger than {value[1]:g}", "write [smallest, largest]")
    return config


def add_materials(spec: mujoco.MjSpec, centre: tuple[float, float], half: tuple[float, float]) -> None:
    """Adds the sheet over the table and the pool of patterns to a scene that is being built.

    The patterns are grey and bright: a geom's own colour shows through them, so a red cube stays red.

    Args:
        spec: the scene.
        centre: (x, y) of the table, metres.
        half: half of its extent in x and y, metres.
    """
    rng = np.random.default_rng(0)
    spec.worldbody.add_geom(
        name=TABLE_TOP,
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[*half, 0.0003],
        pos=[*centre, 0.0002],
        contype=0,
        conaffinity=0,
    )
    for index in range(SURFACES):
        texture = spec.add_texture(name=f"surface_{index}", type=mujoco.mjtTexture.mjTEXTURE_2D, width=_TEXELS)
        texture.height, texture.nchannel, texture.data = _TEXELS, 3, pattern(index, rng, 0.45).tobytes()
    for index in range(STICKERS):
        texture = spec.add_texture(name=f"sticker_{index}", type=mujoco.mjtTexture.mjTEXTURE_CUBE, width=_TEXELS)
        sides = np.concatenate([pattern(index, rng, 0.2) for _ in range(6)])
        texture.height, texture.nchannel, texture.data = 6 * _TEXELS, 3, sides.tobytes()
    for kind, count in (("surface", SURFACES), ("sticker", STICKERS)):
        for index in range(count):
            material = spec.add_material(name=f"{kind}_{index}", texrepeat=[3, 3], specular=0.3)
            material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"{kind}_{index}"


def pattern(index: int, rng: np.random.Generator, depth: float) -> np.ndarray:
    """(64, 64, 3) uint8 grey pattern between ``1 - depth`` and 1: stripes, checks, grain or blots, by turns."""
    y, x = np.mgrid[0:_TEXELS, 0:_TEXELS] / _TEXELS
    turns, phase = int(rng.integers(2, 9)), rng.uniform(0, 2 * np.pi)
    kind = index % 4
    if kind == 0:
        value = 0.5 + 0.5 * np.sin(2 * np.pi * turns * (x if rng.random() < 0.5 else y) + phase)
    elif kind == 1:
        value = ((x * turns).astype(int) + (y * turns).astype(int)) % 2
    elif kind == 2:
        value = 0.5 + 0.5 * np.sin(2 * np.pi * (turns * x + 0.5 * np.sin(2 * np.pi * y + phase)))
        value = 0.7 * value + 0.3 * rng.random(value.shape)
    else:
        coarse = rng.random((8, 8))
        value = np.kron(coarse, np.ones((_TEXELS // 8, _TEXELS // 8)))
    grey = (255 * (1 - depth * np.asarray(value, dtype=np.float64))).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def apply(
    model: mujoco.MjModel, config: DomainConfig, rng: np.random.Generator, cubes: tuple[str, ...], arm_dofs: np.ndarray
) -> dict[str, Any]:
    """Draws one episode's domain and writes it into a model whose fields are as built.

    The caller recomputes the model's derived constants afterwards (``mj_setConst``).

    Args:
        model: built with ``add_materials``.
        config: the ranges.
        rng: the episode's generator for this alone.
        cubes: names of the cube geoms, which are also those of their bodies.
        arm_dofs: degree-of-freedom addresses of the arm joints; their actuators have the same order.

    Returns:
        What was drawn, as plain JSON, for the episode's record.
    """
    drawn: dict[str, Any] = {"cubes": {}}
    for light in range(model.nlight):
        model.light_pos[light] += rng.uniform(-config.light_position, config.light_position, 3)
        tint = rng.uniform(*config.light_strength) * rng.uniform(1 - config.light_tint, 1 + config.light_tint, 3)
        model.light_diffuse[light] *= tint
        model.light_specular[light] *= tint
    ambient = float(rng.uniform(*config.ambient))
    model.vis.headlight.ambient[:] *= ambient
    model.vis.headlight.diffuse[:] *= ambient
    drawn["ambient"] = ambient
    for name, bounds in ((TABLE_TOP, config.table_rgb), ("floor", config.floor_rgb)):
        geom = model.geom(name).id
        model.geom_rgba[geom, :3] = rng.uniform(*bounds, 3)
        pattern = int(rng.integers(SURFACES))
        model.geom_matid[geom] = model.material(f"surface_{pattern}").id if config.textures else -1
        drawn[name] = {"rgb": model.geom_rgba[geom, :3].tolist(), "pattern": pattern if config.textures else None}
    for name in cubes:
        drawn["cubes"][name] = _cube(model, config, rng, name)
    joints = len(arm_dofs)
    model.dof_damping[arm_dofs] += rng.uniform(*config.joint_damping, joints)
    model.dof_frictionloss[arm_dofs] *= rng.uniform(*config.joint_friction, joints)
    gain = rng.uniform(*config.joint_gain, joints)
    actuators = [int(np.flatnonzero(model.actuator_trnid[:, 0] == model.dof_jntid[dof])[0]) for dof in arm_dofs]
    model.actuator_gainprm[actuators, 0] *= gain
    model.actuator_biasprm[actuators, 1] *= gain
    drawn["joint_gain"] = gain.tolist()
    return drawn


def _cube(model: mujoco.MjModel, config: DomainConfig, rng: np.random.Generator, name: str) -> dict[str, float]:
    """Edge, mass, friction and pattern of one cube."""
    geom, body = model.geom(name).id, model.body(name).id
    size, mass = float(rng.uniform(*config.cube_size)), float(rng.uniform(*config.cube_mass))
    friction, pattern = float(rng.uniform(*config.cube_friction)), int(rng.integers(-1, STICKERS))
    model.geom_size[geom] *= size
    model.geom_rbound[geom] *= size
    model.geom_aabb[geom] *= size
    model.body_mass[body] *= mass
    model.body_inertia[body] *= mass * size**2
    model.geom_friction[geom] *= friction
    if config.textures and pattern >= 0:  # some cubes stay plain
        model.geom_matid[geom] = model.material(f"sticker_{pattern}").id
    return {"size": size, "mass": mass, "friction": friction}


def domain_option(value: str | None, kind: type[Ranges] = DomainConfig) -> Ranges | None:  # type: ignore[assignment]
    """The value of ``--randomize``: None is off, empty is the default ranges, anything else a YAML file.

    Args:
        value: as given.
        kind: a world's ``domain_type``.

    Raises:
        UserError: see ``load_domain``.
    """
    if value is None:
        return None
    if not value:
        return kind()
    if not Path(value).is_file():
        raise UserError(f"--randomize {value}: no such file; leave it out for the default ranges, or name a YAML file")
    return load_domain(value, kind)
