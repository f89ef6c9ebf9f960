"""The conveyor belt before the WidowX: its surface, what rides on it, and when something has left it.

Nothing that rides is ever placed by hand after the start. The belt is a slab on a slide joint with a velocity motor;
once per control step its few millimetres of travel are taken back, so that the surface goes on for ever under friction
while its ends stay where they are, as on a real conveyor. Arrows painted on it travel along and show the direction,
which a policy that sees one picture could not know otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.randomize import CubeLayout, RandomizationConfig, choose_colours, lay_out

SPEED = 0.2  # m/s, unless the world is told otherwise
FASTEST = 0.35  # m/s: faster than this the arm (0.45 m/s) cannot run after a cube
TOP, HALF_WIDTH = 0.012, 0.045  # height of its surface, half of its width, metres
END, BEGIN = 0.52, 0.66  # |y| of its ends down and up the stream, metres: beyond the table; the arm reaches to 0.36
MIDDLE_X = (0.22, 0.30)  # of the belt, metres before the robot's base
FIRST, GAP = (0.20, 0.32), (0.12, 0.15)  # |y| of the first cube, distance of each further one behind it, metres
ASIDE = 0.012  # largest distance of a cube from the belt's middle line, metres
KEEP_CLEAR = 0.12  # metres beside the middle line that stay free of clutter
TRAY_Z, TRAY_BEYOND = -0.15, 0.16  # what comes over the end falls into a tray: its height, its middle beyond the end
HIDDEN_Z = -3.0
ARROW_PITCH, ARROW_HALF, ARROW_THICK = 0.06, 0.035, 0.012  # metres
OFF_BY = 0.006  # a cube whose centre is so far below where it would lie on the belt has fallen off, metres
LOW = 0.02  # metres above lying from which a cube is in the air

Course = tuple[float, float]  # x of the middle line; side that cubes come from: 1 is +y, -1 is -y


def add_belt(spec: mujoco.MjSpec) -> None:
    """Adds arrows and tray; slab and motor are in the MJCF."""
    tray = spec.worldbody.add_body(name="belt_tray")
    tray.add_geom(name="belt_tray", type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.2, 0.2, 0.01], rgba=[0.3, 0.3, 0.3, 1.0])
    points, faces = _arrows()
    mesh = spec.add_mesh(name="belt_arrows", uservert=points.ravel(), userface=faces.ravel())
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL  # of no mass: only seen
    body = spec.worldbody.add_body(name="belt_arrows", mocap=True)
    body.add_geom(
        name="belt_arrows",
        type=mujoco.mjtGeom.mjGEOM_MESH,
        meshname="belt_arrows",
        contype=0,
        conaffinity=0,
        rgba=[0.72, 0.71, 0.66, 1.0],
    )


def _arrows() -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) corners and (m, 3) triangles of chevrons that point along +y; a pitch of room is left at the front."""
    points: list[list[float]] = []
    faces: list[list[int]] = []
    length, high = END + BEGIN, 0.001
    for tip in np.arange(-length / 2 + ARROW_PITCH, length / 2 - ARROW_PITCH + 1e-9, ARROW_PITCH):
        for side in (-1.0, 1.0):
            back = tip - ARROW_HALF
            outline = [
                (0.0, tip),
                (side * ARROW_HALF, back),
                (side * ARROW_HALF, back - ARROW_THICK),
                (0.0, tip - ARROW_THICK),
            ]
            if side > 0:  # counter-clockwise from above, so that all faces look outwards
                outline.reverse()
            first = len(points)
            points += [[x, y, z] for z in (0.0, high) for x, y in outline]
            quads = [(3, 2, 1, 0), (4, 5, 6, 7), *((i, (i + 1) % 4, 4 + (i + 1) % 4, 4 + i) for i in range(4))]
            faces += [[first + q[i] for i in three] for q in quads for three in ((0, 1, 2), (0, 2, 3))]
    return np.array(points), np.array(faces)


class Belt:
    """The belt of one world: hidden, or running at a constant speed towards one side.

    Attributes:
        speed: m/s.
        velocity: (3,) of its surface in this episode, m/s; zero while hidden.
        course: where it runs.
    """

    def __init__(self, model: mujoco.MjModel, speed: float) -> None:
        """
        Args:
            model: built with ``add_belt``.
            speed: of the surface, m/s.

        Raises:
            UserError: no speed that the arm could follow.
        """
        if not 0 < speed <= FASTEST:
            raise UserError(f"belt_speed: {speed:g} m/s is not above 0 and at most {FASTEST:g}")
        self.speed = speed
        self.velocity = np.zeros(3)
        self.course: Course = (0.0, 1.0)
        self._body, self._motor = model.body("belt").id, model.actuator("belt").id
        self._tray = model.body("belt_tray").id
        self._qpos, self._dof = model.joint("belt").qposadr[0], model.joint("belt").dofadr[0]
        self._arrows = model.body("belt_arrows").mocapid[0]
        self._geoms = model.geom("belt").id, model.geom("belt_arrows").id
        self._middle = np.zeros(3)
        self._travel = 0.0

    # --- at the start of an episode ---------------------------------------------------------------------------------

    @staticmethod
    def choose_course(config: RandomizationConfig, seed: int) -> Course:
        """Where the belt of an episode runs, and from which side."""
        if not config.cubes:
            return sum(MIDDLE_X) / 2, 1.0
        rng = np.random.default_rng([seed, 8])
        return float(rng.uniform(*MIDDLE_X)), float(rng.choice([-1.0, 1.0]))

    @staticmethod
    def sample(config: RandomizationConfig, rng: np.random.Generator, course: Course) -> list[CubeLayout]:
        """Two or three cubes in a row, the first of them next to the arm; the last may still be out of sight."""
        x, side = course
        colours = choose_colours(config, rng, 2, 3)
        if not config.cubes:
            away, aside = sum(FIRST) / 2 + sum(GAP) / 2 * np.arange(len(colours)), np.zeros(len(colours))
        else:
            gaps = rng.uniform(*GAP, len(colours))
            gaps[0] = rng.uniform(*FIRST)
            away, aside = np.cumsum(gaps), rng.uniform(-ASIDE, ASIDE, len(colours))
        row = [np.array([x + dx, side * y]) for dx, y in zip(aside, away, strict=True)]
        return lay_out(config, rng, colours, row)

    def hide(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Away and at rest."""
        self._put(model, data, np.array([0.0, 0.0, HIDDEN_Z]), np.zeros(3))

    def start(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        course: Course,
        cubes: Sequence[str],
        look: np.random.Generator | None,
    ) -> None:
        """Running, with the cubes on it moving as it does.

        Args:
            model: whose colours are as built.
            data: with the cubes in place.
            course: where.
            cubes: colours of those on it.
            look: of its shades and of where its arrows are; None: as built.
        """
        x, side = self.course = course
        self._put(model, data, np.array([x, side * (BEGIN - END) / 2, 0.0]), np.array([0.0, -side * self.speed, 0.0]))
        if look is not None:
            self._travel = float(look.uniform(0, ARROW_PITCH))
            model.geom_rgba[self._geoms[0], :3] = look.uniform(0.1, 0.3) + look.uniform(-0.02, 0.02, 3)
            model.geom_rgba[self._geoms[1], :3] = look.uniform(0.6, 0.9) + look.uniform(-0.05, 0.05, 3)
            self._show(data)
        for colour in cubes:
            at = model.joint(f"cube_{colour}").dofadr[0]
            data.qvel[at : at + 3] = self.velocity

    def _put(self, model: mujoco.MjModel, data: mujoco.MjData, middle: np.ndarray, velocity: np.ndarray) -> None:
        self._middle, self.velocity, self._travel = middle, velocity, 0.0
        model.body_pos[self._body] = middle
        down = np.sign(velocity[1])
        model.body_pos[self._tray] = (middle[0], down * (END + TRAY_BEYOND), TRAY_Z if down else HIDDEN_Z)
        data.qvel[self._dof] = data.ctrl[self._motor] = velocity[1]
        self._show(data)

    # --- while it runs ----------------------------------------------------------------------------------------------

    def advance(self, data: mujoco.MjData) -> None:
        """Once per control step: takes the slab's own travel back, and lets the arrows travel instead."""
        if not self.velocity.any():
            return
        self._travel = (self._travel + abs(float(data.qpos[self._qpos]))) % ARROW_PITCH
        data.qpos[self._qpos] = 0.0
        self._show(data)

    def _show(self, data: mujoco.MjData) -> None:
        ahead = 1.0 if self.velocity[1] >= 0 else -1.0
        data.mocap_pos[self._arrows] = self._middle + np.array([0.0, ahead * self._travel, TOP])
        data.mocap_quat[self._arrows] = (1, 0, 0, 0) if ahead > 0 else (0, 0, 0, 1)

    def has_left(self, position: np.ndarray, half: float) -> bool:
        """Whether a cube that nothing holds is over the belt's end or has fallen beside it.

        Args:
            position: (3,) of its centre, metres.
            half: half of its edge, metres.
        """
        above = float(position[2]) - TOP - half
        over_end = -self.course[1] * float(position[1]) > END
        return above < -OFF_BY or (over_end and above < LOW)
