"""Bimanual ALOHA over a table with coloured cubes: its joints, its channels, and when its tasks are done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_vla_core.sim.domain import DomainConfig
from qwen_vla_core.sim.randomize import CubeLayout, RandomizationConfig, sample_cubes
from qwen_vla_core.sim.tasks import TASKS, TWO_ARMS
from qwen_vla_core.sim.worlds.scene import ARMS, CAMERAS, PARKING_Z, build_model
from qwen_vla_core.sim.worlds.tabletop import LIFTED, TabletopWorld, Touching

JOINTS: tuple[str, ...] = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
START_ARM = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)  # radians
FINGER_RANGE = (0.021, 0.057)  # metres of one finger: closed, open
CUBE_X = (0.05, 0.19)  # metres from the middle plane
CUBE_Y = (0.39, 0.61)


class AlohaWorld(TabletopWorld):
    """The ``World`` of the ALOHA embodiment (``simulation: {world: aloha}``).

    Channels are canonical, in actions and state alike: arm joints in radians, grippers as opening fraction. The scene
    depends on the seed alone, so one seed can be asked for either of its cubes.
    """

    substeps = 10
    channels = state_channels = tuple(f"{arm}_{joint}" for arm in ARMS for joint in (*JOINTS, "gripper"))
    held_c = np.zeros(14, bool)
    cameras = CAMERAS
    views = tuple(CAMERAS)
    arms = ARMS
    book = TWO_ARMS
    task_names = TASKS
    parking_z = PARKING_Z

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        randomize: RandomizationConfig | None = None,
        domain: DomainConfig | None = None,
    ) -> None:
        """Builds the scene; call ``reset`` before anything else. The arguments are those of ``TabletopWorld``."""
        m = build_model(materials=domain is not None)
        fingers = {
            m.geom(f"vx300s_{arm}/10_{finger}_gripper_finger").id: (arm, finger)
            for arm in ARMS
            for finger in ("left", "right")
        }
        super().__init__(m, tasks, randomize, domain, fingers)
        self._arm_qpos = {
            arm: np.array([m.joint(f"vx300s_{arm}/{name}").qposadr[0] for name in JOINTS]) for arm in ARMS
        }
        self._finger_qpos = {arm: m.joint(f"vx300s_{arm}/left_finger").qposadr[0] for arm in ARMS}
        self.pinch_site = {arm: m.site(f"{arm}_pinch").id for arm in ARMS}

    def _sample(self, rng: np.random.Generator, task: str) -> list[CubeLayout]:
        return sample_cubes(self.randomize, rng, CUBE_X, CUBE_Y)

    def _place(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        """Arms at their start pose with open grippers."""
        start = np.array(START_ARM)
        jitter = rng.uniform(-1, 1, (len(ARMS), len(JOINTS))) * self.randomize.start_pose
        self._command = np.column_stack([start + jitter, np.ones(len(ARMS))]).ravel()
        self.data.ctrl[:] = self._to_ctrl(self._command)
        self.data.qpos[: self.model.nu] = self.data.ctrl
        self._put_cubes(cubes)

    @staticmethod
    def _to_ctrl(action_c: np.ndarray) -> np.ndarray:
        """(14,) canonical → (16,) actuators: one gripper fraction drives two fingers, in metres."""
        arms = action_c.reshape(2, 7)
        finger = FINGER_RANGE[0] + np.clip(arms[:, 6], 0, 1) * (FINGER_RANGE[1] - FINGER_RANGE[0])
        return np.column_stack([arms[:, :6], finger, -finger]).ravel()

    def _control(self, action: np.ndarray) -> None:
        """Position targets; beyond a joint's range they stop at its end, as on the robot."""
        self.data.ctrl[:] = self._to_ctrl(action)

    def _done(self, touching: Touching) -> bool:
        """pick: the named cube is ≥ 5 cm above its resting height and a finger of the arm that was nearer at the start
        touches it. transfer: it is up there in both fingers of the other arm, and the first arm does not touch it.
        """
        giver, receiver = self.arm, ARMS[1 - ARMS.index(self.arm)]
        colour = self.task.colour
        up = self.cube_position(colour)[2] >= self._half(colour) + LIFTED
        if self.task.name == "pick":
            return bool(up and touching[giver, colour])
        return bool(up and len(touching[receiver, colour]) == 2 and not touching[giver, colour])

    # --- what the robot and the judge know --------------------------------------------------------------------------

    def state(self) -> np.ndarray:
        """(14,) measured joints in radians and gripper openings as fractions."""
        parts = []
        for arm in ARMS:
            finger = self.data.qpos[self._finger_qpos[arm]]
            fraction = (finger - FINGER_RANGE[0]) / (FINGER_RANGE[1] - FINGER_RANGE[0])
            parts += [self.data.qpos[self._arm_qpos[arm]], [fraction]]
        return np.concatenate(parts)

    def openings(self) -> dict[str, float]:
        """Arm → opening fraction of its gripper."""
        return dict(zip(ARMS, self.state()[[6, 13]], strict=True))

    def nearer_arm(self, colour: str) -> str:
        """The arm whose side of the table the cube lies on."""
        return ARMS[0] if self.cube_position(colour)[0] < 0 else ARMS[1]

    def pinch(self, arm: str) -> np.ndarray:
        """(3,) point between an arm's finger pads, metres."""
        return self.data.site_xpos[self.pinch_site[arm]]

    def arm_dofs(self, arm: str) -> np.ndarray:
        """(6,) addresses of an arm's joints, the same in qpos and qvel: the arms come before the free cubes."""
        return self._arm_qpos[arm]

    @property
    def robot_dofs(self) -> np.ndarray:
        """(12,) of both arms."""
        return np.concatenate([self._arm_qpos[arm] for arm in ARMS])
