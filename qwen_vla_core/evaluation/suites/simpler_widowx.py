"""SimplerEnv's four Bridge tasks of a WidowX in ManiSkill 3: pictures of real tables with simulated objects on them.

Written against mani-skill 3.0.1 (envs/tasks/digital_twins/bridge_dataset_eval) and run with it; evaluation as in
github.com/simpler-env/SimplerEnv, branch maniskill3 at 52a5088 (simpler_env/real2sim_eval_maniskill3.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.external import (
    ExternalWorld,
    Seen,
    missing_modules,
    numbered,
    suite_embodiment,
)
from qwen_vla_core.evaluation.suites.protocol import IN_DISTRIBUTION, PublishedProtocol, Trial, Watcher
from qwen_vla_core.sim.track import Track

CONTROL_HZ = 5.0
EPISODES = 24
CAMERA = "3rd_view_camera"
# task → (environment, control steps it is registered with)
TASKS = {
    "spoon_on_towel": ("PutSpoonOnTableClothInScene-v1", 60),
    "carrot_on_plate": ("PutCarrotOnPlateInScene-v1", 60),
    "stack_cubes": ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 60),
    "eggplant_in_basket": ("PutEggplantInBasketScene-v1", 120),
}
# BridgeData measures the hand relative to one that points straight down (rail-berkeley/bridge_data_robot,
# widowx_controller.py, DEFAULT_ROTATION).
DOWN = Rotation.from_matrix([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
INSTALL = (
    "pip install mani-skill==3.0.1 (SAPIEN needs Vulkan; without a GPU Mesa's lavapipe from version 25 on, named by "
    "VK_ICD_FILENAMES)"
)
ASSETS = (
    "its assets: `python -m mani_skill.utils.download_asset bridge_v2_real2sim -y` (Hugging Face hub) and "
    "`… widowx250s -y` (GitHub), or a folder named by MS_ASSET_DIR"
)


class SimplerSimulator:
    """One task.

    Args:
        environment: its Gymnasium id.
        steps: control steps of an episode: success is what holds after the last of them.
    """

    def __init__(self, environment: str, steps: int) -> None:
        import gymnasium
        import mani_skill.envs.tasks.digital_twins.bridge_dataset_eval  # noqa: F401  registers the tasks

        self.env: Any = gymnasium.make(
            environment,
            obs_mode="rgb+segmentation",
            num_envs=1,
            sim_backend="cpu",
            max_episode_steps=steps + 1,  # the world counts; a truncation would only reset
        )
        self.steps = steps

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """Episode ``seed`` of the 24 fixed arrangements."""
        shown, _ = self.env.reset(seed=seed, options={"episode_id": seed})
        said = self.env.unwrapped.get_language_instruction()
        self._text = instruction or (said if isinstance(said, str) else said[0])
        self._done, self._grasped, self._moved = 0, False, False
        return self._seen(shown, {})

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """Displacement and turn of the hand's target, and the gripper open or closed."""
        displacement = command["/ee_target_delta_pose"]
        turn = Rotation.from_euler("xyz", displacement[3:])
        # The controller of mani-skill 3.0.1 reads its turn as Euler angles of Rx·Ry·Rz.
        gripper = 1.0 if command["/gripper_target"][0] > 0 else -1.0
        action = np.concatenate([displacement[:3], turn.as_euler("XYZ"), [gripper]])
        shown, _, _, _, info = self.env.step(action[None].astype(np.float32))
        self._done += 1
        return self._seen(shown, info)

    def track(self) -> Track | None:
        """Nothing walks."""
        return None

    def close(self) -> None:
        """Frees the renderer."""
        self.env.close()

    def _seen(self, shown: Mapping[str, Any], info: Mapping[str, Any]) -> Seen:
        self._grasped |= _flag(info, "is_src_obj_grasped")
        self._moved |= _flag(info, "moved_correct_obj")
        agent = self.env.unwrapped.agent
        hand = agent.controller.controllers["arm"].ee_pose_at_base
        w, x, y, z = np.asarray(hand.q.cpu(), np.float64)[0]
        turn = (Rotation.from_quat([x, y, z, w]) * DOWN.inv()).as_euler("xyz")
        place = np.asarray(hand.p.cpu(), np.float64)[0]
        names = [joint.name for joint in agent.robot.get_active_joints()]
        positions = np.asarray(agent.robot.get_qpos().cpu(), np.float64)[0]
        state = {
            "/ee_gripper_link": dict(zip(("x", "y", "z", "roll", "pitch", "yaw"), (*place, *turn), strict=True)),
            "/fingers": {name: float(positions[i]) for i, name in enumerate(names) if name.endswith("finger")},
        }
        image = np.asarray(shown["sensor_data"][CAMERA]["rgb"].cpu())[0].astype(np.uint8)
        metrics = {"grasped": float(self._grasped), "moved_the_object": float(self._moved)}
        at_end = self._done == self.steps
        success = at_end and _flag(info, "success")
        return Seen({"/third_view_camera": image}, state, self._text, success, at_end and not success, metrics)


class SimplerWidowXSuite:
    """``--suite simpler_widowx``."""

    name = "simpler_widowx"
    title = "SimplerEnv, 4 Bridge tasks of a WidowX (visual matching)"
    embodiment = "simpler_widowx"
    axes: ClassVar[Mapping[str, str]] = {IN_DISTRIBUTION: "the tables and objects of BridgeData V2, simulated"}
    tasks: tuple[str, ...] = tuple(TASKS)
    metrics: tuple[str, ...] = ("grasped", "moved_the_object")
    protocol = PublishedProtocol(
        source="SimplerEnv, arXiv 2405.05941; mani-skill 3.0.1, bridge_dataset_eval; github.com/simpler-env/SimplerEnv "
        "at 52a5088 (maniskill3), real2sim_eval_maniskill3.py",
        tag="X",
        trials_per_task=EPISODES,
        horizon_steps={task: steps for task, (_, steps) in TASKS.items()},
        control_hz=CONTROL_HZ,
        seeds="24 fixed arrangements, episode_id 0…23",
        success="the object is on its target after the last step of the horizon; a grasp is not asked for",
        preprocessing=(
            "one camera 640×480 with the real background pasted in",
            "action: displacement in metres, turn as fixed-axis roll, pitch, yaw, gripper open above one half",
            "state: the hand relative to one that points down, as in BridgeData",
        ),
        deviations=(
            "the script gives its controller, which reads Euler angles, an axis-angle turn; here it gets Euler angles",
            "displacements beyond 0.1 m and turns beyond 0.5 rad per action are clipped",
            "some published evaluations give all four tasks 120 steps, or stop at the first success",
        ),
    )

    def missing(self) -> str | None:
        """Modules, then assets."""
        absent = missing_modules(("mani_skill", "sapien", "gymnasium"), INSTALL)
        if absent is not None:
            return absent
        folder = Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser() / "data"
        for needed in ("tasks/bridge_v2_real2sim_dataset", "robots/widowx/wx250s.urdf"):
            if not (folder / needed).exists():
                return f"{ASSETS}  (no {folder / needed})"
        return None

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Arrangements from ``seed`` on, around the 24th."""
        found = numbered(seed, episodes, EPISODES, "arrangements of a SimplerEnv task")
        return [Trial(IN_DISTRIBUTION, task, episode) for task in self.tasks for episode in found]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """A task."""
        problem = self.missing()
        if problem is not None:
            raise UserError(f"install {problem}")
        environment, steps = TASKS[trial.task]
        return ExternalWorld(suite_embodiment(self.embodiment), SimplerSimulator(environment, steps), steps)

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """Nothing beside the simulator's numbers."""
        return ()


def _flag(info: Mapping[str, Any], name: str) -> bool:
    return name in info and bool(np.asarray(info[name].cpu()).all())
