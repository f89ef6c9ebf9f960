"""What every world with arms over a table of coloured cubes shares: episodes, physics, appearance, snapshots, pictures.

A world of this kind adds its scene, how an action becomes joint targets, and what counts as done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.domain import FIELDS, DomainConfig
from qwen_vla_core.sim.domain import apply as apply_domain
from qwen_vla_core.sim.grounding import intention, questions
from qwen_vla_core.sim.randomize import COLOURS, CubeLayout, RandomizationConfig
from qwen_vla_core.sim.state import CubeState, GripperState, PlaceState, SceneState, project
from qwen_vla_core.sim.tasks import Task, TaskBook
from qwen_vla_core.sim.worlds.objects import scatter_clutter
from qwen_vla_core.sim.worlds.rendering import Cameras

Touching = dict[tuple[str, str], frozenset[str]]  # (arm, colour) → its fingers on that cube
LIFTED = 0.05  # metres above the resting height
HOLD_S = 0.2  # a condition must last this long


class TabletopWorld(ABC):
    """Base of the MuJoCo worlds with cubes. The same seed gives bit-identical states and images.

    Attributes:
        control_hz: control steps per second.
        decision_s: seconds that one action of a policy, of the expert and in demonstrations lasts.
        limit_s: simulated seconds after which an episode has failed.
        channels: action channels; ``state_channels``: what ``state`` measures.
        held_c: (c,) bool, True for channels that say how far to go in one period: such an action is held, not
            interpolated, until the next one is due, and is not repeated after the last.
        headings: action columns that are angles modulo a turn.
        cameras: view → camera of the model. views: the same names, in the order of the embodiment.
        arms: names; a world with one arm has one name.
        book: the sentences it knows; ``task_names``: their tasks.
        domain_type: the ranges that ``domain`` takes.
        read_scene, questions, intention: a stored snapshot back to a scene, and what can be asked and told about one.
        model, data: MuJoCo's; cubes are bodies, geoms and free joints called ``cube_<colour>``.
        domain_drawn: this episode's domain, as plain JSON.
    """

    control_hz: float = 50.0
    substeps: int
    decision_s: float = 0.1
    limit_s: float = 12.0
    channels: tuple[str, ...]
    state_channels: tuple[str, ...]
    held_c: np.ndarray
    headings: tuple[int, ...] = ()
    cameras: dict[str, str]
    views: tuple[str, ...]
    arms: tuple[str, ...]
    book: TaskBook
    task_names: tuple[str, ...]
    domain_type: type = DomainConfig
    read_scene = staticmethod(SceneState.from_dict)
    questions = staticmethod(questions)
    intention = staticmethod(intention)
    parking_z: float
    ray_groups: np.ndarray | None = None  # geom groups that can hide a cube; None = all

    def __init__(
        self,
        model: mujoco.MjModel,
        tasks: Sequence[str] | None,
        randomize: RandomizationConfig | None,
        domain: DomainConfig | None,
        fingers: dict[int, tuple[str, str]],
    ) -> None:
        """
        Args:
            model: the compiled scene.
            tasks: from which ``reset`` draws when no instruction is given; None = all.
            randomize: what differs between seeds; everything by default.
            domain: full domain randomisation on top; its camera and start pose ranges replace those of ``randomize``.
            fingers: geom id → (arm, "left" or "right").
        """
        self.tasks = tuple(self.task_names if tasks is None else tasks)
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
        self.domain_drawn: dict[str, Any] = {}
        self.model = model
        self.data = mujoco.MjData(model)
        self.instruction = ""
        self.task = Task(self.tasks[0], COLOURS[0])
        self._cameras = Cameras(model, self.cameras)
        self._as_built = {
            name: getattr(model, name).copy()
            for name in (
                "geom_rgba",
                "light_dir",
                "light_diffuse",
                "cam_pos",
                "cam_quat",
                "cam_fovy",
                "body_pos",
                *FIELDS,
            )
        }
        self._headlight = model.vis.headlight.ambient.copy(), model.vis.headlight.diffuse.copy()
        self._cube_qpos = {colour: model.joint(f"cube_{colour}").qposadr[0] for colour in COLOURS}
        self._cube_geom = {model.geom(f"cube_{colour}").id: colour for colour in COLOURS}
        self._finger_geom = fingers
        self._hold_steps = round(HOLD_S * self.control_hz)

    # --- what a world adds ------------------------------------------------------------------------------------------

    @abstractmethod
    def _sample(self, rng: np.random.Generator, task: str) -> list[CubeLayout]:
        """The cubes of an episode."""

    @abstractmethod
    def _place(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        """Puts arms and objects where they start, and sets ``_command`` to what that start pose is as an action."""

    @abstractmethod
    def _control(self, action: np.ndarray) -> None:
        """Sets ``data.ctrl`` for one control step."""

    @abstractmethod
    def _done(self, touching: Touching) -> bool:
        """Whether the task's condition holds now."""

    @abstractmethod
    def state(self) -> np.ndarray:
        """(n_state,) what the robot measures, in the units of ``state_channels``."""

    @abstractmethod
    def openings(self) -> dict[str, float]:
        """Arm → opening fraction of its gripper."""

    @abstractmethod
    def nearer_arm(self, colour: str) -> str:
        """The arm whose side of the table the cube lies on."""

    @abstractmethod
    def pinch(self, arm: str) -> np.ndarray:
        """(3,) point between an arm's finger pads, metres."""

    def places(self) -> tuple[PlaceState, ...]:
        """What cubes can be put on."""
        return ()

    def command_by(self, channels: Sequence[str]) -> None:
        """Says which channels the steps to come are commanded in; before ``reset``.

        Raises:
            UserError: the world is not commanded that way.
        """
        if tuple(channels) != self.channels:
            raise UserError(
                f"simulation.world: is commanded by {', '.join(self.channels)}, not by {', '.join(channels)}; "
                "use mock:=true (--mock), or another world"
            )

    @property
    @abstractmethod
    def robot_dofs(self) -> np.ndarray:
        """Degree-of-freedom addresses of all arm joints, without grippers."""

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
        asked = None if instruction is None else self.book.parse(instruction)
        self.seed = seed
        rng, words = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        name = self.tasks[int(words.integers(len(self.tasks)))] if asked is None else asked.name
        cubes = self._sample(rng, name)
        if asked is None:
            asked = Task(name, cubes[int(words.integers(len(cubes)))].colour)
            instruction = self.book.phrase(asked, words)
        elif asked.colour not in {cube.colour for cube in cubes}:
            shades = {cube.colour: cube.rgb for cube in self._sample(np.random.default_rng([seed, 2]), name)}
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
        self.domain_drawn = apply_domain(self.model, domain, rng, names, self.robot_dofs)
        mujoco.mj_setConst(self.model, self.data)
        mujoco.mj_resetData(self.model, self.data)

    def _clutter(
        self,
        domain: DomainConfig,
        area: tuple[float, float, float, float],
        taken: Sequence[tuple[float, float, float]],
    ) -> None:
        """Clutter on the table where domain randomisation asks for it; see ``scatter_clutter``."""
        rng = np.random.default_rng([self.seed, 6])
        count = int(rng.integers(domain.distractors[0], domain.distractors[1] + 1))
        self.domain_drawn["distractors"] = scatter_clutter(self.model, self.data, rng, count, area, taken)

    def _half(self, colour: str) -> float:
        """Half of a cube's edge in metres."""
        return float(self.model.geom_size[self._geom_of(colour), 0])

    def _put_cubes(self, cubes: Sequence[CubeLayout], ground: float = 0.0) -> None:
        """Cubes at rest ``ground`` above the table, absent ones on the shelf."""
        places = {cube.colour: cube for cube in cubes}
        for index, colour in enumerate(COLOURS):
            at = self._cube_qpos[colour]
            cube = places.get(colour)
            x, y = cube.xy if cube else (0.15 * (index - 1), 0.0)
            half = self._half(colour)
            z, yaw = (ground + half, cube.yaw) if cube else (self.parking_z + half, 0.0)
            self.data.qpos[at : at + 7] = (x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    def step(self, action_c: np.ndarray) -> None:
        """One control period (``1 / control_hz`` seconds).

        Args:
            action_c: (c,) in the units of ``channels``. What goes beyond the robot's limits stops at them.

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
        self._control(action)
        mujoco.mj_step(self.model, self.data, self.substeps)
        self._steps += 1
        self._judge()

    def play(self, action_c: np.ndarray) -> Iterator[np.ndarray]:
        """The commands of one action, ``decision_s`` long, as the controller plays a chunk: held channels at once, the
        others on the straight line to their target.
        """
        start = np.where(self.held_c, action_c, self.command())
        yield from interpolate(start, action_c, round(self.decision_s * self.control_hz))

    def _judge(self) -> None:
        touching = self.touching()
        for colour in self._layout:
            high = self.cube_position(colour)[2] >= self._half(colour) + LIFTED
            lifted = high and any(touching[arm, colour] for arm in self.arms)
            self._lifted_for[colour] = self._lifted_for[colour] + 1 if lifted else 0
        self._done_for = self._done_for + 1 if self._done(touching) else 0

    # --- what the robot and the judge know --------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since ``reset``."""
        return self._steps / self.control_hz

    def command(self) -> np.ndarray:
        """(c,) the action last commanded (the start pose, and no displacement, after ``reset``)."""
        return self._command.copy()

    def success(self) -> bool:
        """Whether the task's condition holds and has held for 0.2 s."""
        return self._done_for >= self._hold_steps

    def ended(self) -> bool:
        """Whether the episode is over. Cubes can always be tried again, so only success ends it."""
        return self.success()

    def chosen(self) -> str | None:
        """The cube the robot acted on, whatever was asked."""
        return self.lifted_cube()

    def metrics(self) -> dict[str, float]:
        """Numbers beside success; none here."""
        return {}

    @property
    def film_views(self) -> tuple[str, ...]:
        """What a film shows."""
        return self.views

    def track(self) -> None:
        """Nothing walks here."""
        return None

    def about(self) -> dict[str, Any]:
        """What a demonstration says of itself."""
        return {"task": self.task.name, "target": self.target, "arm": self.arm}

    @property
    def target(self) -> str:
        """The colour asked for."""
        return self.task.colour

    def other_instruction(self) -> str | None:
        """The same sentence about another cube of this scene."""
        other = next((colour for colour in self._layout if colour != self.target), None)
        return None if other is None else self.instruction.replace(self.target, other)

    def lifted_cube(self) -> str | None:
        """Colour of the cube that a gripper has held ≥ 5 cm up for 0.2 s, whatever the instruction said."""
        held = [colour for colour, steps in self._lifted_for.items() if steps >= self._hold_steps]
        return held[0] if held else None

    def touching(self) -> Touching:
        """(arm, colour) → the fingers ("left", "right") of that arm in contact with that cube."""
        found: dict[tuple[str, str], set[str]] = {(arm, colour): set() for arm in self.arms for colour in COLOURS}
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

    def cube_yaw(self, colour: str) -> float:
        """Radians about the vertical."""
        at = self._cube_qpos[colour]
        w, x, y, z = self.data.qpos[at + 3 : at + 7]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    def scene_state(self) -> SceneState:
        """Everything the questions of ``sim/grounding.py`` are answered from."""
        touching = self.touching()
        cubes = []
        for colour, layout in self._layout.items():
            position = self.cube_position(colour)
            pixels = {view: self.pixel(view, position) for view in self.views}
            cubes.append(
                CubeState(
                    colour=colour,
                    position=tuple(position.tolist()),
                    yaw=self.cube_yaw(colour),
                    rgb=layout.rgb,
                    pixels={view: uv for view, uv in pixels.items() if uv is not None},
                    visible=tuple(v for v, uv in pixels.items() if uv is not None and self._seen(v, colour)),
                    nearer_arm=self.nearer_arm(colour),
                    touched_by=tuple(arm for arm in self.arms if touching[arm, colour]),
                    held_by=tuple(arm for arm in self.arms if len(touching[arm, colour]) == 2),
                )
            )
        grippers = [
            GripperState(
                arm=arm,
                position=tuple(self.pinch(arm).tolist()),
                opening=float(fraction),
                pixel=self.pixel("ego", self.pinch(arm)),
            )
            for arm, fraction in self.openings().items()
        ]
        return SceneState(
            task=self.task.name,
            target=self.task.colour,
            arm=self.arm,
            cubes=tuple(cubes),
            grippers=tuple(grippers),
            places=self.places(),
        )

    def pixel(self, view: str, point: np.ndarray) -> tuple[float, float] | None:
        """(u, v) in 0..1 (right, down) where a 4:3 picture of ``view`` shows a world point; None when it does not."""
        camera = self.model.camera(self.cameras[view]).id
        return project(
            point,
            self.data.cam_xpos[camera],
            self.data.cam_xmat[camera].reshape(3, 3),
            float(self.model.cam_fovy[camera]),
        )

    def _seen(self, view: str, colour: str) -> bool:
        """Whether a ray from the camera reaches the cube before anything else (its centre or its top)."""
        centre = self.cube_position(colour)
        top = centre + np.array([0, 0, 0.9 * self._half(colour)])
        return self._hits(view, (centre, top), {self._geom_of(colour)})

    def _hits(self, view: str, points: Sequence[np.ndarray], geoms: set[int]) -> bool:
        """Whether a ray from the camera towards one of the points reaches one of ``geoms`` first."""
        eye = self.data.cam_xpos[self.model.camera(self.cameras[view]).id]
        hit = np.zeros(1, np.int32)
        for point in points:
            mujoco.mj_ray(self.model, self.data, eye, point - eye, self.ray_groups, 1, -1, hit)
            if int(hit[0]) in geoms:
                return True
        return False

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture of one view, at most 640×480.

        Raises:
            ValueError: unknown view.
        """
        return self._cameras.render(self.data, view, width, height)

    def close(self) -> None:
        """Frees the renderers. The world can still be used; the next ``render`` makes a new one."""
        self._cameras.close()


def interpolate(start: np.ndarray, end: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """The ``steps`` commands on the straight line from ``start`` (left out) to ``end`` (included)."""
    for i in range(1, steps + 1):
        yield start + (end - start) * (i / steps)
