"""RoboTwin 2.0 (SAPIEN): 50 tasks of two arms, Easy (clean) and Hard (randomised), from a checkout of the benchmark.

Written against github.com/RoboTwin-Platform/RoboTwin, branch stable_2.0, commit 13c3c47 (envs/_base_task.py,
script/eval_policy.py, task_config/). The benchmark is a checkout, not a package: it reads its files relative to its
root, which ``ROBOTWIN_PATH`` names.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites.external import ExternalWorld, Seen, missing_modules, suite_embodiment
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher
from qwen_vla_core.sim.track import Track

ROBOT = "robotwin"
MODULES = ("sapien", "mplib", "torch", "transforms3d")
INSTALL = (
    "RoboTwin 2.0 (NVIDIA GPU, Python 3.10): git clone --branch stable_2.0 "
    "https://github.com/RoboTwin-Platform/RoboTwin && cd RoboTwin && bash script/_install.sh && "
    "bash script/_download_assets.sh (background_texture.zip, embodiments.zip and objects.zip of the Hugging Face "
    "dataset TianxingChen/RoboTwin2.0), then export ROBOTWIN_PATH=<that folder>"
)
FIRST_SEED = 100_000  # script/eval_policy.py: st_seed = 100000 * (1 + seed), seed 0
GIVE_UP = 200  # seeds in a row that the expert does not solve: then the checkout is broken, not the seeds
CAMERAS = ("head_camera", "left_camera", "right_camera")
ARMS = ("left", "right")

# task_config/_eval_step_limit.yml
_LIMITS = """
400 adjust_bottle beat_block_hammer click_alarmclock click_bell grab_roller lift_pot move_can_pot
400 move_pillbottle_pad move_playingcard_away move_stapler_pad pick_diverse_bottles pick_dual_bottles place_a2b_left
400 place_a2b_right place_container_plate place_fan place_mouse_pad place_object_scale place_object_stand
400 place_phone_stand press_stapler rotate_qrcode stamp_seal turn_switch
500 place_bread_skillet place_burger_fries place_empty_cup place_shoe scan_object
600 dump_bin_bigbin handover_mic place_dual_shoes
700 open_laptop place_bread_basket place_can_basket place_object_basket put_object_cabinet shake_bottle
700 shake_bottle_horizontally
800 handover_block place_cans_plasticbox stack_blocks_two
900 hanging_mug stack_bowls_two
1200 blocks_ranking_rgb blocks_ranking_size stack_blocks_three stack_bowls_three
1500 open_microwave
1700 put_bottles_dustbin
"""
STEP_LIMITS = {task: int(line.split()[0]) for line in _LIMITS.split("\n") for task in line.split()[1:]}


class RoboTwinSimulator:
    """One task of a checkout.

    Args:
        root: the checkout.
        task: module and class below ``envs``.
        config: file below ``task_config``, without .yml.
    """

    def __init__(self, root: Path, task: str, config: str) -> None:
        self.root, self.task = root, task
        with self._inside():
            self.arguments = task_arguments(root, task, config)
            self.env: Any = getattr(importlib.import_module(f"envs.{task}"), task)()
            self.describe = importlib.import_module("generate_episode_instructions").generate_episode_descriptions
        self._solved: list[tuple[int, Mapping[str, Any], Any]] = []
        self._next_seed = FIRST_SEED
        self._text = ""

    def reset(self, seed: int, instruction: str | None) -> Seen:
        """Episode ``seed`` (0, 1, …): the scene of the so-many-th seed from 100000 on that the expert solves."""
        with self._inside():
            scene, info, saved = self._scene(seed)
            self.env.setup_demo(now_ep_num=seed, seed=scene, is_test=True, **self.arguments)
            self._text = instruction or self._unseen(scene, info)
            self.env.set_instruction(instruction=self._text)
            self.prepare(scene, saved)
            return self.seen()

    def step(self, command: Mapping[str, np.ndarray]) -> Seen:
        """``take_action(…, 'qpos')``: left arm, left gripper, right arm, right gripper."""
        action = np.concatenate([command[f"/take_action/{arm}_{part}"] for arm in ARMS for part in ("arm", "gripper")])
        with self._inside():
            self.env.take_action(action, action_type="qpos")
            return self.seen()

    def accepts(self, scene: int, saved: Any) -> bool:
        """Whether a scene that the expert has solved is one of the benchmark's."""
        return True

    def prepare(self, scene: int, saved: Any) -> None:
        """What a benchmark built on this one still does before the first observation."""

    def judged(self) -> tuple[bool, bool, dict[str, float]]:
        """(success, over for another reason, numbers of the episode so far)."""
        return bool(self.env.eval_success), False, {}

    def seen(self) -> Seen:
        """``get_obs`` in the embodiment's topics."""
        observation = self.env.get_obs()
        images = {f"/{name}": observation["observation"][name]["rgb"] for name in CAMERAS}
        joints = observation["joint_action"]
        state: dict[str, float] = {}
        for arm in ARMS:
            state |= {f"{arm}_arm_{i}": float(value) for i, value in enumerate(joints[f"{arm}_arm"])}
            state[f"{arm}_gripper"] = float(joints[f"{arm}_gripper"])
        success, over, metrics = self.judged()
        return Seen(images, {"/joint_action": state}, self._text, success, over, metrics)

    def track(self) -> Track | None:
        """Nothing walks."""
        return None

    def close(self) -> None:
        """Closes the scene."""
        with self._inside(), contextlib.suppress(AttributeError):  # before the first reset there is none
            self.env.close_env(clear_cache=True)

    def _scene(self, number: int) -> tuple[int, Mapping[str, Any], Any]:
        """As in eval_policy.py: seeds that are unstable or that the expert does not solve do not count."""
        failed = 0
        while len(self._solved) <= number:
            seed, self._next_seed = self._next_seed, self._next_seed + 1
            info = None
            try:
                self.env.setup_demo(now_ep_num=len(self._solved), seed=seed, is_test=True, **self.arguments)
                info = self.env.play_once()
            except Exception as error:  # the benchmark's own loop skips a seed whatever its expert raises
                reason: Any = error
            else:
                reason = "the expert failed"
            self.env.close_env()
            if info is not None and self.env.plan_success and self.env.check_success():
                saved = getattr(self.env, "_saved_dynamic_motion_info", None)
                if self.accepts(seed, saved):
                    self._solved.append((seed, info["info"], saved))
                    failed = 0
                    continue
                reason = "not accepted"
            failed += 1
            if failed >= GIVE_UP:
                raise UserError(
                    f"{self.root}: the expert of {self.task} solved none of {failed} seeds in a row "
                    f"(last: {' '.join(str(reason).split())}); download the assets again"
                )
        return self._solved[number]

    def _unseen(self, scene: int, info: Mapping[str, Any]) -> str:
        """One of the sentences kept back from training, the same for the same scene."""
        sentences = self.describe(self.task, [info], 100)[0]["unseen"]
        return str(np.random.default_rng(scene).choice(sentences))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """In the checkout's root, with its folders importable and its prints silenced."""
        here = Path.cwd()
        for folder in (self.root, self.root / "description" / "utils", self.root / "script"):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
        os.chdir(self.root)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            os.chdir(here)


def task_arguments(root: Path, task: str, config: str) -> dict[str, Any]:
    """What ``setup_demo`` is given: the task config with cameras and robot filled in, as eval_policy.py does.

    Raises:
        UserError: a file of the checkout is missing.
    """

    def read(path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise UserError(f"{path}: missing; install {INSTALL}")
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))

    arguments = read(root / "task_config" / f"{config}.yml")
    cameras = read(root / "task_config" / "_camera_config.yml")
    robots = read(root / "task_config" / "_embodiment_config.yml")
    head = cameras[arguments["camera"]["head_camera_type"]]
    robot_file = robots[arguments["embodiment"][0]]["file_path"]
    robot = read(root / robot_file / "config.yml")
    return {
        **arguments,
        "task_name": task,
        "task_config": config,
        "head_camera_h": head["h"],
        "head_camera_w": head["w"],
        "left_robot_file": robot_file,
        "right_robot_file": robot_file,
        "left_embodiment_config": robot,
        "right_embodiment_config": robot,
        "dual_arm_embodied": True,
        "eval_mode": True,
        "render_freq": 0,
    }


def checkout(variable: str, install: str) -> Path:
    """The folder that an environment variable names.

    Raises:
        UserError: it is not set, or holds no checkout with its assets.
    """
    problem = checkout_problem(variable, install)
    if problem is not None:
        raise UserError(f"install {problem}")
    return Path(os.environ[variable]).resolve()


def checkout_problem(variable: str, install: str) -> str | None:
    """Why ``checkout`` would fail."""
    value = os.environ.get(variable)
    if not value:
        return f"{install}  ({variable} is not set)"
    for needed in ("envs/_base_task.py", "task_config/_eval_step_limit.yml", "assets/embodiments/aloha-agilex"):
        if not (Path(value) / needed).exists():
            return f"{install}  ({variable}={value} has no {needed})"
    return None


class RoboTwinSuite:
    """``--suite robotwin``."""

    name = "robotwin"
    title = "RoboTwin 2.0, 50 two-armed tasks"
    embodiment = ROBOT
    axes: ClassVar[Mapping[str, str]] = {
        "easy": "demo_clean: bare table, one light",
        "hard": "demo_randomized: clutter, backgrounds, lights, table height",
    }
    configs: ClassVar[Mapping[str, str]] = {"easy": "demo_clean", "hard": "demo_randomized"}
    tasks: tuple[str, ...] = tuple(sorted(STEP_LIMITS))
    metrics: tuple[str, ...] = ()
    protocol = PublishedProtocol(
        source="RoboTwin 2.0, arXiv 2506.18088; github.com/RoboTwin-Platform/RoboTwin stable_2.0 at 13c3c47, "
        "script/eval_policy.py and task_config/",
        tag="X",
        trials_per_task=100,
        horizon_steps=STEP_LIMITS,
        control_hz=16.667,
        seeds="from 100000 upwards; seeds that are unstable or that the scripted expert does not solve are skipped",
        success="check_success of the task at any simulation step",
        preprocessing=(
            "three cameras D435 at 320×240, RGB",
            "action: 14 absolute values in the order left arm, left gripper, right arm, right gripper; a path to each "
            "target is planned (TOPP)",
            "instruction: one of the task's sentences of kind unseen",
        ),
        deviations=("the unseen sentence is drawn from the scene's seed, not from the global generator",),
    )

    def missing(self) -> str | None:
        """Modules, then the checkout."""
        return missing_modules(MODULES, INSTALL) or checkout_problem("ROBOTWIN_PATH", INSTALL)

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Episodes are numbered from 0 on, whatever ``seed``: which scenes they are is the benchmark's rule."""
        return [Trial(axis, task, i) for axis in self.axes for task in self.tasks for i in range(episodes)]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """A task with the configuration of its axis."""
        root = checkout("ROBOTWIN_PATH", INSTALL)
        simulator = RoboTwinSimulator(root, trial.task, self.configs[trial.axis])
        return ExternalWorld(suite_embodiment(ROBOT), simulator, self.protocol.horizon(trial.task))

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """Nothing beside the benchmark's own judgement."""
        return ()
