"""What a recipe's keys make of a dataset: conversations, meanings, rest at the end, early frames, whole episodes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from loader_support import open_memory, write_recipe
from memory_dataset import MemoryDataset
from scene_support import demonstrations, without_scenes

from qwen_vla_core.actions.conventions import relative_parts, to_relative
from qwen_vla_core.data.loader import MixtureLoader
from qwen_vla_core.data.mixture import Draw, Mixture, SampleForm
from qwen_vla_core.data.mixture_recipe import START_SHARE, START_STEPS, load_mixture
from qwen_vla_core.data.mixture_report import mixture_report
from qwen_vla_core.data.sample_maker import OTHER_ROBOT, SampleMaker, SampleOptions, SourceReference
from qwen_vla_core.data.samples import ActionSample, TextSample, policy_inputs
from qwen_vla_core.data.scene_questions import SceneQuestions
from qwen_vla_core.errors import UserError
from qwen_vla_core.sim.scenes import read_scene

RECIPE = """
batch_size: 8
seed: 2
families:
  - name: manipulation
    weight: 2
    datasets: [{path: table.json, intention: true, hold_at_end: true}]
  - name: navigation
    weight: 2
    datasets: [{path: rooms.json, intention: true}]
  - name: spatial_grounding
    weight: 4
    balance: [dataset]
    datasets:
      - {path: table.json, ask: where}
      - {path: rooms.json, ask: requests}
      - {path: table.json, ask: all, weight: 2}
absent: [human, synthetic, general_vl, driving_vqa, captions]
"""
FILES = {"table": {"scenes": "table", "episodes": 4}, "rooms": {"scenes": "rooms", "episodes": 3}}


def recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    text = RECIPE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return write_recipe(folder, text, **FILES)


def make(data: MemoryDataset, form: SampleForm, t: int, episode: int = 0) -> ActionSample:
    reference = SourceReference(Path("there"), "manipulation", None, "robot", form)
    sample = SampleMaker([reference], open_memory, SampleOptions(), {0: data}).make(Draw(0, episode, t, 5))
    assert isinstance(sample, ActionSample)
    return sample


def test_the_loader_makes_conversations_as_the_policy_sees_its_pictures(tmp_path: Path) -> None:
    mixture = Mixture(load_mixture(recipe(tmp_path)), open_memory)
    options = SampleOptions(frames=2, frame_stride=3, size=(16, 12), jitter=1.0)
    seen: Counter[str] = Counter()
    with MixtureLoader(mixture, options) as loader:
        for batch in loader.batches(0, 12):
            for sample, draw in zip(batch.samples, loader.draws(batch.step), strict=True):
                seen[sample.dataset] += 1
                assert all(frames.shape == (2, 12, 16, 3) for frames in sample.images.values())
                if isinstance(sample, ActionSample):
                    continue
                source = mixture.sources[draw.source]
                assert isinstance(source.dataset, SceneQuestions) and sample.family == "spatial_grounding"
                assert (sample.turns, sample.index) == (source.dataset.asked(draw.t).turns, draw.t)
                again = loader._maker.make(draw)
                for view, frames in sample.images.items():
                    np.testing.assert_array_equal(frames, again.images[view])
    assert seen["table: where"] and seen["rooms: requests"] and seen["table: all"]
    report = mixture_report(mixture, 4000)
    assert [row["dataset"] for row in report["datasets"]][2:] == ["table: where", "rooms: requests", "table: all"]
    assert [row["samples"] for row in report["datasets"]] == [36, 27, 36, 27, 36]
    assert [row["wanted"] for row in report["datasets"]] == [0.25, 0.25, 0.125, 0.125, 0.25]


def test_batches_are_the_same_from_workers_and_from_any_step(tmp_path: Path) -> None:
    mixture = Mixture(load_mixture(recipe(tmp_path)), open_memory)
    with MixtureLoader(mixture, SampleOptions(jitter=1.0)) as alone:
        expected = list(alone.batches(0, 6))
    with MixtureLoader(mixture, SampleOptions(jitter=1.0), workers=1) as loader:
        found = list(loader.batches(3, 3))
    for one, two in zip(expected[3:], found, strict=True):
        for left, right in zip(one.samples, two.samples, strict=True):
            assert (left.turns, left.dataset, left.family) == (right.turns, right.dataset, right.family)
            for view in left.images:
                np.testing.assert_array_equal(left.images[view], right.images[view])
    kinds = {type(sample) for batch in found for sample in batch.samples}
    assert kinds == {ActionSample, TextSample}


def test_the_meaning_of_the_instruction_follows_the_prompt() -> None:
    data = demonstrations("rooms")
    for t in (0, 4, 8):
        sample = make(data, SampleForm(intention=True), t, episode=1)
        assert sample.turns == (("", read_scene(data.episodes[1].extra["scene"][t]).intention()),)
        assert make(data, SampleForm(), t, episode=1).turns == ()
    (robot,) = policy_inputs([sample, make(data, SampleForm(), 3)]).robots
    assert robot.turns == (sample.turns, ())


def test_rest_is_the_last_target_held_and_no_more_displacement() -> None:
    data = demonstrations("table", 1, 9)
    rows = data.episodes[0]
    sample = make(data, SampleForm(hold_at_end=True), 7)
    assert sample.step_mask_h.all() and not make(data, SampleForm(), 7).step_mask_h[2:].any()
    np.testing.assert_array_equal(sample.actions_hc[:2], rows.action[7:])
    np.testing.assert_array_equal(sample.actions_hc[2:, :6], 0)
    np.testing.assert_array_equal(sample.actions_hc[2:, 6], rows.action[[8, 8], 6])
    np.testing.assert_array_equal(rows.action, demonstrations("table", 1, 9).episodes[0].action)  # not written to
    data.episodes[0] = dataclasses.replace(rows, perturbed=np.arange(9) == 7)
    assert make(data, SampleForm(hold_at_end=True), 7).step_mask_h.tolist() == [True] + [False] * 3


def test_a_base_at_rest_keeps_its_last_pose_as_seen_from_where_it_is() -> None:
    data = demonstrations("rooms", 1, 9)
    rows, contract = data.episodes[0], data.contract
    sample = make(data, SampleForm(hold_at_end=True), 6)
    poses = rows.action[[6, 7, 8, 8]]
    parts = relative_parts(contract.convention, contract.action, contract.state)
    np.testing.assert_allclose(sample.actions_hc, to_relative(parts, poses, rows.state[6]), atol=1e-6)
    assert sample.step_mask_h.all()


def test_a_prompt_of_another_robot_means_staying_in_place() -> None:
    rover, arm = demonstrations("rooms", 1, 9), demonstrations("table", 1, 9)
    form = SampleForm(intention=True, other_prompt=0.25)
    references = [
        SourceReference(Path("rooms"), "navigation", None, "rover", form),
        SourceReference(Path("table"), "manipulation", None, "arm"),
    ]
    maker = SampleMaker(references, open_memory, SampleOptions(), {0: rover, 1: arm})
    samples = [maker.make(Draw(0, 0, 2, seed)) for seed in range(400)]
    told = [sample for sample in samples if isinstance(sample, ActionSample) and sample.told is not None]
    assert 70 < len(told) < 130
    for sample in told:
        assert (sample.told, sample.embodiment, sample.turns) == ("arm", "rover", (("", OTHER_ROBOT),))
        np.testing.assert_allclose(sample.actions_hc, 0, atol=1e-6)  # waypoints are seen from where the base is
        assert sample.step_mask_h.all()
    again = maker.make(Draw(0, 0, 2, told[0].seed))
    assert isinstance(again, ActionSample) and again.told == "arm"  # a function of the seed
    alone = SampleMaker(references[:1], open_memory, SampleOptions(), {0: rover}).make(Draw(0, 0, 2, told[0].seed))
    assert isinstance(alone, ActionSample) and alone.told is None
    blind = SampleMaker(
        [dataclasses.replace(references[1], form=SampleForm(other_prompt=1.0)), references[0]],
        open_memory, SampleOptions(), {0: arm, 1: rover},
    )  # fmt: skip
    with pytest.raises(UserError, match="table: other_prompt: an action channel has no measured state"):
        blind.make(Draw(0, 0, 2, 0))


def test_a_whole_episode_has_no_pictures_in_any_family(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        ("    weight: 2\n    datasets: [{path: table.json, intention: true, hold_at_end: true}]",
         "    weight: 2\n    whole: true\n    datasets: [{path: table.json}]"),
    )  # fmt: skip
    mixture = Mixture(load_mixture(path), open_memory)
    with MixtureLoader(mixture) as loader:
        samples = [s for s in loader.batch(0).samples if s.family == "manipulation"]
    assert len(samples) == 2
    for sample in samples:
        assert isinstance(sample, ActionSample)
        assert sample.images == {} and sample.t == 0 and sample.actions_hc.shape == (9, 7) and sample.step_mask_h.all()


def test_t2a_may_be_cut_into_windows(tmp_path: Path) -> None:
    text = RECIPE.replace("name: manipulation", "name: t2a\n    whole: false").replace(
        "absent: [", "absent: [manipulation, "
    )
    mixture = Mixture(load_mixture(write_recipe(tmp_path, text, **FILES)), open_memory)
    assert mixture.sizes()[0] == 36
    assert Mixture(load_mixture(recipe(tmp_path)), open_memory).sizes()[0] == 36


def share_of_early_draws(mixture: Mixture, source: int, steps: int = 150) -> float:
    early = [draw.t % 9 < START_STEPS for n in range(steps) for draw in mixture.draws(n) if draw.source == source]
    return float(np.mean(early))


def test_a_share_of_the_draws_comes_from_the_beginnings(tmp_path: Path) -> None:
    plain = Mixture(load_mixture(recipe(tmp_path)), open_memory)
    path = recipe(
        tmp_path, ("rooms.json, intention: true", "rooms.json, intention: true, start_share: 1"),
        ("ask: where", "ask: where, start_share: 0.6"),
    )  # fmt: skip
    early = Mixture(load_mixture(path), open_memory)
    uniform = START_STEPS / 9
    assert share_of_early_draws(early, 1, 20) == 1
    assert share_of_early_draws(early, 2) == pytest.approx(0.6 + 0.4 * uniform, abs=0.06)
    assert share_of_early_draws(plain, 1) == pytest.approx(uniform, abs=0.08)
    # Requests begin early by themselves; the other draws are those of the recipe without the key.
    assert share_of_early_draws(plain, 3) == pytest.approx(START_SHARE + (1 - START_SHARE) * uniform, abs=0.06)
    for one, two in zip(plain.draws(3), early.draws(3), strict=True):
        assert (one.source, one.episode, one.seed) == (two.source, two.episode, two.seed)
        assert one.t == two.t or one.source in (1, 2)
    assert early.draws(7) == Mixture(early.recipe, open_memory).draws(7) and early.hash != plain.hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "table.json, intention: true",
            "table.json, ask: where",
            r"datasets\[0\]\.ask: family 'manipulation' holds act",
        ),
        ("ask: where", "ask: were", r"datasets\[0\]\.ask: .*did you mean 'where'"),
        ("ask: where", "ask: where, intention: true", r"datasets\[0\]\.intention: conversations have no actions"),
        ("ask: where", "ask: where, hold_at_end: true", r"datasets\[0\]\.hold_at_end: conversations have no actions"),
        ("ask: where", "ask: where, other_prompt: 0.1", r"datasets\[0\]\.other_prompt: conversations have no actions"),
        (", ask: where", ", start_share: 0.5", r"datasets\[0\]\.start_share: conversations belong to no episode"),
        ("ask: where", "ask: where, start_share: 1.5", r"start_share: 1.5 is too large"),
        ("    balance: [dataset]\n", "    whole: false\n", r"families\[2\]\.whole: conversations are no episodes"),
        ("name: navigation", "name: navigation\n    whole: true", r"datasets\[0\]\.intention: .* whole episodes"),
        ("{path: rooms.json, intention: true}", "{path: rooms.json, intention: yes please}", "true or false"),
    ],
)
def test_keys_that_mean_nothing_where_they_stand_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"recipe\.yaml:\d+: .*{message}") as caught:
        load_mixture(recipe(tmp_path, (old, new)))
    assert "\n" not in str(caught.value)


def test_meanings_and_questions_need_scenes(tmp_path: Path) -> None:
    def forgetful(path: Path, family: str, embodiment: str | None) -> MemoryDataset:
        data = open_memory(path, family, embodiment)
        assert isinstance(data, MemoryDataset)
        return without_scenes(data)

    loaded = load_mixture(recipe(tmp_path))
    with pytest.raises(UserError, match=r"families\[0\]\.datasets\[0\]\.path: table: has no feature 'scene'"):
        Mixture(loaded, forgetful)
    only = dataclasses.replace(loaded, families=(loaded.families[2],))
    with pytest.raises(UserError, match=r"\.path: table: has no feature 'scene'.*qwen-vla sim demos"):
        Mixture(only, forgetful)
    data = demonstrations("table")
    data.episodes[0].extra["scene"][1] = "{}"  # type: ignore[index]
    with pytest.raises(UserError, match="there: episode 0, step 1: a scene of no known world"):
        make(data, SampleForm(intention=True), 4)
