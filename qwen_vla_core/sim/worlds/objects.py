"""Things that lie on every table: the coloured cubes, the shelf for those that are absent, and clutter."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from qwen_vla_core.sim.randomize import COLOURS, PLAIN_RGB

CUBE_HALF = 0.02  # metres
PARKING_Z = -2.0  # what is not in the episode rests on a shelf under the floor, out of every camera's sight
CLUTTER_GAP = 0.09  # least distance of clutter from cubes, metres: a gripper must pass

_CYLINDER, _BOX, _CAPSULE = mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CAPSULE
# name → shape, sizes in metres, height of the centre above the table. No cubes, and no colour that is asked for.
CLUTTER: dict[str, tuple[mujoco.mjtGeom, tuple[float, float, float], float]] = {
    "can": (_CYLINDER, (0.018, 0.025, 0.0), 0.025),
    "disc": (_CYLINDER, (0.03, 0.008, 0.0), 0.008),
    "bar": (_BOX, (0.035, 0.01, 0.01), 0.01),
    "brick": (_BOX, (0.03, 0.018, 0.012), 0.012),
}
CLUTTER_RGB: tuple[tuple[float, float, float], ...] = (
    (0.9, 0.8, 0.1),  # yellow
    (0.5, 0.15, 0.6),  # purple
    (0.9, 0.9, 0.9),
    (0.08, 0.08, 0.08),
    (0.45, 0.28, 0.13),  # brown
)


def aim(position: tuple[float, ...], target: tuple[float, ...], up: tuple[float, ...]) -> list[float]:
    """``xyaxes`` of a camera at ``position`` that looks at ``target``."""
    forward = [t - p for p, t in zip(position, target, strict=True)]
    right = _cross(forward, up)
    return [*right, *_cross(right, forward)]


def _cross(a: list[float] | tuple[float, ...], b: list[float] | tuple[float, ...]) -> list[float]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def add_cubes(spec: mujoco.MjSpec, contact: int = 1) -> None:
    """Adds the shelf and one cube of each colour.

    Args:
        spec: the scene being built; whatever has joints and is not free must be in it already.
        contact: contact bits of the cubes.
    """
    world = spec.worldbody
    world.add_geom(name="shelf", type=_BOX, size=[0.3, 0.3, 0.05], pos=[0, 0, PARKING_Z - 0.05])
    for colour in COLOURS:
        body = world.add_body(name=f"cube_{colour}")
        body.add_freejoint(name=f"cube_{colour}")
        body.mass = 0.05
        body.inertia = [1.4e-5] * 3  # 50 g solid cube of 4 cm
        body.explicitinertial = True
        body.add_geom(
            name=f"cube_{colour}",
            type=_BOX,
            size=[CUBE_HALF] * 3,
            rgba=[*PLAIN_RGB[colour], 1.0],
            condim=4,
            friction=[1, 0.005, 0.0001],  # as in gym-aloha
            solimp=[2, 1, 0.01, 0.5, 2],
            solref=[0.01, 1],
            contype=contact,
            conaffinity=contact,
        )


def add_clutter(spec: mujoco.MjSpec, contact: int = 1) -> None:
    """Adds one of each kind of clutter, as free bodies after the cubes."""
    for name, (shape, size, _) in CLUTTER.items():
        body = spec.worldbody.add_body(name=name)
        body.add_freejoint(name=name)
        body.add_geom(name=name, type=shape, size=size, mass=0.06, condim=4, contype=contact, conaffinity=contact)


def scatter_clutter(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    rng: np.random.Generator,
    count: int,
    area: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float]],
) -> dict[str, list[float]]:
    """Puts ``count`` random pieces on the table and the others on the shelf; one that finds no room stays there.

    Args:
        model: built with ``add_clutter``.
        data: whose qpos is set.
        rng: the episode's generator for this alone.
        count: pieces wanted.
        area: least and largest x, least and largest y, metres.
        taken: (x, y, least distance) of what lies there already.

    Returns:
        name → [x, y, yaw] of those on the table.
    """
    occupied = list(taken)
    placed: dict[str, list[float]] = {}
    for index, name in enumerate(rng.permutation(sorted(CLUTTER))):
        at, height = model.joint(name).qposadr[0], CLUTTER[name][2]
        yaw, colour = float(rng.uniform(-np.pi, np.pi)), CLUTTER_RGB[int(rng.integers(len(CLUTTER_RGB)))]
        x, y, z = 0.12 * (index - 1.5), 0.2, PARKING_Z + height
        for _ in range(40 if len(placed) < count else 0):
            u, v = float(rng.uniform(*area[:2])), float(rng.uniform(*area[2:]))
            if all(np.hypot(u - a, v - b) >= gap for a, b, gap in occupied):
                x, y, z = u, v, height
                occupied.append((u, v, CLUTTER_GAP))
                placed[str(name)] = [u, v, yaw]
                break
        data.qpos[at : at + 7] = (x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        model.geom_rgba[model.geom(name).id, :3] = colour
    return placed
