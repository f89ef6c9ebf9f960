"""RoboCasa's 24 tabletop tasks of a Fourier GR1 (robosuite, MuJoCo), from the GR00T N1 release.

Written against github.com/robocasa/robocasa-gr1-tabletop-tasks at 4840e67 (robocasa/utils/gym_utils/gymnasium_groot.py,
models/robots/__init__.py). Its repackaging on PyPI, praxis-robocasa-gr1 0.2.0, has the same code in another namespace;
either does, and the latter is what this was run with.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.external import ExternalWorld, Seen, missing_modules, suite_embodiment
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher
from qwen_vla_core.sim.track import Track

PACKAGES = ("robocasa", "robocasa_gr1")
ROBOT = "GR1ArmsAndWaistFourierHands"
STEPS = 720
EGO = "video.ego_view_bg_crop_pad_res256_freq20"
SPOKEN = "annotation.human.coarse_action"
INSTALL = (
    "pip install praxis-robocasa-gr1==0.2.0 (in an environment of its own: it pins numpy 2.2.5 and mujoco 3.3.1), or "
    "git clone https://github.com/robocasa/robocasa-gr1-tabletop-tasks && pip install -e it, beside robosuite 1.5"
)
ASSETS = (
    "its objects: `python -m {package}.scripts.download_tabletop_assets -y` (objaverse, sketchfab, lightwheel: "
    "several GB from Hugging Face nvidia/PhysicalAI-DigitalCousin-Assets and Box)"
)
_NOVEL = {  # Posttrain… SplitA: from → to
    "Cuttingboard": ("Basket", "Cardboardbox", "Pan", "Pot", "Tieredbasket"),
    "Placemat": ("Basket", "Bowl", "Plate", "Tieredshelf"),
    "Plate": ("Bowl", "Cardboardbox", "Pan", "Plate"),
    "Tray": ("Cardboardbox", "Plate", "Pot", "Tieredbasket", "Tieredshelf"),
}
TASKS = (
    "PnPCupToDrawerClose",
    "PnPPotatoToMicrowaveClose",
    "PnPMilkToMicrowaveClose",
    "PnPBottleToCabinetClose",
    "PnPWineToCabinetClose",
    "PnPCanToDrawerClose",
    *(f"PosttrainPnPNovelFrom{start}To{end}SplitA" for start, ends in _NOVEL.items() for end in ends),
)


class Gr1Simulator:
    """One task.

    Args:
        task: its name, without the robot's.
        robot: says in which order the values of a part are.
    """

    def __init__(self, task: str, robot: Embodiment) -> None:
        import gymnasium

        importlib.import_module(f"{installed_package()}.utils.gym_utils.gymnasium_groot")  # registers the tasks
        self.env: Any = gymnasium.make(f"gr1_unified/{task}_{ROBOT}_Env", enable_render=True, disable_env_checker=True)
        self.parts = {group.name: (group.topic, group.fields) for group in robot.state}
        self.topics = {group.name: group.command.topic for group in robot.actions}

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """The scene of a seed: robosuite draws it from a generator of its own, which ``reset`` leaves as it is."""
        self.env.unwrapped.env.rng = np.random.default_rng(seed)
        shown, info = self.env.reset(seed=seed)
        said = str(shown[SPOKEN]).removeprefix("unlocked_waist: ").removeprefix("locked_waist: ")
        self._text = instruction or said
        return self._seen(shown, info)

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """Joint targets part by part."""
        action = {f"action.{part}": command[topic] for part, topic in self.topics.items()}
        shown, _, over, _, info = self.env.step(action)
        return self._seen(shown, info, bool(over))

    def track(self) -> Track | None:
        """Nothing walks."""
        return None

    def close(self) -> None:
        """Frees the renderer."""
        self.env.close()

    def _seen(self, shown: Mapping[str, Any], info: Mapping[str, Any], over: bool = False) -> Seen:
        state = {}
        for part, (topic, fields) in self.parts.items():
            values = np.asarray(shown[f"state.{part}"], np.float64)
            state[topic] = dict(zip(fields, values.tolist(), strict=True))
        image = np.ascontiguousarray(shown[EGO], np.uint8)
        metrics = {"grasped_a_distractor": float(bool(info.get("grasp_distractor_obj", False)))}
        return Seen({"/video/ego_view": image}, state, self._text, bool(info["success"]), over, metrics)


class RoboCasaGr1Suite:
    """``--suite robocasa_gr1``."""

    name = "robocasa_gr1"
    title = "RoboCasa GR1, 24 tabletop tasks of a humanoid's upper body"
    embodiment = "robocasa_gr1"
    axes: ClassVar[Mapping[str, str]] = {"tabletop": "the published tasks, objects of split A"}
    tasks: tuple[str, ...] = TASKS
    metrics: tuple[str, ...] = ("grasped_a_distractor",)
    protocol = PublishedProtocol(
        source="GR00T N1, arXiv 2503.14734; github.com/robocasa/robocasa-gr1-tabletop-tasks at 4840e67 (README: 24 "
        "tasks, 720 steps); 50 rollouts per task as in starVLA 474a5cf, examples/Robocasa_tabletop",
        tag="X",
        trials_per_task=50,
        horizon_steps={"*": STEPS},
        control_hz=20.0,
        seeds="consecutive seeds of the environment's reset",
        success="the task's reward is positive after a step",
        preprocessing=(
            "egoview 1280×800, cropped and padded to 256×256 as in the corpus (ego_view_bg_crop_pad_res256_freq20)",
            "the words `unlocked_waist:` before the instruction are left out",
            "action: absolute joint targets of arms, hands and waist",
        ),
        deviations=(
            "the published scripts execute 12 or 16 actions of a chunk before they look again",
            "scenes are seeded by trial; the published scripts leave robosuite's generator unseeded",
        ),
    )

    def missing(self) -> str | None:
        """Modules, then objects."""
        absent = missing_modules(("gymnasium", "robosuite"), INSTALL)
        package = installed_package()
        if absent is not None or package is None:
            return absent or f"{INSTALL}  (lacks {' or '.join(PACKAGES)})"
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for root in spec.submodule_search_locations or ():
            objects = Path(root) / "models" / "assets" / "objects"
            if not (objects / "objaverse").is_dir():
                return f"{ASSETS.format(package=package)}  (no {objects / 'objaverse'})"
        return None

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Seeds from ``seed`` on."""
        return [Trial("tabletop", task, seed + i) for task in self.tasks for i in range(episodes)]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """A task."""
        problem = self.missing()
        if problem is not None:
            raise UserError(f"install {problem}")
        robot = suite_embodiment(self.embodiment)
        return ExternalWorld(robot, Gr1Simulator(trial.task, robot), STEPS)

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """Nothing beside the simulator's numbers."""
        return ()


def installed_package() -> str | None:
    """Which of the two namespaces is installed, and has these tasks."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        roots = (spec.submodule_search_locations or ()) if spec else ()
        if any((Path(root) / "environments" / "tabletop").is_dir() for root in roots):
            return name
    return None
