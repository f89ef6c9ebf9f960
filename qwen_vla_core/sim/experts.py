"""Scripted experts for the ALOHA tasks: state feedback, so that a push or a dropped cube only means trying again.

Ten times a second the expert looks at the simulator's state, decides where each arm should end up (a goal in joint
space, from inverse kinematics) and moves its command a bounded step towards it. Nothing depends on time or chance: the
same situation always gives the same action, which is what a small learner needs. Commands between two decisions are
interpolated linearly, exactly as the controller plays a policy's chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from qwen_vla_core.sim.ik import solve_ik
from qwen_vla_core.sim.worlds.aloha import START_ARM, AlohaWorld
from qwen_vla_core.sim.worlds.scene import ARMS, CUBE_HALF
from qwen_vla_core.sim.worlds.tabletop import interpolate

__all__ = ["PERIOD_S", "ScriptedExpert", "gripper_rotation", "interpolate"]

PERIOD_S = 0.1  # one decision
DOWN, LEVEL = 0.5 * np.pi, 0.0  # pitch of the gripper below the horizontal, radians
BASE_YAW = {"left": 0.0, "right": np.pi}


@dataclass(frozen=True)
class ExpertConfig:
    """Shape of the expert's motion. Metres, radians, seconds.

    Attributes:
        speed: largest joint speed.
        acceleration: largest joint acceleration.
        gripper_speed: largest change of the opening fraction per second (the embodiment's own limit).
        hover: height of the pinch point above the table while the gripper is not yet over the cube.
        grasp_height: height of the pinch point when the fingers close.
        aligned: horizontal distance to the cube below which the gripper may be at grasp height.
        funnel: metres of extra height per metre of horizontal distance beyond that, up to ``hover``.
        lift: height of the pinch point after the lift.
        handoff: where the two arms meet.
        stand_off: how far the receiving arm waits, and the giving one retreats, from the meeting point.
        push_arm: largest displacement of an arm joint when a demonstration is pushed off its path.
        push_gripper: chance that such a push closes the open gripper instead.
    """

    speed: float = 1.5
    acceleration: float = 6.0
    gripper_speed: float = 5.0
    hover: float = 0.11
    grasp_height: float = CUBE_HALF
    aligned: float = 0.008
    funnel: float = 3.0
    lift: float = 0.16
    handoff: tuple[float, float, float] = (0.0, 0.5, 0.30)
    stand_off: float = 0.11
    push_arm: float = 0.06
    push_gripper: float = 0.2


@dataclass(frozen=True)
class ArmGoal:
    """Where one arm should end up: pinch point (metres), pitch and roll (radians), opening fraction."""

    position: np.ndarray
    pitch: float
    roll: float
    opening: float


class ScriptedExpert:
    """Solves the task a world was reset to.

    Example:
        >>> world.reset(seed)
        >>> expert = ScriptedExpert(world)
        >>> while not world.success() and world.time_s < 8:
        ...     for command_c in interpolate(world.command(), expert.action(), 5):
        ...         world.step(command_c)
    """

    def __init__(self, world: AlohaWorld, config: ExpertConfig | None = None) -> None:
        """Binds the expert to a world that has been reset; make a new one after the next reset."""
        self.world = world
        self.config = config or ExpertConfig()
        self._scratch = mujoco.MjData(world.model)
        self._home = world.command()
        self._last = world.command()
        self._velocity = np.zeros(14)

    def action(self) -> np.ndarray:
        """(14,) canonical command for 0.1 s from now. Look once per decision, then command it (or something near)."""
        command = self.world.command()
        self._velocity = (command - self._last) / PERIOD_S  # whatever was really commanded, pushes included
        self._last = command
        goal = self._home.copy()  # an arm without a goal stays at its start pose
        for arm, wanted in self._goals().items():
            index = 7 * ARMS.index(arm)
            goal[index : index + 6] = self._joints(arm, wanted)
            goal[index + 6] = wanted.opening
        return self._towards(command, goal)

    # --- being pushed while a demonstration is recorded -------------------------------------------------------------

    def draw_push(self, action_c: np.ndarray, rng: np.random.Generator, drop: float = 0.0) -> np.ndarray:
        """(14,) a displacement of the moving arm, or of its gripper, to be added to some actions from this one on.

        Args:
            action_c: what the expert wants now.
            rng: draws it.
            drop: chance that a closed gripper opens instead, so that the cube falls.
        """
        c, first = self.config, 7 * ARMS.index(self.world.arm)
        offset = np.zeros(14)
        if action_c[first + 6] > 0.9 and rng.random() < c.push_gripper:
            offset[first + 6] = -1.0
        elif drop and action_c[first + 6] < 0.1 and rng.random() < drop:
            offset[first + 6] = 1.0
        else:
            offset[first : first + 6] = rng.uniform(-c.push_arm, c.push_arm, 6)
        return offset

    def pushed(self, action_c: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """(14,) what is executed instead of ``action_c`` while pushed."""
        executed = action_c + offset
        executed[[6, 13]] = executed[[6, 13]].clip(0, 1)
        return executed

    # --- decisions --------------------------------------------------------------------------------------------------

    def _goals(self) -> dict[str, ArmGoal]:
        """What each arm should do now; an arm that is not named stays at its start pose."""
        world, giver = self.world, self.world.arm
        receiver = ARMS[1 - ARMS.index(giver)]
        colour = world.task.colour
        cube = world.cube_position(colour)
        in_giver, in_receiver = (self._holds(arm, colour) for arm in (giver, receiver))
        if world.task.name == "pick":
            return {giver: self._lift(giver) if in_giver else self._pick(giver, cube)}
        return self._transfer(giver, receiver, cube, in_giver, in_receiver)

    def _holds(self, arm: str, colour: str) -> bool:
        """Both fingers on the cube; one is enough in the air, where a contact may flicker while the arm moves."""
        fingers = len(self.world.touching()[arm, colour])
        cube = self.world.cube_position(colour)
        near = np.linalg.norm(self._pinch(arm) - cube) < 0.03
        return fingers == 2 or bool(fingers == 1 and near and cube[2] > CUBE_HALF + 0.01)

    def _pick(self, arm: str, cube: np.ndarray) -> ArmGoal:
        """Over the cube with open fingers, down once above it, close once around it."""
        c = self.config
        away = self._pinch(arm) - cube
        if np.linalg.norm(away[:2]) < 0.012 and away[2] < 0.012:
            return ArmGoal(np.array([cube[0], cube[1], c.grasp_height]), DOWN, 0.0, 0.0)
        heading = np.linalg.norm((self._pinch_of(arm, self.world.command()) - cube)[:2])
        height = c.grasp_height + np.clip(c.funnel * (heading - c.aligned), 0.0, c.hover - c.grasp_height)
        return ArmGoal(np.array([cube[0], cube[1], height]), DOWN, 0.0, 1.0)

    def _lift(self, arm: str) -> ArmGoal:
        """Straight up from wherever the cube was gripped."""
        x, y, z = self._pinch_of(arm, self.world.command())
        return ArmGoal(np.array([x, y, min(z + 0.05, self.config.lift)]), DOWN, 0.0, 0.0)

    def _transfer(
        self, giver: str, receiver: str, cube: np.ndarray, in_giver: bool, in_receiver: bool
    ) -> dict[str, ArmGoal]:
        """Pick, carry to the middle with a level gripper, let the other arm close above and below, let go, retreat."""
        c = self.config
        meet = np.array(c.handoff)
        side = -1.0 if giver == "left" else 1.0
        away = np.array([side * c.stand_off, 0.0, 0.0])
        wait = ArmGoal(meet - away, LEVEL, 0.5 * np.pi, 1.0)
        if in_receiver:
            giver_opening = self.world.state()[7 * ARMS.index(giver) + 6]
            clear = giver_opening > 0.9
            return {
                giver: ArmGoal(meet + (away if clear else 0.0), LEVEL, 0.0, 1.0),
                receiver: ArmGoal(meet, LEVEL, 0.5 * np.pi, 0.0),
            }
        if not in_giver:
            return {giver: self._pick(giver, cube), receiver: wait}
        if cube[2] < 0.5 * c.lift and np.linalg.norm((cube - meet)[:2]) > 0.04:
            return {giver: self._lift(giver), receiver: wait}
        carry = ArmGoal(meet, LEVEL, 0.0, 0.0)
        there = np.linalg.norm(cube - meet) < 0.03
        gap = np.abs(self._pinch(receiver) - cube)
        if there and gap[0] < 0.012 and gap[1:].max() < 0.02:
            return {giver: carry, receiver: ArmGoal(cube, LEVEL, 0.5 * np.pi, 0.0)}
        return {giver: carry, receiver: ArmGoal(cube, LEVEL, 0.5 * np.pi, 1.0) if there else wait}

    # --- motion -----------------------------------------------------------------------------------------------------

    def _pinch(self, arm: str) -> np.ndarray:
        return self.world.data.site_xpos[self.world.pinch_site[arm]]

    def _pinch_of(self, arm: str, command: np.ndarray) -> np.ndarray:
        dofs = self.world.arm_dofs(arm)
        index = 7 * ARMS.index(arm)
        self._scratch.qpos[dofs] = command[index : index + 6]
        mujoco.mj_kinematics(self.world.model, self._scratch)
        return self._scratch.site_xpos[self.world.pinch_site[arm]].copy()

    def _joints(self, arm: str, goal: ArmGoal) -> np.ndarray:
        """(6,) joint goal. The seed depends on the kind of goal alone, so equal goals give equal joints."""
        seed = np.array([0.0, 0.2, 0.6, 0.0, 0.9, 0.0]) if goal.pitch > 0.8 else np.array([*START_ARM[:5], goal.roll])
        return solve_ik(
            self.world.model,
            self._scratch,
            self.world.pinch_site[arm],
            self.world.arm_dofs(arm),
            goal.position,
            gripper_rotation(BASE_YAW[arm], goal.pitch, goal.roll),
            seed,
        )

    def _towards(self, command: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """One step: arms straight in joint space with limited speed and acceleration, grippers by a ramp."""
        c, result = self.config, command.copy()
        for index in (0, 7):
            arm = slice(index, index + 6)
            error = goal[arm] - command[arm]
            distance = float(np.abs(error).max())
            # The fastest speed from which the arm still stops at the goal, decelerating in steps of PERIOD_S.
            stop = np.sqrt(2 * c.acceleration * distance + (0.5 * c.acceleration * PERIOD_S) ** 2)
            speed = min(c.speed, stop - 0.5 * c.acceleration * PERIOD_S, distance / PERIOD_S)
            wanted = error / max(distance, 1e-9) * speed
            change = np.clip(wanted - self._velocity[arm], -c.acceleration * PERIOD_S, c.acceleration * PERIOD_S)
            result[arm] = command[arm] + (self._velocity[arm] + change) * PERIOD_S
            ramp = c.gripper_speed * PERIOD_S
            result[index + 6] = command[index + 6] + np.clip(goal[index + 6] - command[index + 6], -ramp, ramp)
        return result


def gripper_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) orientation of a gripper: x along the fingers, y across them; pitch is downwards. Radians."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x
