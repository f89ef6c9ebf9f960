"""Demonstrations with scenes, in memory: cubes before one arm that moves by displacements, and landmarks in a room."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from memory_dataset import FPS, MemoryDataset

from qwen_vla_core.data.contract import ChannelGroup, DataContract
from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.embodiment.spec import PromptSpec
from qwen_vla_core.sim.navigation_state import NavigationState
from qwen_vla_core.sim.navigation_state import PlaceState as Landmark
from qwen_vla_core.sim.state import CubeState, GripperState, PlaceState, SceneState

COLOURS = ("red", "green", "blue")
TABLE_TASKS = tuple(f"put the {colour} cube on the plate" for colour in COLOURS)
ROOM_TASKS = ("go to the red ball", "go past the blue pillar and stop at the red ball")

ARM = DataContract(
    prompt=PromptSpec("Arm", "single arm"),
    frequency_hz=FPS,
    horizon=4,
    convention="delta_eef",
    views=("ego", "cam_wrist"),
    state=(ChannelGroup("joints", "joint_position", "rad", ("a", "b")),),
    action=(
        ChannelGroup("arm", "eef_delta", "m,axis_angle", ("dx", "dy", "dz", "rx", "ry", "rz")),
        ChannelGroup("gripper", "gripper", "fraction", ("grip",)),
    ),
)
ROVER = DataContract(
    prompt=PromptSpec("Rover", "no arm", mobile_base=True),
    frequency_hz=2.0,
    horizon=4,
    convention="waypoint",
    views=("ego",),
    state=(ChannelGroup("pose", "waypoint", "m,rad", ("x", "y", "yaw")),),
    action=(ChannelGroup("pose", "waypoint", "m,rad", ("x", "y", "yaw")),),
)


def cube(colour: str, u: float, v: float, hidden: bool = False) -> CubeState:
    pixels = {"ego": (u, v), "cam_wrist": (v, u)}
    return CubeState(colour, (u, v, 0.02), 0.0, (1, 0, 0), pixels, () if hidden else tuple(pixels), "arm", (), ())


def table(target: str, *cubes: CubeState) -> SceneState:
    plate = PlaceState("plate", (0.2, 0.1, 0.0), {"ego": (0.5, 0.5)}, ("ego",), ())
    gripper = GripperState("arm", (0.2, 0.0, 0.2), 1.0, (0.6, 0.2))
    return SceneState("place", target, "arm", cubes, (gripper,), (plate,))


def landmark(name: str, ahead: float, left: float, uv: tuple[float, float] | None) -> Landmark:
    pixels = {} if uv is None else {"ego": uv}
    return Landmark(name, ahead, left, pixels, tuple(pixels))


def rooms(task: int, distance: float) -> NavigationState:
    via = None if task == 0 else "blue pillar"
    places = (
        landmark("red ball", distance, 0.1, (0.48, 0.5)),
        landmark("blue pillar", 3.0, 0.9, (0.2, 0.4)),
        landmark("green box", -2.0, 0.0, None),
        landmark("yellow doorway", 4.0, -1.0, (0.8, 0.4)),
    )
    near = distance <= 1
    return NavigationState("past" if via else "goto", "red ball", via, not via, False, near, places, (2.0, 1.0, 3.0))


def demonstrations(kind: str, episodes: int = 3, steps: int = 9, name: str = "demos") -> MemoryDataset:
    """``table`` or ``rooms``; every number and every picture differs from every other."""
    rng = np.random.default_rng(episodes + steps)
    contract = ARM if kind == "table" else ROVER
    made, pictures = [], []
    for episode in range(episodes):
        task = episode % (3 if kind == "table" else 2)
        scenes = []
        for t in range(steps):
            if kind == "table":
                u, v = (episode + 1) / (episodes + 2), (t + 1) / (steps + 2)
                others = [cube(c, 0.9 - 0.1 * i, v) for i, c in enumerate(COLOURS) if i != task]
                scenes.append(table(COLOURS[task], cube(COLOURS[task], u, v, hidden=t == 4), *others))
            else:
                scenes.append(rooms(task, 5.0 - 4.5 * t / (steps - 1)))
        action = rng.normal(size=(steps, len(contract.action_channels)))
        state = np.zeros((steps, len(contract.state_channels)))
        if kind == "rooms":
            action, state = action.cumsum(0) * 0.1, (action.cumsum(0) - action) * 0.1
        made.append(
            EpisodeRows(
                state.astype(np.float32), action.astype(np.float32), np.arange(steps) / contract.frequency_hz,
                np.full(steps, task, np.int64), np.zeros(steps, bool),
                {"scene": [json.dumps(scene.to_dict()) for scene in scenes]},
            )
        )  # fmt: skip
        pictures.append({view: rng.integers(0, 256, (steps, 24, 32, 3), np.uint8) for view in contract.views})
    tasks = TABLE_TASKS if kind == "table" else ROOM_TASKS
    return MemoryDataset(made, pictures, tasks, contract, name, "synthetic", contract.frequency_hz)


def without_scenes(data: MemoryDataset) -> MemoryDataset:
    return dataclasses.replace(data, episodes=[dataclasses.replace(rows, extra={}) for rows in data.episodes])
