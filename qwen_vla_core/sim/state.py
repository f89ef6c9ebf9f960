"""A snapshot of a scene that survives without the simulator: what questions are answered from, during training too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

Pixel = tuple[float, float]
EGO = "ego"  # the view that grippers are located in
ONLY_ARM = "arm"  # the name of an arm that has no other beside it
ASPECT = 4 / 3  # width : height of every picture the pixels refer to


@dataclass(frozen=True)
class CubeState:
    """One cube.

    Attributes:
        colour: its name.
        position: (x, y, z) in metres, world frame.
        yaw: radians about the vertical.
        rgb: the shade it was painted in, 0..1.
        pixels: view → (u, v) in 0..1 (right, down) of its centre, only where that lies inside the picture.
        visible: the views in which nothing hides it.
        nearer_arm: "left" or "right".
        touched_by: arms with at least one finger on it.
        held_by: arms with both fingers on it.
    """

    colour: str
    position: tuple[float, float, float]
    yaw: float
    rgb: tuple[float, float, float]
    pixels: Mapping[str, Pixel]
    visible: tuple[str, ...]
    nearer_arm: str
    touched_by: tuple[str, ...]
    held_by: tuple[str, ...]


@dataclass(frozen=True)
class GripperState:
    """One gripper: the point between its pads (metres), opening fraction, and where the ego view shows that point."""

    arm: str
    position: tuple[float, float, float]
    opening: float
    pixel: Pixel | None


@dataclass(frozen=True)
class PlaceState:
    """What cubes can be put on: its name, position (metres), where each view shows it, and which cubes lie on it."""

    name: str
    position: tuple[float, float, float]
    pixels: Mapping[str, Pixel]
    visible: tuple[str, ...]
    holds: tuple[str, ...]


@dataclass(frozen=True)
class SceneState:
    """The whole table, what was asked for, and the side of the ego view that a belt runs to (None: there is none)."""

    task: str
    target: str
    arm: str
    cubes: tuple[CubeState, ...]
    grippers: tuple[GripperState, ...]
    places: tuple[PlaceState, ...] = ()
    belt: str | None = None

    def cube(self, colour: str) -> CubeState | None:
        """The cube of that colour, or None when it is not on the table."""
        return next((cube for cube in self.cubes if cube.colour == colour), None)

    def gripper(self, arm: str) -> GripperState:
        """The gripper of that arm."""
        return next(gripper for gripper in self.grippers if gripper.arm == arm)

    def seen_in(self, views: Sequence[str]) -> SceneState:
        """What is left of the scene when only these pictures are shown."""
        cubes = tuple(
            replace(cube, visible=tuple(view for view in cube.visible if view in views)) for cube in self.cubes
        )
        places = tuple(
            replace(place, visible=tuple(view for view in place.visible if view in views)) for place in self.places
        )
        grippers = self.grippers if EGO in views else ()
        belt = self.belt if EGO in views else None
        return replace(self, cubes=cubes, grippers=grippers, places=places, belt=belt)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` restores it."""
        value = asdict(self)
        if not self.places:
            del value["places"]
        if self.belt is None:
            del value["belt"]
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SceneState:
        """Restores what ``to_dict`` gave, also after a journey through JSON."""
        cubes = tuple(
            CubeState(
                **{
                    **cube,
                    "position": tuple(cube["position"]),
                    "rgb": tuple(cube["rgb"]),
                    "pixels": {view: tuple(uv) for view, uv in cube["pixels"].items()},
                    "visible": tuple(cube["visible"]),
                    "touched_by": tuple(cube["touched_by"]),
                    "held_by": tuple(cube["held_by"]),
                }
            )
            for cube in value["cubes"]
        )
        grippers = tuple(
            GripperState(
                **{
                    **gripper,
                    "position": tuple(gripper["position"]),
                    "pixel": tuple(gripper["pixel"]) if gripper["pixel"] else None,
                }
            )
            for gripper in value["grippers"]
        )
        places = tuple(
            PlaceState(
                place["name"],
                tuple(place["position"]),
                {view: tuple(uv) for view, uv in place["pixels"].items()},
                tuple(place["visible"]),
                tuple(place["holds"]),
            )
            for place in value.get("places", ())
        )
        return cls(value["task"], value["target"], value["arm"], cubes, grippers, places, value.get("belt"))


def project(point: np.ndarray, eye: np.ndarray, axes: np.ndarray, fovy_deg: float) -> Pixel | None:
    """Pinhole projection into a 4:3 picture.

    Args:
        point: (3,) world point.
        eye: (3,) camera position.
        axes: (3, 3) camera orientation, MuJoCo's convention: columns right, up, backward.
        fovy_deg: vertical field of view in degrees.

    Returns:
        (u, v) in 0..1, right and down, or None outside the picture or behind the camera.
    """
    right, up, backward = (point - eye) @ axes
    if backward >= 0:
        return None
    half = np.tan(np.radians(fovy_deg) / 2) * -backward
    u, v = 0.5 + 0.5 * right / (half * ASPECT), 0.5 - 0.5 * up / half
    return (float(u), float(v)) if 0 <= u < 1 and 0 <= v < 1 else None
