"""Demonstrations come back as they were written, resume where they stopped, and say so when a file is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_vla_core.data.episodes import Episode, EpisodeStore, read_episode, write_episode, write_index
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.demos import DemoConfig, NoiseConfig, generate, record
from qwen_vla_core.sim.worlds.aloha import AlohaWorld

PICK = DemoConfig(world="aloha", tasks=("pick",))


def made_up(seed: int = 7, steps: int = 5) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        images={v: rng.integers(0, 256, (steps, 12, 16, 3), dtype=np.uint8) for v in ("ego", "wrist")},
        state=rng.normal(size=(steps, 14)).astype(np.float32),
        action=rng.normal(size=(steps, 14)).astype(np.float32),
        perturbed=np.array([False, False, True, False, False])[:steps],
        instruction="pick up the red cube",
        seed=seed,
        success=True,
        info={"task": "pick", "target": "red"},
        scenes=[{"step": i} for i in range(steps)],
    )


def assert_same(one: Episode, two: Episode) -> None:
    """Every bit of two episodes agrees."""
    assert set(one.images) == set(two.images)
    arrays = [(one.images[view], two.images[view]) for view in one.images]
    arrays += [(getattr(one, name), getattr(two, name)) for name in ("state", "action", "perturbed")]
    for a, b in arrays:
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert all(getattr(one, n) == getattr(two, n) for n in ("instruction", "seed", "success", "info", "scenes"))


def test_an_episode_comes_back_bit_identical(tmp_path: Path) -> None:
    episode = made_up()
    entry = write_episode(tmp_path, episode)
    write_index(tmp_path, [entry], [], {"embodiment": "aloha"})
    store = EpisodeStore(tmp_path)
    assert len(store) == 1 and store.steps == 5 and store.index["embodiment"] == "aloha"
    assert_same(store[0], episode)


def test_chunks_hold_at_the_end_and_mask_what_a_push_made_unforeseeable() -> None:
    episode = made_up()
    actions, valid = episode.chunk(0, 8)
    np.testing.assert_array_equal(actions[:5], episode.action)
    np.testing.assert_array_equal(actions[5:], np.tile(episode.action[-1], (3, 1)))
    # Step 2 is pushed: its own action is still the expert's answer to step 0's future, what follows is not.
    assert valid.tolist() == [True, True, True, False, False, False, False, False]
    assert episode.chunk(2, 3)[1].tolist() == [True, False, False]
    assert episode.chunk(3, 8)[1].all()


def test_recorded_actions_replay_to_success(world: AlohaWorld) -> None:
    """The stored 10 Hz actions, interpolated as the controller does, are the whole demonstration."""
    episode = record(world, "aloha", 21)
    assert episode.success and not episode.perturbed.any()
    assert episode.images["ego"].shape == (len(episode), 96, 128, 3)
    world.reset(21)
    for t, action in enumerate(episode.action):
        np.testing.assert_allclose(world.state(), episode.state[t], atol=1e-4)
        start = world.command()
        for i in range(1, 6):
            world.step(start + (action - start) * i / 5)
    assert world.success()


def test_pushed_episodes_differ_are_marked_and_still_succeed(world: AlohaWorld) -> None:
    often = NoiseConfig(start=0.5)
    pushed = [record(world, "aloha", seed, noise=1.0, pushes=often) for seed in range(2)]
    assert all(episode.perturbed.any() and episode.info["pushed"] for episode in pushed)
    assert sum(episode.success for episode in pushed) >= 1
    again = record(world, "aloha", 0, noise=1.0, pushes=often)
    np.testing.assert_array_equal(again.action, pushed[0].action)


def test_generation_resumes_without_writing_again(tmp_path: Path) -> None:
    assert generate(tmp_path, PICK, 2) == (2, 0)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("episode_*")}
    (tmp_path / "dataset.json").unlink()  # as after a crash before the index was written
    assert generate(tmp_path, PICK, 3) == (3, 0)
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in written} == written
    assert [entry["seed"] for entry in EpisodeStore(tmp_path).entries] == [0, 1, 2]


def test_a_damaged_episode_is_written_again_on_resume(tmp_path: Path) -> None:
    generate(tmp_path, PICK, 1)
    path = tmp_path / "episode_00000000.safetensors"
    whole, content = read_episode(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    generate(tmp_path, PICK, 1)
    assert_same(read_episode(path), whole)


def test_other_settings_are_refused_in_the_same_folder(tmp_path: Path) -> None:
    generate(tmp_path, PICK, 1)
    with pytest.raises(UserError, match=r"--out .*noise"):
        generate(tmp_path, DemoConfig(world="aloha", tasks=("pick",), noise=0.5), 2)


def test_spawned_workers_write_what_one_process_writes(tmp_path: Path) -> None:
    generate(tmp_path / "one", PICK, 2)
    generate(tmp_path / "two", PICK, 2, workers=2)
    one, two = EpisodeStore(tmp_path / "one"), EpisodeStore(tmp_path / "two")
    assert one.index == two.index and len(one) == 2
    for episode, other in zip(one, two, strict=True):
        assert_same(episode, other)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "foreign"])
def test_damaged_episodes_give_one_clear_line(tmp_path: Path, damage: str) -> None:
    entry = write_episode(tmp_path, made_up())
    write_index(tmp_path, [entry], [], {})
    path = tmp_path / entry["file"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not an episode")
    elif damage == "missing":
        path.unlink()
    else:
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(3)}, path)
    with pytest.raises(UserError, match=path.name) as caught:
        EpisodeStore(tmp_path)[0]
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / write_episode(tmp_path, made_up())["file"]
    with safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["png.ego"] = np.zeros_like(tensors["png.ego"])
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="picture"):
        read_episode(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"version": 99, "episodes": []})])
def test_damaged_indexes_give_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        EpisodeStore(tmp_path)
    with pytest.raises(UserError, match="qwen-vla sim demos"):
        EpisodeStore(tmp_path / "empty")
