"""Batches are the same whoever makes them and whenever; chunks end where episodes end; mistakes arrive as one line."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from loader_support import PUBLISHED, open_memory, small_recipe, write_recipe
from memory_dataset import MemoryDataset, healthy

from qwen_vla_core.data import loader as loader_module
from qwen_vla_core.data import shared
from qwen_vla_core.data.lerobot import LeRobotWriter
from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Draw, Mixture, SampleForm
from qwen_vla_core.data.mixture_recipe import load_mixture
from qwen_vla_core.data.sample_maker import SampleMaker, SampleOptions, SourceReference
from qwen_vla_core.data.samples import ActionSample, Sample, SampleBatch, TextSample
from qwen_vla_core.data.sampling import step_runs
from qwen_vla_core.errors import UserError

PREFIX = f"qwen_vla_{os.getpid()}_"
OPTIONS = SampleOptions(frames=2, frame_stride=3, size=(24, 24), jitter=1.0)


def blocks() -> set[str]:
    """Names of the shared memory of this process's loaders."""
    return {path.name for path in Path("/dev/shm").glob(f"{PREFIX}*")}


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    before = blocks()
    yield
    assert blocks() <= before


def assert_same(a: Sample, b: Sample) -> None:
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "images":
            assert list(left) == list(right)
            for view in left:
                np.testing.assert_array_equal(left[view], right[view])
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


def assert_same_batches(first: list[SampleBatch], second: list[SampleBatch]) -> None:
    assert [batch.step for batch in first] == [batch.step for batch in second]
    for a, b in zip(first, second, strict=True):
        for left, right in zip(a.samples, b.samples, strict=True):
            assert_same(left, right)


def test_batches_do_not_depend_on_workers_or_on_where_training_resumed(tmp_path: Path) -> None:
    mixture = Mixture(small_recipe(tmp_path), open_memory)
    with MixtureLoader(mixture, OPTIONS) as alone:
        expected = list(alone.batches(0, 9))
    assert {type(sample) for sample in expected[0].samples} == {ActionSample, TextSample}
    for workers, first in ((1, 4), (2, 0)):
        with MixtureLoader(Mixture(mixture.recipe, open_memory), OPTIONS, workers=workers, prefetch=1) as loader:
            batches = list(loader.batches(first, 9 - first))
        assert_same_batches(batches, expected[first:])
        if workers == 2:  # writable, and alive after the workers are gone
            next(iter(batches[0].samples[0].images.values()))[:] = 0
    with MixtureLoader(mixture, OPTIONS) as loader:
        assert_same(loader.batch(5).samples[2], expected[5].samples[2])


def test_ranks_share_a_batch_without_overlap(tmp_path: Path) -> None:
    mixture = Mixture(small_recipe(tmp_path), open_memory)
    parts = [MixtureLoader(mixture, rank=rank, world=3) for rank in range(3)]
    for step in range(4):
        drawn = [draw for part in parts for draw in part.draws(step)]
        assert sorted(drawn) == sorted(mixture.draws(step))
        assert max(len(part.draws(step)) for part in parts) - min(len(part.draws(step)) for part in parts) <= 1


def make(
    data: MemoryDataset, t: int, episode: int = 0, form: SampleForm | None = None, **options: object
) -> ActionSample:
    maker = SampleMaker(
        [SourceReference(Path("there"), "manipulation", None, "pair", form or SampleForm())],
        open_memory,
        SampleOptions(**options),  # type: ignore[arg-type]
        opened={0: data},
    )
    sample = maker.make(Draw(0, episode, t, 5))
    assert isinstance(sample, ActionSample)
    return sample


def test_a_window_at_the_end_is_masked_and_nothing_is_repeated_silently() -> None:
    data = healthy(1, steps=12)
    for t in range(12):
        sample = make(data, t)
        real = min(8, 12 - t)
        assert sample.step_mask_h.tolist() == [True] * real + [False] * (8 - real)
        np.testing.assert_array_equal(sample.actions_hc[:real], data.episodes[0].action[t : t + real])
        np.testing.assert_array_equal(sample.state, data.episodes[0].state[t])
        np.testing.assert_array_equal(sample.images["ego"][0], data.pictures[0]["ego"][t])


def test_a_window_ends_at_a_push_and_at_a_new_instruction() -> None:
    data = healthy(1, steps=12)
    rows = data.episodes[0]
    data.episodes[0] = dataclasses.replace(rows, perturbed=np.arange(12) == 3)
    assert make(data, 1).step_mask_h.tolist() == [True] * 3 + [False] * 5
    data.episodes[0] = dataclasses.replace(rows, task=np.repeat([0, 1], [5, 7]))
    before, after = make(data, 4), make(data, 5)
    assert before.step_mask_h.tolist() == [True] + [False] * 7
    assert (before.instruction, after.instruction) == (data.tasks[0], data.tasks[1])
    assert after.step_mask_h.sum() == 7


def test_earlier_frames_come_first_and_the_beginning_has_only_its_first_frame() -> None:
    data = healthy(1, steps=12)
    film = data.pictures[0]["ego"]
    for t, steps in ((10, [4, 7, 10]), (4, [0, 1, 4]), (0, [0, 0, 0])):
        sample = make(data, t, frames=3, frame_stride=3)
        np.testing.assert_array_equal(sample.images["ego"], film[steps])


def test_relative_conventions_are_relative_to_the_first_frame() -> None:
    data = healthy(1, steps=12)
    data.contract = dataclasses.replace(data.contract, convention="relative_joint")
    rows, sample = data.episodes[0], make(data, 3)
    joints, grippers = [0, 1, 3, 4], [2, 5]
    moved = rows.action[3:11].astype(np.float64) - rows.state[3]
    np.testing.assert_array_equal(sample.actions_hc[:, joints], moved[:, joints].astype(np.float32))
    np.testing.assert_array_equal(sample.actions_hc[:, grippers], rows.action[3:11][:, grippers])
    assert sample.actions_hc.dtype == np.float32


def test_text_to_action_has_the_whole_sequence_and_no_pictures() -> None:
    data = healthy(1, steps=30)
    sample = make(data, 0, form=SampleForm(whole=True))
    assert sample.images == {} and sample.step_mask_h.all()
    np.testing.assert_array_equal(sample.actions_hc, data.episodes[0].action)


def test_size_and_jitter_are_functions_of_the_draw(tmp_path: Path) -> None:
    data = healthy(1, steps=12)
    plain, jittered, again = make(data, 3, size=(24, 16)), make(data, 3, jitter=1.0), make(data, 3, jitter=1.0)
    assert plain.images["ego"].shape == (1, 16, 24, 3)
    np.testing.assert_array_equal(jittered.images["ego"], again.images["ego"])
    assert (jittered.images["ego"] != data.pictures[0]["ego"][3]).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_one_line_that_names_it_and_the_loader_goes_on(tmp_path: Path, workers: int) -> None:
    mixture = Mixture(small_recipe(tmp_path, broken=[0]), open_memory)
    bad = [any(d.source == 0 and d.episode == 0 for d in mixture.draws(step)) for step in range(20)]
    first_bad, first_good = bad.index(True), bad.index(False)
    with MixtureLoader(mixture, workers=workers) as loader:
        with pytest.raises(UserError, match=r"^\S*pair\.json: episode 0 of view ego cannot be decoded$"):
            list(loader.batches(first_bad, 3))
        assert next(loader.batches(first_good, 1)).step == first_good


@pytest.mark.parametrize("what", ["state", "action"])
def test_numbers_that_are_not_finite_never_reach_training(what: str) -> None:
    data = healthy(1, steps=12)
    values = getattr(data.episodes[0], what).copy()
    values[4, 1] = np.nan
    data.episodes[0] = dataclasses.replace(data.episodes[0], **{what: values})
    with pytest.raises(UserError, match="there: episode 0, step 4: an action or a state is not finite"):
        make(data, 4)
    assert make(data, 5)


def test_a_convention_whose_channels_are_not_measured_names_the_dataset() -> None:
    data = healthy(1, steps=12)
    data.contract = dataclasses.replace(data.contract, convention="relative_joint", state=())
    with pytest.raises(UserError, match=r"there: convention relative_joint: action channel 'left_shoulder'.*missing"):
        make(data, 0)


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    with MixtureLoader(Mixture(small_recipe(tmp_path), open_memory), workers=1) as loader:
        batches = loader.batches()
        next(batches)
        assert loader._pool is not None
        os.kill(next(iter(loader._pool._processes)), signal.SIGKILL)
        with pytest.raises(UserError, match="one of 1 worker processes died"):
            for _ in batches:
                pass
        assert blocks() == set()


def test_a_block_of_a_worker_killed_before_it_had_a_size_is_freed() -> None:
    whole = shared.pack([make(healthy(1), 0)], f"{PREFIX}swept_")
    empty = Path("/dev/shm") / f"{PREFIX}swept_empty"
    empty.touch()
    assert blocks() == {whole.block, empty.name}
    shared.sweep(f"{PREFIX}swept_")
    assert blocks() == set()


def test_stopping_early_frees_what_was_made_ahead(tmp_path: Path) -> None:
    before = blocks()
    with MixtureLoader(Mixture(small_recipe(tmp_path), open_memory), workers=1, prefetch=3) as loader:
        batches = loader.batches()
        kept = next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert blocks() <= before
    assert kept.samples[0].images["ego"].any()
    del kept
    gc.collect()


def test_full_shared_memory_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = blocks()
    monkeypatch.setattr(shared.os, "posix_fallocate", full)
    mixture = Mixture(small_recipe(tmp_path), open_memory)
    with pytest.raises(UserError, match=r"no room for a batch .*No space left.*--shm-size"):
        shared.pack(MixtureLoader(mixture).batch(0).samples, PREFIX)
    assert blocks() <= before


def test_samples_without_any_array_travel_too() -> None:
    sample = TextSample({}, (("a", "b"),), "captions", "d", 0)
    assert shared.unpack(shared.pack([sample], PREFIX)) == [sample]
    empty = dataclasses.replace(make(healthy(1), 0), images={"ego": np.zeros((0, 4, 4, 3), np.uint8)})
    assert_same(shared.unpack(shared.pack([empty], PREFIX))[0], empty)


def write_files(folder: Path) -> None:
    """A LeRobot dataset with several episodes in a file, one of them with two instructions; and conversations."""
    data = healthy(4, steps=12)
    split = dataclasses.replace(data.episodes[2], task=np.repeat([0, 1], [5, len(data.episodes[2]) - 5]))
    data.episodes[2] = split
    with LeRobotWriter(folder / "films", data.contract, family="synthetic", views={"ego": (48, 48)}) as writer:
        for rows, frames in zip(data.episodes, data.pictures, strict=True):
            writer.add_episode(rows, data.tasks, frames)
    lines = [
        {"id": i, "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "yes"}]}
        for i in range(3)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_recipe_over_files_opens_them_in_every_worker(tmp_path: Path) -> None:
    write_files(tmp_path)
    recipe = write_recipe(
        tmp_path,
        """
batch_size: 6
families:
  - {name: synthetic, weight: 2, datasets: [{path: films}]}
  - {name: captions, weight: 1, datasets: [{path: texts.jsonl}]}
absent: [manipulation, human, navigation, general_vl, spatial_grounding, driving_vqa]
""",
    )
    mixture = Mixture(load_mixture(recipe))
    films = mixture.sources[0].actions
    runs = step_runs(films)  # metadata tell the tasks of all episodes but the divided one
    assert runs.episode.tolist() == [0, 1, 2, 2, 3]
    assert runs.length.tolist() == [12, 14, 5, 11, 18]
    assert [runs.tasks[task] for task in runs.task] == [films.tasks[films.rows(e).task[0]] for e in (0, 1, 2)] + [
        films.tasks[films.rows(2).task[-1]],
        films.tasks[films.rows(3).task[0]],
    ]
    with MixtureLoader(mixture, OPTIONS) as alone:
        expected = list(alone.batches(0, 4))
    with MixtureLoader(mixture, OPTIONS, workers=2) as loader:
        assert_same_batches(list(loader.batches(0, 4)), expected)
    with MixtureLoader(mixture) as loader:
        batches = list(loader.batches(0, 4))
    for sample in (sample for batch in batches for sample in batch.samples):
        if isinstance(sample, TextSample):
            assert sample.turns == ((f"{sample.index}?", "yes"),)
            continue
        np.testing.assert_array_equal(sample.images["ego"], films.frames(sample.episode, "ego", [sample.t]))
        assert sample.instruction == films.tasks[int(films.rows(sample.episode).task[sample.t])]
        assert (sample.dataset, sample.family, sample.embodiment) == ("films", "synthetic", "pair")


def test_a_video_cut_short_is_named_by_a_worker(tmp_path: Path) -> None:
    write_files(tmp_path)
    text = """
batch_size: 4
families: [{name: synthetic, datasets: [{path: films}]}]
absent: [manipulation, human, navigation, general_vl, spatial_grounding, driving_vqa, captions]
"""
    mixture = Mixture(load_mixture(write_recipe(tmp_path, text)))
    (video,) = (tmp_path / "films").rglob("*.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with (
        MixtureLoader(mixture, workers=1) as loader,
        pytest.raises(UserError, match=rf"{video.name}") as caught,
    ):
        list(loader.batches(0, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers -1"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"world": 9}, "every rank needs a sample"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixtureLoader(Mixture(small_recipe(tmp_path), open_memory), **options)  # type: ignore[arg-type]
    for bad in ({"frames": 0}, {"frame_stride": 0}, {"size": (0, 5)}, {"jitter": -1.0}, {"cache_mb": -1.0}):
        with pytest.raises(UserError, match="loader: "):
            SampleOptions(**bad)  # type: ignore[arg-type]


def test_workers_need_no_torch(tmp_path: Path) -> None:
    """A worker that imports torch takes seconds to start and hundreds of megabytes."""
    recipe = load_mixture(
        write_recipe(
            tmp_path,
            f"batch_size: 1\nfamilies: [{{name: manipulation, datasets: [{{path: a.json}}]}}]\nabsent: [{PUBLISHED}]\n",
            a={"episodes": 1},
        )
    )
    with MixtureLoader(Mixture(recipe, open_memory), workers=1) as loader:
        next(loader.batches(0, 1))
        assert loader._pool is not None
        assert not loader._pool.submit(_has_torch).result()
        assert loader_module._MAKER == []  # workers only


def _has_torch() -> bool:
    import sys

    return "torch" in sys.modules
