"""The base keeps its limits, follows what it can follow, and never enters anything."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_vla_core.sim.worlds.rooms_layout import ROBOT_RADIUS, Landmark, Wall
from qwen_vla_core.sim.worlds.rooms_motion import Base, BaseConfig, Pose, Wear

DT = 0.05
WALLS = (Wall(1.0, -5.0, 1.2, 5.0), Wall(-5.0, 1.0, 1.0, 1.2))
BALL = Landmark("red", "ball", (-1.5, -1.5))


def drive(base: Base, targets: list[Pose]) -> list[Pose]:
    poses, before = [], (0.0, 0.0, 0.0)
    for target in targets:
        base.step(target, before, DT)
        before = target
        poses.append(base.pose)
    return poses


def test_limits_hold_whatever_is_asked() -> None:
    rng = np.random.default_rng(0)
    base, c = Base((0.0, 0.0, 0.0), (), ()), BaseConfig()
    before: Pose = (0.0, 0.0, 0.0)
    for _ in range(600):
        x, y, heading = rng.uniform(-3, 3, 3)
        speed, turning, (px, py, ph) = base.speed, base.turning, base.pose
        base.step((x, y, heading), before, DT)
        before = (x, y, heading)
        assert -c.backward - 1e-9 <= base.speed <= c.forward + 1e-9 and abs(base.turning) <= c.turn + 1e-9
        assert abs(base.speed - speed) <= c.acceleration * DT + 1e-9
        assert abs(base.turning - turning) <= c.turn_acceleration * DT + 1e-9
        assert math.dist(base.pose[:2], (px, py)) <= c.forward * DT + 1e-9
        assert abs(base.pose[2] - ph) <= c.turn * DT + 1e-9


def test_a_path_it_can_drive_is_followed_closely() -> None:
    base = Base((0.0, 0.0, 0.0), (), ())
    targets, pose, speed = [], (0.0, 0.0, 0.0), 0.0
    for step in range(120):  # an arc of 1 m radius, gently begun
        speed = min(speed + 0.8 * DT, 0.5)
        turn = speed / 1.0 if step > 40 else 0.0
        x, y, heading = pose
        pose = (x + speed * DT * math.cos(heading), y + speed * DT * math.sin(heading), heading + turn * DT)
        targets.append(pose)
    poses = drive(base, targets)
    off = [math.dist(a[:2], b[:2]) for a, b in zip(poses, targets, strict=True)]
    assert max(off) < 0.04 and abs(poses[-1][2] - targets[-1][2]) < 0.05


@pytest.mark.parametrize("target", [(2.0, 1.5, 0.0), (-1.5, 0.0, 0.0), (0.0, 2.0, math.pi / 2), (1.0, -1.0, -1.0)])
def test_a_pose_far_away_is_reached_and_it_stays_there(target: Pose) -> None:
    base = Base((0.0, 0.0, 0.0), (), ())
    poses = drive(base, [target] * 300)
    assert math.dist(poses[-1][:2], target[:2]) < 0.16 and base.speed == pytest.approx(0.0, abs=0.02)
    assert abs(math.remainder(poses[-1][2] - target[2], 2 * math.pi)) < 0.1
    assert max(math.dist(a[:2], b[:2]) for a, b in zip(poses[-40:], poses[-39:], strict=False)) < 0.002


def test_it_slides_along_a_wall_and_counts_one_bump() -> None:
    base, step = Base((0.0, 0.0, -math.pi / 4), WALLS, ()), 0.03
    for _ in range(150):  # on and on in its own direction, as relative waypoints say it
        x, y, heading = base.odometry
        base.step((x + step * math.cos(heading), y + step * math.sin(heading), heading), base.odometry, DT)
    assert base.bumps == 1 and base.touching
    assert base.pose[0] == pytest.approx(1.0 - ROBOT_RADIUS, abs=1e-6)
    assert base.pose[1] < -1.5  # 0.8 m to the wall, the rest along it


def test_driven_at_a_wall_it_stands_and_its_odometer_knows() -> None:
    base = Base((0.0, 0.0, 0.0), WALLS, ())
    drive(base, [(0.03 * i, 0.0, 0.0) for i in range(80)])
    assert base.pose[0] == pytest.approx(1.0 - ROBOT_RADIUS) and base.bumps == 1
    assert base.odometry == pytest.approx(base.pose, abs=1e-9)
    assert abs(base.speed) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_inside_anything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, before = Base((0.0, 0.0, 0.0), WALLS, (BALL,)), (0.0, 0.0, 0.0)
    for _ in range(40):
        target = tuple(rng.uniform(-3, 3, 3).tolist())
        for _ in range(15):
            base.step(target, before, DT)
            before = target
            x, y, _ = base.pose
            for w in WALLS:
                away = math.hypot(max(w.x0 - x, x - w.x1, 0.0), max(w.y0 - y, y - w.y1, 0.0))
                assert away >= ROBOT_RADIUS - 1e-6
            assert math.dist((x, y), BALL.centre) >= BALL.radius + ROBOT_RADIUS - 1e-6
    assert base.bumps > 0


def test_wear_moves_the_base_away_from_where_it_believes_to_be() -> None:
    straight = [(0.025 * i, 0.0, 0.0) for i in range(100)]
    worn = Base((0.0, 0.0, 0.0), (), (), wear=Wear(speed_gain=0.9, pull=0.1, odometry_gain=1.05))
    drive(worn, straight)
    assert worn.odometry[0] == pytest.approx(straight[-1][0], abs=0.1)  # it follows by its odometer
    assert worn.pose[0] < worn.odometry[0] - 0.05 and worn.pose[1] > 0.1
    assert worn.pose[2] == pytest.approx(worn.odometry[2] + 0.1 * worn.odometry[0] / 1.05, abs=0.01)
