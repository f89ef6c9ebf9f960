"""A mixture draws what its recipe says, in every batch and over time, and repeats itself from any step on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_support import PUBLISHED, open_memory, small_recipe, write_recipe
from memory_dataset import healthy

from qwen_vla_core.commands.data_jobs import mixture as job
from qwen_vla_core.data import sampling
from qwen_vla_core.data.contract import FAMILIES, PUBLISHED_MIXTURE
from qwen_vla_core.data.mixture import Mixture
from qwen_vla_core.data.mixture_recipe import load_mixture
from qwen_vla_core.data.mixture_report import mixture_report
from qwen_vla_core.data.sampling import (
    Cell,
    FamilySampler,
    Quota,
    conversation_runs,
    episode_runs,
    probabilities,
    step_runs,
)
from qwen_vla_core.errors import UserError

RECIPES = Path(__file__).parents[2] / "training" / "recipes" / "mixtures"


# ---- how many of each family --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 32, 512])
def test_published_shares_hold_in_every_batch_and_exactly_over_time(batch_size: int) -> None:
    weights = np.array(list(PUBLISHED_MIXTURE.values()))
    share = weights / weights.sum()  # the published percentages add up to 99.9
    quota = Quota(list(weights), batch_size)
    counts = np.array([quota.counts(step) for step in range(999)])
    assert (counts.sum(1) == batch_size).all()
    assert (counts >= np.floor(batch_size * share)).all() and (counts <= np.ceil(batch_size * share)).all()
    owed = batch_size * np.outer(np.arange(1, 1000), share) - counts.cumsum(0)
    assert np.abs(owed).max() < 2
    np.testing.assert_array_equal(counts.sum(0), batch_size * np.round(weights * 10).astype(int))  # 999 batches


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    batch_size=st.integers(1, 40),
    steps=st.lists(st.integers(0, 150), min_size=1, max_size=5),
)
def test_counts_depend_on_the_step_alone(weights: list[float], batch_size: int, steps: list[int]) -> None:
    straight = Quota(weights, batch_size)
    expected = [straight.counts(step) for step in range(151)]
    jumping = Quota(weights, batch_size)
    assert [jumping.counts(step) for step in steps] == [expected[step] for step in steps]
    assert all(sum(counts) == batch_size and min(counts) >= 0 for counts in expected)


# ---- how likely each sample is ------------------------------------------------------------------------------------


def cells() -> list[Cell]:
    """Robot a has two datasets that share a task; robot b one."""
    return [
        Cell(0, "a", "pick", 1.0, 100),
        Cell(0, "a", "push", 1.0, 300),
        Cell(1, "a", "pick", 1.0, 400),
        Cell(2, "b", "pick", 1.0, 200),
    ]


def test_without_balance_every_sample_is_equally_likely() -> None:
    np.testing.assert_allclose(probabilities(cells(), (), None), [0.1, 0.3, 0.4, 0.2])


def test_embodiments_then_tasks_share_equally_and_the_rest_goes_by_size() -> None:
    found = probabilities(cells(), ("embodiment", "task"), None)
    np.testing.assert_allclose(found, [0.25 * 0.2, 0.25, 0.25 * 0.8, 0.5])


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (("dataset",), [0.25 / 3, 0.75 / 3, 1 / 3, 1 / 3]),
        (("task",), [0.5 * 100 / 700, 0.5, 0.5 * 400 / 700, 0.5 * 200 / 700]),
        (("task", "embodiment"), [0.25 * 0.2, 0.5, 0.25 * 0.8, 0.25]),
    ],
)
def test_other_levels(balance: tuple[str, ...], expected: list[float]) -> None:
    np.testing.assert_allclose(probabilities(cells(), balance, None), expected)  # type: ignore[arg-type]


def test_temperature_goes_from_by_size_to_equal() -> None:
    by_size = probabilities(cells(), ("embodiment",), 1.0)
    np.testing.assert_allclose(by_size, probabilities(cells(), (), None))
    root = probabilities(cells(), ("embodiment",), 2.0)
    assert root[3] == pytest.approx(200**0.5 / (200**0.5 + 800**0.5))
    np.testing.assert_allclose(
        probabilities(cells(), ("embodiment",), 1e9), probabilities(cells(), ("embodiment",), None), rtol=1e-6
    )


def test_a_weight_multiplies_the_chance_of_a_source() -> None:
    doubled = [dataclasses.replace(cell, weight=2.0) if cell.source == 2 else cell for cell in cells()]
    np.testing.assert_allclose(probabilities(doubled, (), None), np.array([1, 3, 4, 4]) / 12)
    np.testing.assert_allclose(probabilities(doubled, ("embodiment",), None)[3], 2 / 3)
    half = [dataclasses.replace(cell, weight=3.0) if cell.source == 0 else cell for cell in cells()]
    np.testing.assert_allclose(probabilities(half, (), None), np.array([3, 9, 4, 2]) / 18)


@pytest.mark.parametrize("balance", [(), ("embodiment", "task"), ("task",), ("dataset", "task")])
@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
def test_chances_add_up_to_one(balance: tuple[str, ...], temperature: float | None) -> None:
    assert probabilities(cells(), balance, temperature).sum() == pytest.approx(1.0)  # type: ignore[arg-type]


def test_an_instruction_that_changes_begins_a_new_run() -> None:
    data = healthy(2, steps=10)
    data.episodes[1] = dataclasses.replace(data.episodes[1], task=np.repeat([1, 0, 1], [3, 4, 5]))
    runs = step_runs(data)
    assert runs.episode.tolist() == [0, 1, 1, 1]
    assert runs.start.tolist() == [0, 0, 3, 7]
    assert runs.length.tolist() == [10, 3, 4, 5]
    assert runs.task.tolist() == [0, 1, 0, 1]
    whole = episode_runs(data)
    assert (whole.episode.tolist(), whole.start.tolist(), whole.length.tolist()) == ([0, 1], [0, 0], [1, 1])
    texts = conversation_runs(7)
    assert (texts.episode.tolist(), texts.length.tolist()) == ([-1], [7])


def test_too_many_tasks_are_told_apart_only_where_they_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_MOST_TASKS", 1)
    runs = step_runs(healthy(4, steps=10))
    one = FamilySampler.build([(0, "pair", 1.0, runs)], ("embodiment",), None)
    assert [(cell.task, cell.size) for cell in one.cells] == [("", 10 + 12 + 14 + 16)]
    source, episode, t, _ = one.draw(np.stack([np.zeros(52), (np.arange(52) + 0.5) / 52], axis=1))
    assert list(zip(episode, t, strict=True)) == [(e, t) for e in range(4) for t in range(10 + 2 * e)]
    assert not source.any()
    assert len(FamilySampler.build([(0, "pair", 1.0, runs)], ("task",), None).cells) == 2


# ---- draws --------------------------------------------------------------------------------------------------------


def test_draws_are_the_same_from_any_step_on_and_differ_between_seeds(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    straight, resumed = Mixture(recipe, open_memory), Mixture(recipe, open_memory)
    expected = [straight.draws(step) for step in range(30)]
    assert [resumed.draws(step) for step in range(17, 30)] == expected[17:]
    assert [straight.draws(step) for step in (3, 0)] == [expected[3], expected[0]]
    other = Mixture(dataclasses.replace(recipe, seed=4), open_memory)
    assert other.draws(0) != expected[0]
    assert len({draw.seed for batch in expected for draw in batch}) == 30 * 8


def test_every_sample_of_a_cell_comes_equally_often(tmp_path: Path) -> None:
    mixture = Mixture(small_recipe(tmp_path, batch_size=64), open_memory)
    drawn = Counter((draw.source, draw.episode, draw.t) for step in range(400) for draw in mixture.draws(step))
    pair = mixture.sources[0].actions
    everything = {(0, e, t) for e, length in enumerate(pair.lengths) for t in range(length)}
    everything |= {(1, e, t) for e, length in enumerate(mixture.sources[1].actions.lengths) for t in range(length)}
    assert set(drawn) == everything | {(2, -1, t) for t in range(5)}
    # Two robots, two tasks each: a task's samples share 3/4 · 1/2 · 1/2 of all draws, whatever the dataset's size.
    for source, data in ((0, pair), (1, mixture.sources[1].actions)):
        for task in (0, 1):
            episodes = [e for e in range(len(data.lengths)) if data.rows(e).task[0] == task]
            counts = np.array([drawn[source, e, t] for e in episodes for t in range(int(data.lengths[e]))])
            expected = 64 * 400 * 0.75 / 4 / len(counts)
            assert counts.sum() == pytest.approx(64 * 400 * 0.75 / 4, rel=0.05)
            assert ((counts - expected) ** 2 / expected).sum() < 2 * len(counts)  # χ² of a fair draw is about n


def test_report_says_what_was_drawn(tmp_path: Path) -> None:
    mixture = Mixture(small_recipe(tmp_path), open_memory)
    report = mixture_report(mixture, 10_000, tasks=3)
    assert (report["draws"], report["batches"]) == (10_000, 1250)
    assert [(f["family"], f["drawn"], f["per_batch"]) for f in report["families"]] == [
        ("manipulation", 0.75, [6, 6]),
        ("captions", 0.25, [2, 2]),
    ]
    assert {d["dataset"]: d["wanted"] for d in report["datasets"]} == {"pair": 0.375, "other": 0.375, "texts": 0.25}
    assert {e["embodiment"] for e in report["embodiments"]} == {"pair", "other"}
    for dataset in report["datasets"]:
        assert dataset["drawn"] == pytest.approx(dataset["wanted"], abs=0.02)
        assert dataset["epochs"] == pytest.approx(dataset["draws"] / dataset["samples"])
    assert report["task_count"] == 4 and len(report["tasks"]) == 3
    assert all(task["wanted"] == pytest.approx(0.1875) for task in report["tasks"])


def test_sources_with_one_tag_and_two_contracts_are_two_embodiments(tmp_path: Path) -> None:
    text = f"""
batch_size: 4
families:
  - name: manipulation
    datasets: [{{path: a.json}}, {{path: b.json}}, {{path: c.json}}]
absent: [{PUBLISHED}]
"""
    path = write_recipe(
        tmp_path, text, a={"episodes": 2}, b={"episodes": 2, "convention": "relative_joint"}, c={"episodes": 3}
    )
    mixture = Mixture(load_mixture(path), open_memory)
    assert [source.embodiment for source in mixture.sources] == ["pair", "pair_2", "pair"]


def test_the_hash_follows_recipe_and_content_but_not_the_place(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    first = Mixture(recipe, open_memory).hash
    other = tmp_path / "other"
    other.mkdir()
    assert Mixture(small_recipe(other), open_memory).hash == first
    assert Mixture(small_recipe(other, seed=9), open_memory).hash != first
    (tmp_path / "texts.json").write_text('{"texts": 6}')
    assert Mixture(recipe, open_memory).hash != first


# ---- recipes ------------------------------------------------------------------------------------------------------


def test_the_published_recipe_has_the_published_shares() -> None:
    recipe = load_mixture(RECIPES / "published.yaml")
    assert {f.name: w for f, w in zip(recipe.families, recipe.weights, strict=True)} == PUBLISHED_MIXTURE
    assert recipe.absent == ()


def test_every_shipped_recipe_loads_and_names_the_source_that_is_missing(tmp_path: Path) -> None:
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        recipe = dataclasses.replace(load_mixture(path), root=str(tmp_path))
        first = recipe.families[0].datasets[0].path
        with pytest.raises(UserError, match=rf"{path.name}:\d+: families\[0\].datasets\[0\].path: .*{first}"):
            Mixture(recipe)


GOOD = f"""
batch_size: 4
families:
  - name: manipulation
    datasets: [{{path: a.json}}]
absent: [{PUBLISHED}]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("name: manipulation", "name: manipulatoin", 4, "did you mean 'manipulation'"),
        ("[{path: a.json}]", "[]", 5, "family 'manipulation' has no data; fix: name a source, or list it under absent"),
        (", captions]", "]", 3, "the published mixture also has captions; .*absent: .*captions"),
        (", captions]", ", captions, manipulation]", 4, "also listed under absent"),
        (", captions]", ", caption]", 6, "did you mean 'captions'"),
        ("datasets:", "weigth: 3\n    datasets:", 5, "did you mean 'weight'"),
        ("datasets:", "weight: 0\n    datasets:", 5, "greater than 0"),
        ("datasets:", "balance: [tasks]\n    datasets:", 5, "did you mean 'task'"),
        ("datasets:", "balance: [task, task]\n    datasets:", 5, "level twice"),
        ("datasets:", "temperature: 0.5\n    datasets:", 5, "at least 1"),
        ("absent", "  - {name: t2a, datasets: [{path: a.json}]}\nabsent", 6, "'t2a' has no published share; .*weight"),
        ("absent", "  - {name: manipulation, datasets: [{path: a.json}]}\nabsent", 6, r"already families\[0\]"),
        ("batch_size: 4", "batch_size: 0", 2, "at least 1"),
        ("batch_size: 4", "", 1, "batch_size: missing"),
    ],
)
def test_mistakes_in_a_recipe_name_line_and_fix(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    path = write_recipe(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"recipe\.yaml:\d+: .*{message}") as caught:
        load_mixture(path)
    assert f"recipe.yaml:{line}:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conversations_have_no_embodiment(tmp_path: Path) -> None:
    text = GOOD.replace("manipulation", "captions").replace("a.json}", "a.json, embodiment: aloha}")
    text = text.replace(", captions]", ", manipulation]")
    with pytest.raises(UserError, match="conversations have no embodiment"):
        load_mixture(write_recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, "there is no dataset at .*a.json"),
        ({"mistake": "a.json: data/file.parquet is cut short"}, "cut short"),
        ({"texts": 0}, "holds no samples"),
    ],
)
def test_a_bad_source_is_named_with_its_line(tmp_path: Path, about: dict[str, object] | None, message: str) -> None:
    text = GOOD
    if about == {"texts": 0}:
        text = GOOD.replace("manipulation", "captions").replace(", captions]", ", manipulation]")
    recipe = load_mixture(write_recipe(tmp_path, text, **({} if about is None else {"a": about})))
    with pytest.raises(UserError, match=rf"recipe\.yaml:5: families\[0\]\.datasets\[0\]\.path: .*{message}"):
        Mixture(recipe, open_memory)


def test_a_view_without_pictures_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(path: Path, family: str, embodiment: str | None) -> object:
        data = open_memory(path, family, embodiment)
        data.pictures = [{} for _ in data.pictures]  # type: ignore[union-attr]
        return data

    recipe = load_mixture(write_recipe(tmp_path, GOOD, a={"episodes": 2}))
    with pytest.raises(UserError, match="has no pictures of view 'ego'"):
        Mixture(recipe, blind)  # type: ignore[arg-type]
    text = GOOD.replace("name: manipulation", "name: t2a\n    weight: 1").replace("[human", "[manipulation, human")
    assert Mixture(load_mixture(write_recipe(tmp_path, text, a={"episodes": 2})), blind).draws(0)  # type: ignore[arg-type]


def test_absent_families_leave_their_weight_to_the_others(tmp_path: Path) -> None:
    text = GOOD.replace("absent", "  - {name: captions, datasets: [{path: t.json}]}\nabsent").replace(
        ", captions]", "]"
    )
    recipe = load_mixture(write_recipe(tmp_path, text, a={"episodes": 2}, t={"texts": 3}))
    assert recipe.shares == pytest.approx((74.2 / 74.4, 0.2 / 74.4))
    assert set(recipe.absent) | {f.name for f in recipe.families} == set(FAMILIES) - {"t2a"}


# ---- the command --------------------------------------------------------------------------------------------------


def show(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    return job.run(parser.parse_args(["show", *flags]))


def test_show_prints_shares_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture.__init__, "__defaults__", (open_memory,))
    recipe = small_recipe(tmp_path)
    assert show(recipe.source, "--draws", "2000") == 0
    text = capsys.readouterr().out
    assert "2000 draws in 250 batches of 8; left out: human" in text
    assert "75.00%   75.00%  6 – 6" in text
    assert "task (4 of 4)" in text
    assert show(recipe.source, "--draws", "2000", "--json", "--tasks", "0") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["draws"] == 2000 and report["tasks"] == [] and report["absent"][0] == "human"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--draws", "0"), "--draws 0: must be at least 1"),
        (("--tasks", "-1"), "--tasks -1: must be at least 0"),
        (("--root", "/nowhere"), "no dataset at /nowhere/pair.json"),
    ],
)
def test_show_with_a_mistake_says_so(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        show(small_recipe(tmp_path).source, *flags)
