"""Demonstrations are the expert's, resume where they stopped, and do not depend on the number of workers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.data.dataset import EpisodeRows
from qwen_vla_core.data.lerobot import LeRobotDataset
from qwen_vla_core.data.lerobot.staging import STAGING
from qwen_vla_core.embodiment import Embodiment, load_embodiment
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim import demos
from qwen_vla_core.sim.demonstration import read_demonstration
from qwen_vla_core.sim.demos import SETTINGS, DemoConfig, NoiseConfig, generate, record
from qwen_vla_core.sim.worlds.aloha import AlohaWorld

PICK = DemoConfig(world="aloha", tasks=("pick",))


@pytest.fixture(scope="module")
def aloha() -> Embodiment:
    return load_embodiment("aloha")


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def seeds(path: Path) -> list[int]:
    return [info["seed"] for info in LeRobotDataset(path).infos]


def test_chunks_hold_at_the_end_where_asked_and_mask_what_a_push_made_unforeseeable() -> None:
    action = np.arange(10, dtype=np.float32).reshape(5, 2)
    pushed = np.array([False, False, True, False, False])
    rows = EpisodeRows(action, action, np.arange(5) / 10, np.zeros(5, np.int64), pushed)
    actions, valid = rows.chunk(0, 8, hold_at_end=True)
    # Step 2 is pushed: its own action is still the expert's answer to step 0's future, what follows is not.
    assert valid.tolist() == [True, True, True, False, False, False, False, False]
    np.testing.assert_array_equal(actions[:3], action[:3])
    assert rows.chunk(2, 3, hold_at_end=True)[1].tolist() == [True, False, False]
    actions, valid = rows.chunk(3, 8, hold_at_end=True)
    assert valid.all()
    np.testing.assert_array_equal(actions, np.concatenate([action[3:], np.tile(action[-1], (6, 1))]))
    assert rows.chunk(3, 8)[1].tolist() == [True, True] + [False] * 6


def test_recorded_actions_replay_to_success(world: AlohaWorld) -> None:
    """The stored 10 Hz actions, interpolated as the controller does, are the whole demonstration."""
    made = record(world, "aloha", 21)
    assert made.success and not made.rows.perturbed.any()
    assert made.images["ego"].shape == (len(made), 96, 128, 3)
    world.reset(21)
    for t, action in enumerate(made.rows.action):
        np.testing.assert_allclose(world.state(), made.rows.state[t], atol=1e-4)
        start = world.command()
        for i in range(1, 6):
            world.step(start + (action - start) * i / 5)
    assert world.success()


def test_pushed_episodes_differ_are_marked_and_still_succeed(world: AlohaWorld) -> None:
    often = NoiseConfig(start=0.5)
    pushed = [record(world, "aloha", seed, noise=1.0, pushes=often) for seed in range(2)]
    assert all(made.rows.perturbed.any() and made.info["pushed"] for made in pushed)
    assert sum(made.success for made in pushed) >= 1
    again = record(world, "aloha", 0, noise=1.0, pushes=often)
    np.testing.assert_array_equal(again.rows.action, pushed[0].rows.action)


def test_what_is_dropped_falls_and_is_brought_after_all() -> None:
    arms = AlohaWorld(tasks=("transfer",))
    try:
        heights = []
        for seed in (60001, 60002):
            made = record(arms, "aloha", seed, noise=1.0, pushes=NoiseConfig(drop=1.0))
            assert made.success
            scenes = [json.loads(text) for text in made.rows.extra["scene"]]
            cubes = ({cube["colour"]: cube for cube in scene["cubes"]}[scene["target"]] for scene in scenes)
            heights.append([cube["position"][2] for cube in cubes])
    finally:
        arms.close()
    for height in heights:
        lifted = next(i for i, z in enumerate(height) if z > 0.06)
        assert min(height[lifted:]) < 0.03 and height[-1] > 0.2


def test_a_base_that_is_to_drop_something_is_refused(tmp_path: Path) -> None:
    config = DemoConfig(world="rooms", tasks=("goto",), noise=1.0, drops=0.5)
    with pytest.raises(UserError, match="--drops: a mobile base holds nothing"):
        generate(tmp_path, config, load_embodiment("mobile_base"), 1)


class Scripted:
    """Stands where a loaded policy does: drives until a given time, always to the same command."""

    def __init__(self, until_s: float, away: float) -> None:
        self.until_s, self.away, self.begun = until_s, away, list[float | None]()

    def begin(self, seed: int, limit_s: float, sooner_than_s: float | None = None) -> None:
        self.begun.append(sooner_than_s)
        if sooner_than_s is not None:
            self.until_s = 0.5 * sooner_than_s

    def drives(self, time_s: float) -> bool:
        return time_s < self.until_s

    def action(self, world: AlohaWorld, images: dict[str, np.ndarray]) -> np.ndarray:
        assert images["ego"].shape == (192, 256, 3)
        return world.command() + self.away


def test_the_expert_takes_over_from_a_policy_and_finishes(world: AlohaWorld) -> None:
    pilot = Scripted(until_s=0.8, away=0.02)
    made = record(world, "aloha", 21, pilot=pilot)  # type: ignore[arg-type]
    assert made.success and made.rows.perturbed.tolist() == [True] * 8 + [False] * (len(made) - 8)
    assert made.info["expert_from"] == 8 and pilot.begun == [None]
    alone = record(world, "aloha", 21)
    np.testing.assert_array_equal(made.rows.action[0], alone.rows.action[0])  # the label is the expert's from the start
    assert not np.allclose(made.rows.action[8], alone.rows.action[8])
    assert made.rows.chunk(3, 4)[1].tolist() == [True, False, False, False]


def test_an_episode_that_is_over_before_the_experts_turn_is_played_again(
    world: AlohaWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "ended", lambda: world.time_s > 1.0)  # whatever the policy did, it is over
    pilot = Scripted(until_s=5.0, away=0.0)
    made = record(world, "aloha", 21, pilot=pilot)  # type: ignore[arg-type]
    assert pilot.begun == [None, pytest.approx(1.0)]
    assert 0 < made.info["expert_from"] < 8


def test_corrections_of_a_real_policy_are_reproducible_and_name_its_weights(tmp_path: Path, aloha: Embodiment) -> None:
    config = replace(PICK, pilot="generalist")
    assert generate(tmp_path / "a", config, aloha, 1) == (1, 0)
    assert generate(tmp_path / "b", config, aloha, 1) == (1, 0)
    first, second = (read_demonstration(LeRobotDataset(tmp_path / name), 0) for name in "ab")
    np.testing.assert_array_equal(first.rows.action, second.rows.action)
    assert first.rows.perturbed.any() and not first.rows.perturbed.all()
    assert json.loads((tmp_path / "a" / SETTINGS).read_text())["pilot"]
    with pytest.raises(UserError, match="pilot"):
        generate(tmp_path / "a", PICK, aloha, 2)


def test_generation_resumes_without_recording_again(
    tmp_path: Path, aloha: Embodiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed seed and a finished one are not tried again; the dataset is that of one run."""
    assert generate(tmp_path / "a", PICK, aloha, 2) == (2, 0)
    tried = []

    def watched(world: AlohaWorld, name: str, seed: int, **options: float) -> object:
        tried.append(seed)
        return record(world, name, seed, **options)

    monkeypatch.setattr(demos, "record", watched)
    settings = json.loads((tmp_path / "a" / SETTINGS).read_text())
    (tmp_path / "a" / SETTINGS).write_text(json.dumps(settings | {"failed_seeds": [2]}))
    assert generate(tmp_path / "a", PICK, aloha, 3) == (3, 1)
    assert tried == [3] and seeds(tmp_path / "a") == [0, 1, 3]
    read = read_demonstration(LeRobotDataset(tmp_path / "a"), 2)
    assert read.seed == 3 and read.success and len(read.rows.extra["scene"]) == len(read)


def test_a_killed_run_keeps_what_was_complete(
    tmp_path: Path, aloha: Embodiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third episode is written: two episodes stay, and the next run ends as an unbroken one does."""
    generate(tmp_path / "whole", PICK, aloha, 3)

    def killed(world: AlohaWorld, name: str, seed: int, **options: float) -> object:
        if seed == 2:
            raise KeyboardInterrupt
        return record(world, name, seed, **options)

    monkeypatch.setattr(demos, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "cut", PICK, aloha, 3)
    with pytest.warns(UserWarning, match="unfinished"):
        assert seeds(tmp_path / "cut") == [0, 1]
    monkeypatch.setattr(demos, "record", record)
    assert generate(tmp_path / "cut", PICK, aloha, 3) == (3, 0)
    assert seeds(tmp_path / "cut") == [0, 1, 2] and not (tmp_path / "cut" / STAGING).exists()
    whole, cut = LeRobotDataset(tmp_path / "whole"), LeRobotDataset(tmp_path / "cut")
    for episode in range(3):
        one, two = read_demonstration(whole, episode), read_demonstration(cut, episode)
        np.testing.assert_array_equal(one.rows.action, two.rows.action)
        for view, pictures in one.images.items():
            np.testing.assert_array_equal(pictures, two.images[view])


def test_other_settings_are_refused_in_the_same_folder(tmp_path: Path, aloha: Embodiment) -> None:
    generate(tmp_path, PICK, aloha, 1)
    with pytest.raises(UserError, match=r"--out .*noise"):
        generate(tmp_path, DemoConfig(world="aloha", tasks=("pick",), noise=0.5), aloha, 2)
    with pytest.raises(UserError, match=r"--out .*drops=None, now 0\.5"):
        generate(tmp_path, DemoConfig(world="aloha", tasks=("pick",), drops=0.5), aloha, 2)
    assert "drops" not in json.loads((tmp_path / SETTINGS).read_text())  # part of the dataset's hash
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match=r"sim_demos\.json: damaged"):
        generate(tmp_path, PICK, aloha, 2)


def test_spawned_workers_write_what_one_process_writes(tmp_path: Path, aloha: Embodiment) -> None:
    generate(tmp_path / "one", PICK, aloha, 2)
    generate(tmp_path / "two", PICK, aloha, 2, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(seeds(tmp_path / "one")) == 2
    shutil.rmtree(tmp_path / "one")
