"""DOMINO: 35 of RoboTwin's tasks with moving objects; success and manipulation score by the benchmark's own code.

Written against github.com/H-EmbodVis/DOMINO, commit 9fd1271 (script/eval_policy.py, script/eval_metrics.py), a fork of
RoboTwin 2.0; the checkout is named by ``DOMINO_PATH``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qwen_vla_core.evaluation.suites.external import ExternalWorld, missing_modules, suite_embodiment
from qwen_vla_core.evaluation.suites.protocol import PublishedProtocol, Trial, Watcher
from qwen_vla_core.evaluation.suites.robotwin import (
    MODULES,
    ROBOT,
    STEP_LIMITS,
    RoboTwinSimulator,
    checkout,
    checkout_problem,
)

INSTALL = (
    "DOMINO (NVIDIA GPU, Python 3.10): git clone https://github.com/H-EmbodVis/DOMINO && cd DOMINO && "
    "bash script/_install.sh && bash script/_download_assets.sh (RoboTwin 2.0's assets), then export "
    "DOMINO_PATH=<that folder>"
)
_STATIC = """
blocks_ranking_rgb blocks_ranking_size lift_pot open_laptop open_microwave pick_diverse_bottles pick_dual_bottles
place_burger_fries place_cans_plasticbox place_dual_shoes stack_blocks_three stack_blocks_two stack_bowls_three
stack_bowls_two turn_switch
"""  # of RoboTwin's tasks, those that have no get_dynamic_motion_config
TASKS = tuple(sorted(set(STEP_LIMITS) - set(_STATIC.split())))


class DominoSimulator(RoboTwinSimulator):
    """A task in motion: the object moves as it did for the expert, slowed to the policy's steps, until the grasp."""

    def __init__(self, root: Path, task: str, config: str) -> None:
        super().__init__(root, task, config)
        with self._inside():
            self.tracker_type: Any = importlib.import_module("eval_metrics").EvalMetricsTracker
        self._scene_seed = 0

    def accepts(self, scene: int, saved: Any) -> bool:
        """Seeds whose motion cannot be continued beyond the expert's grasp do not count."""
        self.env.setup_demo(now_ep_num=0, seed=scene, is_test=True, **self.arguments)
        self.env._saved_dynamic_motion_info = saved
        accepted = bool(self.env.init_dynamic_motion_for_eval())
        self.env.close_env()
        return accepted

    def prepare(self, scene: int, saved: Any) -> None:
        """Starts the motion, then the benchmark's measurement."""
        self._scene_seed = scene
        self.env._saved_dynamic_motion_info = saved
        self.env.init_dynamic_motion_for_eval()
        config: dict[str, Any] = self.env.get_dynamic_motion_config() or {}
        self._least_lift = config.get("check_z_threshold")
        self._stops_on_contact = config.get("stop_on_contact", True)
        self._lifted = self._least_lift is None
        if not self._lifted:
            self._lifted_actor = config["check_z_actor" if "check_z_actor" in config else "target_actor"]
            self._start_z = float(self._lifted_actor.get_pose().p[2])
        self._failure: str | None = None
        self._tracker = self.tracker_type(self.env, self.arguments)
        self._tracker.on_episode_start()
        self.env._metrics_tracker = self._tracker

    def judged(self) -> tuple[bool, bool, dict[str, float]]:
        """The rules of eval_policy.py: lifted where that is asked for, never out of bounds before it is grasped."""
        env = self.env
        if not self._lifted:
            self._lifted = float(self._lifted_actor.get_pose().p[2]) - self._start_z > float(self._least_lift or 0.0)
        success = bool(env.eval_success) and self._lifted
        if env.eval_success and not self._lifted:
            self._failure = "object_not_lifted"
        elif not success and self._failure is None:
            if self._stops_on_contact and env.check_gripper_contact_dynamic_object():
                env.stop_dynamic_object_motion()
            if not getattr(env, "_dynamic_object_stopped", False) and not env.check_dynamic_object_boundary():
                self._failure = "out_of_bounds"
                self._tracker.record_out_of_bounds()
        measured = self._tracker.get_episode_metrics(success, self._failure, seed=self._scene_seed)
        metrics = {
            "manipulation_score": float(measured.manipulation_score),
            "route_completion": float(measured.route_completion),
        }
        return success, self._failure is not None, metrics


class DominoSuite:
    """``--suite domino``."""

    name = "domino"
    title = "DOMINO, 35 two-armed tasks with moving objects"
    embodiment = ROBOT
    axes: ClassVar[Mapping[str, str]] = {
        "clean": "demo_clean_dynamic: level 1, coefficient 0.1, bare table",
        "random": "demo_random_dynamic: level 1, coefficient 0.1, RoboTwin's randomisation",
    }
    configs: ClassVar[Mapping[str, str]] = {"clean": "demo_clean_dynamic", "random": "demo_random_dynamic"}
    tasks: tuple[str, ...] = TASKS
    metrics: tuple[str, ...] = ("manipulation_score", "route_completion")
    protocol = PublishedProtocol(
        source="DOMINO, arXiv 2603.15620; github.com/H-EmbodVis/DOMINO at 9fd1271, script/eval_policy.py and "
        "script/eval_metrics.py",
        tag="X",
        trials_per_task=100,
        horizon_steps={task: STEP_LIMITS[task] for task in TASKS},
        control_hz=16.667,
        seeds="as RoboTwin: from 100000 upwards, those that the expert solves",
        success="check_success, the object lifted where the task asks for it, and not out of bounds before a grasp",
        preprocessing=(
            "as RoboTwin",
            "manipulation score: route completion (0…100; 100 on success) × 0.5 out of bounds × 0.8 per clutter hit",
        ),
        deviations=(
            "lift and bounds are looked at after every action, the benchmark's script looks after every chunk",
            "the paper says zero-shot, but not which of the two configurations its numbers are from",
        ),
    )

    def missing(self) -> str | None:
        """Modules, then the checkout."""
        return missing_modules(MODULES, INSTALL) or checkout_problem("DOMINO_PATH", INSTALL)

    def trials(self, episodes: int, seed: int) -> Sequence[Trial]:
        """Numbered from 0 on, as RoboTwin's."""
        return [Trial(axis, task, i) for axis in self.axes for task in self.tasks for i in range(episodes)]

    def make_world(self, trial: Trial) -> ExternalWorld:
        """A task with the configuration of its axis."""
        simulator = DominoSimulator(checkout("DOMINO_PATH", INSTALL), trial.task, self.configs[trial.axis])
        return ExternalWorld(suite_embodiment(ROBOT), simulator, self.protocol.horizon(trial.task))

    def watch(self, world: Any, trial: Trial) -> Sequence[Watcher]:
        """The benchmark measures itself."""
        return ()
