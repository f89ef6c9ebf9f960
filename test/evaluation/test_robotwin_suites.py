"""RoboTwin and DOMINO against a checkout with the files and classes of stable_2.0 at 13c3c47 and of 9fd1271."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qwen_vla_core.errors import UserError
from qwen_vla_core.evaluation.suites import robotwin
from qwen_vla_core.evaluation.suites.domino import DominoSimulator
from qwen_vla_core.evaluation.suites.external import ExternalWorld, suite_embodiment

TASK = """
import numpy as np
class beat_block_hammer:
    def __init__(self): self.log = []
    def setup_demo(self, now_ep_num=0, seed=0, is_test=False, **kw):
        assert kw["eval_mode"] and kw["left_robot_file"] == kw["right_robot_file"] and kw["dual_arm_embodied"]
        assert kw["head_camera_h"] == 240 and kw["domain_randomization"]["cluttered_table"] is False
        if seed % 3 == 1: raise ValueError("unstable")
        self.seed, self.plan_success, self.eval_success, self.done = seed, seed % 3 != 2, False, 0
    def play_once(self): return {"info": {"{A}": "020_hammer/base0"}}
    def check_success(self): return True
    def close_env(self, clear_cache=False): self.log.append("closed")
    def set_instruction(self, instruction=None): self.instruction = instruction
    def get_obs(self):
        cameras = {name: {"rgb": np.full((240, 320, 3), i, np.uint8)} for i, name in enumerate(
            ("head_camera", "left_camera", "right_camera"))}
        return {"observation": cameras, "joint_action": {
            "left_arm": [0.1] * 6, "left_gripper": 1.0, "right_arm": [0.2] * 6, "right_gripper": 0.5}}
    def take_action(self, action, action_type="qpos"):
        print("step")
        self.taken, self.done = np.array(action), self.done + 1
        self.eval_success = self.done == 2
"""
MOVING = """
import numpy as np
from types import SimpleNamespace
from envs.still import beat_block_hammer as Still
class Actor:
    z = 0.75
    def get_pose(self): return SimpleNamespace(p=np.array([0.0, 0.0, self.z]))
class beat_block_hammer(Still):
    def setup_demo(self, **kw):
        assert kw["use_dynamic"] is True
        super().setup_demo(**{**kw, "eval_mode": True})
        self.actor, self._dynamic_object_stopped, self.out = Actor(), False, False
    def play_once(self):
        self._saved_dynamic_motion_info = {"of": self.seed}
        return super().play_once()
    def init_dynamic_motion_for_eval(self): return self._saved_dynamic_motion_info["of"] != 100002
    def get_dynamic_motion_config(self): return {"target_actor": self.actor, "check_z_threshold": 0.03}
    def check_gripper_contact_dynamic_object(self): return False
    def check_dynamic_object_boundary(self): return not self.out
"""
METRICS = """
from types import SimpleNamespace
class EvalMetricsTracker:
    def __init__(self, env, args): self.lost = False
    def on_episode_start(self): pass
    def record_out_of_bounds(self): self.lost = True
    def get_episode_metrics(self, success, fail_reason=None, seed=None):
        return SimpleNamespace(manipulation_score=100.0 * success + 20.0 * (not success) * (0.5 if self.lost else 1),
                               route_completion=100.0 if success else 20.0)
"""


@pytest.fixture
def benchmark_checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder laid out as RoboTwin's and DOMINO's; what was imported from it is forgotten afterwards."""
    files = {
        "envs/_base_task.py": "",
        "envs/__init__.py": "",
        "envs/still.py": TASK,
        "envs/beat_block_hammer.py": "from envs.still import beat_block_hammer\n",
        "description/utils/generate_episode_instructions.py": (
            "def generate_episode_descriptions(task, episodes, n):\n"
            "    return [{'seen': ['s'], 'unseen': [f'hit it {i}' for i in range(9)]}]\n"
        ),
        "script/eval_metrics.py": METRICS,
        "task_config/_eval_step_limit.yml": "beat_block_hammer: 400\n",
        "task_config/_camera_config.yml": "D435: {fovy: 37, w: 320, h: 240}\n",
        "task_config/_embodiment_config.yml": "aloha-agilex: {file_path: ./assets/embodiments/aloha-agilex/}\n",
        "assets/embodiments/aloha-agilex/config.yml": "arm_joints_name: [[a], [b]]\n",
    }
    config = {
        "embodiment": ["aloha-agilex"],
        "camera": {"head_camera_type": "D435"},
        "domain_randomization": {"cluttered_table": False},
    }
    files["task_config/demo_clean.yml"] = yaml.safe_dump(config)
    files["task_config/demo_clean_dynamic.yml"] = yaml.safe_dump({**config, "use_dynamic": True})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("envs", "generate_episode_instructions", "eval_metrics"):
            del sys.modules[name]


def test_robotwin(benchmark_checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = Path.cwd()
    simulator = robotwin.RoboTwinSimulator(benchmark_checkout, "beat_block_hammer", "demo_clean")
    world = ExternalWorld(suite_embodiment("robotwin"), simulator, 400)
    world.reset(2)
    # 100000 % 3 == 1 is unstable, 100001 fails its expert, so episode 2 is the third of 100002, 100005, 100008 …
    assert simulator.env.seed == 100_008 and world.instruction.startswith("hit it ")
    first = world.instruction
    np.testing.assert_allclose(world.state(), [0.1] * 6 + [1.0] + [0.2] * 6 + [0.5])
    assert [int(world.render(view, 320, 240)[0, 0, 0]) for view in world.views] == [0, 1, 2]
    action = np.arange(14) / 20
    world.step(action)
    np.testing.assert_allclose(simulator.env.taken, action)
    assert not world.success()
    world.step(action)
    assert world.success()
    world.reset(2)
    assert world.instruction == first  # the same scene is the same sentence
    world.reset(0, "do nothing")
    assert simulator.env.seed == 100_002 and simulator.env.instruction == "do nothing" == world.instruction
    world.close()
    assert Path.cwd() == here and "step" not in capfd.readouterr().out


def test_a_robotwin_whose_expert_never_succeeds_is_told(benchmark_checkout: Path, monkeypatch: Any) -> None:
    simulator = robotwin.RoboTwinSimulator(benchmark_checkout, "beat_block_hammer", "demo_clean")
    monkeypatch.setattr(robotwin, "GIVE_UP", 6)
    monkeypatch.setattr(type(simulator.env), "check_success", lambda self: False)
    with pytest.raises(UserError, match=r"solved none of 6 seeds in a row .*download the assets again"):
        simulator.reset(0, None)


def test_domino(benchmark_checkout: Path) -> None:
    (benchmark_checkout / "envs" / "beat_block_hammer.py").write_text(MOVING)
    simulator = DominoSimulator(benchmark_checkout, "beat_block_hammer", "demo_clean_dynamic")
    world = ExternalWorld(suite_embodiment("robotwin"), simulator, 400)
    world.reset(0)
    assert simulator.env.seed == 100_005  # the motion of 100002 cannot be continued
    action = world.command()
    world.step(action)
    assert not world.ended() and world.metrics() == {"manipulation_score": 20.0, "route_completion": 20.0}
    world.step(action)
    assert world.ended() and not world.success()  # the benchmark says success, but the object was not lifted
    world.reset(0)
    world.step(action)
    simulator.env.actor.z += 0.04
    world.step(action)
    assert world.success() and world.metrics()["manipulation_score"] == 100.0
    world.reset(0)
    simulator.env.out = True
    world.step(action)
    assert world.ended() and not world.success() and world.metrics()["manipulation_score"] == 10.0


def test_a_checkout_without_its_assets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBOTWIN_PATH", raising=False)
    assert "(ROBOTWIN_PATH is not set)" in str(robotwin.checkout_problem("ROBOTWIN_PATH", robotwin.INSTALL))
    monkeypatch.setenv("ROBOTWIN_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"install RoboTwin 2.0 .*has no envs/_base_task.py"):
        robotwin.checkout("ROBOTWIN_PATH", robotwin.INSTALL)
