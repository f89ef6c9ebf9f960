"""The scripted expert for the WidowX tasks: state feedback, one change of the hand's pose per decision.

Nothing depends on time or chance: after a push or a dropped cube the same rules simply try again. On the belt it aims
at where the cube will be when the action has been carried out; without that lead it closes behind the cube.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from qwen_vla_core.sim.worlds.widowx import ARM, DOWN, PLATE_TOP, WidowXWorld

CUBE, OPEN = 0.02, 1.0  # half of a cube's edge in metres; opening fraction
Pace = tuple[float, float, float]  # m/s, m/s², rad/s


@dataclass(frozen=True)
class ExpertConfig:
    """Shape of the expert's motion. Metres, radians, seconds.

    Attributes:
        speed: largest speed of the hand.
        acceleration: largest change of speed per second.
        chase, chase_acceleration: the same while it follows the belt; no faster than on the table, so that one policy's
            ranges hold both.
        overtake: how much faster than the belt it is at least.
        turn, chase_turn: largest turning speed, on the table and at the belt.
        hover: height of the tool point while the open gripper is not yet over the cube.
        carry: height of the tool point while it carries a cube.
        above: height of the tool point over a cube's centre when the fingers close.
        drop: extra height over the plate when they open.
        aligned: horizontal distance below which the tool may be at its lowest.
        funnel: metres of extra height per metre of horizontal distance beyond that.
        lag: how long the arm takes to follow a moving target.
        upstream: how far up the belt it goes to meet a cube, from the middle.
        lead: aim at where a moving cube will be.
        push: largest displacement per action when a demonstration is pushed off its path.
        push_turn: largest turn of such a push.
        push_gripper: chance that it closes the open gripper instead.
    """

    speed: float = 0.3
    acceleration: float = 1.2
    chase: float = 0.3
    chase_acceleration: float = 3.0
    overtake: float = 0.1
    turn: float = 1.5
    chase_turn: float = 1.0
    hover: float = 0.11
    carry: float = 0.13
    above: float = 0.004
    drop: float = 0.003
    aligned: float = 0.006
    funnel: float = 3.0
    lag: float = 0.04
    upstream: float = 0.2
    lead: bool = True
    push: float = 0.02
    push_turn: float = 0.12
    push_gripper: float = 0.2


@dataclass(frozen=True)
class Goal:
    """Where the tool point should be, the yaw of the hand that points down, its opening, and how fast."""

    position: np.ndarray
    yaw: float
    opening: float
    pace: Pace


class PlateAndBeltExpert:
    """Solves the task a world was reset to; make a new one after the next reset."""

    def __init__(self, world: WidowXWorld, config: ExpertConfig | None = None) -> None:
        """Binds the expert to a world that has been reset."""
        self.world = world
        self.config = config or ExpertConfig()

    def action(self) -> np.ndarray:
        """(7,) change of the hand's pose in one period, base frame, and the gripper's opening fraction."""
        world, period = self.world, self.world.decision_s
        position, rotation = world.tool_target()
        goal = self._goal(position)
        # From the speed that was really commanded, pushes included, to the wanted one; the last bit is never cut off.
        before, wanted = world.command()[:3], _shorten(goal.position - position, goal.pace[0] * period)
        move = before + _shorten(wanted - before, goal.pace[1] * period**2)
        attitude = Rotation.from_euler("z", goal.yaw).as_matrix() @ DOWN
        turn = Rotation.from_matrix(attitude @ rotation.T).as_rotvec()
        return np.concatenate([move, _shorten(turn, goal.pace[2] * period), [goal.opening]])

    # --- being pushed while a demonstration is recorded -------------------------------------------------------------

    def draw_push(self, action_c: np.ndarray, rng: np.random.Generator, drop: float = 0.0) -> np.ndarray:
        """(7,) a displacement to be added to some actions from this one on.

        Args:
            action_c: what the expert wants now.
            rng: draws it.
            drop: chance that a closed gripper opens instead, so that the cube falls.
        """
        c, offset = self.config, np.zeros(7)
        if action_c[6] > 0.9 and rng.random() < c.push_gripper:
            offset[6] = -1.0
        elif drop and action_c[6] < 0.1 and rng.random() < drop:
            offset[6] = 1.0
        else:
            offset[:3] = rng.uniform(-c.push, c.push, 3)
            offset[3:6] = rng.uniform(-c.push_turn, c.push_turn, 3)
        return offset

    def pushed(self, action_c: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """(7,) what is executed instead of ``action_c`` while pushed."""
        executed = action_c + offset
        executed[6] = executed[6].clip(0, 1)
        return executed

    # --- decisions --------------------------------------------------------------------------------------------------

    def _goal(self, target: np.ndarray) -> Goal:
        """What the hand should do now; ``target`` (3,) is where the changes so far have led it."""
        c, world, colour = self.config, self.world, self.world.task.colour
        cube, tool = world.cube_position(colour), world.pinch(ARM)
        held = self._holds(colour)
        calm, chase = (c.speed, c.acceleration, c.turn), max(c.chase, world.belt.speed + c.overtake)
        quick = (chase, c.chase_acceleration, c.chase_turn)
        if world.task.name == "belt":
            return self._lift(target, quick) if held else self._pick(target, cube, tool, colour, quick)
        if world.on_plate(colour):  # let go, then get out of the way
            clear = world.openings()[ARM] > 0.85
            return Goal(
                target + np.array([0, 0, c.hover if clear else 0.0]), self._yaw(), OPEN, (0.5 * c.speed, *calm[1:])
            )
        if held:
            return self._put(target, cube, tool, calm)
        return self._pick(target, cube, tool, colour, calm)

    def _holds(self, colour: str) -> bool:
        """Both fingers on the cube; one is enough in the air, where a contact may flicker while the arm moves."""
        fingers = len(self.world.touching()[ARM, colour])
        cube = self.world.cube_position(colour)
        near = np.linalg.norm(self.world.pinch(ARM) - cube) < 0.025
        return bool(near and (fingers == 2 or (fingers == 1 and cube[2] > 2.2 * CUBE)))

    def _pick(self, target: np.ndarray, cube: np.ndarray, tool: np.ndarray, colour: str, pace: Pace) -> Goal:
        """Over the cube with open fingers, turned to its sides, down once above it, close once around it."""
        c, world = self.config, self.world
        drift = world.belt.velocity if c.lead else np.zeros(3)
        ahead = cube + drift * self._time_to_meet(target, cube, drift, pace[0])
        if world.task.name == "belt":  # not too far up it, where the arm ends and the ego view too: it comes by itself
            side = world.belt.course[1]
            ahead[1] = side * min(side * ahead[1], c.upstream)
        around = np.hypot(*(tool - cube)[:2]) < 0.011 and abs(tool[2] - cube[2] - c.above) < 0.012
        yaw = _nearest_side(world.cube_yaw(colour), self._yaw())
        turned = abs(_wrap(yaw - self._yaw())) < 0.1
        if around and turned:
            return Goal(np.array([*ahead[:2], cube[2] + c.above]), yaw, 0.0, pace)
        away = float(np.hypot(*(target - cube - drift * c.lag)[:2]))
        rise = c.funnel * max(away - c.aligned, 0.0) + (0.0 if turned else 0.04)
        on_top = tool[2] - cube[2] > CUBE and bool(world.touching()[ARM, colour])
        if on_top or (world.openings()[ARM] < 0.8 and tool[2] - cube[2] > 0.5 * CUBE):
            rise = max(rise, 3 * CUBE)  # fingers that stand on the cube, or would: up, open, again
        height = min(cube[2] + c.above + rise, c.hover)
        return Goal(np.array([*ahead[:2], height]), yaw, OPEN, pace)

    def _time_to_meet(self, target: np.ndarray, cube: np.ndarray, drift: np.ndarray, speed: float) -> float:
        """Seconds until the hand can be where a moving cube then is: at least the action's own period."""
        seconds = soonest = self.world.decision_s + self.config.lag
        for _ in range(3):
            way = np.hypot(*(cube + drift * seconds - target)[:2])
            seconds = max(soonest, float(way) / speed)
        return seconds

    def _lift(self, target: np.ndarray, pace: Pace) -> Goal:
        """Straight up."""
        return Goal(np.array([*target[:2], self.config.carry]), self._yaw(), 0.0, pace)

    def _put(self, target: np.ndarray, cube: np.ndarray, tool: np.ndarray, pace: Pace) -> Goal:
        """Up, over to the plate, down onto it: the tool goes where the cube, as it is held, comes to lie there."""
        c, plate = self.config, self.world.plate_position()
        goal = plate + (tool - cube)
        goal[2] = PLATE_TOP + CUBE + (tool - cube)[2] + c.drop
        away = float(np.hypot(*(goal - target)[:2]))
        if away > 0.03 and target[2] < c.carry - 0.03:
            return self._lift(target, pace)
        there = away < 0.012 and target[2] - goal[2] < 0.002  # and yet not flat on it: tilted, the last bit it falls
        goal[2] = min(goal[2] + c.funnel * max(away - c.aligned, 0.0), c.carry)
        return Goal(goal, self._yaw(), OPEN if there else 0.0, pace)

    def _yaw(self) -> float:
        """Radians by which the commanded gripper is turned about the vertical."""
        across = self.world.tool_target()[1][:, 1]
        return float(np.arctan2(-across[0], across[1]))


def _wrap(angle: float) -> float:
    """The same angle in -π … π."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


def _nearest_side(yaw: float, now: float) -> float:
    """Of the four ways to grip a cube turned by ``yaw``: the nearest to ``now`` that stays within a right angle."""
    options = [_wrap(yaw + quarter * np.pi / 2) for quarter in range(4)]
    allowed = [option for option in options if abs(option) <= 0.3 * np.pi]
    return min(allowed or options, key=lambda option: abs(_wrap(option - now)))


def _shorten(vector: np.ndarray, longest: float) -> np.ndarray:
    """The same direction, no longer than ``longest``."""
    length = float(np.linalg.norm(vector))
    return vector if length <= longest else vector * (longest / length)
