"""A WidowX 250s before a plate or a belt, driven by changes of its hand's pose; when its tasks are done.

An action is what a policy of 5 Hz says: how far the hand is to move and turn in one period, in the robot's base frame,
and how far the gripper is to be open. The robot's side of that is here: a pose that the changes are added to, and
inverse kinematics with limits that follows it, as MoveIt Servo does on the real arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.sim.domain import DomainConfig
from qwen_vla_core.sim.ik import solve_ik
from qwen_vla_core.sim.randomize import COLOURS, CubeLayout, RandomizationConfig, choose_colours, lay_out, spread
from qwen_vla_core.sim.state import EGO, ONLY_ARM, PlaceState, SceneState
from qwen_vla_core.sim.tasks import PLATE_AND_BELT
from qwen_vla_core.sim.worlds.objects import CLUTTER_GAP, PARKING_Z
from qwen_vla_core.sim.worlds.tabletop import LIFTED, TabletopWorld, Touching
from qwen_vla_core.sim.worlds.widowx_belt import END, HIDDEN_Z, KEEP_CLEAR, Belt
from qwen_vla_core.sim.worlds.widowx_belt import SPEED as BELT_SPEED
from qwen_vla_core.sim.worlds.widowx_belt import TOP as BELT_TOP
from qwen_vla_core.sim.worlds.widowx_scene import CAMERAS, build_model

ARM = ONLY_ARM
JOINTS: tuple[str, ...] = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
FINGER_RANGE = (0.015, 0.037)  # metres of one finger: closed, open
START_POSITION = (0.22, 0.0, 0.18)  # of the tool point, metres; the hand points down
START_NEAR = np.array([0.0, -0.4, 0.5, 0.0, 1.4, 0.0])  # where the search for that pose begins, radians
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # hand pointing down, fingers along y
REACH_LOW, REACH_HIGH = np.array([0.10, -0.36, 0.018]), np.array([0.50, 0.36, 0.42])  # of the tool point, metres
SPEED, TURN_SPEED, JOINT_SPEED = 0.5, 3.0, 3.14  # m/s, rad/s, rad/s
LEAD = 0.25  # radians that a commanded joint may be ahead of the measured one, so that a blocked hand stays soft
LOST = (0.003, 0.03)  # a pose that is missed by more (metres, radians) cannot be reached: the target gives way

AREA = (0.16, 0.38, -0.23, 0.23)  # where things lie: least and largest x, least and largest y, metres
PLATE_RADIUS, PLATE_TOP = 0.065, 0.006
ON_PLATE = (0.05, 0.006)  # largest horizontal distance of a cube's centre, and of its height from lying flat, metres


class WidowXWorld(TabletopWorld):
    """The ``World`` of the WidowX embodiment (``simulation: {world: widowx}``).

    Actions: dx, dy, dz (metres) and drx, dry, drz (axis-angle, radians) per period in the base frame, gripper as
    opening fraction. State: joints in radians, gripper as opening fraction. The scene depends on the seed and on the
    kind of task alone: one seed can be asked for any of its cubes.
    """

    substeps = 5
    decision_s = 0.2
    limit_s = 15.0
    channels: tuple[str, ...] = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    state_channels = (*JOINTS, "gripper", "hand_x", "hand_y", "hand_z")
    held_c: np.ndarray = np.array([*[True] * 6, False])
    by_joints = False  # commanded by joint positions instead, see ``command_by``
    cameras = CAMERAS
    views = tuple(CAMERAS)
    arms = (ARM,)
    book = PLATE_AND_BELT
    task_names = PLATE_AND_BELT.names
    parking_z = PARKING_Z
    ray_groups = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # what is seen

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        randomize: RandomizationConfig | None = None,
        domain: DomainConfig | None = None,
        policy_hz: float | None = None,
        belt_speed: float = BELT_SPEED,
    ) -> None:
        """Builds the scene; call ``reset`` before anything else.

        Args:
            tasks: see ``TabletopWorld``.
            randomize: see there.
            domain: see there.
            policy_hz: actions per second, where they shall not be 5; a divisor of 50.
            belt_speed: m/s, in the task ``belt``.

        Raises:
            UserError: the belt would be too fast for the arm, or stand still.
        """
        model = build_model(materials=domain is not None)
        super().__init__(
            model, tasks, randomize, domain, {model.geom(f"{side}_pad").id: (ARM, side) for side in ("left", "right")}
        )
        if policy_hz is not None:
            self.decision_s = 1.0 / policy_hz
        self.tool = model.site("tool").id
        self._dofs = np.arange(len(JOINTS))  # the arm comes first in qpos and qvel
        self._plate, self.belt = model.body("plate").id, Belt(model, belt_speed)
        self._plate_geoms = [model.geom(name).id for name in ("plate", "plate_well")]
        self._scratch = mujoco.MjData(model)
        self._home = self._inverse(np.array(START_POSITION), DOWN, START_NEAR, iterations=200)

    def command_by(self, channels: Sequence[str]) -> None:
        """By changes of the hand's pose, or by joint positions and the gripper: then no inverse kinematics is in it."""
        self.by_joints = tuple(channels) == (*JOINTS, "gripper")
        if self.by_joints:
            self.channels, self.held_c = (*JOINTS, "gripper"), np.zeros(len(JOINTS) + 1, bool)
        else:
            super().command_by(channels)

    # --- life of an episode -----------------------------------------------------------------------------------------

    def _sample(self, rng: np.random.Generator, task: str) -> list[CubeLayout]:
        """Two or three cubes anywhere before the arm, or in a row on the belt."""
        config = self.randomize
        if task == "belt":
            return Belt.sample(config, rng, Belt.choose_course(config, self.seed))
        colours = choose_colours(config, rng, 2, 3)
        taken = [(*self._plate_place(), PLATE_RADIUS + 0.05)]
        return lay_out(config, rng, colours, spread(config, rng, len(colours), AREA, taken))

    def _place(self, cubes: Sequence[CubeLayout], rng: np.random.Generator) -> None:
        """The arm above the table with an open gripper; plate or belt; clutter."""
        jitter = rng.uniform(-1, 1, len(JOINTS)) * self.randomize.start_pose
        self._joints = self._home + jitter
        self._position, self._rotation = self._forward(self._joints)
        self._command = np.array([*(self._joints if self.by_joints else np.zeros(6)), 1.0])
        self.data.qpos[: len(JOINTS)] = self._joints
        self.data.qpos[len(JOINTS) : len(JOINTS) + 2] = FINGER_RANGE[1], -FINGER_RANGE[1]
        self._set_motors(1.0)
        moving = self.task.name == "belt"
        self._put_cubes(cubes, BELT_TOP if moving else 0.0)
        self.model.body_pos[self._plate] = (0, 0, HIDDEN_Z) if moving else (*self._plate_place(), 0)
        if self.randomize.table:
            self.model.geom_rgba[self._plate_geoms[0], :3] = rng.uniform(0.75, 1.0) * rng.uniform(0.9, 1.0, 3)
        if moving:
            look = np.random.default_rng([self.seed, 9]) if self.randomize.table else None
            course = Belt.choose_course(self.randomize, self.seed)
            self.belt.start(self.model, self.data, course, [cube.colour for cube in cubes], look)
        else:
            self.belt.hide(self.model, self.data)
        if self.domain is not None:
            taken = [(*cube.xy, CLUTTER_GAP) for cube in cubes]
            if moving:  # nothing on the belt's way
                taken += [(self.belt.course[0], y, KEEP_CLEAR) for y in np.arange(-END, END + 0.01, 0.05)]
            else:
                taken.append((*self._plate_place(), PLATE_RADIUS + 0.05))
            self._clutter(self.domain, AREA, taken)
        self._moved: str | None = None
        self._named_lifted = self._named_lost = False

    def _plate_place(self) -> tuple[float, float]:
        """(x, y) of this seed's plate, metres."""
        if not self.randomize.cubes:
            return 0.36, 0.0
        rng = np.random.default_rng([self.seed, 5])
        return float(rng.uniform(*AREA[:2])), float(rng.uniform(*AREA[2:]))

    # --- the robot's side of an action ------------------------------------------------------------------------------

    def _control(self, action: np.ndarray) -> None:
        """Adds one control step's share of the change to the target pose and follows it with the joints."""
        self.belt.advance(self.data)
        dt = 1.0 / self.control_hz
        if self.by_joints:
            self._follow_joints(action, dt)
            return
        share = dt / self.decision_s
        move = _shorten(action[:3] * share, SPEED * dt)
        turn = _shorten(action[3:6] * share, TURN_SPEED * dt)
        position = np.clip(self._position + move, REACH_LOW, REACH_HIGH)
        rotation = Rotation.from_rotvec(turn).as_matrix() @ self._rotation
        goal = self._inverse(position, rotation, self._joints, iterations=5)
        goal = np.clip(goal, self._joints - JOINT_SPEED * dt, self._joints + JOINT_SPEED * dt)
        measured = self.data.qpos[self._dofs]
        low, high = measured - LEAD, measured + LEAD
        joints = np.clip(goal, low, high)
        reached, attitude = self._forward(joints)
        missed = 0.5 * np.linalg.norm(sum(np.cross(attitude[:, i], rotation[:, i]) for i in range(3)))
        if np.linalg.norm(reached - position) <= LOST[0] and missed <= LOST[1]:
            self._joints, self._position, self._rotation = joints, position, rotation
        elif ((reached >= REACH_LOW - LOST[0]) & (reached <= REACH_HIGH + LOST[0])).all():
            self._joints, self._position, self._rotation = joints, reached, attitude
        elif ((self._joints < low) | (self._joints > high)).any():  # stays, and is being pushed
            self._joints = np.clip(self._joints, low, high)
            self._position, self._rotation = self._forward(self._joints)
        # else: the nearest pose the arm could take lies outside its box, so it stays as it is
        self._set_motors(float(action[6]))

    def _follow_joints(self, action: np.ndarray, dt: float) -> None:
        """Motors that go where they are told, as fast as they can and with no more force than ``LEAD`` gives."""
        low, high = self.model.jnt_range[self.model.dof_jntid[self._dofs]].T
        goal = np.clip(action[: len(JOINTS)], low, high)
        goal = np.clip(goal, self._joints - JOINT_SPEED * dt, self._joints + JOINT_SPEED * dt)
        measured = self.data.qpos[self._dofs]
        self._joints = np.clip(goal, measured - LEAD, measured + LEAD)
        self._position, self._rotation = self._forward(self._joints)
        self._set_motors(float(action[-1]))

    def _set_motors(self, opening: float) -> None:
        finger = FINGER_RANGE[0] + min(max(opening, 0.0), 1.0) * (FINGER_RANGE[1] - FINGER_RANGE[0])
        self.data.ctrl[: len(JOINTS) + 2] = (*self._joints, finger, -finger)  # the belt's motor comes after them

    def _inverse(self, position: np.ndarray, rotation: np.ndarray, near: np.ndarray, iterations: int) -> np.ndarray:
        return solve_ik(
            self.model, self._scratch, self.tool, self._dofs, position, rotation, near, iterations=iterations
        )

    def _forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(3,) position and (3, 3) orientation of the tool for (6,) joints."""
        self._scratch.qpos[self._dofs] = joints
        mujoco.mj_kinematics(self.model, self._scratch)
        return self._scratch.site_xpos[self.tool].copy(), self._scratch.site_xmat[self.tool].reshape(3, 3).copy()

    def tool_target(self) -> tuple[np.ndarray, np.ndarray]:
        """(3,) position and (3, 3) orientation that the changes so far add up to, base frame."""
        return self._position.copy(), self._rotation.copy()

    # --- what the robot and the judge know --------------------------------------------------------------------------

    def on_plate(self, colour: str) -> bool:
        """Whether a cube lies flat on the plate, held or not."""
        away = self.cube_position(colour) - self.model.body_pos[self._plate]
        level = abs(away[2] - PLATE_TOP - self._half(colour)) <= ON_PLATE[1]
        return bool(level and np.hypot(*away[:2]) <= ON_PLATE[0])

    def plate_position(self) -> np.ndarray:
        """(3,) middle of the plate's top, metres."""
        return self.model.body_pos[self._plate] + np.array([0, 0, PLATE_TOP])

    def _done(self, touching: Touching) -> bool:
        """place: the named cube lies on the plate and the hand has let go. belt: it is ≥ 5 cm above the belt and a
        finger touches it, and it had never left the belt by itself.
        """
        colour = self.task.colour
        if self.task.name == "belt":
            up = self.cube_position(colour)[2] >= BELT_TOP + self._half(colour) + LIFTED
            return bool(up and touching[ARM, colour] and not self._named_lost)
        return self.on_plate(colour) and not touching[ARM, colour]

    def _judge(self) -> None:
        super()._judge()
        lifted = self.lifted_cube()
        if lifted is not None:
            self._moved = lifted
            self._named_lifted |= lifted == self.task.colour
        if self.task.name == "belt" and not self._named_lost:
            colour = self.task.colour
            gone = self.belt.has_left(self.cube_position(colour), self._half(colour))
            self._named_lost = gone and not self.touching()[ARM, colour]

    def ended(self) -> bool:
        """Success, or the named cube is lost: it has gone over the belt's end or fallen off."""
        return self._named_lost or self.success()

    def chosen(self) -> str | None:
        """The cube that was last lifted in this episode, also after it has been put down."""
        return self._moved

    def metrics(self) -> dict[str, float]:
        """Whether the named cube was ever lifted (a grasp without a placement), and whether it left the belt."""
        return {"named_cube_lifted": float(self._named_lifted), "named_cube_lost": float(self._named_lost)}

    def state(self) -> np.ndarray:
        """(10,) measured joints in radians, the gripper's opening as a fraction, the tool point in metres."""
        return np.concatenate([self.data.qpos[self._dofs], [self.openings()[ARM]], self.pinch(ARM)])

    def openings(self) -> dict[str, float]:
        """The gripper's opening fraction."""
        finger = self.data.qpos[len(JOINTS)]
        return {ARM: float((finger - FINGER_RANGE[0]) / (FINGER_RANGE[1] - FINGER_RANGE[0]))}

    def nearer_arm(self, colour: str) -> str:
        """There is one."""
        return ARM

    def pinch(self, arm: str) -> np.ndarray:
        """(3,) the tool point, measured."""
        return self.data.site_xpos[self.tool]

    @property
    def robot_dofs(self) -> np.ndarray:
        """(6,) of the arm."""
        return self._dofs

    def scene_state(self) -> SceneState:
        """With the way the belt runs."""
        return replace(super().scene_state(), belt=self._belt_side())

    def _belt_side(self) -> str | None:
        """ "left" or "right": where the ego view shows the belt running to; None: there is no belt."""
        if self.task.name != "belt":
            return None
        middle = np.array([self.belt.course[0], 0.0, BELT_TOP])
        ends = (self.pixel(EGO, middle), self.pixel(EGO, middle + 0.1 * np.sign(self.belt.velocity)))
        return None if ends[0] is None or ends[1] is None else ("left" if ends[1][0] < ends[0][0] else "right")

    def places(self) -> tuple[PlaceState, ...]:
        """The plate, where there is one."""
        if self.task.name == "belt":
            return ()
        middle = self.plate_position()
        pixels = {view: self.pixel(view, middle) for view in self.views}
        rim = [middle + 0.9 * PLATE_RADIUS * np.array([np.cos(a), np.sin(a), 0]) for a in (0.0, 2.1, 4.2)]
        seen = (
            view
            for view, uv in pixels.items()
            if uv is not None and self._hits(view, (middle, *rim), set(self._plate_geoms))
        )
        return (
            PlaceState(
                name="plate",
                position=tuple(middle.tolist()),
                pixels={view: uv for view, uv in pixels.items() if uv is not None},
                visible=tuple(seen),
                holds=tuple(colour for colour in COLOURS if colour in self._layout and self.on_plate(colour)),
            ),
        )


def _shorten(vector: np.ndarray, longest: float) -> np.ndarray:
    """The same direction, no longer than ``longest``."""
    length = float(np.linalg.norm(vector))
    return vector if length <= longest else vector * (longest / length)
