"""A mobile base in generated rooms: "go past the blue pillar and stop at the red ball"."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mujoco
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.grounding_navigation import intention, questions
from qwen_vla_core.sim.navigation_state import NavigationState, PlaceState
from qwen_vla_core.sim.navigation_tasks import TASKS, NavigationTask, parse_instruction, phrase, reworded
from qwen_vla_core.sim.state import project
from qwen_vla_core.sim.track import Track
from qwen_vla_core.sim.worlds.rendering import Cameras
from qwen_vla_core.sim.worlds.rooms_domain import RoomsDomain, draw_wear
from qwen_vla_core.sim.worlds.rooms_domain import apply as apply_domain
from qwen_vla_core.sim.worlds.rooms_layout import (
    ROBOT_RADIUS,
    Doorway,
    Landmark,
    Layout,
    LayoutConfig,
    blocked_by_wall,
    draw_layout,
    wrap,
)
from qwen_vla_core.sim.worlds.rooms_motion import Base, BaseConfig, Wear
from qwen_vla_core.sim.worlds.rooms_scene import CAMERAS, HEIGHT, OVERHEAD, WALL_HEIGHT, Parts, build_model
from qwen_vla_core.sim.worlds.rooms_ways import PASS, REACH, occupancy, remaining, shortest
from qwen_vla_core.sim.worlds.tabletop import interpolate

STOP_S = 1.0  # a stop: for so long ...
STOP_MOVE, STOP_TURN = 0.10, 0.15  # ... the waypoints have gone less far than this (metres, radians) ...
STOP_SPEED, STOP_TURNING = 0.10, 0.15  # ... and the base has been slower than this (m/s, rad/s)
SETTING_OUT = (0.15, 0.20)  # metres or radians from the start before which a base has not set out and cannot stop
SIDE_RAYS = math.radians(40)  # to both sides, for the clearance
SCAN_HEIGHT = 0.2  # metres above the floor
TRACK_EVERY = 5  # control steps


class RoomsWorld:
    """The ``World`` of a mobile base (``simulation: {world: rooms}``).

    An action is a pose in the frame of the odometry, which starts at (0, 0, 0): where to be at the end of the period.
    The scene depends on the seed alone, so one seed can be asked for several goals. The same seed gives bit-identical
    states and pictures. The class attributes are those of ``TabletopWorld``.
    """

    control_hz: float = 20.0
    decision_s: float = 0.5
    limit_s: float = 40.0
    channels: tuple[str, ...] = ("x", "y", "yaw")
    state_channels: tuple[str, ...] = ("x", "y", "yaw", "vx", "wz")
    held_c: np.ndarray = np.zeros(3, bool)
    headings: tuple[int, ...] = (2,)
    views: tuple[str, ...] = tuple(CAMERAS)
    film_views: tuple[str, ...] = (*CAMERAS, OVERHEAD)
    task_names: tuple[str, ...] = TASKS
    domain_type: type = RoomsDomain
    read_scene = staticmethod(NavigationState.from_dict)
    questions = staticmethod(questions)
    intention = staticmethod(intention)

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        layout: LayoutConfig | None = None,
        domain: RoomsDomain | None = None,
        base: BaseConfig | None = None,
    ) -> None:
        """Builds the spare parts; call ``reset`` before anything else.

        Args:
            tasks: from which ``reset`` draws when no instruction is given; None = all.
            layout: ranges of the rooms.
            domain: appearance, camera and dynamics randomisation on top; None = off.
            base: what the base can do.
        """
        self.tasks = tuple(self.task_names if tasks is None else tasks)
        self.layout_config, self.domain, self.base_config = layout, domain, base
        self.domain_drawn: dict[str, Any] = {}
        self.model = build_model(textures=domain is not None)
        self.data = mujoco.MjData(self.model)
        self.instruction = ""
        self._parts = Parts(self.model)
        self._cameras = Cameras(self.model, {**CAMERAS, OVERHEAD: OVERHEAD})
        self._body = self.model.body("base").id

    # --- life of an episode -----------------------------------------------------------------------------------------

    def reset(self, seed: int, instruction: str | None = None) -> None:
        """Starts the episode that ``seed`` stands for.

        Args:
            seed: any non-negative integer.
            instruction: what to do; drawn from the seed when None. Where it names something the scene does not have,
                another landmark (or the first doorway) takes its place or colour.

        Raises:
            UserError: the instruction is not one this world knows.
        """
        asked = None if instruction is None else parse_instruction(instruction)
        layout, offered = draw_layout(seed, self.layout_config)
        words = np.random.default_rng([seed, 1])
        if asked is None:
            name = self.tasks[int(words.integers(len(self.tasks)))]
            choice = [task for task in offered if task.name == name]
            asked = choice[int(words.integers(len(choice)))]
            instruction = phrase(asked, words)
        else:
            layout = _with_named(layout, asked)
        self.layout, self.offered, self.task, self.instruction = layout, tuple(offered), asked, instruction or ""
        self._named = self._parts.arrange(layout)
        wear = Wear()
        if self.domain is not None:
            rng = np.random.default_rng([seed, 4])
            self.domain_drawn = apply_domain(self.model, self.domain, rng, self._parts.walls, self._named)
            wear = draw_wear(self.domain, rng)
            self.domain_drawn["wear"] = dict(vars(wear))
        self.base = Base(layout.start, layout.walls, layout.landmarks, self.base_config, wear)
        mujoco.mj_resetData(self.model, self.data)
        self._command = (0.0, 0.0, 0.0)
        self._due = deque([self._command] * (wear.delay + 1), maxlen=wear.delay + 1)
        self._twists = deque([(0.0, 0.0)] * (wear.delay + 1), maxlen=wear.delay + 1)
        self._lately = deque([self._command], maxlen=round(STOP_S * self.control_hz) + 1)
        self._path = [layout.start[:2]]
        self._steps = 0
        self._set_out = self._stopped = self._success = False
        self._chosen: str | None = None
        self._passed = asked.via is None
        self._show()

    def step(self, action_c: np.ndarray) -> None:
        """One control period (50 ms).

        Args:
            action_c: (3,) x, y, heading of the pose to be at, in the frame of the odometry. The base drives there as
                far as its limits allow; what it runs into, it slides along.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """
        action = np.asarray(action_c, dtype=np.float64)
        if action.shape != (len(self.channels),):
            raise ValueError(f"action has shape {action.shape}, expected ({len(self.channels)},)")
        if not np.isfinite(action).all():
            bad = [self.channels[i] for i in np.flatnonzero(~np.isfinite(action))]
            raise ValueError(f"action is not finite in {', '.join(bad)}")
        x, y, heading = action.tolist()
        before = self._due[0]
        self._command = (x, y, heading)
        self._due.append(self._command)
        here = self.base.pose[:2]
        self.base.step(self._due[0], before, 1.0 / self.control_hz)
        self._after_step(here)

    def drive(self, speed: float, turning: float) -> None:
        """One control period of a base that is told a twist instead of a pose, as real ones are.

        Where it is told to be is then where the twist has taken it: the same rule says when it has stopped.

        Args:
            speed: m/s ahead.
            turning: rad/s to the left.

        Raises:
            ValueError: a value that is not finite.
        """
        if not (math.isfinite(speed) and math.isfinite(turning)):
            raise ValueError(f"twist {speed} m/s, {turning} rad/s is not finite")
        self._twists.append((speed, turning))
        here = self.base.pose[:2]
        self.base.drive(*self._twists[0], 1.0 / self.control_hz)
        self._command = self.base.odometry
        self._due.append(self._command)
        self._after_step(here)

    def _after_step(self, here: tuple[float, float]) -> None:
        self._lately.append(self._command)
        self._steps += 1
        if self._steps % TRACK_EVERY == 0:
            self._path.append(self.base.pose[:2])
        self._judge(here)
        self._show()

    def play(self, action_c: np.ndarray) -> Iterator[np.ndarray]:
        """The control steps from the present command to an action that is due one decision later."""
        yield from interpolate(self.command(), action_c, round(self.decision_s * self.control_hz))

    def _show(self) -> None:
        self.data.qpos[:] = self.base.pose
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    # --- the judge --------------------------------------------------------------------------------------------------

    def _judge(self, before: tuple[float, float]) -> None:
        if self._stopped:
            return
        here = self.base.pose[:2]
        if not self._passed:
            self._passed = self._passes(before, here)
        x, y, heading = self.base.odometry
        if not self._set_out:
            self._set_out = math.hypot(x, y) > SETTING_OUT[0] or abs(heading) > SETTING_OUT[1]
            return
        if len(self._lately) < (self._lately.maxlen or 0):
            return
        if abs(self.base.speed) >= STOP_SPEED or abs(self.base.turning) >= STOP_TURNING:
            return
        x, y, heading = self._command
        far = max(math.hypot(x - ox, y - oy) for ox, oy, _ in self._lately)
        turned = max(abs(wrap(heading - other)) for _, _, other in self._lately)
        if far < STOP_MOVE and turned < STOP_TURN:
            self._stopped = True
            self._chosen = self.nearest_in_reach()
            self._success = self._passed and self._chosen == self.task.goal

    def _passes(self, before: tuple[float, float], here: tuple[float, float]) -> bool:
        """Whether this step passes the landmark, or crosses the threshold of the doorway, that is to be passed."""
        via = str(self.task.via)
        door = self.layout.doorway(via)
        if door is not None:
            return _crosses(door, before, here)
        landmark = self.layout.landmark(via)
        assert landmark is not None
        return math.dist(here, landmark.centre) <= PASS and not blocked_by_wall(
            here, landmark.centre, self.layout.walls
        )

    def nearest_in_reach(self) -> str | None:
        """The landmark that a stop here counts for: the nearest one within reach with no wall between."""
        here = self.base.pose[:2]
        found = [
            (math.dist(here, landmark.centre), landmark.name)
            for landmark in self.layout.landmarks
            if math.dist(here, landmark.centre) <= REACH
            and not blocked_by_wall(here, landmark.centre, self.layout.walls)
        ]
        return min(found)[1] if found else None

    def success(self) -> bool:
        """Whether the base has stopped within 1 m of the goal after passing what was named. The first stop decides."""
        return self._success

    def command_by(self, channels: Sequence[str]) -> None:
        """As ``TabletopWorld.command_by``: this world takes poses."""
        if tuple(channels) != self.channels:
            raise UserError(f"simulation.world: is commanded by {', '.join(self.channels)}, not {', '.join(channels)}")

    def ended(self) -> bool:
        """Whether the base has stopped, wherever."""
        return self._stopped

    def chosen(self) -> str | None:
        """The landmark that the base has stopped at, whatever was asked; None before the stop, or far from all."""
        return self._chosen

    @property
    def target(self) -> str:
        """The landmark that was asked for."""
        return self.task.goal

    def other_instruction(self) -> str | None:
        """The same sentence with another goal of this scene, from those that can be seen when they are needed."""
        others = [task for task in self.offered if task.goal != self.task.goal and self.layout.landmark(task.goal)]
        others.sort(key=lambda task: (task.name != self.task.name, task.via != self.task.via))
        return reworded(self.task, self.instruction, others[0]) if others else None

    def about(self) -> dict[str, Any]:
        """What a demonstration notes about its episode."""
        return {"task": self.task.name, "target": self.task.goal, "via": self.task.via}

    def metrics(self) -> dict[str, float]:
        """Nothing beside what the walk tells."""
        return {}

    def track(self) -> Track:
        """The walk so far."""
        goal = self.layout.landmark(self.task.goal)
        assert goal is not None
        path = np.array([*self._path, self.base.pose[:2]])
        reference = shortest(self.layout, occupancy(self.layout, ROBOT_RADIUS), self.task)
        return Track(
            path_n2=path,
            to_goal_n=remaining(self.layout, path, goal, ROBOT_RADIUS),
            reference_m2=np.array(reference),
            reach=REACH,
            stopped=self._stopped,
            passed=self._passed,
            bumps=self.base.bumps,
        )

    # --- what the base knows ----------------------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since ``reset``."""
        return self._steps / self.control_hz

    @property
    def passed(self) -> bool:
        """Whether what was to be passed has been; True where nothing was named."""
        return self._passed

    def command(self) -> np.ndarray:
        """(3,) the pose last commanded."""
        return np.array(self._command)

    def state(self) -> np.ndarray:
        """(5,) what the odometry says: x, y in metres, heading in (−π, π], speed in m/s, turning rate in rad/s."""
        x, y, heading = self.base.odometry
        return np.array([x, y, wrap(heading), self.base.speed, self.base.turning])

    def scene_state(self) -> NavigationState:
        """Everything the questions of ``sim/grounding_navigation.py`` are answered from."""
        places: tuple[Landmark | Doorway, ...] = (*self.layout.landmarks, *self.layout.doorways)
        return NavigationState(
            task=self.task.name,
            goal=self.task.goal,
            via=self.task.via,
            passed=self._passed,
            stopped=self._stopped,
            near_goal=self.nearest_in_reach() == self.task.goal,
            places=tuple(self._place(place) for place in places),
            clearance=(self._clearance(SIDE_RAYS), self._clearance(0.0), self._clearance(-SIDE_RAYS)),
        )

    def _place(self, place: Landmark | Doorway) -> PlaceState:
        x, y, heading = self.base.pose
        dx, dy = place.centre[0] - x, place.centre[1] - y
        cos, sin = math.cos(heading), math.sin(heading)
        middle = np.array([*place.centre, self._middle(place)])
        pixels = {view: self.pixel(view, middle) for view in self.views}
        return PlaceState(
            name=place.name,
            ahead=cos * dx + sin * dy,
            left=cos * dy - sin * dx,
            pixels={view: uv for view, uv in pixels.items() if uv is not None},
            visible=tuple(view for view, uv in pixels.items() if uv is not None and self._seen(view, place, middle)),
        )

    def _middle(self, place: Landmark | Doorway) -> float:
        """Height of the middle of a landmark or of a doorway's opening, metres."""
        if isinstance(place, Doorway):
            return 0.5 * WALL_HEIGHT
        return float(self.model.geom_pos[self._named[place.name][0], 2])

    def pixel(self, view: str, point: np.ndarray) -> tuple[float, float] | None:
        """(u, v) in 0..1 (right, down) where a 4:3 picture of ``view`` shows a world point; None when it does not."""
        camera = self.model.camera(CAMERAS[view]).id
        return project(
            point,
            self.data.cam_xpos[camera],
            self.data.cam_xmat[camera].reshape(3, 3),
            float(self.model.cam_fovy[camera]),
        )

    def _seen(self, view: str, place: Landmark | Doorway, middle: np.ndarray) -> bool:
        """Whether rays from the camera reach it: the middle of an opening, or two of four points of a landmark."""
        eye = self.data.cam_xpos[self.model.camera(CAMERAS[view]).id]
        if isinstance(place, Doorway):
            away = float(np.linalg.norm(middle - eye))
            return not 0 <= self._ray(eye, middle - eye)[0] * away < away - 0.05
        dx, dy = middle[0] - eye[0], middle[1] - eye[1]
        sideways = 0.6 * place.radius / max(math.hypot(dx, dy), 1e-6)
        up = 0.35 * HEIGHT[place.shape]
        points = [middle + np.array(off) for off in ((0, 0, 0), (0, 0, up))]
        points += [middle + np.array([-side * dy * sideways, side * dx * sideways, 0]) for side in (-1, 1)]
        geom = self._named[place.name][0]
        return sum(self._ray(eye, point - eye)[1] == geom for point in points) >= 2

    def _ray(self, eye: np.ndarray, direction: np.ndarray) -> tuple[float, int]:
        """How far along ``direction`` (in its lengths; negative: nowhere) a ray meets which geom; never the base."""
        hit = np.zeros(1, np.int32)
        return mujoco.mj_ray(self.model, self.data, eye, direction, None, 1, self._body, hit), int(hit[0])

    def _clearance(self, angle: float) -> float:
        """Metres from the front of the base to the nearest obstacle in a direction, knee-high."""
        x, y, heading = self.base.pose
        direction = np.array([math.cos(heading + angle), math.sin(heading + angle), 0.0])
        away, _ = self._ray(np.array([x, y, 0.2]), direction)
        return max(away - ROBOT_RADIUS, 0.0) if away >= 0 else math.inf

    def scan(self, mount: tuple[float, float, float], beams: int = 360, range_max: float = 10.0) -> np.ndarray:
        """(beams,) metres that a planar scanner on the base measures, from −π on evenly around; inf: nothing in reach.

        Args:
            mount: x, y (m) and yaw (rad) of the scanner in the base's frame.
            beams: directions.
            range_max: metres.
        """
        x, y, heading = self.base.pose
        cos, sin = math.cos(heading), math.sin(heading)
        eye = np.array([x + cos * mount[0] - sin * mount[1], y + sin * mount[0] + cos * mount[1], SCAN_HEIGHT])
        angles = heading + mount[2] + np.arange(beams) * (2 * math.pi / beams) - math.pi
        rays = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(beams)])
        away = np.full(beams, -1.0)
        for beam, ray in enumerate(rays):
            away[beam] = self._ray(eye, ray)[0]
        return np.where((away < 0) | (away > range_max), np.inf, away)

    def render(self, view: str, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB picture of one view, at most 640×480.

        Raises:
            ValueError: unknown view.
        """
        return self._cameras.render(self.data, view, width, height)

    def close(self) -> None:
        """Frees the renderers. The world can still be used; the next ``render`` makes a new one."""
        self._cameras.close()


def _crosses(door: Doorway, before: tuple[float, float], here: tuple[float, float]) -> bool:
    """Whether a step goes over the threshold."""
    (nx, ny), (cx, cy) = door.normal, door.centre
    was, now = ((p[0] - cx) * nx + (p[1] - cy) * ny for p in (before, here))
    if was * now > 0 or was == now:
        return False
    t = was / (was - now)
    x, y = before[0] + t * (here[0] - before[0]), before[1] + t * (here[1] - before[1])
    return abs((y - cy) * nx - (x - cx) * ny) <= 0.5 * door.width


def _with_named(layout: Layout, task: NavigationTask) -> Layout:
    """The layout with everything that a task names in it."""
    landmarks, doorways = list(layout.landmarks), list(layout.doorways)
    wanted = {task.goal, task.via}
    for name in (task.goal, task.via):
        if name is None:
            continue
        colour, kind = name.split()
        if kind == "doorway":
            if not any(door.name == name for door in doorways):
                doorways[0] = replace(doorways[0], colour=colour)
        elif not any(landmark.name == name for landmark in landmarks):
            last = max(i for i, landmark in enumerate(landmarks) if landmark.name not in wanted)
            landmarks[last] = replace(landmarks[last], colour=colour, shape=kind)
    return replace(layout, landmarks=tuple(landmarks), doorways=tuple(doorways))
