"""Adapters of foreign simulators against stand-ins that speak as the real ones do, and the contracts they go through.

Where a stand-in's keys, shapes and dtypes come from is said beside it. ``test_installed_suites.py`` runs the same
adapters against the simulators themselves, where those are installed.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from qwen_vla_core.cli import main
from qwen_vla_core.data.contract import DataContract
from qwen_vla_core.data.rlds_mapping import load_mapping
from qwen_vla_core.data.waypoints import navigation_contract
from qwen_vla_core.embodiment import Embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.closed_loop import observe, run_episode
from qwen_vla_core.evaluation.suites import SUITES, libero, make_suite, simpler_widowx, vln_ce
from qwen_vla_core.evaluation.suites.external import ExternalWorld, Seen, numbered, suite_embodiment
from qwen_vla_core.evaluation.suites.robocasa_gr1 import Gr1Simulator
from qwen_vla_core.interfaces import ActionChunk, Observation

FOREIGN = ("libero", "simpler_widowx", "robotwin", "domino", "robocasa_gr1", "r2r", "rxr")


def picture(width: int, height: int) -> np.ndarray:
    """One whose halves tell whether it was turned."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2] = (200, 0, 0)
    image[:, : width // 2, 2] = 90
    return image


# ---- what all of them share ----------------------------------------------------------------------------------------


class Echo:
    """A simulator of any robot: it measures what it was told."""

    def __init__(self, robot: Embodiment, ends_after: int = 99) -> None:
        self.robot, self.ends_after = robot, ends_after
        self.told: list[dict[str, np.ndarray]] = []

    def reset(self, seed: int, instruction: str | None) -> Seen:
        self.told = []
        return self._seen(instruction or f"task {seed}")

    def step(self, command: Any) -> Seen:
        self.told.append(dict(command))
        return self._seen("")

    def track(self) -> None:
        return None

    def close(self) -> None:
        self.told = []

    def _seen(self, text: str) -> Seen:
        images = {c.topic: picture(*c.size) for c in self.robot.cameras}
        state = {}
        for group in self.robot.state:
            state.setdefault(group.topic, {}).update(dict.fromkeys(group.fields, 0.02))
        return Seen(images, state, text, over=len(self.told) >= self.ends_after)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_suite_says_what_it_is_without_its_simulator(name: str) -> None:
    suite = make_suite(name)
    trials = suite.trials(3, 0)
    assert [trial.key for trial in trials] == [trial.key for trial in suite.trials(3, 0)]
    assert len({trial.key for trial in trials}) == len(trials) == 3 * len(suite.axes) * len(suite.tasks)
    assert all(suite.protocol.horizon(t.axis if t.axis in suite.protocol.horizon_steps else t.task) for t in trials)
    robot = suite_embodiment(suite.embodiment)
    assert robot.control.frequency_hz == pytest.approx(suite.protocol.control_hz, rel=1e-3)
    assert suite.protocol.source and suite.protocol.tag in "PXO"


@pytest.mark.parametrize("name", sorted({make_suite(name).embodiment for name in FOREIGN}))
def test_every_robot_of_a_suite_keeps_the_contract(name: str) -> None:
    robot = suite_embodiment(name)
    assert main(["embodiment", "check", f"suites/{name}"]) == 0
    echo = Echo(robot)
    world = ExternalWorld(robot, echo, limit_steps=4)
    world.reset(7)
    assert world.instruction == "task 7" and world.limit_s == pytest.approx(4 / robot.control.frequency_hz)
    shown = observe(world)
    assert {view: image.shape for view, image in shown.images.items()} == {
        camera.view: (camera.size[1], camera.size[0], 3) for camera in robot.cameras
    }
    assert world.render(robot.views[0], 64, 48).shape == (48, 64, 3)
    world.step(world.command() + 1e5)  # far beyond every limit
    for group in robot.actions:
        told = echo.told[0][group.command.topic]
        np.testing.assert_allclose(group.command.map.to_channel(told), group.limits.upper, rtol=1e-9)
    with pytest.raises(ValueError, match="finite"):
        world.step(np.full(len(robot.channels), np.nan))


def test_a_simulator_that_is_not_as_the_yaml_says_is_told_apart() -> None:
    robot = suite_embodiment("libero")
    echo = Echo(robot)
    world = ExternalWorld(robot, echo, 10)
    with pytest.raises(ValueError, match="reset first"):
        world.state()
    world.reset(0)
    world._seen = replace(world.seen, images={"/agentview_image": picture(128, 128)})
    with pytest.raises(ValueError, match=r"/agentview_image .* \(128, 128, 3\)"):
        world.render("ego", 256, 256)
    with pytest.raises(ValueError, match="gives nothing"):
        world.render("cam_wrist", 256, 256)
    world._seen = replace(world.seen, state={"/robot0_eef": {"x": 0.0}})
    with pytest.raises(ValueError, match="/robot0_eef of the simulator has no 'y'"):
        world.state()


def test_an_episode_runs_through_the_closed_loop() -> None:
    """One action of a chunk is one step of the simulator, whatever part of the chunk is executed."""
    robot = suite_embodiment("simpler_widowx")
    echo = Echo(robot, ends_after=7)
    rows = np.arange(16)[:, None] * np.full((1, 7), 0.01)

    class Count:
        def predict(self, observation: Observation) -> ActionChunk:
            assert observation.images["ego"].shape == (480, 640, 3)
            return ActionChunk(rows, robot.channels, observation.stamp_ns, robot.period_s)

    result = run_episode(ExternalWorld(robot, echo, 60), Count(), seed=3, execute_steps=3, timeout_s=12.0)
    told = [step["/ee_target_delta_pose"][0] for step in echo.told]
    np.testing.assert_allclose(told, [0, 0.01, 0.02, 0, 0.01, 0.02, 0], atol=1e-12)
    assert (result.inferences, result.success, result.seconds) == (3, False, pytest.approx(1.4))


def test_initial_states_are_counted_around_their_end() -> None:
    assert numbered(100_000, 3, 50, "states") == [0, 1, 2]
    assert numbered(49, 2, 50, "states") == [49, 0]
    with pytest.raises(UserError, match="--episodes 51: there are 50 states"):
        numbered(0, 51, 50, "states")


def test_data_and_suites_agree_so_that_a_trained_checkpoint_runs() -> None:
    """The contract of a converted corpus is that of the suite's robot, to the last channel."""
    for mapping, robot in (("libero", "libero"), ("bridge", "simpler_widowx")):
        assert load_mapping(mapping).contract == DataContract.of(suite_embodiment(robot))
    assert navigation_contract("Habitat agent", ("ego",)) == DataContract.of(suite_embodiment("vln_ce"))


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_missing_is_one_sentence_with_a_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("qwen_vla_core.evaluation.suites.external.importlib.util.find_spec", lambda name: None)
    missing = make_suite(name).missing()
    assert missing is not None and "\n" not in missing
    assert "pip install" in missing or "git clone" in missing


# ---- LIBERO: keys and shapes as printed by hf-libero 0.1.4 (env.step of OffScreenRenderEnv) ------------------------


class LiberoEnv:
    robots: ClassVar = [SimpleNamespace(controller=SimpleNamespace(output_max=np.array([0.05] * 3 + [0.5] * 3)))]
    env = SimpleNamespace(control_freq=20)

    def __init__(self) -> None:
        self.actions: list[list[float]] = []

    def seed(self, seed: int) -> None:
        self.seeded = seed

    def reset(self) -> None:
        self.actions = []

    def set_init_state(self, state: np.ndarray) -> dict[str, np.ndarray]:
        self.state = state
        return self._shown()

    def step(self, action: list[float]) -> tuple[dict[str, np.ndarray], float, bool, dict]:
        self.actions.append(list(action))
        return self._shown(), 0.0, len(self.actions) == 13, {}

    def _shown(self) -> dict[str, np.ndarray]:
        return {
            "agentview_image": picture(256, 256),
            "robot0_eye_in_hand_image": picture(256, 256),
            "robot0_eef_pos": np.array([-0.2, 0.0, 1.1]),
            "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0]),
            "robot0_gripper_qpos": np.array([0.02, -0.02]),
        }


def test_libero() -> None:
    simulator = object.__new__(libero.LiberoSimulator)
    simulator.env = LiberoEnv()
    simulator.task = SimpleNamespace(language="put the bowl on the plate")
    simulator.states = [np.full(3, i) for i in range(50)]
    world = ExternalWorld(suite_embodiment("libero"), simulator, 220)
    world.reset(51)
    assert simulator.env.state[0] == 1 and world.instruction == "put the bowl on the plate"
    assert simulator.env.actions == [[0.0] * 6 + [-1.0]] * 10  # things settle before the first observation
    np.testing.assert_allclose(world.state(), [-0.2, 0, 1.1, math.pi, 0, 0, 0.5], atol=1e-9)
    np.testing.assert_array_equal(world.render("ego", 256, 256), picture(256, 256)[::-1, ::-1])
    world.step(np.array([0.05, -0.025, 0, 0, 0, 0.25, 1.0]))
    np.testing.assert_allclose(simulator.env.actions[-1], [1, -0.5, 0, 0, 0, 0.5, -1], atol=1e-12)
    world.step(np.array([0.2, 0, 0, 0, 0, 0, 0.0]))
    np.testing.assert_allclose(simulator.env.actions[-1], [1, 0, 0, 0, 0, 0, 1], atol=1e-12)
    assert not world.ended()
    world.step(world.command())
    assert world.success() and world.ended()


# ---- SimplerEnv: as printed by mani-skill 3.0.1; arrays are torch tensors with a leading 1 --------------------------


class Tensor:
    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def cpu(self) -> np.ndarray:
        return self.value


class SimplerEnv:
    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []
        down = simpler_widowx.DOWN.as_quat()  # x, y, z, w
        pose = SimpleNamespace(p=Tensor([[0.29, 0.0, 0.13]]), q=Tensor([[down[3], *down[:3]]]))
        joints = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "left_finger"]
        robot = SimpleNamespace(
            get_active_joints=lambda: [SimpleNamespace(name=name) for name in [*joints, "right_finger"]],
            get_qpos=lambda: Tensor([[0, 0, 0, 0, 0, 0, 0.026, 0.026]]),
        )
        arm = SimpleNamespace(ee_pose_at_base=pose)
        agent = SimpleNamespace(controller=SimpleNamespace(controllers={"arm": arm}), robot=robot)
        self.unwrapped = SimpleNamespace(agent=agent, get_language_instruction=lambda: ["put carrot on plate"])

    def reset(self, seed: int, options: dict[str, int]) -> tuple[dict, dict]:
        self.actions, self.options = [], options
        return self._shown(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        assert action.shape == (1, 7) and action.dtype == np.float32
        self.actions.append(action[0])
        info = {"success": Tensor([True]), "is_src_obj_grasped": Tensor([len(self.actions) == 2])}
        return self._shown(), 0.0, False, False, info

    def _shown(self) -> dict:
        return {"sensor_data": {"3rd_view_camera": {"rgb": Tensor(picture(640, 480)[None])}}}


def test_simpler_widowx() -> None:
    simulator = object.__new__(simpler_widowx.SimplerSimulator)
    simulator.env, simulator.steps = SimplerEnv(), 3
    world = ExternalWorld(suite_embodiment("simpler_widowx"), simulator, 3)
    world.reset(23)
    assert simulator.env.options == {"episode_id": 23} and world.instruction == "put carrot on plate"
    np.testing.assert_allclose(world.state(), [0.29, 0, 0.13, 0, 0, 0, 0.5], atol=1e-6)
    turn = np.array([0.3, -0.2, 0.4])
    world.step(np.array([0.01, 0, -0.02, *turn, 0.6]))
    action = simulator.env.actions[0]
    np.testing.assert_allclose(action[[0, 1, 2, 6]], [0.01, 0, -0.02, 1], atol=1e-6)
    # The controller multiplies Rx·Ry·Rz, the corpus Rz·Ry·Rx: the same rotation in other angles.
    built = simpler_widowx.Rotation.from_euler("XYZ", action[3:6])
    assert (built * simpler_widowx.Rotation.from_euler("xyz", turn).inv()).magnitude() < 1e-6
    world.step(np.array([0, 0, 0, 0, 0, 0, 0.4]))
    assert simulator.env.actions[1][6] == -1
    assert not world.ended()  # the object lay on its target, but only the last step counts
    world.step(world.command())
    assert world.success() and world.metrics() == {"grasped": 1.0, "moved_the_object": 0.0}


# ---- RoboCasa GR1: as printed by praxis-robocasa-gr1 0.2.0 (GrootRoboCasaEnv.reset) --------------------------------


class Gr1Env:
    SIZES: ClassVar = {"left_arm": 7, "right_arm": 7, "left_hand": 6, "right_hand": 6, "waist": 3}

    def __init__(self) -> None:
        self.unwrapped = SimpleNamespace(env=SimpleNamespace(rng=None))

    def reset(self, seed: int) -> tuple[dict, dict]:
        self.seed = seed
        return self._shown(), {"success": False, "grasp_distractor_obj": False}

    def step(self, action: dict[str, np.ndarray]) -> tuple[dict, float, bool, bool, dict]:
        self.action = action
        return self._shown(), 1.0, False, False, {"success": True, "grasp_distractor_obj": True}

    def _shown(self) -> dict:
        state = {f"state.{part}": np.full(size, 0.1, np.float32) for part, size in self.SIZES.items()}
        image = picture(256, 256)
        return {
            **state,
            "video.ego_view_bg_crop_pad_res256_freq20": image,
            "video.ego_view_pad_res256_freq20": image[::-1],
            "annotation.human.coarse_action": "unlocked_waist: pick up the cup and close the drawer",
        }


def test_robocasa_gr1() -> None:
    robot = suite_embodiment("robocasa_gr1")
    simulator = object.__new__(Gr1Simulator)
    simulator.env = Gr1Env()
    simulator.parts = {group.name: (group.topic, group.fields) for group in robot.state}
    simulator.topics = {group.name: group.command.topic for group in robot.actions}
    world = ExternalWorld(robot, simulator, 720)
    world.reset(5)
    assert simulator.env.unwrapped.env.rng.random() == np.random.default_rng(5).random()
    assert simulator.env.seed == 5 and world.instruction == "pick up the cup and close the drawer"
    np.testing.assert_allclose(world.state(), np.full(29, 0.1), rtol=1e-6)
    world.step(world.command())
    assert {key: value.shape for key, value in simulator.env.action.items()} == {
        f"action.{part}": (size,) for part, size in Gr1Env.SIZES.items()
    }
    assert world.success() and world.metrics() == {"grasped_a_distractor": 1.0}
    assert len(make_suite("robocasa_gr1").tasks) == 24


# ---- VLN-CE: habitat-lab's Env (core/env.py, tasks/nav/nav.py) on an empty floor -----------------------------------


class HabitatEnv:
    """Moves as Habitat does: 0.25 m ahead, turns of 15°, y up, −z ahead."""

    def __init__(self, turn_deg: float) -> None:
        self.turn = math.radians(turn_deg)
        told = SimpleNamespace(instruction_text="walk to the sofa")
        self.episodes = [SimpleNamespace(episode_id=str(i), instruction=told) for i in (7, 8)]
        self.sim = SimpleNamespace(get_agent_state=self._state)

    def reset(self) -> dict[str, np.ndarray]:
        self.position, self.course, self.walked = np.zeros(3), 0.0, 0.0
        self.moves: list[str] = []
        self.episode_over = False
        return {"rgb": picture(224, 224)}

    def step(self, action: dict[str, str]) -> dict[str, np.ndarray]:
        assert not self.episode_over
        move = action["action"]
        self.moves.append(move)
        if move == "move_forward":
            self.position = self.position + 0.25 * np.array([-math.sin(self.course), 0.0, -math.cos(self.course)])
            self.walked += 0.25
        self.course += {"turn_left": self.turn, "turn_right": -self.turn}.get(move, 0.0)
        self.episode_over = move == "stop" or len(self.moves) >= 500
        return {"rgb": picture(224, 224)}

    def get_metrics(self) -> dict[str, float]:
        left = float(np.linalg.norm(self.position - np.array([-2.0, 0.0, -4.0])))
        success = float("stop" in self.moves and left < 3.0)
        return {"distance_to_goal": left, "success": success, "spl": success * 4.5 / max(4.5, self.walked)}

    def _state(self) -> SimpleNamespace:
        turn = SimpleNamespace(x=0.0, y=math.sin(self.course / 2), z=0.0, w=math.cos(self.course / 2))
        return SimpleNamespace(position=self.position.astype(np.float32), rotation=turn)

    def close(self) -> None:
        self.episodes = []


class Route:
    """Waypoints of a walk: four metres ahead, a quarter turn to the left, two metres on, and there it stays."""

    def __init__(self) -> None:
        ahead = [(0.25 * i, 0.0, 0.0) for i in range(17)]
        turned = [(4.0, 0.0, math.radians(15 * i)) for i in range(1, 7)]
        left = [(4.0, 0.25 * i, math.pi / 2) for i in range(1, 9)]
        self.poses = np.array([*ahead, *turned, *left, *[left[-1]] * 16])

    def predict(self, observation: Observation) -> ActionChunk:
        now = round(observation.stamp_ns / 5e8)
        return ActionChunk(self.poses[now + 1 : now + 9], ("x", "y", "heading"), observation.stamp_ns, 0.5)


def test_vln_ce() -> None:
    """The walk of the waypoints is what Habitat does, move by move, and standing still is the stop."""
    env = HabitatEnv(15.0)
    walks = {"7": np.zeros((1, 3)), "8": np.array([[0.0, 0.0, -0.5 * i] for i in range(9)])}
    world = vln_ce.R2RSuite().world(vln_ce.HabitatSimulator(env, walks, 15.0))
    result = run_episode(world, Route(), seed=1, execute_steps=5, timeout_s=world.limit_s)
    assert env.moves == ["move_forward"] * 16 + ["turn_left"] * 6 + ["move_forward"] * 8 + ["stop"]
    assert result.instruction == "walk to the sofa" and result.success
    assert result.metrics["navigation_error_m"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["path_m"] == pytest.approx(6.0, abs=1e-4)
    assert result.metrics["spl"] == pytest.approx(4.5 / 6.0, abs=1e-4)
    assert result.metrics["oracle_success"] == 1.0 and 0 < result.metrics["ndtw"] < 1
    world.close()


@pytest.mark.parametrize(
    "target, move",
    [
        ((1.0, 0.0, 0.0), "move_forward"),
        ((1.0, 0.05, 3.0), "move_forward"),
        ((0.0, 1.0, 0.0), "turn_left"),
        ((0.3, -1.0, 0.0), "turn_right"),
        ((-0.2, 0.0, 0.0), None),  # just behind: walked past it
        ((-1.0, 0.01, 0.0), "turn_left"),
        ((0.05, 0.0, 0.2), "turn_left"),
        ((0.05, 0.0, -6.2), None),  # a full turn further is the same heading
        ((0.0, 0.0, 0.1), None),
    ],
)
def test_the_move_nearest_to_a_waypoint(target: tuple[float, ...], move: str | None) -> None:
    assert vln_ce.discrete_action(np.array(target), np.zeros(3), math.radians(15)) == move


def test_vln_ce_reads_episodes_as_the_corpora_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / vln_ce.RXR.episodes
    path.parent.mkdir(parents=True)
    items = [{"instruction": {"instruction_text": "a", "language": language}} for language in ("en-IN", "te-IN")]
    path.write_bytes(gzip.compress(json.dumps({"episodes": items}).encode()))
    assert len(vln_ce.chosen_episodes(vln_ce.RXR, tmp_path)) == 1
    path.write_bytes(gzip.compress(json.dumps({"episodes": items[1:]}).encode()))
    with pytest.raises(UserError, match="no episode in en-US, en-IN"):
        vln_ce.chosen_episodes(vln_ce.RXR, tmp_path)
    for name in ("habitat", "habitat_sim"):  # pretend that they are installed
        module = types.ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLN_CE_DATA", str(tmp_path))
    assert "val_unseen_guide_gt.json.gz" in str(vln_ce.RxRSuite().missing())


def test_every_suite_can_be_made() -> None:
    assert [make_suite(name).name for name in SUITES] == list(SUITES)
