"""Bimanual ALOHA over a table with coloured cubes: what the robot does, what it sees, and whether the task is done."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.sim.domain import FIELDS, DomainConfig
from qwen_vla_core.sim.domain import apply as apply_domain
from qwen_vla_core.sim.randomize import COLOURS, CubeLayout, RandomizationConfig, sample_cubes
from qwen_vla_core.sim.state import CubeState, GripperState, SceneState, project
from qwen_vla_core.sim.tasks import TASKS, Task, TaskName, parse_instruction, phrase
from qwen_vla_core.sim.worlds.scene import ARMS, CAMERAS, PARKING_Z, build_model

JOINTS: tuple[str, ...] = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
START_ARM = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)  # radians
FINGER_RANGE = (0.021, 0.057)  # metres of one finger: closed, open
SUBSTEPS = 10
LIFTED = 0.05  # metres above the resting height
HOLD_STEPS = 10  # control steps (0.2 s) a condition must last
CUBE_X = (0.05, 0.19)  # metres from the middle plane
CUBE_Y = (0.39, 0.61)

_OPEN: weakref.WeakSet[AlohaWorld] = weakref.WeakSet()


def _close_all() -> None:
    """At exit: renderers must go before the GL library's own handler, or each of them prints a traceback."""
    for world in list(_OPEN):
        world.close()


class AlohaWorld:
    """The ``World`` of the ALOHA embodiment (``simulation: {world: aloha}``).

    Channels are canonical: arm joints in radians, grippers as opening fraction. The same seed gives bit-identical
    states and images; the scene depends on the seed alone, so one seed can be asked for either of its cubes.
    """

    control_hz: float = 50.0
    channels: tuple[str, ...] = tuple(f"{arm}_{joint}" for arm in ARMS for joint in (*JOINTS, "gripper"))
    views: tuple[str, ...] = tuple(CAMERAS)

    def __init__(
        self,
        *,
        tasks: Sequence[TaskName] = TASKS,
        randomize: RandomizationConfig | None = None,
        domain: DomainConfig | None = None,
    ) -> None:
        """Builds the scene; call ``reset`` before anything else.

        Args:
            tasks: from which ``reset`` draws when no instruction is given.
            randomize: what differs between seeds; everything by default.
            domain: full domain randomisation on top; its camera and start pose ranges replace those of ``randomize``.
        """
        self.tasks: tuple[TaskName, ...] = tuple(tasks)
        self.randomize = randomize or RandomizationConfig()
        self.domain = domain
        if domain is not None:
            self.randomize = replace(
                self.randomize,
                camera_shift=domain.camera_shift,
                camera_turn=domain.camera_turn,
                camera_fovy=domain.camera_fovy,
                start_pose=domain.start_pose,
            )
        self.domain_drawn: dict[str, Any] = {}  # this episode's, as plain JSON
        self.model = build_model(materials=domain is not None)
        self.data = mujoco.MjData(self.model)
        self.instruction = ""
        self.task = Task("pick", COLOURS[0])
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        m = self.model
        self._as_built = {
            name: getattr(m, name).copy()
            for name in ("geom_rgba", "light_dir", "light_diffuse", "cam_pos", "cam_quat", "cam_fovy", *FIELDS)
        }
        self._headlight = m.vis.headlight.ambient.copy(), m.vis.headlight.diffuse.copy()
        self._arm_qpos = {
            arm: np.array([m.joint(f"vx300s_{arm}/{name}").qposadr[0] for name in JOINTS]) for arm in ARMS
        }
        self._finger_qpos = {arm: m.joint(f"vx300s_{arm}/left_finger").qposadr[0] for arm in ARMS}
        self._cube_qpos = {colour: m.joint(f"cube_{colour}").qposadr[0] for colour in COLOURS}
        self._cube_geom = {m.geom(f"cube_{colour}").id: colour for colour in COLOURS}
        self._finger_geom = {
            m.geom(f"vx300s_{arm}/10_{finger}_gripper_finger").id: (arm, finger)
            for arm in ARMS
            for finger in ("left", "right")
        }
        self.pinch_site = {arm: m.site(f"{arm}_pinch").id for arm in ARMS}

    # --- life of an episode -----------------------------------------------------------------------------------------

    def reset(self, seed: int, instruction: str | None = None) -> None:
        """Starts the episode that ``seed`` stands for.

        Args:
            seed: any non-negative integer.
            instruction: what to do; drawn from the seed when None. When it names a colour that is not on the table,
                the last cube takes that colour.

        Raises:
            UserError: the instruction is not one this world knows.
        """
        asked = None if instruction is None else parse_instruction(instruction)
        rng = np.random.default_rng([seed, 0])
        cubes = sample_cubes(self.randomize, rng, CUBE_X, CUBE_Y)
        words = np.random.default_rng([seed, 1])
        if asked is None:
            name = self.tasks[int(words.integers(len(self.tasks)))]
            asked = Task(name, cubes[int(words.integers(len(cubes)))].colour)
            instruction = phrase(asked, words)
        elif asked.colour not in {cube.colour for cube in cubes}:
            plain = sample_cubes(self.randomize, np.random.default_rng([seed, 2]), CUBE_X, CUBE_Y)
            shades = {cube.colour: cube.rgb for cube in plain}
            last = cubes[-1]
            rgb = shades.get(asked.colour, tuple(self._as_built["geom_rgba"][self._geom_of(asked.colour), :3]))
            cubes[-1] = CubeLayout(asked.colour, last.xy, last.yaw, rgb)
        self.task, self.instruction = asked, instruction or ""
        mujoco.mj_resetData(self.model, self.data)
        self._paint(cubes, rng)
        if self.domain is not None:
            self._vary(self.domain, np.random.default_rng([seed, 4]))
        self._place(cubes, rng)
        mujoco.mj_forward(self.model, self.data)
        self._layout = {cube.colour: cube for cube in cubes}
        self._steps = 0
        self._lifted_for = dict.fromkeys(COLOURS, 0)
        self._done_for = 0
        self.arm = self.nearer_arm(asked.colour)

    def _geom_of(self, colour: str) -> int:
        return int(self.model.geom(f"cube_{colour}").id)

    def _paint(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        """Colours, light and cameras of this episode, always starting from the scene as built."""
        m, config = self.model, self.randomize
        for name, value in self._as_built.items():
            getattr(m, name)[:] = value
        m.vis.headlight.ambient[:], m.vis.headlight.diffuse[:] = self._headlight
        table, floor = m.geom("table").id, m.geom("floor").id
        m.geom_rgba[floor] = (0.35, 0.35, 0.37, 1.0)
        if config.table:
            grey = rng.uniform(0.12, 0.6)
            m.geom_rgba[table, :3] = np.clip(grey + rng.uniform(-0.05, 0.05, 3), 0, 1)
            m.geom_rgba[floor, :3] = np.clip(rng.uniform(0.1, 0.6) + rng.uniform(-0.05, 0.05, 3), 0, 1)
        if config.light:
            m.light_dir[:] += rng.uniform(-0.4, 0.4, m.light_dir.shape)
            m.light_diffuse[:] *= rng.uniform(0.6, 1.4, (m.nlight, 1))
            m.vis.headlight.ambient[:] *= rng.uniform(0.8, 1.2)
        if config.camera:
            for camera in range(m.ncam):
                m.cam_pos[camera] += rng.uniform(-config.camera_shift, config.camera_shift, 3)
                turn, quat = np.zeros(4), m.cam_quat[camera].copy()
                mujoco.mju_euler2Quat(turn, rng.uniform(-config.camera_turn, config.camera_turn, 3), "xyz")
                mujoco.mju_mulQuat(m.cam_quat[camera], quat, turn)
                m.cam_fovy[camera] *= 1 + rng.uniform(-config.camera_fovy, config.camera_fovy)
        for cube in cubes:
            m.geom_rgba[self._geom_of(cube.colour), :3] = cube.rgb

    def _vary(self, domain: DomainConfig, rng: np.random.Generator) -> None:
        """The wider ranges of domain randomisation, dynamics included."""
        names = tuple(f"cube_{colour}" for colour in COLOURS)
        dofs = np.concatenate([self._arm_qpos[arm] for arm in ARMS])
        self.domain_drawn = apply_domain(self.model, domain, rng, names, dofs)
        mujoco.mj_setConst(self.model, self.data)
        mujoco.mj_resetData(self.model, self.data)

    def _half(self, colour: str) -> float:
        """Half of a cube's edge in metres."""
        return float(self.model.geom_size[self._geom_of(colour), 0])

    def _place(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        """Arms at their start pose with open grippers, cubes at rest on the table, absent cubes on the shelf."""
        start = np.array(START_ARM)
        jitter = rng.uniform(-1, 1, (len(ARMS), len(JOINTS))) * self.randomize.start_pose
        self._command = np.column_stack([start + jitter, np.ones(len(ARMS))]).ravel()
        self.data.ctrl[:] = self._to_ctrl(self._command)
        self.data.qpos[: self.model.nu] = self.data.ctrl
        places = {cube.colour: cube for cube in cubes}
        for index, colour in enumerate(COLOURS):
            at = self._cube_qpos[colour]
            cube = places.get(colour)
            x, y = cube.xy if cube else (0.15 * (index - 1), 0.0)
            half = self._half(colour)
            z, yaw = (half, cube.yaw) if cube else (PARKING_Z + half, 0.0)
            self.data.qpos[at : at + 7] = (x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    @staticmethod
    def _to_ctrl(action_c: np.ndarray) -> np.ndarray:
        """(14,) canonical → (16,) actuators: one gripper fraction drives two fingers, in metres."""
        arms = action_c.reshape(2, 7)
        finger = FINGER_RANGE[0] + np.clip(arms[:, 6], 0, 1) * (FINGER_RANGE[1] - FINGER_RANGE[0])
        return np.column_stack([arms[:, :6], finger, -finger]).ravel()

    def step(self, action_c: np.ndarray) -> None:
        """One control period (20 ms) with position targets.

        Args:
            action_c: (14,) arm joints in radians, grippers as opening fraction. Targets beyond a joint's range stop
                at its end, as on the robot.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """
        action = np.asarray(action_c, dtype=np.float64)
        if action.shape != (len(self.channels),):
            raise ValueError(f"action has shape {action.shape}, expected ({len(self.channels)},)")
        if not np.isfinite(action).all():
            bad = [self.channels[i] for i in np.flatnonzero(~np.isfinite(action))]
            raise ValueError(f"action is not finite in {', '.join(bad)}")
        self._command = action.copy()
        self.data.ctrl[:] = self._to_ctrl(action)
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        self._steps += 1
        self._judge()

    def _judge(self) -> None:
        touching = self.touching()
        for colour in self._layout:
            high = self.cube_position(colour)[2] >= self._half(colour) + LIFTED
            lifted = high and any(touching[arm, colour] for arm in ARMS)
            self._lifted_for[colour] = self._lifted_for[colour] + 1 if lifted else 0
        giver, receiver = self.arm, ARMS[1 - ARMS.index(self.arm)]
        colour = self.task.colour
        up = self.cube_position(colour)[2] >= self._half(colour) + LIFTED
        if self.task.name == "pick":
            done = up and bool(touching[giver, colour])
        else:
            done = up and len(touching[receiver, colour]) == 2 and not touching[giver, colour]
        self._done_for = self._done_for + 1 if done else 0

    # --- what the robot and the judge know --------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since ``reset``."""
        return self._steps / self.control_hz

    def command(self) -> np.ndarray:
        """(14,) the targets last commanded (the start pose after ``reset``)."""
        return self._command.copy()

    def state(self) -> np.ndarray:
        """(14,) measured joints in radians and gripper openings as fractions."""
        parts = []
        for arm in ARMS:
            finger = self.data.qpos[self._finger_qpos[arm]]
            fraction = (finger - FINGER_RANGE[0]) / (FINGER_RANGE[1] - FINGER_RANGE[0])
            parts += [self.data.qpos[self._arm_qpos[arm]], [fraction]]
        return np.concatenate(parts)

    def success(self) -> bool:
        """Whether the task's condition holds and has held for 0.2 s.

        pick: the named cube is ≥ 5 cm above its resting height and a finger of the arm that was nearer at the start
        touches it. transfer: it is up there in both fingers of the other arm, and the first arm does not touch it.
        """
        return self._done_for >= HOLD_STEPS

    def lifted_cube(self) -> str | None:
        """Colour of the cube that a gripper has held ≥ 5 cm up for 0.2 s, whatever the instruction said."""
        held = [colour for colour, steps in self._lifted_for.items() if steps >= HOLD_STEPS]
        return held[0] if held else None

    def touching(self) -> dict[tuple[str, str], frozenset[str]]:
        """(arm, colour) → the fingers ("left", "right") of that arm in contact with that cube."""
        found: dict[tuple[str, str], set[str]] = {(arm, colour): set() for arm in ARMS for colour in COLOURS}
        for geom1, geom2 in self.data.contact.geom[: self.data.ncon]:
            for a, b in ((geom1, geom2), (geom2, geom1)):
                if a in self._finger_geom and b in self._cube_geom:
                    arm, finger = self._finger_geom[a]
                    found[arm, self._cube_geom[b]].add(finger)
        return {key: frozenset(fingers) for key, fingers in found.items()}

    def cube_position(self, colour: str) -> np.ndarray:
        """(3,) centre in metres, world frame."""
        at = self._cube_qpos[colour]
        return self.data.qpos[at : at + 3].copy()

    def nearer_arm(self, colour: str) -> str:
        """The arm whose side of the table the cube lies on."""
        return ARMS[0] if self.cube_position(colour)[0] < 0 else ARMS[1]

    def arm_dofs(self, arm: str) -> np.ndarray:
        """(6,) addresses of an arm's joints, the same in qpos and qvel: the arms come before the free cubes."""
        return self._arm_qpos[arm]

    def scene_state(self) -> SceneState:
        """Everything the questions of ``sim/grounding.py`` are answered from."""
        touching = self.touching()
        cubes = []
        for colour, layout in self._layout.items():
            position = self.cube_position(colour)
            at = self._cube_qpos[colour]
            w, x, y, z = self.data.qpos[at + 3 : at + 7]
            pixels = {view: self.pixel(view, position) for view in self.views}
            cubes.append(
                CubeState(
                    colour=colour,
                    position=tuple(position.tolist()),
                    yaw=float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))),
                    rgb=layout.rgb,
                    pixels={view: uv for view, uv in pixels.items() if uv is not None},
                    visible=tuple(v for v, uv in pixels.items() if uv is not None and self._seen(v, colour)),
                    nearer_arm=self.nearer_arm(colour),
                    touched_by=tuple(arm for arm in ARMS if touching[arm, colour]),
                    held_by=tuple(arm for arm in ARMS if len(touching[arm, colour]) == 2),
                )
            )
        fractions = self.state()[[6, 13]]
        grippers = [
            GripperState(
                arm=arm,
                position=tuple(self.data.site_xpos[self.pinch_site[arm]].tolist()),
                opening=float(fraction),
                pixel=self.pixel("ego", self.data.site_xpos[self.pinch_site[arm]]),
            )
            for arm, fraction in zip(ARMS, fractions, strict=True)
        ]
        return SceneState(
            task=self.task.name,
            target=self.task.colour,
            arm=self.arm,
            cubes=tuple(cubes),
            grippers=tuple(grippers),
        )

    def pixel(self, view: str, point: np.ndarray) -> tuple[float, float] | None:
        """(u, v) in 0..1 (right, down) where a 4:3 picture of ``view`` shows a world point; None when it does not."""
        camera = self.model.camera(CAMERAS[view]).id
        return project(
            point,
            self.data.cam_xpos[camera],
            self.data.cam_xmat[camera].reshape(3, 3),
            float(self.model.cam_fovy[camera]),
        )

    def _seen(self, view: str, colour: str) -> bool:
        """Whether a ray from the camera reaches the cube before anything else (its centre or its top)."""
        eye = self.data.cam_xpos[self.model.camera(CAMERAS[view]).id]
        centre, hit = self.cube_position(colour), np.zeros(1, np.int32)
        for point in (centre, centre + np.array([0, 0, 0.9 * self._half(colour)])):
            mujoco.mj_ray(self.model, self.data, eye, point - eye, None, 1, -1, hit)
            if hit[0] == self._geom_of(colour):
                return True
        return False

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture of one view, at most 640×480.

        Raises:
            ValueError: unknown view.
        """
        if view not in CAMERAS:
            raise ValueError(f"view {view!r} is not one of {', '.join(CAMERAS)}")
        renderer = self._renderers.get((width, height))
        if renderer is None:
            renderer = self._renderers[width, height] = mujoco.Renderer(self.model, height, width)
            _OPEN.add(self)
            atexit.unregister(_close_all)  # handlers run last in, first out: ours must be newer than the GL library's
            atexit.register(_close_all)
        renderer.update_scene(self.data, CAMERAS[view])
        return renderer.render()

    def close(self) -> None:
        """Frees the renderers. The world can still be used; the next ``render`` makes a new one."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
