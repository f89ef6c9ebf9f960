"""The mobile-base world: repeatable, honest about stops, and its pictures show what its state says."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mujoco
import numpy as np
import pytest

from qwen_vla_core.embodiment import load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import run_episode
from qwen_vla_core.evaluation.navigation import measure
from qwen_vla_core.interfaces import ActionChunk, Observation
from qwen_vla_core.sim.demos import check_expert, record
from qwen_vla_core.sim.navigation_expert import NavigationExpert
from qwen_vla_core.sim.worlds.rooms import RoomsWorld
from qwen_vla_core.sim.worlds.rooms_domain import RoomsDomain

UNSEEN = 500_000


@pytest.fixture(scope="module")
def world() -> Iterator[RoomsWorld]:
    shared = RoomsWorld()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def varied() -> Iterator[RoomsWorld]:
    shared = RoomsWorld(domain=RoomsDomain())
    yield shared
    shared.close()


def drive(world: RoomsWorld, instruction_of_expert: str | None = None) -> None:
    """Lets the expert end the episode, with another task in mind than the judge's where one is given."""
    asked, passed = world.task, world._passed
    if instruction_of_expert is not None:
        other = RoomsWorld()
        other.reset(0, instruction_of_expert)
        world.task, world._passed = other.task, other.task.via is None
    expert = NavigationExpert(world)
    world.task, world._passed = asked, passed
    while not world.ended() and world.time_s < world.limit_s:
        for command in world.play(expert.action()):
            world.step(command)


def hold(world: RoomsWorld, seconds: float) -> None:
    x, y, yaw, _, _ = world.state()
    for _ in range(round(seconds * world.control_hz)):
        world.step(np.array([x, y, yaw]))


def moment(world: RoomsWorld, seed: int) -> tuple[np.ndarray, np.ndarray]:
    world.reset(seed)
    for step in range(20):
        world.step(np.array([0.02 * step, 0.0, 0.01 * step]))
    return np.concatenate([world.state(), world.base.pose]), world.render("ego", 128, 96).copy()


def test_it_is_the_robot_of_its_embodiment() -> None:
    robot = load_embodiment("mobile_base")
    assert robot.simulation is not None and robot.simulation.world == "rooms"
    assert RoomsWorld.channels == robot.channels and RoomsWorld.state_channels == robot.state_channels
    assert RoomsWorld.views == robot.views and RoomsWorld.decision_s == 1 / robot.control.frequency_hz
    assert RoomsWorld.control_hz == robot.control.controller_rate_hz and robot.control.horizon == 8


def test_the_same_seed_gives_the_same_states_and_pictures(world: RoomsWorld) -> None:
    first = moment(world, 4)
    other = moment(world, 5)
    again = moment(world, 4)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_the_scene_does_not_depend_on_what_is_asked(world: RoomsWorld) -> None:
    world.reset(3)
    layout, picture = world.layout, world.render("ego", 64, 48).copy()
    for task in world.offered:
        instruction = "go to the " + task.goal
        world.reset(3, instruction)
        assert world.layout == layout and world.instruction == instruction and world.target == task.goal
        assert np.array_equal(world.render("ego", 64, 48), picture)


def test_what_is_named_is_there(world: RoomsWorld) -> None:
    for goal, via in (("red pillar", "blue ball"), ("yellow box", "green doorway"), ("green ball", "yellow pillar")):
        word = "through" if via.endswith("doorway") else "past"
        world.reset(9, f"Go {word} the {via} and stop at the {goal}.")
        names = [place.name for place in (*world.layout.landmarks, *world.layout.doorways)]
        assert {goal, via} <= set(names) and len(set(names)) == len(names)
    with pytest.raises(UserError, match="sing"):
        world.reset(9, "sing")


def test_what_is_asked_for_is_in_the_first_picture(world: RoomsWorld) -> None:
    for seed in range(40):
        world.reset(seed)
        place = world.scene_state().place(world.scene_state().next)
        assert place is not None and "ego" in place.visible, world.instruction


def pixels_of(world: RoomsWorld, renderer: mujoco.Renderer, geom: int) -> np.ndarray:
    """(192, 256) bool: where the segmented picture shows a geom."""
    renderer.update_scene(world.data, "ego")
    return renderer.render()[..., 0] == geom


def test_visible_is_what_a_segmented_picture_shows(world: RoomsWorld) -> None:
    """Rays decide what is visible; the renderer says which share of it there really is."""
    renderer = mujoco.Renderer(world.model, 192, 256)
    renderer.enable_segmentation_rendering()
    seen = hidden = 0
    for seed in range(25):
        world.reset(seed)
        for landmark in world.layout.landmarks:
            place = world.scene_state().place(landmark.name)
            assert place is not None
            if "ego" not in place.pixels:
                continue
            geom = world._named[landmark.name][0]
            mask = pixels_of(world, renderer, geom)
            world.model.geom_rgba[:, 3] = 0.0  # everything else away: how much of it there could be
            world.model.geom_rgba[geom, 3] = 1.0
            whole = pixels_of(world, renderer, geom)
            world.model.geom_rgba[:, 3] = 1.0
            rows, columns = np.nonzero(whole)
            u, v = place.pixels["ego"]
            assert columns.min() - 1 <= u * 256 <= columns.max() + 1 and rows.min() - 1 <= v * 192 <= rows.max() + 1
            share = mask.sum() / whole.sum()
            if "ego" in place.visible:
                seen += 1
                assert share > 0.3, (seed, landmark.name)
            else:
                hidden += 1
                assert share < 0.7, (seed, landmark.name)
    renderer.close()
    assert seen > 50 and hidden > 10


def test_near_zero_waypoints_are_a_stop_once_it_has_set_out(world: RoomsWorld) -> None:
    world.reset(1)
    hold(world, 5.0)
    assert not world.ended() and world.chosen() is None  # waiting for the first chunk is no stop
    for step in range(30):
        world.step(np.array([0.01 * step, 0.0, 0.0]))
    assert not world.ended()
    hold(world, 2.0)
    assert world.ended() and not world.success()


def test_a_slow_turn_on_the_spot_is_no_stop(world: RoomsWorld) -> None:
    world.reset(1)
    for step in range(120):
        world.step(np.array([0.0, 0.0, 0.02 * step]))
    assert not world.ended()


def test_stopping_at_another_landmark_is_seen_and_is_no_success(world: RoomsWorld) -> None:
    world.reset(2)
    asked = world.instruction
    other = world.other_instruction()
    assert other is not None and other != asked
    world.reset(2, other)
    wrong = world.target
    world.reset(2, asked)
    drive(world, f"go to the {wrong}")
    assert world.ended() and not world.success() and world.chosen() == wrong != world.target
    assert measure(world.track())["spl"] == 0.0


def test_the_way_counts_where_one_was_named(world: RoomsWorld) -> None:
    """Driving straight to the goal of a 'past' or 'through' task is a success only when the way led there anyway."""
    missed = 0
    for seed in range(12):
        world.reset(seed)
        task = next(task for task in world.offered if task.name == "past")
        world.reset(seed, f"go past the {task.via} and stop at the {task.goal}")
        drive(world, f"go to the {task.goal}")
        assert world.ended() and world.chosen() == task.goal
        assert world.success() == world.passed
        missed += not world.passed
    assert missed > 0


def test_the_first_stop_decides(world: RoomsWorld) -> None:
    world.reset(1)
    world.reset(1, f"go to the {world.target}")
    for step in range(30):
        world.step(np.array([0.01 * step, 0.0, 0.0]))
    hold(world, 2.0)
    assert world.ended()
    stopped_at = world.state()[:2]
    expert = NavigationExpert(world)
    for _ in range(60):
        for command in world.play(expert.action()):
            world.step(command)
    assert world.nearest_in_reach() == world.target and not world.success()  # it is there now, too late
    assert np.linalg.norm(world.state()[:2] - stopped_at) > 1.0


def test_actions_that_are_none_are_refused(world: RoomsWorld) -> None:
    world.reset(0)
    with pytest.raises(ValueError, match="shape"):
        world.step(np.zeros(2))
    with pytest.raises(ValueError, match="yaw"):
        world.step(np.array([0.0, 0.0, np.nan]))
    with pytest.raises(ValueError, match="view"):
        world.render("rear", 64, 48)


def test_the_expert_does_every_task_the_short_way(world: RoomsWorld) -> None:
    lines = check_expert(world, "rooms", range(UNSEEN, UNSEEN + 30))
    assert all(line["success"] for line in lines)
    found = [measure(line["track"]) for line in lines]
    assert min(f["spl"] for f in found) > 0.9 and np.mean([f["spl"] for f in found]) > 0.97
    assert min(f["ndtw"] for f in found) > 0.7 and all(f["oracle_success"] == 1.0 for f in found)
    assert sum(f["bumps"] for f in found) == 0


def test_expert_recovers_from_pushes_and_says_where(world: RoomsWorld) -> None:
    episodes = [record(world, "rooms", seed, noise=1.0) for seed in range(4)]
    assert all(episode.success for episode in episodes)
    assert any(episode.rows.perturbed is not None and episode.rows.perturbed.any() for episode in episodes)
    assert all(set(episode.info) >= {"task", "target", "via", "pushed"} for episode in episodes)


class ExpertPolicy:
    """The expert as a policy: eight waypoints from what it knows of the world; headings as the odometer tells them."""

    def __init__(self, world: RoomsWorld) -> None:
        self.world = world

    def predict(self, observation: Observation) -> ActionChunk:
        waypoints = NavigationExpert(self.world).chunk(8)
        waypoints[:, 2] += observation.state[2] - self.world.base.odometry[2]  # in (−π, π] at the first frame
        return ActionChunk(waypoints, self.world.channels, observation.stamp_ns, 0.5)


def test_chunks_through_the_policy_interface_reach_the_goal(world: RoomsWorld) -> None:
    for seed in range(UNSEEN, UNSEEN + 6):
        result = run_episode(world, ExpertPolicy(world), seed=seed, execute_steps=3, timeout_s=40.0)
        assert result.success and result.chosen == world.target and result.metrics["spl"] > 0.9


def test_without_a_domain_nothing_varies_but_the_scene(world: RoomsWorld) -> None:
    world.reset(0)
    colours, eye = world.model.geom_rgba[world._parts.walls[0]].copy(), world.model.cam_pos.copy()
    world.reset(1)
    assert np.array_equal(world.model.geom_rgba[world._parts.walls[0]], colours)
    assert np.array_equal(world.model.cam_pos, eye) and world.domain_drawn == {}


def test_a_domain_is_repeatable_varies_everything_and_keeps_its_ranges(varied: RoomsWorld, world: RoomsWorld) -> None:
    first = moment(varied, 5)
    drawn, config = varied.domain_drawn, RoomsDomain()
    moment(varied, 6)
    assert varied.domain_drawn != drawn
    again = moment(varied, 5)
    assert varied.domain_drawn == drawn and np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert np.abs(first[1].astype(int) - moment(world, 5)[1].astype(int)).mean() > 10
    assert varied.layout == world.layout  # the scene is the seed's, with or without
    for seed in range(10):
        varied.reset(seed)
        wear = varied.domain_drawn["wear"]
        assert config.speed_gain[0] <= wear["speed_gain"] <= config.speed_gain[1]
        assert config.delay[0] <= wear["delay"] <= config.delay[1] and abs(wear["pull"]) <= config.pull
        assert abs(varied.domain_drawn["camera_tilt"]) <= config.camera_tilt
        for landmark in varied.layout.landmarks:
            size = varied.domain_drawn[landmark.name]["size"]
            assert config.landmark_size[0] <= size <= config.landmark_size[1]


def test_the_expert_copes_with_the_domain(varied: RoomsWorld) -> None:
    assert all(line["success"] for line in check_expert(varied, "rooms", range(20)))


def by_sight(world: RoomsWorld) -> np.ndarray:
    """A waypoint from what the picture shows now and nothing else: no plan, no memory."""
    scene = world.scene_state()
    shown = {place.name: place for place in scene.places if "ego" in place.visible}
    via, goal = shown.get(scene.via or ""), shown.get(scene.goal)
    stop = 0.0
    if via is not None and not (goal is not None and not via.doorway and math.hypot(via.ahead, via.left) < 1.05):
        ahead, left = via.ahead, via.left
        if not via.doorway:  # beside it, on the side of the goal
            bearing = math.atan2(left, ahead)
            side = 1 if goal is not None and goal.left * ahead > left * goal.ahead else -1
            ahead, left = ahead - side * 0.7 * math.sin(bearing), left + side * 0.7 * math.cos(bearing)
    elif goal is not None:
        ahead, left, stop = goal.ahead, goal.left, 0.72
    else:
        return world.base.odometry + np.array([0.0, 0.0, 0.5])  # look around
    far, turn = math.hypot(ahead, left), math.atan2(left, ahead)
    room_left, room_ahead, room_right = scene.clearance
    if room_ahead < 0.5 and (stop == 0.0 or far > 1.2):
        turn += 0.5 if room_left > room_right else -0.5
    to_go = max(far - stop, 0.0)
    step = 0.0 if abs(turn) > 0.8 else min(0.3, 0.5 * to_go) if stop else 0.3
    turn = min(max(turn, -0.6), 0.6) if to_go > 0.05 or not stop else 0.0
    x, y, heading = world.base.odometry
    course = heading + 0.5 * turn
    return np.array([x + step * math.cos(course), y + step * math.sin(course), heading + turn])


@pytest.mark.parametrize("task", RoomsWorld.task_names)
def test_what_one_picture_shows_is_enough(world: RoomsWorld, task: str) -> None:
    seeds, done = range(100_000, 100_020), 0
    for seed in seeds:
        world.tasks = (task,)
        world.reset(seed)
        while not world.ended() and world.time_s < world.limit_s:
            for command in world.play(by_sight(world)):
                world.step(command)
        done += world.success()
    world.tasks = world.task_names
    assert done >= 0.85 * len(seeds)
